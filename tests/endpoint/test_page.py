"""The page at `/` in headless Chromium: it shows the node's figures, is walked by keyboard, names its parts, and fits a phone."""

import json
import os
import shutil
import subprocess
import tempfile
import time
import unittest

import openai

from node import DOCUMENT, MODEL, NodeTest, stored

NAMES = ["chromium-headless-shell", "chromium", "chromium-browser", "google-chrome"]
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """Chromium over its debugging pipe: messages in JSON, each ended by a zero byte."""

    def __init__(self, width, dark=False):
        self.folder = tempfile.mkdtemp()
        to_read, self.write = os.pipe()
        self.read, to_write = os.pipe()

        def pipes():
            # As file descriptors 3 and 4, whatever numbers they had.
            spare = [os.dup(to_read), os.dup(to_write)]
            os.dup2(spare[0], 3)
            os.dup2(spare[1], 4)

        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
        command += [f"--user-data-dir={self.folder}", f"--window-size={width},1200"]
        command += ["--blink-settings=preferredColorScheme=0"] if dark else []
        null = subprocess.DEVNULL
        self.process = subprocess.Popen(
            command, preexec_fn=pipes, close_fds=False, stdin=null, stdout=null, stderr=null
        )
        os.close(to_read)
        os.close(to_write)
        self.number, self.rest, self.session = 0, b"", None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def call(self, method, **params):
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.rest:
                more = os.read(self.read, 1 << 16)
                if not more:
                    raise RuntimeError("the browser is gone")
                self.rest += more
            text, self.rest = self.rest.split(b"\0", 1)
            reply = json.loads(text)
            if reply.get("id") == self.number:
                if "error" in reply:
                    raise RuntimeError(f"{method}: {reply['error']}")
                return reply["result"]

    def evaluate(self, script):
        done = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in done:
            raise RuntimeError(done["exceptionDetails"])
        return done["result"].get("value")

    def open(self, url, wanted):
        self.call("Page.navigate", url=url)
        until = time.monotonic() + 20
        while not self.evaluate(wanted):
            if time.monotonic() > until:
                raise RuntimeError(f"{wanted} did not come: {self.evaluate('document.body.innerText')}")
            time.sleep(0.1)

    def press(self, key):
        for kind in ["rawKeyDown", "keyUp"]:
            code = {"Tab": 9, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}[key]
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def close(self):
        self.process.terminate()
        self.process.wait(20)
        os.close(self.write)
        os.close(self.read)
        # Its helpers may still write there for a moment.
        shutil.rmtree(self.folder, ignore_errors=True)


@unittest.skipUnless(CHROMIUM, f"there is none of {', '.join(NAMES)} here, and .ci/setup-page could install none")
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
