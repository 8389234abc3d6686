"""The scheduler's side of the vLLM connector: the conformance cases of prefix lookup that vLLM's groups can express."""

from __future__ import annotations

import hashlib
import os
import types
from collections.abc import Iterator

import pytest

pytest.importorskip("vllm")

import torch  # noqa: E402
from vllm.v1 import kv_cache_interface as specs  # noqa: E402

import esker  # noqa: E402
from esker.connectors.settings import Settings  # noqa: E402
from esker.connectors.vllm import SchedulerSide, Shape  # noqa: E402
from support import Node, within  # noqa: E402

PAGE = 16


def full(block_size: int = PAGE) -> specs.FullAttentionSpec:
    return specs.FullAttentionSpec(block_size=block_size, num_kv_heads=1, head_size=64, dtype=torch.bfloat16)


def window(tokens: int) -> specs.SlidingWindowSpec:
    return specs.SlidingWindowSpec(
        block_size=PAGE, num_kv_heads=1, head_size=64, dtype=torch.bfloat16, sliding_window=tokens
    )


class Case:
    """A scheduler's side over a real node, with these groups."""

    def __init__(self, node: Node, *groups: object, tp: int = 1, revision: str = "r1", model: str = "org/model") -> None:
        ns = types.SimpleNamespace
        kv = ns(
            kv_cache_groups=[
                ns(layer_names=[f"layer.{at}"], kv_cache_spec=spec) for at, spec in enumerate(groups)
            ],
            hash_block_size=PAGE,
            cache_hit_alignment_tokens=PAGE,
        )
        config = ns(
            model_config=ns(model=model, revision=None, tokenizer=None, dtype="bf16", quantization=None, hf_config=ns()),
            parallel_config=ns(tensor_parallel_size=tp, pipeline_parallel_size=1),
            cache_config=ns(cache_dtype="auto", prefix_caching_hash_algo="sha256"),
            speculative_config=None,
        )
        settings = Settings(endpoint=node.address, weights_revision=revision, lookup_timeout_s=5)
        self.shape = Shape(config, kv, settings)  # type: ignore[arg-type]
        self.client = esker.Client(node.address)
        self.side = SchedulerSide(settings, self.shape, self.client)
        self.count = 0

    def put(self, group: int, request: types.SimpleNamespace, pages: list[int], rank: int = 0) -> None:
        """Stores pages of a group, as a worker does."""
        store = self.shape.store(self.client, self.shape.groups[group], rank)
        hashes = self.shape.hashes(request, self.shape.groups[group])  # type: ignore[arg-type]
        assert all(store.put(hashes, {at: os.urandom(store.chunk_bytes) for at in pages}).values())

    def request(self, tokens: list[int]) -> types.SimpleNamespace:
        """A request with chained block hashes, as vLLM makes them."""
        hashes, before = [], b"seed"
        for end in range(PAGE, len(tokens) + 1, PAGE):
            before = hashlib.sha256(before + repr(tokens[end - PAGE : end]).encode()).digest()
            hashes.append(before)
        self.count += 1
        return types.SimpleNamespace(
            request_id=f"r{self.count}",
            num_tokens=len(tokens),
            num_prompt_tokens=len(tokens),
            block_hashes=hashes,
            skip_reading_prefix_cache=False,
            num_preemptions=0,
        )

    def matched(self, request: types.SimpleNamespace, local: int = 0) -> int:
        """Tokens that the scheduler is told of, once there is a verdict; it says "later" until then."""
        answer = within(20, lambda: (got := self.side.matched(request, local))[0] is not None and got)
        tokens, loads_async = answer
        assert loads_async == (tokens > 0)
        return int(tokens)

    def points(self, request: types.SimpleNamespace) -> list[int]:
        self.matched(request)
        return self.side._verdicts[request.request_id].points() or []


@pytest.fixture
def cases() -> Iterator[list[Case]]:
    made: list[Case] = []
    yield made
    for case in made:
        case.side.shutdown()


def tokens(count: int, salt: int = 0) -> list[int]:
    return [at * 7 + salt for at in range(count)]


def test_l1_l9_l16_history_alone(node: Node, cases: list[Case]) -> None:
    case, other = Case(node, full()), Case(node, full(), revision="r2")
    cases += [case, other]
    request = case.request(tokens(10 * PAGE))
    case.put(0, request, list(range(10)))
    # The whole prompt is stored: its last token is computed all the same.
    assert case.matched(request) == 9 * PAGE
    longer = case.request(tokens(11 * PAGE + 3))
    assert case.matched(longer) == 10 * PAGE and case.points(longer) == [PAGE * at for at in range(1, 11)]
    assert case.matched(case.request(tokens(11 * PAGE + 3)), local=4 * PAGE) == 6 * PAGE
    assert case.matched(case.request(tokens(11 * PAGE + 3)), local=10 * PAGE) == 0
    assert other.matched(other.request(tokens(11 * PAGE))) == 0
    assert case.matched(case.request(tokens(5))) == 0


def test_l2_l5_a_window_is_needed_where_it_ends(node: Node, cases: list[Case]) -> None:
    case = Case(node, full(), window(3 * PAGE))
    cases.append(case)
    request = case.request(tokens(12 * PAGE + 1))
    case.put(0, request, list(range(12)))
    # Pages of the window: whole before 5 pages, with a hole before 9 to 11.
    case.put(1, request, [2, 3, 4, 8, 10, 11])
    assert case.points(request) == [5 * PAGE]
    case.put(1, request, [9])
    again = case.request(tokens(12 * PAGE + 1))
    assert case.points(again) == [5 * PAGE, 11 * PAGE, 12 * PAGE]
    # What was answered once stays.
    assert case.points(request) == [5 * PAGE]


def test_l3_l6_history_ends_at_the_first_hole_of_any_group_and_at_a_fork(node: Node, cases: list[Case]) -> None:
    case = Case(node, full(), full())
    cases.append(case)
    a = tokens(10 * PAGE)
    request = case.request(a)
    case.put(0, request, list(range(10)))
    case.put(1, request, list(range(4)))
    assert case.matched(case.request(a + [1])) == 4 * PAGE
    fork = case.request(a[: 2 * PAGE + 3] + tokens(8 * PAGE, 5))
    assert case.matched(fork) == 2 * PAGE


def test_l15_ranks_intersect_and_l17_groups_round_alone(node: Node, cases: list[Case]) -> None:
    case = Case(node, full(), full(4 * PAGE), tp=2)
    cases.append(case)
    request = case.request(tokens(12 * PAGE + 1))
    for rank, pages in ((0, 12), (1, 7)):
        case.put(0, request, list(range(pages)), rank)
        case.put(1, request, [0, 1, 2], rank)
    # One group of pages four times as large: nothing is rounded to what both divide.
    assert case.points(request) == [PAGE * at for at in range(1, 8)]


def test_a_node_that_does_not_answer_is_a_miss_in_time(node: Node, cases: list[Case]) -> None:
    case = Case(node, full())
    cases.append(case)
    request = case.request(tokens(10 * PAGE))
    case.put(0, request, list(range(9)))
    node.kill()
    assert case.matched(request) == 0


def test_what_failed_to_load_is_not_asked_for_again(node: Node, cases: list[Case]) -> None:
    case = Case(node, full())
    cases.append(case)
    request = case.request(tokens(10 * PAGE + 1))
    case.put(0, request, list(range(10)))
    assert case.matched(request) == 10 * PAGE
    table = list(range(100, 111))
    case.side.allocated(request, (table,), 10 * PAGE)
    output = types.SimpleNamespace(
        scheduled_new_reqs=[],
        scheduled_cached_reqs=types.SimpleNamespace(req_ids=[], new_block_ids=[], num_computed_tokens=[], resumed_req_ids=set()),
        num_scheduled_tokens={},
    )
    loads = case.side.metadata(output).loads
    assert [(load.request, load.pages[0].blocks) for load in loads] == [("r1", dict(enumerate(table[:10])))]
    case.side.told({104}, {"r1"})
    assert case.matched(request) == 0
    # And it is stored anew: nothing counts as present any more.
    assert case.side._verdicts["r1"].present(0) == []
