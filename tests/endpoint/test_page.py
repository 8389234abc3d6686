"""The page at `/` in headless Chromium: it shows the node's figures, is walked by keyboard, names its parts, and fits a phone.

$ESKER_SCREENSHOTS is a folder for what it looked like, light and dark.
"""

import os
import pathlib
import tempfile
import time
import unittest

import openai

from browser import CHROMIUM, NAMES, Browser
from node import BLOCK, DOCUMENT, MODEL, Node, NodeTest, stored
from tokens import policy, token

import esker  # node.py says where it is

SCREENSHOTS = os.environ.get("ESKER_SCREENSHOTS")
needs_chromium = unittest.skipUnless(
    CHROMIUM, f"there is none of {', '.join(NAMES)} here, and .ci/setup-page could install none"
)


@needs_chromium
class Page(NodeTest):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        with openai.OpenAI(base_url=f"{cls.node.http}/v1", api_key="unused", max_retries=0) as client:
            for end in ["Who is there? " * 40, "Who is there? " * 40, "Nobody at all. " * 60]:
                messages = [{"role": "system", "content": DOCUMENT[:3000]}, {"role": "user", "content": end}]
                client.chat.completions.create(model=MODEL, messages=messages, max_tokens=2, temperature=0)
                stored()

    def browse(self, width=1280, dark=False):
        browser = Browser(width, dark)
        self.addCleanup(browser.close)
        browser.open(self.node.http, "document.querySelectorAll('[role=treeitem]').length > 1")
        return browser

    def test_it_shows_what_the_node_did(self):
        text = self.browse().evaluate("document.body.innerText")
        for part in ["Served from cache", "prompt tokens in the last hour", "default", MODEL, "2 continue it"]:
            self.assertIn(part, text)

    def test_the_keyboard_reaches_everything_and_walks_the_tree(self):
        browser = self.browse()
        seen = []
        for _ in range(12):
            browser.press("Tab")
            seen.append(browser.evaluate("document.activeElement.className + '|' + document.activeElement.innerText"))
        self.assertTrue(seen[0].startswith("skip"), seen)
        for part in ["Last hour", "Last 7 days", "plot"]:
            self.assertTrue(any(part in one for one in seen), seen)
        browser.evaluate("document.querySelector('[role=treeitem]').focus()")
        at = "document.activeElement.dataset.path + ' ' + document.activeElement.getAttribute('aria-expanded')"
        self.assertEqual(browser.evaluate(at), "/0 true")
        browser.press("ArrowRight")
        self.assertTrue(browser.evaluate(at).startswith("/0/0"))
        browser.press("ArrowLeft")
        browser.press("ArrowLeft")
        time.sleep(0.2)
        self.assertEqual(browser.evaluate(at), "/0 false")
        browser.evaluate("document.querySelector('.plot').focus()")
        browser.press("ArrowLeft")
        time.sleep(0.2)
        self.assertIn("from cache", browser.evaluate("document.querySelector('[aria-live]').innerText"))

    def test_every_part_has_a_name_and_enough_contrast(self):
        unnamed = """[...document.querySelectorAll('button, a, input, select, [tabindex="0"], section, [role=img]')]
            .filter(e => !(e.innerText.trim() || e.ariaLabel || e.getAttribute('aria-labelledby') || e.labels?.length))
            .map(e => e.outerHTML.slice(0, 100))"""
        twice = "[...document.querySelectorAll('[id]')].map(e => e.id).filter((id, at, all) => all.indexOf(id) < at)"
        contrast = """(() => {
            const rgb = text => (text.match(/[\\d.]+/g) || []).map(Number);
            const light = ([r, g, b]) => [r, g, b].map(v => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
                .reduce((sum, v, at) => sum + v * [.2126, .7152, .0722][at], 0);
            const behind = e => { for (; e; e = e.parentElement) {
                const c = rgb(getComputedStyle(e).backgroundColor); if (c.length === 3 || c[3] > 0) return c; } return [255, 255, 255]; };
            return [...document.querySelectorAll('p, td, th, dt, dd, small, b, span, li, h1, h2, button')]
                .filter(e => [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()) && e.offsetWidth)
                .map(e => { const [a, b] = [light(rgb(getComputedStyle(e).color)), light(behind(e))];
                    return [(Math.max(a, b) + .05) / (Math.min(a, b) + .05), e.innerText.slice(0, 40)]; })
                .filter(([ratio]) => ratio < 4.5);
        })()"""
        for dark in [False, True]:
            browser = self.browse(dark=dark)
            scheme = browser.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
            self.assertEqual(scheme, dark)
            for script in [unnamed, twice, contrast]:
                self.assertEqual(browser.evaluate(script), [], f"dark: {dark}")

    def test_a_phone_shows_it_without_moving_sideways(self):
        browser = self.browse(width=500)
        self.assertLessEqual(browser.evaluate("document.documentElement.scrollWidth - innerWidth"), 0)


TENANTS = """
[tenants.acme]
stored_bytes = 200_000_000
[tenants.globex]
stored_bytes = 50_000_000_000
[tenants.operators]
"""
PRICES = """
currency = "USD"
hit = 28_000
miss = 280_000
write = { ttl_24h = 70_000 }
completion = 420_000
"""
PAGES = esker.Layout.opaque("pages", 128, [65_536])


@needs_chromium
class Monday(NodeTest):
    """A node to which things have happened: with tenants and prices, a session, warm-up jobs, a refusal and a damaged record."""

    @classmethod
    def setUpClass(cls):
        folder = cls.enterClassContext(tempfile.TemporaryDirectory())
        prices = pathlib.Path(folder, "prices.toml")
        prices.write_text(PRICES)
        cls.options = ("--policy", policy(folder, TENANTS), "--prices", str(prices), "--codec", "raw", "--scrub-mb-per-s", "0")
        super().setUpClass()
        cls.acme = token("acme", "reader", "writer", "pinner", account="engine")
        cls.reader = token("globex", "reader", account="dashboard")
        with cls.client(cls.acme) as client:
            content = os.urandom(65_536)
            namespace = cls.pages(client)
            client.put(namespace, [esker.Object(128, content)], engine_hashes=[b"page"], unchained=True)
            text = DOCUMENT[:6000]
            tokens = client.tokenize(text)
            client.generate(tokens, max_new_tokens=2, user="ada")
            described = client.describe()
            own = esker.Namespace(described.namespace, described.layout)
            until = time.monotonic() + 20
            while client.lookup(own, tokens, grant=False, user="ada").tokens < len(tokens) // BLOCK * BLOCK:
                assert time.monotonic() < until, "what was generated was not stored"
                time.sleep(0.1)
            client.open_session("ticket-4711", own, tokens, keep_s=4 * 3600, user="ada")
            client.warm_up("morning", [DOCUMENT[:2000], DOCUMENT[3000:6000]])
            done = [job.state for job in client.watch_warmup("morning", timeout_s=60)][-1]
            assert done is esker.WarmupState.DONE, done
        # One byte of the record is another now.
        cls.node.stop()
        assert damage(pathlib.Path(cls.folder, "data"), content[1000:1064]) == 1
        cls.node = Node(cls.folder, *cls.options)
        with cls.client(cls.acme) as client:
            namespace = cls.pages(client)
            found = client.lookup(namespace, engine_hashes=[b"page"], unchained=True)
            assert not client.fetch(namespace, found.grant, blocks=[0]).whole
            client.warm_up("nightly", [DOCUMENT[:9000]], max_tokens=100)
            list(client.watch_warmup("nightly", timeout_s=60))
        with cls.client(cls.reader) as client:
            try:
                client.warm_up("not-mine", ["text"])
                raise AssertionError("a reader may not warm up")
            except esker.EskerError:
                pass
        for key, end in [(cls.acme, "Who is there? "), (cls.acme, "Who is there? "), (cls.acme, "Nobody at all. ")]:
            with openai.OpenAI(base_url=f"{cls.node.http}/v1", api_key=key, max_retries=0) as client:
                messages = [{"role": "system", "content": DOCUMENT[:6000]}, {"role": "user", "content": end * 40}]
                client.chat.completions.create(model=MODEL, messages=messages, max_tokens=2, temperature=0)
                stored()

    @classmethod
    def client(cls, bearer):
        return esker.Client(cls.node.grpc, credentials=esker.Credentials(token=bearer))

    @staticmethod
    def pages(client):
        return client.register_namespace(weights=b"w" * 32, tokenizer=b"t" * 32, layout=PAGES)

    def browse(self, width=1280, dark=False):
        """Signs in as an operator does, and waits for the last part."""
        browser = Browser(width, dark)
        self.addCleanup(browser.close)
        browser.open(self.node.http, "document.querySelector('#token') !== null")
        browser.evaluate("document.querySelector('#token').focus()")
        browser.type(token("operators", "admin"))
        browser.evaluate("document.querySelector('form button').click()")
        browser.wait("document.querySelectorAll('[role=treeitem]').length > 1")
        return browser

    def card(self, browser, title):
        return browser.evaluate(
            f"[...document.querySelectorAll('section')].find(e => e.querySelector('h2').innerText === '{title}').innerText"
        )

    def test_each_part_says_what_happened(self):
        browser = self.browse()
        wanted = {
            "Sessions": ["ticket-4711", "acme", "ada", "3 h"],
            "Warm-up jobs": ["morning", "done", "2 of 2 prompts", "nightly"],
            "Recent refusals and damage": ["refusal", "SubmitWarmup", "globex", "damage"],
            "Tenants": ["acme", "globex", "Saved", "USD", "of 200 MB"],
        }
        for title, parts in wanted.items():
            text = self.card(browser, title)
            for part in parts:
                self.assertIn(part, text, title)
        text = browser.evaluate("document.body.innerText")
        for part in ["1 record found damaged", "1 request refused", "Saved for tenants"]:
            self.assertIn(part, text)

    def test_it_is_seen_light_and_dark_wide_and_narrow(self):
        folder = SCREENSHOTS or self.enterContext(tempfile.TemporaryDirectory())
        for name, width, dark in [("light", 1280, False), ("dark", 1280, True), ("phone", 500, False)]:
            browser = self.browse(width, dark)
            path = pathlib.Path(folder, f"page-{name}.png")
            browser.screenshot(path)
            self.assertTrue(path.read_bytes().startswith(b"\x89PNG"))
            self.assertLessEqual(browser.evaluate("document.documentElement.scrollWidth - innerWidth"), 0, name)


def damage(folder, needle):
    """Flips a byte where these bytes are stored; how often they were found. The node must not run."""
    found = 0
    for path in folder.rglob("*.seg*"):
        content = path.read_bytes()
        at = content.find(needle)
        if at >= 0:
            with path.open("r+b") as file:
                file.seek(at)
                file.write(bytes([needle[0] ^ 0xFF]))
            found += 1
    return found
