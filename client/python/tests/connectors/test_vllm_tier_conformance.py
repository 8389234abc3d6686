"""The conformance cases of prefix lookup through the vLLM tier: its hits, asked as vLLM's scheduler asks.

Not expressed:
- L9, the whole prompt: the scheduler itself leaves the last token out.
- L11, optional groups: vLLM has none.
- L15, ranks: a chunk is that of all ranks.
- The half of L7 and L8 that is about states off the block grid: a chunk is whole.
- The half of L13 about what a grant holds: a verdict is not a grant; what is gone when it is loaded is reported by its key.
"""

from __future__ import annotations

import os
import pathlib
import random
import threading
import time
import types
from collections.abc import Iterator

import numpy as np
import pytest

pytest.importorskip("vllm")

from vllm.v1.kv_offload.base import OffloadKey, ReqContext  # noqa: E402
from vllm.v1.kv_offload.tiering.base import TransferJob  # noqa: E402

import cases as table  # noqa: E402
from cases import L1, L2, L3, L4, L4_FILLED, L5, L10, L17, L18  # noqa: E402
from support import Node, within  # noqa: E402
from test_vllm_tier import ROW, Engine, key, spec, verdicts  # noqa: E402

#: Of the smallest group.
CHUNK_TOKENS = 32


@pytest.fixture
def engines() -> Iterator[list[Engine]]:
    made: list[Engine] = []
    yield made
    for engine in made:
        engine.close()


def make(node: Node, case: table.Case, slots: int = 8, **more: object) -> Engine:
    """An engine of the case's groups, whose configuration says which have windows."""
    groups = tuple(
        types.SimpleNamespace(
            tokens_per_block=CHUNK_TOKENS // 2 * group.size,
            layer_names=(f"layer.{at}",),
            group_id=at,
            sliding_window_size_in_chunks=group.window or None,
        )
        for at, group in enumerate(case.groups)
    )
    return Engine(node, slots, spec(groups=groups), **more)


def put(engine: Engine, group: int, chunks: list[int]) -> dict[OffloadKey, bytes]:
    data = {key(at, group): os.urandom(ROW) for at in chunks}
    if data:
        assert all(engine.tier._stores.put({one: memoryview(content) for one, content in data.items()}).values())
    return data


COUNT = iter(range(1 << 20))


def hits(engine: Engine, case: table.Case) -> set[OffloadKey]:
    """The case's prompt in a request of its own."""
    asked = []
    for at, group in enumerate(case.groups):
        chunks = list(range(case.pages // group.size))
        asked.append([key(chunk, at) for chunk in (reversed(chunks) if group.window else chunks)])
    sizes = [group.size for group in case.groups]
    return verdicts(engine, f"r{next(COUNT)}", *asked, sizes=sizes)


def expected(case: table.Case) -> set[OffloadKey]:
    """What the best length needs of each group; of a window, one chunk more may be a hit where it is stored."""
    wanted: set[OffloadKey] = set()
    for at, group in enumerate(case.groups):
        first = 0 if not group.window else max(0, case.best - group.window - 1)
        wanted |= {key(chunk, at) for chunk in group.stored if first <= chunk and chunk * group.size < case.best}
    return wanted


def check(node: Node, engines: list[Engine], case: table.Case) -> Engine:
    engine = make(node, case)
    engines.append(engine)
    for at, group in enumerate(case.groups):
        put(engine, at, list(group.stored))
    assert hits(engine, case) == expected(case)
    return engine


def test_l1_plain_history(node: Node, engines: list[Engine]) -> None:
    check(node, engines, L1)


def test_l2_window_hole(node: Node, engines: list[Engine]) -> None:
    check(node, engines, L2)


def test_l3_only_the_indexer_is_missing(node: Node, engines: list[Engine]) -> None:
    check(node, engines, L3)


def test_l4_state_newer_than_history(node: Node, engines: list[Engine]) -> None:
    engine = check(node, engines, L4)
    put(engine, 0, list(range(12, 16)))
    assert hits(engine, L4_FILLED) == expected(L4_FILLED)


def test_l5_history_newer_than_state(node: Node, engines: list[Engine]) -> None:
    check(node, engines, L5)


def test_l6_fork_between_two_states(node: Node, engines: list[Engine]) -> None:
    engine = make(node, L4)
    engines.append(engine)
    put(engine, 0, list(range(12)))
    put(engine, 1, [5, 6, 7, 9, 10, 11])
    # Behind 10 the other branch has other keys.
    places = lambda chunks: [at if at < 10 else 100 + at for at in chunks]  # noqa: E731
    asked = [key(at, 0) for at in places(range(12))], [key(at, 1) for at in places(reversed(range(12)))]
    ends = {key(at, group): (place + 1) * CHUNK_TOKENS for group in (0, 1) for place, at in enumerate(places(range(12)))}
    assert verdicts(engine, "fork", *asked, ends=ends) == {key(at, 0) for at in range(8)} | {key(at, 1) for at in (5, 6, 7)}


def test_l7_prompt_shorter_than_a_chunk(node: Node, engines: list[Engine]) -> None:
    engine = check(node, engines, L1)
    assert verdicts(engine, "short") == set()


def test_l8_turn_end_off_the_chunk_boundary(node: Node, engines: list[Engine]) -> None:
    engine = check(node, engines, L1)
    # The last chunk has other tokens now, and another key: the whole ones before it stay.
    asked = [[key(at, group) for at in [*range(9), 109]] for group in (0, 1)]
    ends = {one: (place + 1) * CHUNK_TOKENS for keys in asked for place, one in enumerate(keys)}
    assert verdicts(engine, "next", *asked, ends=ends) == {key(at, group) for at in range(9) for group in (0, 1)}


def test_l10_snapshots(node: Node, engines: list[Engine]) -> None:
    check(node, engines, L10)


def load(engine: Engine, data: dict[OffloadKey, bytes]) -> set[OffloadKey]:
    """Has the tier load chunks, as a promotion; what it reports as loaded has the bytes that were stored."""
    keys = list(data)
    job = TransferJob(next(COUNT), keys, np.arange(len(keys), dtype=np.int32), True, ReqContext(req_id="load"))
    engine.tier.submit_load(job)
    (result,) = within(30, lambda: list(engine.tier.get_finished_jobs()))
    loaded = set(keys) if result.success else set(result.successful_keys or ())
    for slot, one in enumerate(keys):
        assert one not in loaded or engine.memory[slot, :ROW].tobytes() == data[one]
    return loaded


def test_l12_a_corrupt_state_falls_to_the_next_point(node: Node, engines: list[Engine]) -> None:
    engine = make(node, L4)
    engines.append(engine)
    put(engine, 0, list(range(16)))
    windows = put(engine, 1, [5, 6, 7, 13, 14, 15])
    node.kill()
    assert node.damage(windows[key(14, 1)][1000:1064]) == 1
    node.start()
    time.sleep(1.2)
    assert within(20, lambda: hits(engine, L4_FILLED)) == expected(L4_FILLED)
    last = {key(at, 1): windows[key(at, 1)] for at in (13, 14, 15)}
    assert load(engine, last) == {key(13, 1), key(15, 1)}
    fallen = table.Case((table.history(16), table.window(5, 6, 7, 13, 15)), 16, (8,))
    assert hits(engine, fallen) == expected(fallen)


def test_l13_what_expired_between_lookup_and_load_is_reported(tmp_path: pathlib.Path, engines: list[Engine]) -> None:
    node = Node(tmp_path / "short", "--codec", "raw", "--segment-mib", "16", "--ttl-s", "2", "2", "2", "2")
    try:
        engine = make(node, L1)
        engines.append(engine)
        data = put(engine, 0, list(range(6)))

        def gone() -> bool:
            # A use keeps what is stored: it is left alone meanwhile.
            time.sleep(8)
            return load(engine, data) == set()

        within(90, gone)
    finally:
        node.kill()


def test_l14_a_crash_leaves_chunks_whole_or_absent(node: Node, engines: list[Engine], rng: random.Random) -> None:
    engine = make(node, L1, slots=32)
    engines.append(engine)
    for round_ in range(4):
        data = {key(1000 * (round_ + 1) + at): os.urandom(ROW) for at in range(32)}
        crash = threading.Timer(rng.random() * 0.05, node.kill)
        crash.start()
        done = {one for one, there in engine.tier._stores.put({one: memoryview(data[one]) for one in data}).items() if there}
        crash.join()
        node.start()
        # What was answered is there, and nothing is there in part.
        within(20, lambda: load(engine, data) >= done and engine.tier._stores._of(0).healthy)


def test_l16_only_the_weights_differ(node: Node, engines: list[Engine]) -> None:
    check(node, engines, L1)
    other = make(node, L1, weights_revision="r2")
    engines.append(other)
    assert hits(other, L1) == set()


def test_l17_a_coarse_group_rounds_alone(node: Node, engines: list[Engine]) -> None:
    check(node, engines, L17)


def test_l18_nothing_required_is_stored(node: Node, engines: list[Engine]) -> None:
    check(node, engines, L18)
