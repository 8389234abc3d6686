"""A headless Chromium, told what to do over its debugging pipe."""

import base64
import json
import os
import pathlib
import shutil
import subprocess
import tempfile
import time

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

        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe"]
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
        self.wait(wanted)

    def wait(self, wanted):
        until = time.monotonic() + 20
        while not self.evaluate(wanted):
            if time.monotonic() > until:
                raise RuntimeError(f"{wanted} did not come: {self.evaluate('document.body.innerText')}")
            time.sleep(0.1)

    def press(self, key):
        for kind in ["rawKeyDown", "keyUp"]:
            code = {"Tab": 9, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}[key]
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def type(self, text):
        self.call("Input.insertText", text=text)

    def screenshot(self, path):
        """The whole page, from top to bottom."""
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        pathlib.Path(path).write_bytes(base64.b64decode(shot["data"]))

    def close(self):
        self.process.terminate()
        self.process.wait(20)
        os.close(self.write)
        os.close(self.read)
        # Its helpers may still write there for a moment.
        shutil.rmtree(self.folder, ignore_errors=True)
