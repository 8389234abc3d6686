"""The eighteen conformance cases of prefix lookup, through the Python client and a real node.

Where a group may be stored without the others, as connectors do, the case is told to `esker.resume` as well, which is what the
connectors decide by.
"""

from __future__ import annotations

import dataclasses
import pathlib
import random
import threading
import time

import pytest

import esker
from esker import Kind, Object
from esker.resume import Need, Presence, common, resume_points
from layouts import DSA, HYBRID, WINDOWED, blocks, fill, group, state
from support import Node, within


class Case:
    """A client, a namespace, and prompts."""

    def __init__(self, node: Node, layout: esker.Layout, weights: bytes = b"w" * 32) -> None:
        self.client = esker.Client(node.address)
        self.layout = layout
        self.namespace = self.client.register_namespace(weights=weights, tokenizer=b"t" * 32, layout=layout)

    def put(self, objects: list[Object], tokens: list[int]) -> list[esker.Put]:
        return self.client.put(self.namespace, objects, tokens=tokens)

    def found(self, tokens: list[int], grant: bool = False) -> esker.Found:
        return self.client.lookup(self.namespace, tokens, grant=grant)

    def points(self, tokens: list[int]) -> list[int]:
        return [point.tokens for point in self.found(tokens).resume_points]


def prompt(length: int, salt: int = 0) -> list[int]:
    return [(token * 7 + salt) % 50_000 for token in range(length)]


def pages(tokens: int, page: int = 128) -> list[bool]:
    return [True] * (tokens // page)


def test_l1_plain_history(node: Node) -> None:
    case = Case(node, DSA)
    case.put(blocks(DSA, 10), prompt(1300))
    found = case.found(prompt(1300))
    assert (found.history_tokens, found.tokens, found.replay_tokens) == (1280, 1280, 0)
    assert [found.resumable(at) for at in range(11)] == [True] * 10 + [False]


def test_l2_window_hole(node: Node) -> None:
    case = Case(node, WINDOWED)
    tokens = prompt(2100)
    case.put([*blocks(WINDOWED, 16), state(WINDOWED, 1024)], tokens)
    # The state at 2,048 arrives with half of its window: it is not there.
    half = state(WINDOWED, 2048)
    with pytest.raises((esker.InvalidRequest, ValueError)):
        case.put([Object(2048, [half.planes[0][:4096], half.planes[1]], Kind.STATE)], tokens)
    found = case.found(tokens)
    assert (found.history_tokens, found.tokens, found.replay_tokens) == (2048, 1024, 1024)
    assert {miss.reason for miss in found.misses} == {"no_state"}
    window = [start + 16 <= 1930 or start >= 1950 for start in range(0, 2048, 16)]
    carry = [end in (1024, 2048) for end in range(16, 2049, 16)]
    groups = [
        Presence(Need.HISTORY, 128, pages(2048)),
        Presence(Need.WINDOW, 16, window, 128),
        Presence(Need.SNAPSHOT, 16, carry),
    ]
    assert resume_points(groups, 128, 2048) == [1024]


def test_l3_only_the_indexer_is_missing(node: Node) -> None:
    case = Case(node, DSA)
    tokens = prompt(2100)
    case.put(blocks(DSA, 5), tokens)
    # A block whose indexer keys never come is not published.
    latent_only = [Object(768, [fill(DSA, Kind.BLOCK, 768)[1]])]
    with pytest.raises(ValueError, match="has 2 planes"):
        case.put(latent_only, tokens)
    found = case.found(tokens)
    assert (found.history_tokens, found.tokens) == (640, 640)
    assert {miss.group for miss in found.misses} >= {"indexer"}
    groups = [Presence(Need.HISTORY, 128, pages(2048)), Presence(Need.HISTORY, 128, pages(640))]
    assert resume_points(groups, 128, 2048)[-1] == 640


def test_l4_state_newer_than_history(node: Node) -> None:
    case = Case(node, WINDOWED)
    tokens = prompt(2100)
    case.put([*blocks(WINDOWED, 12), state(WINDOWED, 1024)], tokens)
    early = case.put([state(WINDOWED, 2048)], tokens)[0]
    assert case.points(tokens) == [1024]
    case.put(blocks(WINDOWED, 16, first=12), tokens)
    if not early.stored:
        assert case.put([state(WINDOWED, 2048)], tokens)[0].stored
    assert case.points(tokens) == [2048, 1024]


def test_l5_history_newer_than_state(node: Node) -> None:
    case = Case(node, WINDOWED)
    tokens = prompt(4200)
    case.put([*blocks(WINDOWED, 32), state(WINDOWED, 1024)], tokens)
    found = case.found(tokens)
    assert (found.history_tokens, found.tokens, found.replay_tokens) == (4096, 1024, 3072)


def test_l6_fork_between_two_states(node: Node) -> None:
    case = Case(node, WINDOWED)
    a = prompt(1700)
    b = a[:1300] + prompt(400, salt=3)
    case.put([*blocks(WINDOWED, 12), state(WINDOWED, 1024), state(WINDOWED, 1536)], a)
    found = case.found(b)
    assert found.history_tokens >= 1280
    assert [point.tokens for point in found.resume_points] == [1024]


@pytest.mark.parametrize("layout", [WINDOWED, DSA], ids=lambda layout: layout.name)
def test_l7_prompt_shorter_than_a_block(node: Node, layout: esker.Layout) -> None:
    case = Case(node, layout)
    found = case.found(prompt(100))
    assert (found.history_tokens, found.tokens) == (0, 0) and not found.resume_points
    # A state off the grid brings the rows of its tokens along.
    case.put([state(layout, 90)], prompt(90))
    found = case.found(prompt(100), grant=True)
    assert (found.history_tokens, found.tokens, found.replay_tokens) == (0, 90, 0)
    fetched = case.client.fetch(case.namespace, found.grant)
    assert fetched.whole == {(Kind.STATE, 90)} and fetched.usable_tokens == 90
    planes = [bytes(plane) for _, plane in sorted(fetched.objects[Kind.STATE, 90].items())]
    assert planes == fill(layout, Kind.STATE, 90)
    assert [len(plane) for plane in planes] == [plane.len_bytes for plane in layout.planes(Kind.STATE, 90)]
    used = case.client.settle(f"l7 {layout.name}", grant=found.grant, used_tokens=90, computed_tokens=10)
    assert used.cached_tokens == 90
    # Other tokens, or none left to compute: nothing, and nothing is rounded.
    assert case.points([*prompt(89), 49_999, *prompt(10)]) == []
    assert case.points(prompt(90)) == []


def test_l8_turn_end_off_the_block_boundary(node: Node) -> None:
    case = Case(node, WINDOWED)
    turn = prompt(1901)
    case.put([*blocks(WINDOWED, 14), state(WINDOWED, 1792), state(WINDOWED, 1900)], turn)
    assert case.points(turn + prompt(200, salt=5)) == [1900, 1792]
    following = turn[:1899] + [49_999] + prompt(200, salt=5)
    assert case.points(following) == [1792]
    # By hashes, with the tokens behind the last of them.
    hashes = case.client.lookup(case.namespace, turn, grant=False, want_hashes=True).hashes
    found = case.client.lookup(case.namespace, hashes=hashes, tail_tokens=turn[1792:], grant=False)
    assert found.tokens == 1900
    with pytest.raises(ValueError, match="at 1850 tokens"):
        case.put([Object(1850, state(WINDOWED, 1900).planes, Kind.STATE)], turn)


def test_l9_whole_prompt_stored(node: Node) -> None:
    case = Case(node, WINDOWED)
    case.put([*blocks(WINDOWED, 16), state(WINDOWED, 1920), state(WINDOWED, 2048)], prompt(2048))
    assert case.points(prompt(2048)) == [1920]
    assert case.points(prompt(2049)) == [2048, 1920]


def test_l10_snapshots(node: Node) -> None:
    case = Case(node, HYBRID)
    tokens = prompt(16_400)
    case.put([*blocks(HYBRID, 128), state(HYBRID, 4096), state(HYBRID, 12_288)], tokens)
    found = case.found(tokens)
    assert [point.tokens for point in found.resume_points] == [12_288, 4096]
    assert found.replay_tokens == 4096
    assert {point.bytes_by_group["recurrent"] for point in found.resume_points} == {4096 * 64}


def test_l11_an_optional_group_never_gates(node: Node) -> None:
    optional = dataclasses.replace(group("draft", "state", 4, order=9), optional=True)
    layout = esker.Layout("drafted", 128, (group("latent", "history", 128), group("window", "state", 8), optional))
    case = Case(node, layout)
    window, draft = fill(layout, Kind.STATE, 256)
    case.put([*blocks(layout, 2), Object(256, [window, b""], Kind.STATE)], prompt(300))
    found = case.found(prompt(300), grant=True)
    assert [(point.tokens, point.missing_optional) for point in found.resume_points] == [(256, ("draft",))]
    fetched = case.client.fetch(case.namespace, found.grant)
    assert (Kind.STATE, 256) in fetched.whole
    assert [bytes(plane) for _, plane in sorted(fetched.objects[Kind.STATE, 256].items())] == [window, b""]

    draft = Presence(Need.WINDOW, 128, pages(1024), 128, required=False)
    groups = [Presence(Need.HISTORY, 128, pages(1536)), Presence(Need.WINDOW, 128, pages(1536), 128), draft]
    assert resume_points(groups, 128, 1536)[-1] == 1536
    assert not draft.supports(1536)


def test_l12_a_corrupt_state_falls_to_the_next_point(node: Node) -> None:
    case = Case(node, WINDOWED)
    tokens = prompt(1700)
    case.put([*blocks(WINDOWED, 13), state(WINDOWED, 1024), state(WINDOWED, 1536)], tokens)
    node.kill()
    assert node.damage(fill(WINDOWED, Kind.STATE, 1536)[0][:64]) == 1
    node.start()
    found = within(10, lambda: case.found(tokens, grant=True))
    assert [point.tokens for point in found.resume_points] == [1536, 1024]
    fetched = case.client.fetch(case.namespace, found.grant, 1536)
    assert [(missing.kind, missing.tokens) for missing in fetched.missing] == [(Kind.STATE, 1536)]
    assert (Kind.STATE, 1536) not in fetched.whole
    # The same grant, the next point.
    fetched = case.client.fetch(case.namespace, found.grant, 1024)
    assert not fetched.missing and fetched.usable_tokens == 1024
    assert [bytes(plane) for _, plane in sorted(fetched.objects[Kind.STATE, 1024].items())] == fill(
        WINDOWED, Kind.STATE, 1024
    )
    assert case.points(tokens) == [1024]


def test_l13_a_grant_outlives_what_would_expire(tmp_path: pathlib.Path) -> None:
    node = Node(tmp_path / "data", "--codec", "raw", "--segment-mib", "16", "--ttl-s", "2", "2", "2", "2")
    try:
        case = Case(node, DSA)
        tokens = prompt(600)
        case.put(blocks(DSA, 4), tokens)
        held = case.found(tokens, grant=True)
        assert held.tokens == 512
        end = time.monotonic() + 6
        while time.monotonic() < end:
            fetched = case.client.fetch(case.namespace, held.grant)
            assert fetched.usable_tokens == 512 and not fetched.missing
            time.sleep(1)
        case.client.release(held.grant)
        with pytest.raises(esker.NotFound):
            case.client.fetch(case.namespace, held.grant)
        within(30, lambda: case.found(tokens).tokens == 0, every=0.5)
    finally:
        node.kill()


def test_l14_a_crash_leaves_objects_whole_or_absent(node: Node, rng: random.Random) -> None:
    case = Case(node, WINDOWED)
    for round_ in range(6):
        tokens = prompt(4000, salt=round_ + 1)
        objects = [object for at in range(30) for object in (blocks(WINDOWED, at + 1, at)[0], state(WINDOWED, (at + 1) * 128))]
        acknowledged = 0
        crash = threading.Timer(rng.random() * 0.08, node.kill)
        crash.start()
        try:
            acknowledged = sum(result.stored for result in case.client.put(case.namespace, objects, tokens=tokens))
        except esker.EskerError as error:
            assert error.retry
        crash.join()
        node.start()
        found = within(10, lambda: _quiet(lambda: case.found(tokens, grant=True)))
        assert acknowledged in (0, len(objects))
        for point in found.resume_points:
            fetched = case.client.fetch(case.namespace, found.grant, point.tokens)
            assert not fetched.missing and fetched.usable_tokens == point.tokens
            for (kind, at), planes in fetched.objects.items():
                assert [bytes(plane) for _, plane in sorted(planes.items())] == fill(WINDOWED, kind, at)


def test_l15_ranks_intersect(node: Node) -> None:
    tokens = prompt(1700)
    ranks = [Case(node, WINDOWED, bytes([rank] * 32)) for rank in (1, 2)]
    for case, kept in zip(ranks, ([512, 1024, 1536], [512, 1536])):
        case.put([*blocks(WINDOWED, 13), *(state(WINDOWED, at) for at in kept)], tokens)
    answers = [case.found(tokens) for case in ranks]
    sets = [[at * 128 for at in range(1, 14) if answer.resumable(at - 1)] for answer in answers]
    assert common(sets) == [512, 1536]
    # Had each rank told its greatest alone, 1,536 would stand alone: the shorter one would be lost.
    assert common([[answer.tokens] for answer in answers]) == [1536]


def test_l16_only_the_weights_differ(node: Node) -> None:
    case = Case(node, DSA)
    case.put(blocks(DSA, 4), prompt(600))
    other = Case(node, DSA, b"v" * 32)
    found = other.found(prompt(600))
    assert found.tokens == 0 and {miss.reason for miss in found.misses} == {"absent"}


def test_l17_a_coarse_group_rounds_alone(node: Node) -> None:
    groups = [Presence(Need.HISTORY, 128, pages(1920)), Presence(Need.HISTORY, 512, pages(1920, 512))]
    assert groups[1].closed_tokens() == 1536
    assert resume_points(groups, 128, 1999)[-2:] == [1408, 1536]


def test_l18_nothing_required_is_stored(node: Node) -> None:
    assert resume_points([Presence(Need.WINDOW, 128, pages(1024), 128, required=False)], 128, 1024) == []
    case = Case(node, WINDOWED)
    # A state alone, without the history that it needs.
    case.put([state(WINDOWED, 512)], prompt(600))
    assert case.points(prompt(600)) == []


def _quiet(work):  # type: ignore[no-untyped-def]
    try:
        return work()
    except esker.EskerError as error:
        assert error.retry, error
        return None


