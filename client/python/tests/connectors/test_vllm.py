"""The vLLM connector in a real vLLM engine on the CPU: second processes find what first ones computed, and compute the same."""

from __future__ import annotations

import json
import os
import pathlib
import random
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from support import Node, documented, usage, within

pytest.importorskip("vllm")
ENGINE = pathlib.Path(__file__).with_name("vllm_engine.py")
PROMPT_TOKENS = 2100
#: Of vLLM's blocks on a CPU.
PAGE_TOKENS = 128
#: The window of the model that has one in every other layer.
WINDOW_TOKENS = 512
#: More than log-probabilities differ by between two ways of computing the same in single precision (measured: 1e-5).
NOISE = 1e-4


class Engine:
    """One vLLM process."""

    def __init__(self, **arguments: object) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONPATH": str(ENGINE.parent)}
        self._process = subprocess.Popen(
            [sys.executable, str(ENGINE), json.dumps(arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert self._answer() == "ready"

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()

    def do(self, op: str, **rest: object):  # type: ignore[no-untyped-def]
        """Has the engine do something and gives its answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"op": op, **rest}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def generate(self, prompt: list[int], count: int = 6) -> dict:
        return self.do("generate", prompt=prompt, count=count)

    def _answer(self):  # type: ignore[no-untyped-def]
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("ANSWER "):
                return json.loads(line.removeprefix("ANSWER "))
        raise RuntimeError(f"the engine ended with {self._process.wait()}")


def configuration(node: Node) -> dict:
    """What docs/vllm.md says, with the node of the test."""
    config = documented("vllm.md")
    config["kv_connector_extra_config"]["endpoint"] = node.address
    return config


def prompt(seed: int, length: int = PROMPT_TOKENS) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(3, 1024) for _ in range(length)]


def distance(one: dict, other: dict) -> float:
    """Greatest difference of log-probabilities over tokens that both list, as far as both chose the same tokens."""
    worst = 0.0
    for at, (a, b) in enumerate(zip(one["logprobs"], other["logprobs"])):
        worst = max([worst, *(abs(a[token] - b[token]) for token in a.keys() & b.keys())])
        if one["tokens"][at] != other["tokens"][at]:
            break
    return worst


def make_model(folder: pathlib.Path, sliding: int = 0) -> str:
    what = {"make": str(folder), "seed": 1, "sliding": sliding}
    subprocess.run([sys.executable, str(ENGINE), json.dumps(what)], check=True)
    return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    node = Node(tmp_path_factory.mktemp("node") / "data", "--codec", "raw", "--segment-mib", "64", "--capacity", "2GiB")
    yield node
    node.kill()


def test_a_second_process_finds_what_the_first_computed(model: str, node: Node) -> None:
    with Engine(model=model, kv_transfer_config=None, enable_prefix_caching=False) as engine:
        uncached = {seed: engine.generate(prompt(seed)) for seed in (1, 2)}

    # The first process computes in pieces, so that how much it differs from the above is the engine's own noise.
    connected = {"model": model, "kv_transfer_config": configuration(node), "enable_prefix_caching": False}
    with Engine(**connected, max_num_batched_tokens=512, max_num_seqs=1) as first:
        computed = first.generate(prompt(1))
        assert computed["cached"] == 0
        assert first.do("flush")
        saved = first.do("saved")
        # It is on the bill as computed.
        assert within(10, lambda: usage(node) == (1, PROMPT_TOKENS, 0)), usage(node)
    noise = max(distance(uncached[1], computed), 1e-5)

    with Engine(**connected) as second:
        restored = second.generate(prompt(1))
        pages = second.do("restored")
        sources = {
            metric["labels"].get("source"): metric["value"]
            for metric in second.do("metrics")
            if metric["name"] == "vllm:prompt_tokens_cached_by_source"
        }
        cached = restored["cached"]
        print(f"cached {cached} tokens; distance {distance(uncached[1], restored):.2e}; noise {noise:.2e}")
        assert cached >= PROMPT_TOKENS - 129
        assert restored["tokens"] == uncached[1]["tokens"]
        assert distance(uncached[1], restored) <= 2 * noise
        assert sources.get("disk") == cached, sources
        # What the engine counts as cached is what the bill says.
        assert within(10, lambda: usage(node) == (2, 2 * PROMPT_TOKENS, cached)), usage(node)
        # Every restored page has, in the engine's memory, the bytes that the first process computed for it.
        assert len(pages) == cached // PAGE_TOKENS and cached % PAGE_TOKENS == 0
        assert {page: saved[page] for page in pages} == pages

        # The control: bytes that are not what was computed are seen in the log-probabilities.
        second.do("tamper", on=True)
        changed = second.generate(prompt(1))
        second.do("tamper", on=False)
        assert changed["cached"] == cached and distance(uncached[1], changed) > 100 * noise
        tampered = second.do("restored")
        assert tampered.keys() == pages.keys() and all(tampered[page] != pages[page] for page in pages)

        # The node goes away: misses and the same answers. It comes back: hits again.
        node.kill()
        alone = second.generate(prompt(2))
        assert alone["cached"] == 0 and alone["tokens"] == uncached[2]["tokens"]
        assert second.generate(prompt(1))["cached"] == 0
        node.start()
        back = within(60, lambda: _hit(second))
        assert back["cached"] == cached and back["tokens"] == uncached[1]["tokens"]

        # The store is damaged: what cannot be proven is computed, and the answer is the same.
        node.kill()
        assert node.damage_all() > 100
        node.start()
        time.sleep(2.5)
        damaged = second.generate(prompt(1))
        assert damaged["cached"] < cached and damaged["tokens"] == uncached[1]["tokens"]
        assert distance(uncached[1], damaged) <= 2 * noise

        # Weights may have changed in place: what is stored is not asked for any more.
        second.do("flush")
        second.do("reset")
        assert second.generate(prompt(1))["cached"] == 0


def test_a_window_is_restored_where_the_prefix_ends(tmp_path: pathlib.Path, node: Node) -> None:
    """Two groups of KV cache: of the one with a window a second process loads the last pages alone, and computes the same."""
    connected = {
        "model": make_model(tmp_path / "gemma", WINDOW_TOKENS),
        "kv_transfer_config": configuration(node),
        "enable_prefix_caching": False,
    }
    with Engine(**connected) as first:
        computed = first.generate(prompt(3))
        assert computed["cached"] == 0 and first.do("flush")
        saved = first.do("saved")
    with Engine(**connected) as second:
        restored = second.generate(prompt(3))
        pages = second.do("restored")
        print(f"cached {restored['cached']} tokens; distance {distance(computed, restored):.2e}")
        assert restored["cached"] >= PROMPT_TOKENS - 129 and restored["tokens"] == computed["tokens"]
        assert distance(computed, restored) < NOISE
        assert {page: saved[page] for page in pages} == pages
        by_group = sorted(sum(page.startswith(f"{group}/") for page in pages) for group in (0, 1))
        assert by_group == [WINDOW_TOKENS // PAGE_TOKENS, restored["cached"] // PAGE_TOKENS]
        second.do("tamper", on=True)
        assert distance(computed, second.generate(prompt(3))) > 100 * NOISE


def _hit(engine: Engine) -> dict | None:
    answer = engine.generate(prompt(1))
    return answer if answer["cached"] else None
