"""OpenAI's library against /v1/models, /v1/completions and /v1/chat/completions."""

import httpx2 as httpx
import openai

from node import BLOCK, DOCUMENT, MODEL, NodeTest, stored, within

SYSTEM = {"role": "system", "content": DOCUMENT[:4000]}


def question(text):
    return [SYSTEM, {"role": "user", "content": text}]


class OpenAi(NodeTest):
    def setUp(self):
        self.client = openai.OpenAI(base_url=f"{self.node.http}/v1", api_key="unused", max_retries=0)
        self.addCleanup(self.client.close)

    def chat(self, messages, **more):
        more = {"max_tokens": 24, "temperature": 0, **more}
        return self.client.chat.completions.create(model=MODEL, messages=messages, **more)

    def check_usage(self, usage):
        extra = usage.model_extra
        cached = usage.prompt_tokens_details.cached_tokens
        self.assertEqual(usage.total_tokens, usage.prompt_tokens + usage.completion_tokens)
        self.assertEqual(extra["prompt_cache_hit_tokens"], cached)
        self.assertEqual(extra["prompt_cache_hit_tokens"] + extra["prompt_cache_miss_tokens"], usage.prompt_tokens)
        return cached

    def test_models(self):
        self.assertEqual([model.id for model in self.client.models.list()], [MODEL])
        self.assertEqual(self.client.models.retrieve(MODEL).owned_by, "esker")
        with self.assertRaises(openai.NotFoundError):
            self.client.models.retrieve("gpt-x")

    def test_the_same_question_again_is_cached_and_answered_alike(self):
        asked = [{"role": "user", "content": DOCUMENT[8000:12000]}]
        first = self.chat(asked)
        self.assertEqual(self.check_usage(first.usage), 0)
        stored()
        second = self.chat(asked)
        cached = self.check_usage(second.usage)
        self.assertEqual(cached, (second.usage.prompt_tokens - 1) // BLOCK * BLOCK)
        self.assertGreater(cached, 0)
        self.assertEqual(first.choices[0].message.content, second.choices[0].message.content)
        self.assertEqual(second.choices[0].finish_reason, "length")
        self.assertEqual(second.usage.completion_tokens, 24)

    def test_a_growing_conversation_hits_up_to_the_answer_before(self):
        messages = question("Tell me of the house.")
        before = 0
        for turn in range(6):
            # Sampled wildly, so that the answers are spelled as no tokenizer would spell them.
            reply = self.chat(messages, temperature=1.5, seed=turn, max_tokens=90)
            cached = self.check_usage(reply.usage)
            self.assertGreaterEqual(cached, before // BLOCK * BLOCK, f"turn {turn}")
            # All but the last token went through the model.
            before = reply.usage.prompt_tokens + reply.usage.completion_tokens - 1
            answer = reply.choices[0].message
            messages.append(answer.model_dump(exclude_none=True))
            messages.append({"role": "user", "content": f"And then, {turn}?"})
            stored()
        self.assertGreater(before, 6 * 90)

    def test_streaming_says_the_same(self):
        asked = question("What was said?")
        whole = self.chat(asked, seed=7, temperature=0.8)
        chunks = list(self.chat(asked, seed=7, temperature=0.8, stream=True, stream_options={"include_usage": True}))
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        self.assertEqual(text, whole.choices[0].message.content)
        self.assertEqual(chunks[0].choices[0].delta.role, "assistant")
        reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
        self.assertEqual((reasons[-1], set(reasons[:-1])), ("length", {None}))
        self.assertEqual(chunks[-1].choices, [])
        self.assertTrue(all(chunk.usage is None for chunk in chunks[:-1]))
        self.check_usage(chunks[-1].usage)
        self.assertEqual(chunks[-1].usage.prompt_tokens, whole.usage.prompt_tokens)
        self.assertEqual({chunk.id for chunk in chunks}, {chunks[0].id})
        plain = list(self.chat(asked, stream=True))
        self.assertTrue(all(chunk.usage is None and chunk.choices for chunk in plain))

    def test_stop_sequences_end_it_and_are_not_given_out(self):
        asked = question("Go on.")
        text = self.chat(asked).choices[0].message.content
        stop = text[9:14]
        reply = self.chat(asked, stop=["never in it", stop]).choices[0]
        self.assertEqual((reply.message.content, reply.finish_reason), (text[: text.index(stop)], "stop"))
        chunks = list(self.chat(asked, stop=stop, stream=True))
        streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        self.assertEqual(streamed, text[: text.index(stop)])

    def test_keys_keep_users_apart(self):
        asked = question("Whose is it?")
        self.chat(asked, prompt_cache_key="anne")
        stored()
        again = self.chat(asked, prompt_cache_key="anne", prompt_cache_retention="24h")
        self.assertGreater(self.check_usage(again.usage), 0)
        other = self.chat(asked, prompt_cache_key="someone else, with words")
        self.assertEqual(self.check_usage(other.usage), 0)

    def test_text_completions(self):
        complete = self.client.completions.create
        first = complete(model=MODEL, prompt=DOCUMENT[:3000], temperature=0)
        self.assertEqual((first.usage.completion_tokens, first.choices[0].finish_reason), (16, "length"))
        stored()
        chunks = list(
            complete(model=MODEL, prompt=[DOCUMENT[:3000]], temperature=0, stream=True, stream_options={"include_usage": True})
        )
        self.assertEqual("".join(chunk.choices[0].text for chunk in chunks if chunk.choices), first.choices[0].text)
        self.assertGreater(self.check_usage(chunks[-1].usage), 0)
        tokens = complete(model=MODEL, prompt=[5, 6, 7], temperature=0, max_tokens=2)
        self.assertEqual(tokens.usage.prompt_tokens, 3)

    def test_parts_developers_and_tools_are_read(self):
        parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
        call = {"id": "call_x", "type": "function", "function": {"name": "look", "arguments": '{"at": "door"}'}}
        tools = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
        reply = self.chat(
            [
                {"role": "developer", "content": "Be brief."},
                {"role": "user", "content": parts},
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "call_x", "content": "nobody"},
            ],
            tools=tools,
        )
        self.assertIsInstance(reply.choices[0].message.content, str)

    def test_errors_are_the_library_s_and_name_the_field(self):
        def refused(kind, status, param=None, **more):
            with self.assertRaises(kind) as caught:
                self.chat(**{"messages": question("?"), **more})
            self.assertEqual(caught.exception.status_code, status)
            self.assertEqual(caught.exception.param, param)
            self.assertTrue(caught.exception.body["message"])

        refused(openai.BadRequestError, 400, "n", n=2)
        refused(openai.BadRequestError, 400, "logprobs", logprobs=True)
        refused(openai.BadRequestError, 400, "presence_penalty", presence_penalty=1)
        refused(openai.BadRequestError, 400, "max_tokens", max_tokens=0)
        refused(openai.BadRequestError, 400, "prompt_cache_retention", prompt_cache_retention="a year")
        refused(openai.BadRequestError, 400, "response_format", response_format={"type": "json_object"})
        refused(openai.BadRequestError, 400, None, temperature=-1)
        refused(openai.BadRequestError, 400, "messages", messages=[])
        refused(openai.BadRequestError, 400, "messages[0].role", messages=[{"role": "king", "content": "x"}])
        image = [{"type": "image_url", "image_url": {"url": "data:"}}]
        refused(openai.BadRequestError, 400, "messages[0].content", messages=[{"role": "user", "content": image}])
        refused(openai.BadRequestError, 400, None, messages=[{"role": "user", "content": "x " * 40_000}])
        with self.assertRaises(openai.NotFoundError) as caught:
            self.client.chat.completions.create(model="gpt-x", messages=question("?"))
        self.assertEqual(caught.exception.code, "model_not_found")
        self.assertIn(MODEL, str(caught.exception))

    def test_broken_requests_get_json(self):
        url = f"{self.node.http}/v1/chat/completions"
        json = {"content-type": "application/json"}
        for body, headers, status in [
            (b"{", json, 400),
            (b'{"model": 3}', json, 400),
            (b"{}", {"content-type": "text/plain"}, 400),
            (b" " * (9 << 20), json, 413),
        ]:
            reply = httpx.post(url, content=body, headers=headers)
            self.assertEqual(reply.status_code, status, reply.text)
            self.assertTrue(reply.json()["error"]["message"])
        self.assertEqual(httpx.get(url).status_code, 405)

    def test_a_client_that_leaves_frees_the_decoder(self):
        streams = [self.chat(question(f"{n}"), max_tokens=8000, stream=True) for n in range(4)]
        next(iter(streams[0]))
        for stream in streams:
            stream.close()
        with within(self, 20):
            self.chat(question("Is anybody there?"), max_tokens=1)
