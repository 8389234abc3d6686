"""The tier manager inside vLLM's own tiering classes, over a real mapped region: store, evict from the CPU, look up, promote."""

from __future__ import annotations

import json
import os
import pathlib
import threading
import time
import types
import uuid
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pytest

pytest.importorskip("vllm")

from vllm.v1.kv_offload.base import LookupResult, OffloadKey, ReqContext, ScheduleEndContext  # noqa: E402
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion  # noqa: E402
from vllm.v1.kv_offload.tiering.base import TransferJob  # noqa: E402
from vllm.v1.kv_offload.tiering.factory import SecondaryTierFactory  # noqa: E402
from vllm.v1.kv_offload.tiering.manager import CPUPrimaryTierOffloadingManager, TieringOffloadingManager  # noqa: E402

from esker.chunks import Identity  # noqa: E402
from esker.connectors.settings import Settings  # noqa: E402
from esker.connectors.vllm_tier import EskerTier, Stores  # noqa: E402
from support import Node, documented, within  # noqa: E402

ROW = 8192
SLOTS = 8


def spec(**changes: object) -> types.SimpleNamespace:
    """What a tier reads of vLLM's OffloadingSpec, with one worker and two groups."""
    group = lambda at: types.SimpleNamespace(tokens_per_block=16, layer_names=(f"layer.{at}",), group_id=at)  # noqa: E731
    config = {
        "groups": (group(0), group(1)),
        "worker_kv_bytes_per_block": ROW // 2,
        "extra_config": {},
        "model": types.SimpleNamespace(name="org/model", dtype="bfloat16"),
        "cache": types.SimpleNamespace(tokens_per_hash=16, blocks_per_chunk=2),
        "parallel": types.SimpleNamespace(rank=0, world_size=1, tp_size=1, pp_size=1, pcp_size=1, dcp_size=1),
        "replicated_layout": False,
        "canonical_layout": False,
        "kv_cache_layout": None,
        **changes,
    }
    events = types.SimpleNamespace(enable_kv_cache_events=True)
    return types.SimpleNamespace(config=types.SimpleNamespace(**config), kv_events_config=events, blocks_per_chunk=2)


def tier_config(node: Node, **more: object) -> dict:
    """The entry of `secondary_tiers` in docs/vllm.md, with the node of the test."""
    config = documented("vllm.md", 1)["kv_connector_extra_config"]
    assert config["spec_name"] == "TieringOffloadingSpec"
    return {**config["secondary_tiers"][0], "endpoint": node.address, **more}


class Engine:
    """vLLM's manager, its mapped region, and the tier made by vLLM's own factory."""

    def __init__(self, node: Node, slots: int = SLOTS, offloading: object = None, **more: object) -> None:
        region = SharedOffloadRegion(uuid.uuid4().hex, slots, 0, ROW, ROW)
        self.primary = CPUPrimaryTierOffloadingManager(num_chunks=slots, mmap_region=region)
        self.view = self.primary.get_kv_memoryview()
        self.memory = np.frombuffer(self.view, dtype=np.uint8).reshape(slots, -1)
        self.tier = SecondaryTierFactory.create_secondary_tier(tier_config(node, **more), self.view, offloading or spec())
        assert isinstance(self.tier, EskerTier)
        self.manager = TieringOffloadingManager(self.primary, [self.tier])

    def step(self) -> None:
        self.manager.on_schedule_end(ScheduleEndContext(new_req_ids=(), preempted_req_ids=()))

    def store(self, data: dict[OffloadKey, bytes], request: str = "w") -> None:
        """As the engine: slots are prepared, the worker writes them, the manager cascades them to the tier."""
        context = ReqContext(req_id=request)
        self.manager.on_new_request(context)
        output = self.manager.prepare_store(list(data), context)
        assert output is not None
        for key, slot in zip(output.keys_to_store, _slots(output.store_spec)):
            self.memory[slot, : len(data[key])] = np.frombuffer(data[key], dtype=np.uint8)
        self.manager.complete_store(output.keys_to_store, context, success=True)
        within(20, lambda: self.step() or not self.tier.has_pending_work())
        self.step()
        self.manager.on_request_finished(context)

    def lookup(self, key: OffloadKey, context: ReqContext, seconds: float = 20) -> LookupResult:
        """Asks step after step, as the scheduler does, until there is a verdict."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            answer = self.manager.lookup(key, context)
            self.step()
            if answer in (LookupResult.HIT, LookupResult.MISS):
                return answer
            time.sleep(0.01)
        raise AssertionError("asked for ever")

    def bytes_of(self, key: OffloadKey, context: ReqContext, size: int) -> bytes:
        """What the CPU tier has for a key."""
        slots = _slots(self.manager.prepare_load([key], context))
        content = self.memory[slots[0], :size].tobytes()
        self.manager.complete_load([key], context)
        return content

    def close(self) -> None:
        del self.memory
        self.view = None  # type: ignore[assignment]
        self.manager.shutdown()


def _slots(load_store_spec: object) -> list[int]:
    ids = getattr(load_store_spec, "block_ids", None)
    return [int(slot) for slot in (load_store_spec.chunk_ids if ids is None else ids)]  # type: ignore[attr-defined]


CHUNK_TOKENS = 32


def verdicts(
    engine: Engine,
    request: str,
    *asked: list[OffloadKey],
    sizes: Sequence[int] = (1, 1),
    ends: Mapping[OffloadKey, int] | None = None,
) -> set[OffloadKey]:
    """The keys that the tier calls hits, asked as vLLM's scheduler asks: group after group, history from the front and windows (lists
    that run backwards) from the end. Keys say where they end in the prompt, by the sizes of groups in chunks, or as `ends` has it."""
    context = ReqContext(req_id=request)
    for size, keys in zip(sizes, asked):
        for one in keys:
            end = (int.from_bytes(one[:4], "big") + 1) * CHUNK_TOKENS * size
            context.set_offload_key_position(one, ends[one] if ends else end)
    engine.tier.on_new_request(context)

    def answers() -> list[dict[OffloadKey, LookupResult]]:
        given = {one: engine.tier.lookup(one, context) for keys in asked for one in keys}
        engine.tier.on_schedule_end(ScheduleEndContext((), ()))
        return [] if LookupResult.RETRY in given.values() else [given]

    (given,) = within(20, answers)
    # A verdict stays.
    assert answers() == [given]
    return {one for one, answer in given.items() if answer is LookupResult.HIT}


def put(engine: Engine, *keys: OffloadKey) -> None:
    """Stores chunks, whatever they hold."""
    assert all(engine.tier._stores.put({one: memoryview(os.urandom(ROW)) for one in keys}).values())


def key(at: int, group: int = 0) -> OffloadKey:
    return OffloadKey(at.to_bytes(4, "big") * 8 + group.to_bytes(4, "big"))


@pytest.fixture
def engines(node: Node) -> Iterator[list[Engine]]:
    made: list[Engine] = []
    yield made
    for engine in made:
        engine.close()


def test_store_evict_look_up_promote_byte_equal(node: Node, engines: list[Engine]) -> None:
    first = Engine(node, enable_kv_events=True)
    engines.append(first)
    data = {key(at, group): os.urandom(ROW) for at in range(3) for group in (0, 1)}
    first.store(data)
    stored = {bytes(one) for event in first.manager.take_events() if not event.removed for one in event.keys}
    assert stored >= {bytes(one) for one in data}
    # Other chunks take the slots: what is looked up now is not in the CPU tier any more.
    others = {key(100 + at): os.urandom(ROW) for at in range(SLOTS)}
    first.store(others, "x")
    context = ReqContext(req_id="r")
    first.manager.on_new_request(context)
    for one, content in data.items():
        assert first.lookup(one, context) is LookupResult.HIT
        assert first.bytes_of(one, context, ROW) == content
    assert first.lookup(key(77), context) is LookupResult.MISS
    first.manager.on_request_finished(context)

    # Another engine with an empty CPU tier finds the same; one with other weights nothing.
    second = Engine(node)
    other = Engine(node, weights_revision="r2")
    engines += [second, other]
    context = ReqContext(req_id="s")
    second.manager.on_new_request(context)
    other.manager.on_new_request(context)
    assert second.lookup(key(1), context) is LookupResult.HIT
    assert second.bytes_of(key(1), context, ROW) == data[key(1)]
    assert other.lookup(key(1), context) is LookupResult.MISS


def test_a_node_that_is_gone_is_a_miss_and_fails_jobs_once(node: Node, engines: list[Engine]) -> None:
    engine = Engine(node, lookup_timeout_s=0.5)
    engines.append(engine)
    data = {key(at): os.urandom(ROW) for at in range(3)}
    engine.store(data)
    node.kill()
    engine.store({key(50 + at): os.urandom(ROW) for at in range(SLOTS)}, "y")
    context = ReqContext(req_id="r")
    engine.manager.on_new_request(context)
    assert engine.lookup(key(0), context) is LookupResult.MISS
    engine.manager.on_request_finished(context)
    node.start()
    time.sleep(1.2)
    context = ReqContext(req_id="t")
    engine.manager.on_new_request(context)
    assert engine.lookup(key(0), context) is LookupResult.HIT
    assert engine.bytes_of(key(0), context, ROW) == data[key(0)]


def test_a_chunk_that_is_damaged_fails_alone_and_is_not_asked_again(node: Node, engines: list[Engine]) -> None:
    engine = Engine(node)
    engines.append(engine)
    data = {key(at): os.urandom(ROW) for at in range(3)}
    engine.store(data)
    node.kill()
    assert node.damage(data[key(1)][4000:4064]) == 1
    node.start()
    time.sleep(1.2)
    context = ReqContext(req_id="r")
    engine.tier.lookup(key(1), context)
    job = TransferJob(901, list(data), np.array([0, 1, 2], dtype=np.int32), True, context)
    engine.tier.submit_load(job)
    results = within(20, lambda: list(engine.tier.get_finished_jobs()))
    assert [(result.job_id, result.success) for result in results] == [(901, False)]
    assert list(results[0].successful_keys) == [key(0), key(2)]
    for slot, one in ((0, key(0)), (2, key(2))):
        assert engine.memory[slot].tobytes() == data[one]
    engine.tier.on_schedule_end(ScheduleEndContext((), ()))
    assert within(10, lambda: engine.tier.lookup(key(1), context) is LookupResult.MISS)


def chunks(group: int, *at: int) -> list[OffloadKey]:
    return [key(one, group) for one in at]


def test_a_hit_lies_inside_the_longest_prefix_that_all_groups_have(node: Node, engines: list[Engine]) -> None:
    engine = Engine(node)
    engines.append(engine)
    put(engine, *chunks(0, *range(10)), *chunks(1, *range(4)))
    asked = chunks(0, *range(10)), chunks(1, *range(10))
    assert verdicts(engine, "a", *asked) == {*chunks(0, 0, 1, 2, 3), *chunks(1, 0, 1, 2, 3)}
    # Alone, the first group is whole: it is the other that ends it.
    assert verdicts(engine, "b", asked[0]) == set(asked[0])
    # What the engine or the tier above has is not asked for, and is no hole.
    assert verdicts(engine, "c", chunks(0, 2, 3, 4, 5), chunks(1, 2, 3, 4, 5)) == {*chunks(0, 2, 3), *chunks(1, 2, 3)}


def test_behind_a_hole_all_are_misses(node: Node, engines: list[Engine]) -> None:
    engine = Engine(node)
    engines.append(engine)
    put(engine, *chunks(0, 0, 1, 3, 4, 5), *chunks(1, *range(6)))
    asked = chunks(0, *range(6)), chunks(1, *range(6))
    assert verdicts(engine, "a", *asked) == {*chunks(0, 0, 1), *chunks(1, 0, 1)}
    put(engine, key(2))
    assert verdicts(engine, "b", *asked) == {*asked[0], *asked[1]}


def windowed(window_chunks: int) -> types.SimpleNamespace:
    """A second group with a window, of which the configuration says how long it is."""
    made = spec()
    made.config.groups[0].sliding_window_size_in_chunks = None
    made.config.groups[1].sliding_window_size_in_chunks = window_chunks
    return made


def test_a_window_is_needed_where_the_prefix_ends_and_nowhere_else(node: Node, engines: list[Engine]) -> None:
    engine = Engine(node, offloading=windowed(2))
    engines.append(engine)
    # The window is whole before 4 chunks; before 10 one is missing, before 7 all but one.
    put(engine, *chunks(0, *range(10)), *chunks(1, 0, 2, 3, 6, 9))
    asked = chunks(0, *range(10)), chunks(1, *reversed(range(10)))
    assert verdicts(engine, "a", *asked) == {*chunks(0, *range(4)), *chunks(1, 2, 3)}
    put(engine, key(8, 1))
    assert verdicts(engine, "b", *asked) == {*chunks(0, *range(10)), *chunks(1, 8, 9)}


def test_a_window_that_the_engine_says_nothing_of_is_seen_from_how_it_asks(node: Node, engines: list[Engine]) -> None:
    engine = Engine(node)
    engines.append(engine)
    put(engine, *chunks(0, *range(10)), *chunks(1, 2, 3))
    asked = chunks(0, *range(10)), chunks(1, *reversed(range(10)))
    assert verdicts(engine, "a", *asked) == {*chunks(0, *range(4)), *chunks(1, 2, 3)}
    # The control: asked from the front it is history, with a hole at its start.
    assert verdicts(engine, "b", chunks(0, *range(10)), chunks(1, *range(10))) == set()


def test_what_is_asked_later_is_judged_by_what_was_answered(node: Node, engines: list[Engine]) -> None:
    engine = Engine(node)
    engines.append(engine)
    put(engine, *chunks(0, *range(6)), *chunks(1, *range(3)))
    context = ReqContext(req_id="r")
    for one in chunks(0, *range(6)) + chunks(1, *range(6)):
        context.set_offload_key_position(one, (int.from_bytes(one[:4], "big") + 1) * CHUNK_TOKENS)

    def ask(keys: list[OffloadKey]) -> list[bool]:
        def answers() -> list[LookupResult] | None:
            given = [engine.tier.lookup(one, context) for one in keys]
            engine.tier.on_schedule_end(ScheduleEndContext((), ()))
            return None if LookupResult.RETRY in given else given

        return [answer is LookupResult.HIT for answer in within(20, answers)]

    assert ask(chunks(0, *range(6))) == [True] * 6
    assert ask(chunks(1, *range(6))) == [True] * 3 + [False] * 3
    assert ask(chunks(0, *range(6))) == [True] * 6, "verdicts stay"


def test_a_lookup_never_waits(node: Node, engines: list[Engine]) -> None:
    """Under the scheduler's lock: neither for the node nor for other requests that are judged."""
    engine = Engine(node)
    engines.append(engine)
    put(engine, *chunks(0, *range(4)))
    slow = engine.tier._stores.exists
    engine.tier._stores.exists = lambda keys: time.sleep(1) or slow(keys)  # type: ignore[method-assign,func-returns-value]
    context = ReqContext(req_id="r")
    started = time.monotonic()
    with engine.tier._judging:
        for _ in range(50):
            assert engine.tier.lookup(key(0), context) is LookupResult.RETRY
            engine.tier.on_schedule_end(ScheduleEndContext((), ()))
    assert time.monotonic() - started < 0.5
    assert within(10, lambda: engine.tier.lookup(key(0), context) is LookupResult.HIT)


def test_neither_lookups_nor_loads_wait_behind_stores(node: Node, engines: list[Engine]) -> None:
    engine = Engine(node, threads=2, lookup_timeout_s=1)
    engines.append(engine)
    data = os.urandom(ROW)
    assert all(engine.tier._stores.put({key(0): memoryview(data)}).values())
    goes_on = threading.Event()
    engine.tier._stores.put = lambda rows: goes_on.wait(30) and {}  # type: ignore[method-assign]
    context = ReqContext(req_id="r")
    for at in range(8):
        engine.tier.submit_store(TransferJob(at, [key(10 + at)], np.array([at % SLOTS], dtype=np.int32), False, context))
    try:
        assert engine.lookup(key(0), context) is LookupResult.HIT
        engine.tier.submit_load(TransferJob(100, [key(0)], np.array([0], dtype=np.int32), True, context))
        results = within(10, lambda: list(engine.tier.get_finished_jobs()))
        assert [(result.job_id, result.success) for result in results] == [(100, True)]
        assert engine.memory[0].tobytes() == data
    finally:
        goes_on.set()


def test_a_replicated_layout_stores_one_copy(node: Node, engines: list[Engine]) -> None:
    replicated = spec(replicated_layout=True, worker_kv_bytes_per_block=ROW // 8)
    engine = Engine(node, offloading=replicated)
    engines.append(engine)
    assert engine.tier._row_bytes == ROW // 4
    engine.store({key(1): os.urandom(ROW // 4)})
    assert engine.tier._stores._of(0).counters.stored_bytes == ROW // 4


def test_each_fact_alone_gives_another_namespace(tmp_path: pathlib.Path) -> None:
    ns = types.SimpleNamespace

    def of(rope: str = "yarn", group: int = 0, *, told: dict[str, str] = {}, **changes: object) -> Identity:
        (tmp_path / "config.json").write_text(json.dumps({"rope_parameters": rope}))
        settings = Settings(**{"weights_revision": "r1", **told})
        config = spec(**{"extra_config": {"model_path": str(tmp_path)}, **changes}).config
        return Stores(None, settings, config, ROW)._of(group)._identity

    parallel = ns(rank=0, world_size=1, tp_size=1, pp_size=1, pcp_size=1, dcp_size=1)
    others = [
        of("linear"),
        of(group=1),
        of(told={"weights_revision": "r2"}),
        of(told={"model_facts": "--quantization fp8"}),
        of(told={"adapter_revision": "a1"}),
        of(model=ns(name="org/other", dtype="bfloat16")),
        of(model=ns(name="org/model", dtype="float16")),
        of(cache=ns(tokens_per_hash=32, blocks_per_chunk=2)),
        of(cache=ns(tokens_per_hash=16, blocks_per_chunk=4)),
        of(kv_cache_layout="HND"),
        of(canonical_layout=True),
        of(groups=(ns(tokens_per_block=16, layer_names=("other",), group_id=0),)),
        of(parallel=ns(**{**vars(parallel), "tp_size": 2})),
    ]
    assert of() == of() and of() not in others
    assert all(one not in others[:at] for at, one in enumerate(others))


def reset(engine: Engine) -> None:
    """Resets the cache; since 0.33 nothing is promoted until the engine says that it has flushed."""
    engine.manager.reset_cache()
    getattr(engine.manager, "on_reset_flushed", lambda: None)()


def test_after_a_reset_nothing_is_read_or_written(node: Node, engines: list[Engine]) -> None:
    engine = Engine(node)
    engines.append(engine)
    engine.store({key(0): os.urandom(ROW)})
    reset(engine)
    context = ReqContext(req_id="r")
    engine.manager.on_new_request(context)
    assert engine.lookup(key(0), context) is LookupResult.MISS
    kept = Engine(node, weights_fixed=True)
    engines.append(kept)
    reset(kept)
    kept.manager.on_new_request(context)
    assert kept.lookup(key(0), context) is LookupResult.HIT
