"""What a node with a model does besides keeping bytes: describe, tokenize, generate, and warm-up jobs. The same for both clients."""

from __future__ import annotations

import asyncio
import inspect
import pathlib
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

import esker
from esker import WarmupState
from support import ROOT, Node, within

BLOCK = 128
DOCUMENT = (ROOT / "engine/decoder/model/demo/document.txt").read_text()


class Awaited:
    """The asyncio client, each call awaited where it is made."""

    def __init__(self, address: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._client = self._loop.run_until_complete(self._make(address))

    @staticmethod
    async def _make(address: str) -> esker.AsyncClient:
        return esker.AsyncClient(address)

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            made = getattr(self._client, name)(*arguments, **options)
            return self._each(made) if inspect.isasyncgen(made) else self._loop.run_until_complete(made)

        return call

    def _each(self, made: AsyncIterator[Any]) -> Iterator[Any]:
        while True:
            try:
                yield self._loop.run_until_complete(made.__anext__())  # type: ignore[arg-type]
            except StopAsyncIteration:
                return

    def close(self) -> None:
        self._loop.run_until_complete(self._client.close())
        self._loop.close()


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    node = Node(tmp_path_factory.mktemp("node") / "data", model=True)
    yield node
    node.kill()


@pytest.fixture(params=[esker.Client, Awaited], ids=["blocking", "asyncio"])
def client(node: Node, request: pytest.FixtureRequest) -> Iterator[Any]:
    client = request.param(node.address)
    yield client
    client.close()


@pytest.fixture
def prompt(client: Any, request: pytest.FixtureRequest) -> list[int]:
    """Tokens that no other test has: seven blocks and a little more."""
    name = request.node.name
    return client.tokenize(f"{name}. {DOCUMENT[:4000]}")[: 7 * BLOCK + 20]


def test_describe(client: Any, tmp_path: pathlib.Path) -> None:
    described = client.describe()
    assert described.model.startswith("esker-") and len(described.namespace) == 32
    assert described.layout is not None and described.layout.block_tokens == BLOCK
    assert described.parameters > 1_000_000 and described.max_tokens >= 32_768
    without = Node(tmp_path / "without")
    try:
        with esker.Client(without.address) as other:
            for call in (other.describe, lambda: other.tokenize("no model, no tokens")):
                with pytest.raises(esker.NotSupported):
                    call()
    finally:
        without.kill()


def test_tokenize(client: Any) -> None:
    tokens = client.tokenize("In the beginning")
    assert tokens and tokens == client.tokenize("In the beginning")
    assert client.tokenize("In the beginning God")[: len(tokens)] == tokens
    with pytest.raises(esker.InvalidRequest):
        client.tokenize("")


def test_generate_hits_what_it_computed_before(client: Any, prompt: list[int]) -> None:
    first = client.generate(prompt, max_new_tokens=4, logits_digest=True)
    assert (first.prompt_tokens, first.prompt_cache_hit_tokens) == (len(prompt), 0)
    assert first.prompt_cache_miss_tokens == len(prompt) and first.completion_tokens == 4 == len(first.tokens)
    assert first.finish_reason == "length" and first.text and first.usage_id and len(first.logits_digests) == 4

    def again() -> esker.Completion | None:
        second = client.generate(prompt, max_new_tokens=4, logits_digest=True)
        return second if second.prompt_cache_hit_tokens >= 7 * BLOCK else None

    second = within(20, again)
    assert second.prompt_cache_hit_tokens + second.prompt_cache_miss_tokens == len(prompt)
    assert (second.tokens, second.text, second.logits_digests) == (first.tokens, first.text, first.logits_digests)
    # Another user's prefix is another's.
    assert client.generate(prompt, max_new_tokens=1, user="somebody").prompt_cache_hit_tokens == 0
    # A prompt may be text; a seed decides what chance does.
    warm = [client.generate("Who is there?", max_new_tokens=6, temperature=1.0, seed=3).tokens for _ in range(2)]
    assert warm[0] == warm[1]
    with pytest.raises(esker.InvalidRequest):
        client.generate([1 << 31], max_new_tokens=1)


def test_a_warm_up_job_is_planned_done_watched_listed_and_hit(client: Any, prompt: list[int], request: pytest.FixtureRequest) -> None:
    job = request.node.callspec.id
    plan = client.warm_up(job, [prompt], dry_run=True)
    assert (plan.state, plan.tokens, plan.tokens_left) == (WarmupState.PLANNED, 7 * BLOCK, 7 * BLOCK)
    with pytest.raises(esker.NotFound):
        client.warmup(job)
    submitted = client.warm_up(job, [prompt], priority=1)
    assert (submitted.job, submitted.prompts, submitted.priority) == (job, 1, 1)
    steps = list(client.watch_warmup(job))
    assert steps[-1].state is WarmupState.DONE and steps[-1].tokens_computed == 7 * BLOCK and steps[-1].tokens_left == 0
    assert all(step.tokens_cached + step.tokens_computed + step.tokens_left == step.tokens for step in steps)
    assert steps[-1].bytes_written > 0 and client.warmup(job) == steps[-1]
    # The same again is the same job; another under its name is refused.
    assert client.warm_up(job, [prompt], priority=1).state is WarmupState.DONE
    with pytest.raises(esker.EskerError):
        client.warm_up(job, [prompt[:BLOCK]])
    assert job in [one.job for one in client.list_warmups()]
    assert job not in [one.job for one in client.list_warmups(after=job)] and len(client.list_warmups(limit=1)) == 1
    assert client.generate(prompt, max_new_tokens=1).prompt_cache_hit_tokens >= 7 * BLOCK


def test_a_warm_up_job_is_cancelled(client: Any, request: pytest.FixtureRequest) -> None:
    job = f"long-{request.node.callspec.id}"
    client.warm_up(job, [client.tokenize(f"{job} {DOCUMENT * 3}")[:16_000]])
    watched = client.watch_warmup(job)
    assert next(watched).state in (WarmupState.QUEUED, WarmupState.RUNNING)
    cancelled = client.cancel_warmup(job)
    last = list(watched)[-1]
    assert last.state is WarmupState.CANCELLED and last.tokens_left > 0
    assert cancelled.job == job and client.warmup(job).state is WarmupState.CANCELLED
    with pytest.raises(esker.NotFound):
        client.cancel_warmup("none")
