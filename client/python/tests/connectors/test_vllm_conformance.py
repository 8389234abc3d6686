"""The conformance cases of prefix lookup through both sides of the vLLM connector, and what else its scheduler's side keeps.

Not expressed:
- L10, snapshots: the connector refuses groups of recurrent state (they go through the tier).
- L11, optional groups: vLLM has none.
- The half of L7 and L8 that is about states off the block grid: vLLM names whole blocks alone.
- The half of L13 about what a grant holds: the scheduler's promise is not a grant; what is gone when it is loaded is computed.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
import random
import struct
import threading
import time
import types
from collections.abc import Iterator

import pytest

pytest.importorskip("vllm")

import torch  # noqa: E402
from vllm.v1 import kv_cache_interface as specs  # noqa: E402

import cases as table  # noqa: E402
import esker  # noqa: E402
from cases import L1, L2, L3, L4, L4_FILLED, L5, L17, L18  # noqa: E402
from esker.chunks import Identity  # noqa: E402
from esker.connectors.settings import Settings  # noqa: E402
from esker.connectors.vllm import EskerMetadata, SchedulerSide, Shape  # noqa: E402
from support import Node, within  # noqa: E402

PAGE = 16


def full(block_size: int = PAGE) -> specs.FullAttentionSpec:
    return specs.FullAttentionSpec(block_size=block_size, num_kv_heads=1, head_size=64, dtype=torch.bfloat16)


def window(tokens: int) -> specs.SlidingWindowSpec:
    return specs.SlidingWindowSpec(
        block_size=PAGE, num_kv_heads=1, head_size=64, dtype=torch.bfloat16, sliding_window=tokens
    )


def engine_config(
    *groups: object,
    tp: int = 1,
    revision: str = "r1",
    model: str = "org/model",
    dtype: str = "bf16",
    quantization: str | None = None,
    kv_dtype: str = "auto",
    hash_algo: str = "sha256",
    kv_layout: str | None = None,
    speculative: object = None,
    hf_config: object = types.SimpleNamespace(),
    hf_text_config: object = None,
    **told: str,
) -> tuple[types.SimpleNamespace, types.SimpleNamespace, Settings]:
    """What the connector reads of vLLM's configuration, of the groups of a cache, and its own settings."""
    ns = types.SimpleNamespace
    kv = ns(
        kv_cache_groups=[ns(layer_names=[f"layer.{at}"], kv_cache_spec=spec) for at, spec in enumerate(groups)],
        hash_block_size=PAGE,
        cache_hit_alignment_tokens=PAGE,
        kv_cache_layout=kv_layout,
    )
    of_model = {"model": model, "dtype": dtype, "quantization": quantization, "hf_config": hf_config}
    config = ns(
        model_config=ns(revision=None, tokenizer=None, hf_text_config=hf_text_config, **of_model),
        parallel_config=ns(tensor_parallel_size=tp, pipeline_parallel_size=1),
        cache_config=ns(cache_dtype=kv_dtype, prefix_caching_hash_algo=hash_algo),
        speculative_config=speculative,
    )
    return config, kv, Settings(weights_revision=revision, lookup_timeout_s=5, **told)  # type: ignore[arg-type]


class Engine:
    """A scheduler's side over a real node, with these groups."""

    def __init__(self, node: Node, *groups: object, **more: object) -> None:
        config, kv, settings = engine_config(*groups, endpoint=node.address, **more)
        self.shape = Shape(config, kv, settings)  # type: ignore[arg-type]
        self.client = esker.Client(node.address)
        self.side = SchedulerSide(settings, self.shape, self.client)
        self.count = 0
        self.stored: dict[tuple[int, int], bytes] = {}

    def put(self, group: int, request: types.SimpleNamespace, pages: list[int], rank: int = 0) -> None:
        """Stores pages of a group, as a worker does."""
        store = self.shape.store(self.client, self.shape.groups[group], rank)
        hashes = self.shape.hashes(request, self.shape.groups[group])  # type: ignore[arg-type]
        chunks = {at: os.urandom(store.chunk_bytes) for at in pages}
        assert all(store.put(hashes, chunks).values())
        self.stored.update(((group, at), chunk) for at, chunk in chunks.items())

    def load(self, group: int, request: types.SimpleNamespace, pages: list[int]) -> list[int]:
        """Pages that a worker can load; they have the bytes that were stored."""
        store = self.shape.store(self.client, self.shape.groups[group], 0)
        memory = {at: bytearray(store.chunk_bytes) for at in pages}
        loaded = store.get(self.shape.hashes(request, self.shape.groups[group]), memory)  # type: ignore[arg-type]
        for at in pages:
            assert not loaded[at] or bytes(memory[at]) == self.stored[group, at]
        return [at for at in pages if loaded[at]]

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
def engines() -> Iterator[list[Engine]]:
    made: list[Engine] = []
    yield made
    for case in made:
        case.side.shutdown()


def tokens(count: int, salt: int = 0) -> list[int]:
    return [at * 7 + salt for at in range(count)]


def of(node: Node, case: table.Case, **more: object) -> tuple[Engine, types.SimpleNamespace]:
    """An engine of the case's groups, and a request of its pages and one token more."""
    specs_ = [window(group.window * PAGE) if group.window else full(group.size * PAGE) for group in case.groups]
    engine = Engine(node, *specs_, **more)  # type: ignore[arg-type]
    return engine, engine.request(tokens(case.pages * PAGE + 1))


def check(node: Node, engines: list[Engine], case: table.Case) -> tuple[Engine, types.SimpleNamespace]:
    """Stores what the case says and compares every length that is offered."""
    engine, request = of(node, case)
    engines.append(engine)
    for at, group in enumerate(case.groups):
        engine.put(at, request, list(group.stored))
    assert engine.points(request) == [PAGE * point for point in case.points]
    assert engine.matched(request) == PAGE * case.best
    return engine, request


def again(engine: Engine, case: table.Case) -> types.SimpleNamespace:
    """The same prompt in another request: what one was answered stays."""
    return engine.request(tokens(case.pages * PAGE + 1))


def test_l1_plain_history(node: Node, engines: list[Engine]) -> None:
    engine, _ = check(node, engines, L1)
    # What the engine has by itself is not loaded.
    assert engine.matched(again(engine, L1), local=4 * PAGE) == 6 * PAGE
    assert engine.matched(again(engine, L1), local=10 * PAGE) == 0


def test_l2_window_hole(node: Node, engines: list[Engine]) -> None:
    engine, request = check(node, engines, L2)
    engine.put(1, request, [14])
    assert engine.points(again(engine, L2)) == [8 * PAGE, 16 * PAGE]
    # What was answered once stays.
    assert engine.points(request) == [8 * PAGE]


def test_l3_only_the_indexer_is_missing(node: Node, engines: list[Engine]) -> None:
    check(node, engines, L3)


def test_l4_state_newer_than_history(node: Node, engines: list[Engine]) -> None:
    engine, request = check(node, engines, L4)
    engine.put(0, request, list(range(12, 16)))
    assert engine.points(again(engine, L4)) == [PAGE * point for point in L4_FILLED.points]


def test_l5_history_newer_than_state(node: Node, engines: list[Engine]) -> None:
    check(node, engines, L5)


def test_l6_fork_between_two_states(node: Node, engines: list[Engine]) -> None:
    engine = Engine(node, full(), window(3 * PAGE))
    engines.append(engine)
    a = tokens(12 * PAGE + 1)
    request = engine.request(a)
    engine.put(0, request, list(range(12)))
    engine.put(1, request, [5, 6, 7, 9, 10, 11])
    assert engine.points(request) == [8 * PAGE, 12 * PAGE]
    fork = engine.request(a[: 10 * PAGE + 3] + tokens(6 * PAGE, 5))
    assert engine.points(fork) == [8 * PAGE]


def test_l7_prompt_shorter_than_a_block(node: Node, engines: list[Engine]) -> None:
    engine, request = check(node, engines, L1)
    assert engine.matched(engine.request(tokens(5))) == 0
    assert engine.matched(engine.request(tokens(PAGE))) == 0, "its last token is computed"


def test_l8_turn_end_off_the_block_boundary(node: Node, engines: list[Engine]) -> None:
    engine = Engine(node, full())
    engines.append(engine)
    turn = tokens(14 * PAGE + 9)
    engine.put(0, engine.request(turn), list(range(14)))
    # The next turn names the last tokens otherwise: the whole blocks before them stay.
    assert engine.matched(engine.request(turn[:-1] + tokens(3 * PAGE, 9))) == 14 * PAGE
    assert engine.matched(engine.request(turn[: 14 * PAGE - 1] + tokens(3 * PAGE, 9))) == 13 * PAGE


def test_l9_whole_prompt_stored(node: Node, engines: list[Engine]) -> None:
    engine = Engine(node, full())
    engines.append(engine)
    request = engine.request(tokens(10 * PAGE))
    engine.put(0, request, list(range(10)))
    # Its last token is computed all the same.
    assert engine.matched(request) == 9 * PAGE
    assert engine.matched(engine.request(tokens(10 * PAGE + 1))) == 10 * PAGE


def test_l12_a_corrupt_state_falls_to_the_next_point(node: Node, engines: list[Engine]) -> None:
    engine, request = check(node, engines, L4_FILLED)
    node.kill()
    assert node.damage(engine.stored[1, 14][100:164]) == 1
    node.start()
    within(20, lambda: engine.points(again(engine, L4)) != [])
    # The load says which page is not there; the others are, and whole.
    assert engine.load(1, request, [13, 14, 15]) == [13, 15]
    assert engine.load(0, request, list(range(16))) == list(range(16))
    assert engine.points(again(engine, L4)) == [8 * PAGE]


def test_l13_what_expired_between_lookup_and_load_is_reported(tmp_path: pathlib.Path, engines: list[Engine]) -> None:
    node = Node(tmp_path / "short", "--codec", "raw", "--segment-mib", "16", "--ttl-s", "2", "2", "2", "2")
    try:
        engine, request = check(node, engines, L1)

        def gone() -> bool:
            # Asked through a store of its own each time: a use would keep it.
            time.sleep(8)
            return engine.load(0, request, list(range(10))) == []

        within(90, gone)
        assert engine.points(again(engine, L1)) == []
    finally:
        node.kill()


def test_l14_a_crash_leaves_pages_whole_or_absent(node: Node, engines: list[Engine], rng: random.Random) -> None:
    for round_ in range(4):
        engine = Engine(node, full())
        engines.append(engine)
        request = engine.request(tokens(64 * PAGE + 1, salt=round_ + 1))
        store = engine.shape.store(engine.client, engine.shape.groups[0], 0)
        hashes = engine.shape.hashes(request, engine.shape.groups[0])  # type: ignore[arg-type]
        chunks = {at: os.urandom(store.chunk_bytes) for at in range(64)}
        engine.stored.update(((0, at), chunk) for at, chunk in chunks.items())
        crash = threading.Timer(rng.random() * 0.05, node.kill)
        crash.start()
        done = [at for at, there in store.put(hashes, chunks).items() if there]
        crash.join()
        node.start()
        found = within(20, lambda: _known(engine, request))
        closed = max(found[0], default=0) // PAGE
        assert closed >= len(done) and engine.load(0, request, list(range(closed))) == list(range(closed))


def _known(engine: Engine, request: types.SimpleNamespace) -> tuple[list[int]] | None:
    """The points, once the node answers again."""
    engine.side.forget(request.request_id)
    points = engine.points(request)
    return (points,) if engine.side._stores[0][0].healthy else None


def test_l15_ranks_intersect(node: Node, engines: list[Engine]) -> None:
    engine = Engine(node, full(), tp=2)
    engines.append(engine)
    request = engine.request(tokens(12 * PAGE + 1))
    for rank, pages in ((0, 12), (1, 7)):
        engine.put(0, request, list(range(pages)), rank)
    assert engine.points(request) == [PAGE * at for at in range(1, 8)]


def test_l16_only_the_weights_differ(node: Node, engines: list[Engine]) -> None:
    check(node, engines, L1)
    other, request = of(node, L1, revision="r2")
    engines.append(other)
    assert other.matched(request) == 0


def test_l17_a_coarse_group_rounds_alone(node: Node, engines: list[Engine]) -> None:
    check(node, engines, L17)


def test_l18_nothing_required_is_stored(node: Node, engines: list[Engine]) -> None:
    check(node, engines, L18)


def test_a_node_that_does_not_answer_is_a_miss_in_time(node: Node, engines: list[Engine]) -> None:
    engine = Engine(node, full())
    engines.append(engine)
    request = engine.request(tokens(10 * PAGE))
    engine.put(0, request, list(range(9)))
    node.kill()
    assert engine.matched(request) == 0


def test_ranks_of_mla_share_one_copy_and_others_do_not(node: Node, engines: list[Engine]) -> None:
    latents = specs.MLAAttentionSpec(block_size=PAGE, num_kv_heads=1, head_size=576, dtype=torch.bfloat16)
    for spec, is_shared in ((latents, True), (full(), False)):
        engine = Engine(node, spec, tp=2)
        engines.append(engine)
        request = engine.request(tokens(4 * PAGE + 1))
        engine.put(0, request, [0, 1], rank=1)
        assert engine.matched(request) == (2 * PAGE if is_shared else 0)
        # What the second rank wrote the first one loads; and what is there is not written again.
        assert engine.load(0, request, [0, 1, 2]) == ([0, 1] if is_shared else [])
        group = engine.shape.groups[0]
        store = engine.shape.store(engine.client, group, 0)
        other = {at: os.urandom(store.chunk_bytes) for at in (0, 1)}
        assert all(store.put(engine.shape.hashes(request, group), other).values())  # type: ignore[arg-type]
        assert store.counters.stored == (0 if is_shared else 2)
        if is_shared:
            assert engine.load(0, request, [0, 1]) == [0, 1]
            # An engine with other ranks has the same latents.
            more = Engine(node, spec, tp=4)
            engines.append(more)
            assert more.matched(more.request(tokens(4 * PAGE + 1))) == 2 * PAGE


def test_each_fact_alone_gives_another_namespace() -> None:
    def of(group: int = 0, rank: int = 0, *, spec: object = full(), tp: int = 2, **changes: object) -> Identity:
        shape = Shape(*engine_config(full(), spec, tp=tp, **changes))  # type: ignore[arg-type]
        return shape.store(None, shape.groups[group], rank)._identity  # type: ignore[arg-type]

    ns = types.SimpleNamespace
    others = [
        of(group=1),
        of(rank=1),
        of(tp=4),
        of(spec=full(2 * PAGE), group=1),
        of(spec=window(64), group=1),
        of(revision="r2"),
        of(model="org/other"),
        of(model_facts="a patched kernel"),
        of(dtype="fp16"),
        of(quantization="fp8"),
        of(kv_dtype="fp8_e4m3"),
        of(hash_algo="xxhash"),
        of(kv_layout="HND"),
        of(speculative=ns(model="org/draft")),
        of(hf_config=ns(rope_parameters={"rope_type": "yarn", "factor": 4.0})),
        of(hf_config=ns(rope_scaling={"rope_type": "yarn", "factor": 4.0})),
        of(hf_config=ns(rope_theta=1e6)),
        of(hf_config=ns(partial_rotary_factor=0.5)),
        of(hf_text_config=ns(rope_theta=2e6)),
    ]
    assert of() == of() and of() not in others
    assert all(one not in others[:at] for at, one in enumerate(others))


def test_what_an_adapter_computed_is_found_by_its_weights(
    node: Node, engines: list[Engine], tmp_path: pathlib.Path
) -> None:
    """Two engines, each with its own weights under one name and path: what one host calls `poet` is not what the other does."""
    adapter = types.SimpleNamespace(lora_name="poet", lora_path=str(tmp_path))
    prompt = tokens(4 * PAGE + 1)

    def engine(weights: bytes, **told: str) -> tuple[Engine, types.SimpleNamespace]:
        header = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
        (tmp_path / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + weights)
        made = Engine(node, full(), **told)
        engines.append(made)
        request = made.request(prompt)
        request.lora_request = adapter
        within(10, lambda: made.shape.hashes(request, made.shape.groups[0]))  # type: ignore[arg-type]
        return made, request

    first, request = engine(b"v")
    first.put(0, request, list(range(4)))
    assert first.matched(request) == 4 * PAGE and first.load(0, request, [0, 1, 2, 3]) == [0, 1, 2, 3]
    assert first.matched(first.request(prompt)) == 0, "without the adapter"
    other, request = engine(b"w")
    assert other.matched(request) == 0
    same, request = engine(b"v")
    assert same.matched(request) == 4 * PAGE
    # One whose weights cannot be known: nothing is asked and nothing is saved, unless the operator says which they are.
    for told, saved in (({}, 0), ({"adapter_revision": "a1"}, 1)):
        unknown = Engine(node, full(), **told)
        engines.append(unknown)
        request = unknown.request(prompt)
        request.lora_request = types.SimpleNamespace(lora_name="poet", lora_path="org/on-a-hub")
        assert unknown.matched(request) == 0
        unknown.side.allocated(request, ([1, 2, 3, 4, 5],), 0)  # type: ignore[arg-type]
        metadata = EskerMetadata()
        unknown.side._save(unknown.side._tracked[request.request_id], 4 * PAGE, metadata)
        assert len(metadata.saves) == saved


def test_what_failed_to_load_is_not_asked_for_again(node: Node, engines: list[Engine]) -> None:
    engine = Engine(node, full())
    engines.append(engine)
    request = engine.request(tokens(10 * PAGE + 1))
    engine.put(0, request, list(range(10)))
    assert engine.matched(request) == 10 * PAGE
    table = list(range(100, 111))
    engine.side.allocated(request, (table,), 10 * PAGE)
    output = types.SimpleNamespace(
        scheduled_new_reqs=[],
        scheduled_cached_reqs=types.SimpleNamespace(req_ids=[], new_block_ids=[], num_computed_tokens=[], resumed_req_ids=set()),
        num_scheduled_tokens={},
    )
    loads = engine.side.metadata(output).loads
    assert [(load.request, load.pages[0].blocks) for load in loads] == [("r1", dict(enumerate(table[:10])))]
    engine.side.told({104}, {"r1"})
    assert engine.matched(request) == 0
    # And it is stored anew: nothing counts as present any more.
    assert engine.side._verdicts["r1"].present(0) == []
