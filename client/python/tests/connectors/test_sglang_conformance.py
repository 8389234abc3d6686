"""The conformance cases of prefix lookup through the SGLang backend: the lengths that `batch_exists_v2` calls restorable.

Not expressed:
- L9, the whole prompt: SGLang asks for the pages it wants; the last token is its own affair.
- L17, a coarse group: all pools have one page size.
- The half of L7 and L8 that is about states off the block grid: a page is whole.
- The half of L13 about what a grant holds: what is gone between the question and the load is a page that is False.
"""

from __future__ import annotations

import pathlib
import random
import threading
import time

import pytest

pytest.importorskip("sglang")

import torch  # noqa: E402
from sglang.srt.mem_cache.hicache_storage import PoolHitPolicy, PoolName, PoolTransfer  # noqa: E402

import cases as table  # noqa: E402
from cases import L1, L2, L3, L4, L4_FILLED, L5, L10, L18  # noqa: E402
from esker.resume import common  # noqa: E402
from support import Node, within  # noqa: E402
from test_sglang import PAGE, PAGES, Rank, keys, ranks  # noqa: E402, F401


def pool(group: table.Group, at: int) -> PoolName:
    """Which pool stands for a group of a case."""
    return PoolName.SWA if group.window else (PoolName.KV, PoolName.INDEXER)[at]


def put(rank: Rank, group: table.Group, at: int, names: list[str]) -> None:
    """Stores the group's pages, each from a page of the pool."""
    stored = list(group.stored)
    if stored:
        where = pool(group, at)
        wrote = rank.backend.batch_set_v2([rank.transfer(where, [names[one] for one in stored], [one % PAGES for one in stored])])
        assert wrote == {where: [True] * len(stored)}


def points(rank: Rank, case: table.Case, names: list[str]) -> list[int]:
    transfers = [
        PoolTransfer(
            name=pool(group, at),
            keys=names[-group.window :] if group.window else names,
            hit_policy=PoolHitPolicy.TRAILING_PAGES if group.window else PoolHitPolicy.ALL_PAGES,
        )
        for at, group in enumerate(case.groups)
        if at > 0
    ]
    found = rank.backend.batch_exists_v2(names, transfers)
    assert found.kv_hit_pages == max(found.restorable_prefix_pages or [0])
    return list(found.restorable_prefix_pages or [])


def check(node: Node, made: list[Rank], case: table.Case) -> tuple[Rank, list[str]]:
    rank = Rank(node)
    made.append(rank)
    rank.fill(1)
    names = keys(case.pages)
    for at, group in enumerate(case.groups):
        put(rank, group, at, names)
    assert points(rank, case, names) == list(case.points)
    return rank, names


def test_l1_plain_history(node: Node, ranks: list[Rank]) -> None:  # noqa: F811
    check(node, ranks, L1)


def test_l2_window_hole(node: Node, ranks: list[Rank]) -> None:  # noqa: F811
    check(node, ranks, L2)


def test_l3_only_the_indexer_is_missing(node: Node, ranks: list[Rank]) -> None:  # noqa: F811
    check(node, ranks, L3)


def test_l4_state_newer_than_history(node: Node, ranks: list[Rank]) -> None:  # noqa: F811
    rank, names = check(node, ranks, L4)
    put(rank, table.Group(range(12, 16)), 0, names)
    assert points(rank, L4_FILLED, names) == list(L4_FILLED.points)


def test_l5_history_newer_than_state(node: Node, ranks: list[Rank]) -> None:  # noqa: F811
    check(node, ranks, L5)


def test_l6_fork_between_two_states(node: Node, ranks: list[Rank]) -> None:  # noqa: F811
    both = table.Case((table.history(12), table.window(5, 6, 7, 9, 10, 11)), 12, (8, 12))
    rank, names = check(node, ranks, both)
    # Behind 10 pages the other branch has other keys.
    assert points(rank, both, names[:10] + keys(2, "f")) == [8]


def test_l7_prompt_shorter_than_a_page(node: Node, ranks: list[Rank]) -> None:  # noqa: F811
    rank, _ = check(node, ranks, L1)
    assert points(rank, L1, []) == [] and rank.backend.batch_exists([]) == 0


def test_l8_turn_end_off_the_page_boundary(node: Node, ranks: list[Rank]) -> None:  # noqa: F811
    rank, names = check(node, ranks, L1)
    # The last page has other tokens now, and another key: the whole ones before it stay.
    assert points(rank, L1, [*names[:9], "f" * 64]) == list(range(1, 10))


def test_l10_snapshots(node: Node, ranks: list[Rank]) -> None:  # noqa: F811
    check(node, ranks, L10)


def test_l11_an_optional_group_never_gates(node: Node, ranks: list[Rank]) -> None:  # noqa: F811
    rank, names = check(node, ranks, L1)
    optional = PoolTransfer(name=PoolName.SWA, keys=names, hit_policy=PoolHitPolicy.BLOCK_GROUPS, block_pages=1, group_pages=1)
    found = rank.backend.batch_exists_v2(names, [optional])
    assert found.kv_hit_pages == 10 and PoolName.SWA not in found.extra_pool_hit_pages


def load(rank: Rank, where: PoolName, names: list[str], pages: list[int]) -> list[bool]:
    """Loads pages to where they came from."""
    return rank.backend.batch_get_v2([rank.transfer(where, [names[at] for at in pages], pages)])[where]


def test_l12_a_corrupt_state_falls_to_the_next_point(node: Node, ranks: list[Rank]) -> None:  # noqa: F811
    rank, names = check(node, ranks, L4_FILLED)
    before = {at: rank.page(PoolName.SWA, at) for at in (13, 14, 15)}
    node.kill()
    assert node.damage(before[14][1000:1064].numpy().tobytes()) == 1
    node.start()
    time.sleep(1.2)
    assert within(20, lambda: points(rank, L4_FILLED, names)) == [8, 16]
    rank.clear()
    assert load(rank, PoolName.SWA, names, [13, 14, 15]) == [True, False, True]
    assert all(torch.equal(rank.page(PoolName.SWA, at), before[at]) for at in (13, 15))
    assert points(rank, L4_FILLED, names) == [8]


def test_l13_what_expired_between_lookup_and_load_is_false(tmp_path: pathlib.Path, ranks: list[Rank]) -> None:  # noqa: F811
    node = Node(tmp_path / "short", "--codec", "raw", "--segment-mib", "16", "--ttl-s", "2", "2", "2", "2")
    try:
        rank, names = check(node, ranks, L1)

        def gone() -> bool:
            # A use keeps what is stored: it is left alone meanwhile.
            time.sleep(8)
            return not any(load(rank, PoolName.KV, names, list(range(10))))

        within(90, gone)
        assert points(rank, L1, names) == []
    finally:
        node.kill()


def test_l14_a_crash_leaves_pages_whole_or_absent(node: Node, ranks: list[Rank], rng: random.Random) -> None:  # noqa: F811
    rank = Rank(node)
    ranks.append(rank)
    for round_ in range(4):
        rank.fill(round_)
        names = keys(PAGES, f"{round_ + 1}")
        before = {at: rank.page(PoolName.KV, at) for at in range(PAGES)}
        indices = torch.arange(PAGES * PAGE)
        crash = threading.Timer(rng.random() * 0.05, node.kill)
        crash.start()
        done = rank.backend.batch_set_v1(names, indices)
        crash.join()
        node.start()
        rank.clear()

        def loaded() -> list[bool] | None:
            there = rank.backend.batch_get_v1(names, indices)
            return there if rank.backend._pools["kv"].store("pages").healthy else None

        there = within(20, loaded)
        # What was answered is there, and nothing is there in part.
        assert all(is_there or not was for is_there, was in zip(there, done))
        assert all(torch.equal(rank.page(PoolName.KV, at), before[at]) for at in range(PAGES) if there[at])


def test_l15_ranks_intersect(node: Node, ranks: list[Rank]) -> None:  # noqa: F811
    names = keys(12)
    both = table.Case((table.history(12), table.window(3, 7, 11, of=1)), 12, (4, 8, 12))
    answers = []
    for number, kept in enumerate(([3, 7, 11], [3, 11])):
        rank = Rank(node, rank=number, ranks=2, mla=False)
        ranks.append(rank)
        rank.fill(number)
        put(rank, both.groups[0], 0, names)
        put(rank, table.window(*kept, of=1), 1, names)
        answers.append(points(rank, both, names))
    assert answers == [[4, 8, 12], [4, 12]] and common(answers) == [4, 12]


def test_l16_only_the_weights_differ(node: Node, ranks: list[Rank]) -> None:  # noqa: F811
    _, names = check(node, ranks, L1)
    other = Rank(node, weights_revision="r2")
    ranks.append(other)
    assert points(other, L1, names) == []


def test_l18_nothing_required_is_stored(node: Node, ranks: list[Rank]) -> None:  # noqa: F811
    check(node, ranks, L18)
