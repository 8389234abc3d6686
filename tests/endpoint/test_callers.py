"""Who may call: tokens of a policy, given as each library gives its key."""

import tempfile

import anthropic
import httpx2 as httpx
import openai

from node import DOCUMENT, MODEL, NodeTest, stored
from tokens import policy, token


class Callers(NodeTest):
    @classmethod
    def setUpClass(cls):
        folder = cls.enterClassContext(tempfile.TemporaryDirectory())
        cls.options = ("--policy", policy(folder, "[tenants.acme]\n[tenants.apex]\n"))
        super().setUpClass()

    def chat(self, key):
        with openai.OpenAI(base_url=f"{self.node.http}/v1", api_key=key, max_retries=0) as client:
            messages = [{"role": "user", "content": DOCUMENT[:3000]}]
            reply = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=4, temperature=0)
            return reply.usage.prompt_tokens_details.cached_tokens

    def test_a_token_names_the_tenant_and_tenants_share_nothing(self):
        acme, apex = token("acme", "reader", "writer"), token("apex", "reader", "writer")
        self.assertEqual(self.chat(acme), 0)
        stored()
        self.assertGreater(self.chat(acme), 0)
        self.assertEqual(self.chat(apex), 0)
        with anthropic.Anthropic(base_url=self.node.http, api_key=acme, max_retries=0) as client:
            messages = [{"role": "user", "content": DOCUMENT[:3000]}]
            reply = client.messages.create(model=MODEL, max_tokens=4, messages=messages)
            self.assertGreater(reply.usage.cache_read_input_tokens, 0)

    def test_others_are_refused(self):
        for key in ["nonsense", token("nobody", "reader"), token("acme", "reader", life_s=-300)]:
            with self.assertRaises(openai.AuthenticationError):
                self.chat(key)
        with self.assertRaises(openai.PermissionDeniedError):
            self.chat(token("acme", "writer"))
        with anthropic.Anthropic(base_url=self.node.http, api_key="nonsense", max_retries=0) as client:
            with self.assertRaises(anthropic.AuthenticationError):
                client.messages.create(model=MODEL, max_tokens=4, messages=[{"role": "user", "content": "x"}])
        self.assertEqual(httpx.get(f"{self.node.http}/healthz").status_code, 200)

    def test_the_page_s_figures_are_the_operator_s(self):
        for key, status in [("", 401), (token("acme", "reader"), 403), (token("acme", "admin"), 200)]:
            headers = {"authorization": f"Bearer {key}"} if key else {}
            reply = httpx.get(f"{self.node.http}/api/overview", headers=headers)
            self.assertEqual(reply.status_code, status, reply.text)
        self.assertEqual(httpx.get(f"{self.node.http}/").status_code, 200)
