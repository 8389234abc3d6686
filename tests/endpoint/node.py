"""A node of its own for each class of tests."""

import contextlib
import os
import pathlib
import subprocess
import sys
import tempfile
import time
import unittest

ROOT = pathlib.Path(__file__).resolve().parents[2]
# This tree's own client.
sys.path.insert(0, str(ROOT / "client/python/src"))
DOCUMENT = (ROOT / "engine/decoder/model/demo/document.txt").read_text()
MODEL = "esker-kjv-austen-8m"
BLOCK = 128


class Node:
    """`esker serve --http` on free ports."""

    def __init__(self, folder, *options):
        self.log = open(os.path.join(folder, "log"), "ab")
        command = [os.environ["ESKER_BIN"], "serve", "--data", os.path.join(folder, "data")]
        command += ["--listen", "127.0.0.1:0", "--http", "127.0.0.1:0", *options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self.log, text=True)
        self.grpc = self.process.stdout.readline().strip().removeprefix("listening on ")
        line = self.process.stdout.readline().strip()
        if not line.startswith("http on "):
            raise RuntimeError(f"no HTTP: {line!r}, see {self.log.name}")
        self.http = "http://" + line.removeprefix("http on ")

    def stop(self, kill=False):
        self.process.kill() if kill else self.process.terminate()
        code = self.process.wait(30)
        self.process.stdout.close()
        self.log.close()
        return code


class NodeTest(unittest.TestCase):
    """A test with a node. Its requests and their seeds are fixed: a failure repeats itself."""

    options = ()

    @classmethod
    def setUpClass(cls):
        cls.folder = cls.enterClassContext(tempfile.TemporaryDirectory())
        cls.node = Node(cls.folder, *cls.options)
        # Also where the rest of a set-up fails, and nothing is torn down.
        cls.addClassCleanup(lambda: cls.node.process.poll() is None and cls.node.stop(kill=True))

    @classmethod
    def tearDownClass(cls):
        log = pathlib.Path(cls.folder, "log")
        code = cls.node.stop()
        text = log.read_text()
        assert code == 0, f"the node ended with {code}: {text}"
        assert "panicked" not in text, text


def stored():
    """New blocks go to the drive behind the answer, within moments."""
    time.sleep(0.5)


@contextlib.contextmanager
def within(test, seconds):
    started = time.monotonic()
    yield
    test.assertLess(time.monotonic() - started, seconds)
