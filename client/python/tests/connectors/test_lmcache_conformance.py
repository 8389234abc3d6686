"""The conformance cases of prefix lookup through the LMCache adapter: which objects a lookup locks, and what a load gives.

LMCache asks for objects and joins them to prefixes itself (windows, groups and ranks are known to it alone), so a case is expressed
where it is about what is there. Not expressed:
- L2, L4, L5, L10, L11, L17, L18: which length a window, a snapshot, an optional or a coarse group supports is LMCache's own arithmetic;
  here each of their objects is there or not, as in L3.
- L9, the whole prompt: LMCache asks for the chunks it wants.
- The half of L7 and L8 that is about states off the block grid: a chunk is whole.
"""

from __future__ import annotations

import pathlib
import random
import threading
import time
from collections.abc import Sequence

import pytest

pytest.importorskip("lmcache")

from lmcache.v1.distributed.api import ObjectKey  # noqa: E402

from cases import L1, L3  # noqa: E402
from support import Node, within  # noqa: E402
from test_lmcache import SIZE, Driver, drivers  # noqa: E402, F401

Where = tuple[int, int, int]  # chunk, group, rank


def make(node: Node, made: list[Driver], *places: Where, prompt: bytes = b"a", **more: object) -> Driver:
    """A driver whose objects are these."""
    driver = Driver(node, len(places), **more)
    made.append(driver)
    driver.keys = [key(place, prompt) for place in places]
    return driver


def key(place: Where, prompt: bytes = b"a") -> ObjectKey:
    chunk, group, rank = place
    return ObjectKey(prompt * 28 + chunk.to_bytes(4, "big"), "org/model", rank, group)


def chunks(pages: Sequence[int], group: int = 0, rank: int = 0) -> list[Where]:
    return [(at, group, rank) for at in pages]


def test_l1_plain_history(node: Node, drivers: list[Driver]) -> None:  # noqa: F811
    driver = make(node, drivers, *chunks(range(L1.pages + 1)))
    assert driver.store(0, L1.pages).is_successful()
    assert driver.lookup() == driver.load() == list(range(L1.best)) and driver.right(list(range(L1.best)))


def test_l3_only_the_indexer_is_missing(node: Node, drivers: list[Driver]) -> None:  # noqa: F811
    places = chunks(range(L3.pages)) + chunks(range(L3.pages), group=1)
    driver = make(node, drivers, *places)
    # The indexer's objects come last: five of them are stored.
    assert driver.store(0, L3.pages + L3.best).is_successful()
    assert driver.lookup() == driver.load() == list(range(L3.pages + L3.best))


def test_l6_fork_between_two_states(node: Node, drivers: list[Driver]) -> None:  # noqa: F811
    a = make(node, drivers, *chunks(range(12)))
    assert a.store().is_successful()
    b = make(node, drivers, *chunks(range(12)))
    b.keys = a.keys[:10] + [key(place, b"b") for place in chunks((10, 11))]
    assert b.lookup() == b.load() == list(range(10))


def test_l7_prompt_shorter_than_a_chunk(node: Node, drivers: list[Driver]) -> None:  # noqa: F811
    driver = make(node, drivers, *chunks(range(3)))
    assert driver.store().is_successful()
    driver.keys, driver.targets = [], []
    assert driver.lookup() == driver.load() == []


def test_l8_turn_end_off_the_chunk_boundary(node: Node, drivers: list[Driver]) -> None:  # noqa: F811
    driver = make(node, drivers, *chunks(range(10)))
    assert driver.store().is_successful()
    # The last chunk has other tokens now, and another key: the whole ones before it stay.
    driver.keys[9] = key((9, 0, 0), b"b")
    assert driver.lookup() == driver.load() == list(range(9))


def test_l12_a_corrupt_object_is_the_one_that_fails(node: Node, drivers: list[Driver]) -> None:  # noqa: F811
    driver = make(node, drivers, *chunks(range(4)), *chunks(range(4), group=1))
    assert driver.store().is_successful()
    node.kill()
    assert node.damage(driver.stored.view(-1, SIZE)[6][1000:1064].numpy().tobytes()) == 1
    node.start()
    within(20, lambda: len(driver.lookup()) >= 7)
    left = [0, 1, 2, 3, 4, 5, 7]
    assert driver.load() == left and driver.right(left)
    assert driver.lookup() == left


def test_l13_what_is_locked_outlives_what_would_expire(tmp_path: pathlib.Path, drivers: list[Driver]) -> None:  # noqa: F811
    node = Node(tmp_path / "short", "--codec", "raw", "--segment-mib", "16", "--ttl-s", "2", "2", "2", "2")
    try:
        locked, free = (make(node, drivers, *chunks(range(4)), prompt=prompt) for prompt in (b"a", b"b"))
        assert locked.store().is_successful() and locked.lookup() == [0, 1, 2, 3]
        time.sleep(12)
        assert locked.load() == [0, 1, 2, 3] and locked.right([0, 1, 2, 3])
        # The control: what nobody has locked is gone by then, as a whole.
        assert free.store().is_successful()
        time.sleep(12)
        assert free.load() == []
        locked.adapter.submit_unlock(locked.keys)

        def gone() -> bool:
            # A use keeps what is stored: it is left alone meanwhile.
            time.sleep(8)
            return locked.load() == []

        within(90, gone)
    finally:
        node.kill()


def test_l14_a_crash_leaves_objects_whole_or_absent(node: Node, drivers: list[Driver], rng: random.Random) -> None:  # noqa: F811
    for round_ in range(4):
        driver = make(node, drivers, *chunks(range(16)), prompt=bytes([round_]))
        crash = threading.Timer(rng.random() * 0.05, node.kill)
        crash.start()
        stored = driver.store().is_successful()
        crash.join()
        node.start()

        def loaded() -> list[list[int]]:
            there = driver.load()
            return [there] if driver.adapter.report_status()["reachable"] else []

        (there,) = within(20, loaded)
        assert driver.right(there) and (not stored or there == list(range(16)))


def test_l15_ranks_are_apart(node: Node, drivers: list[Driver]) -> None:  # noqa: F811
    one = make(node, drivers, *chunks(range(3)))
    assert one.store().is_successful()
    two = make(node, drivers, *chunks((0, 2), rank=1))
    assert two.store().is_successful()
    both = make(node, drivers, *chunks(range(3)), *chunks(range(3), rank=1))
    # All that each rank has, never only its greatest: LMCache intersects.
    assert both.lookup() == [0, 1, 2, 3, 5]


def test_l16_only_the_weights_differ(node: Node, drivers: list[Driver]) -> None:  # noqa: F811
    driver = make(node, drivers, *chunks(range(3)))
    assert driver.store().is_successful() and driver.lookup() == [0, 1, 2]
    other = make(node, drivers, *chunks(range(3)), weights_revision="r2")
    assert other.lookup() == other.load() == []
