"""A real node for the tests of the Python package: started, killed, damaged and started again."""

from __future__ import annotations

import json
import os
import pathlib
import re
import select
import signal
import subprocess
import sys
import time
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[3]


def binary() -> pathlib.Path:
    """The release binary that the tests run: $ESKER_BIN, or the one in cargo's target folder."""
    target = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    found = pathlib.Path(os.environ.get("ESKER_BIN", target / "release" / "esker"))
    if not found.is_file():
        raise FileNotFoundError(f"{found} is not there: run `make build`, or name the binary in ESKER_BIN")
    return found


def offers(flag: str) -> bool:
    """Whether `esker serve` has this flag."""
    help = subprocess.run([str(binary()), "serve", "--help"], capture_output=True, text=True, check=True).stdout
    return flag in help


class Node:
    """`esker serve` on a data folder of its own and on a port that stays the same over restarts."""

    def __init__(self, data: pathlib.Path, *arguments: str, model: bool = False) -> None:
        self.data = data
        self._arguments = [*arguments, *([] if model else ["--no-model"])]
        self._process: subprocess.Popen[str] | None = None
        self.address = "127.0.0.1:0"
        self.start()

    def start(self) -> "Node":
        """Starts it and waits until it listens."""
        command = [str(binary()), "serve", "--data", str(self.data), "--listen", self.address, *self._arguments]
        log = (self.data.parent / f"{self.data.name}.log").open("a")
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], 60)
        line = self._process.stdout.readline() if ready else ""
        if not line.startswith("listening on "):
            self.kill()
            raise RuntimeError(f"esker serve did not start: {line!r}; see {log.name}")
        self.address = line.split()[-1]
        return self

    def kill(self) -> None:
        """SIGKILL: nothing is tidied up."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """SIGTERM."""
        self._end(signal.SIGTERM)

    def signal(self, which: signal.Signals) -> None:
        """Sends a signal that does not end it."""
        assert self._process is not None
        self._process.send_signal(which)

    def _end(self, how: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(how)
            self._process.wait(timeout=30)
            if self._process.stdout is not None:
                self._process.stdout.close()
            self._process = None

    def restart(self) -> None:
        """As a crash: killed, and started again on the same folder and port."""
        self.kill()
        self.start()

    def damage(self, needle: bytes) -> int:
        """Flips a byte in each place of the stored segments where these bytes lie. The node must not run."""
        assert self._process is None, "stop the node first"
        assert len(needle) >= 16
        places = 0
        for file in sorted(self.data.rglob("*")):
            if not file.is_file() or file.stat().st_size < len(needle):
                continue
            content = file.read_bytes()
            at = content.find(needle)
            while at >= 0:
                with file.open("r+b") as handle:
                    handle.seek(at + len(needle) // 2)
                    handle.write(bytes([needle[len(needle) // 2] ^ 0xFF]))
                places += 1
                at = content.find(needle, at + 1)
        return places

    def damage_all(self, every: int = 4096) -> int:
        """Flips a byte in every stretch of this many bytes that is not empty, in all segments, headers included."""
        assert self._process is None, "stop the node first"
        places = 0
        for file in sorted(self.data.rglob("*.seg*")):
            content = bytearray(file.read_bytes())
            for start in range(0, len(content), every):
                stretch = content[start : start + every]
                if any(stretch):
                    content[start + len(stretch) // 2] ^= 0xFF
                    places += 1
            file.write_bytes(content)
        return places


def documented(page: str, number: int = 0) -> dict[str, Any]:
    """The configuration that a page of docs/ tells users to paste: what the tests run is what the page says."""
    text = (ROOT / "docs" / page).read_text()
    block: dict[str, Any] = json.loads(re.findall(r"```json\n(.*?)```", text, re.DOTALL)[number])
    return block


def within(seconds: float, condition, every: float = 0.05):  # type: ignore[no-untyped-def]
    """Waits until the condition gives something true, and gives it."""
    end = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            raise AssertionError(f"not within {seconds} s (line {sys._getframe(1).f_lineno})")
        time.sleep(every)


def usage(node: Node) -> tuple[int, int, int]:
    """Requests, prompt tokens and hit tokens that were settled so far, of all namespaces."""
    import esker

    with esker.Client(node.address) as client:
        rows = client.usage()
    return (rows[0].requests, rows[0].prompt_tokens, rows[0].hit_tokens) if rows else (0, 0, 0)
