"""Anthropic's library against /v1/messages."""

import anthropic

from node import BLOCK, DOCUMENT, MODEL, NodeTest, stored

SYSTEM = [{"type": "text", "text": DOCUMENT[:4000], "cache_control": {"type": "ephemeral", "ttl": "1h"}}]


class Anthropic(NodeTest):
    def setUp(self):
        self.client = anthropic.Anthropic(base_url=self.node.http, api_key="unused", max_retries=0)
        self.addCleanup(self.client.close)

    def ask(self, text, temperature=0, **more):
        # The library has no argument for it any more; the API still has.
        return {
            "model": MODEL,
            "max_tokens": 24,
            "extra_body": {"temperature": temperature},
            "system": SYSTEM,
            "messages": [{"role": "user", "content": text}],
            **more,
        }

    def prompt_tokens(self, usage):
        by_class = usage.cache_creation
        known = by_class.ephemeral_5m_input_tokens + by_class.ephemeral_1h_input_tokens
        self.assertEqual(known + sum(by_class.model_extra.values()), usage.cache_creation_input_tokens)
        return usage.input_tokens + usage.cache_read_input_tokens + usage.cache_creation_input_tokens

    def test_what_was_written_is_read_the_second_time(self):
        system = [{**SYSTEM[0], "text": DOCUMENT[8000:12000]}]
        asked = self.ask("Who is there?", system=system)
        counted = self.client.messages.count_tokens(
            model=MODEL, system=system, messages=asked["messages"]
        ).input_tokens
        first = self.client.messages.create(**asked)
        self.assertEqual(self.prompt_tokens(first.usage), counted)
        self.assertEqual(first.usage.cache_read_input_tokens, 0)
        self.assertEqual(first.usage.cache_creation.ephemeral_1h_input_tokens, counted // BLOCK * BLOCK)
        self.assertEqual((first.stop_reason, first.usage.output_tokens), ("max_tokens", 24))
        stored()
        second = self.client.messages.create(**asked)
        self.assertEqual(self.prompt_tokens(second.usage), counted)
        self.assertEqual(second.usage.cache_read_input_tokens, (counted - 1) // BLOCK * BLOCK)
        self.assertEqual(first.content[0].text, second.content[0].text)

    def test_streaming_says_the_same(self):
        asked = self.ask("What was said?")
        whole = self.client.messages.create(**asked)
        stored()
        with self.client.messages.stream(**asked) as stream:
            kinds = [event.type for event in stream]
            final = stream.get_final_message()
        self.assertEqual(final.content[0].text, whole.content[0].text)
        self.assertEqual(self.prompt_tokens(final.usage), self.prompt_tokens(whole.usage))
        self.assertGreater(final.usage.cache_read_input_tokens, 0)
        self.assertEqual(final.stop_reason, "max_tokens")
        self.assertEqual((kinds[0], kinds[1], kinds[-1]), ("message_start", "content_block_start", "message_stop"))

    def test_a_conversation_goes_on(self):
        messages = [{"role": "user", "content": "Tell me."}]
        before = 0
        for turn in range(4):
            reply = self.client.messages.create(
                **self.ask("", messages=messages, temperature=1.0, max_tokens=90)
            )
            self.assertGreaterEqual(reply.usage.cache_read_input_tokens, before // BLOCK * BLOCK, f"turn {turn}")
            before = self.prompt_tokens(reply.usage) + reply.usage.output_tokens - 1
            messages.append({"role": "assistant", "content": [block.model_dump() for block in reply.content]})
            messages.append({"role": "user", "content": [{"type": "text", "text": f"And then, {turn}?"}]})
            stored()

    def test_stop_sequences(self):
        text = self.client.messages.create(**self.ask("Go on.")).content[0].text
        stop = text[9:14]
        reply = self.client.messages.create(**self.ask("Go on.", stop_sequences=[stop]))
        self.assertEqual((reply.stop_reason, reply.stop_sequence), ("stop_sequence", stop))
        self.assertEqual(reply.content[0].text, text[: text.index(stop)])

    def test_tools_and_results_are_read(self):
        reply = self.client.messages.create(
            **self.ask(
                "",
                messages=[
                    {"role": "user", "content": "Look."},
                    {"role": "assistant", "content": [{"type": "tool_use", "id": "toolu_x", "name": "look", "input": {"at": "door"}}]},
                    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_x", "content": "nobody"}]},
                ],
                tools=[{"name": "look", "description": "Looks.", "input_schema": {"type": "object"}}],
            )
        )
        self.assertEqual(reply.role, "assistant")

    def test_errors_are_the_library_s(self):
        for kind, more in [
            (anthropic.NotFoundError, {"model": "claude-x"}),
            (anthropic.BadRequestError, {"messages": []}),
            (anthropic.BadRequestError, {"max_tokens": 0}),
            (anthropic.BadRequestError, {"thinking": {"type": "enabled", "budget_tokens": 1024}}),
            (anthropic.BadRequestError, {"tool_choice": {"type": "any"}}),
        ]:
            with self.assertRaises(kind) as caught:
                self.client.messages.create(**self.ask("?", **more))
            self.assertEqual(caught.exception.body["type"], "error")
            self.assertTrue(caught.exception.body["error"]["message"])
