"""What needs no node: layouts, the wire by hand, buffers, resume points."""

from __future__ import annotations

import random

import grpc
import numpy as np
import pytest

import esker
from esker import Dtype, Field, Group, Kind, Layout
from esker.buffers import Scatter, flat
from esker.errors import ProtocolError, from_rpc
from esker.resume import Need, Presence, common, resume_points
from esker.wire import MAX_CHUNK_BYTES, PlaneChunk, message, message_class, put_chunks, read_fetch_reply
from layouts import DSA, WINDOWED


def test_a_layout_knows_what_varies() -> None:
    runs = Group("pending", "state", (0,), 3, (Field("row", Dtype.U8, 2),), 5, 1, run_tokens=4)
    coarse = Group("coarse", "history", (0,), 4, (Field("row", Dtype.U8, 2),), 5, 1, grain_blocks=2)
    layout = Layout("varied", 128, (*WINDOWED.groups, runs, coarse))
    assert Layout.from_json(layout.to_json()) == layout
    assert "run_tokens" not in WINDOWED.to_json() and '"run_tokens":4' in layout.to_json()
    assert [plane.len_bytes for plane in layout.planes(Kind.BLOCK, 128)][-1] == 0
    assert [plane.len_bytes for plane in layout.planes(Kind.BLOCK, 256)][-1] == 4 * 2
    # On the grid no run is open; behind it 3 of 4 tokens are, and the rows of 91 come along, rounded up.
    assert [plane.len_bytes for plane in layout.planes(Kind.STATE, 256)][-1] == 0
    tail = layout.planes(Kind.STATE, 256 + 91)
    assert [plane.group for plane in tail] == ["window", "carry", "pending", "indexer", "csa", "coarse"]
    assert [plane.len_bytes for plane in tail][2:] == [3 * 2, 23 * 64, 2 * 23 * 64, 2 * 2]
    assert layout.object_bytes(Kind.STATE, 256 + 91) == sum(plane.len_bytes for plane in tail)


def test_layouts_survive_json_and_cut_planes_in_restore_order() -> None:
    assert Layout.from_json(WINDOWED.to_json()) == WINDOWED
    assert [plane.group for plane in DSA.planes(Kind.BLOCK)] == ["indexer", "latent"]
    assert [plane.group for plane in WINDOWED.planes(Kind.STATE)] == ["window", "carry"]
    assert DSA.object_bytes(Kind.BLOCK) == 3 * 128 * 64
    opaque = Layout.opaque("o", 16, [4096] * 10 + [100])
    assert opaque.object_bytes(Kind.BLOCK) == 41_060 and len(opaque.planes(Kind.BLOCK)) == 2


def test_chunks_by_hand_are_what_protobuf_reads_and_writes(rng: random.Random) -> None:
    for _ in range(200):
        size = rng.choice([0, 1, 100, MAX_CHUNK_BYTES, MAX_CHUNK_BYTES + 1, 2 * MAX_CHUNK_BYTES + 7])
        data = rng.randbytes(size)
        cut = sorted(rng.randrange(size + 1) for _ in range(3))
        parts = [memoryview(data)[a:b] for a, b in zip([0, *cut], [*cut, size])]
        tokens, plane = rng.randrange(1 << 40), rng.randrange(3)
        together = b""
        for raw in put_chunks(1, tokens, plane, parts):
            chunk = message_class("PutRequest").FromString(raw).chunk
            assert (chunk.kind, chunk.tokens, chunk.plane, chunk.plane_bytes) == (1, tokens, plane, size)
            assert chunk.offset == len(together) and len(chunk.data) <= MAX_CHUNK_BYTES
            together += chunk.data
            reply = message("FetchReply", chunk=chunk).SerializeToString()
            read = read_fetch_reply(reply)
            assert isinstance(read, PlaneChunk)
            assert (read.tokens, read.plane, read.offset, bytes(read.data)) == (tokens, plane, chunk.offset, chunk.data)
            if size < 200:
                for end in range(2, len(reply)):
                    with pytest.raises(ProtocolError):
                        read_fetch_reply(reply[:end])
        assert together == data
    done = message("FetchReply", done=message("FetchDone", planes=3)).SerializeToString()
    assert read_fetch_reply(done).done.planes == 3


def test_memory_is_used_and_not_copied() -> None:
    array = np.zeros((4, 8), dtype=np.float32)
    view = flat(array, writable=True)
    view[0] = 255
    assert view.nbytes == 128 and array.view(np.uint8)[0, 0] == 255
    with pytest.raises(ValueError, match="not contiguous"):
        flat(array.T)
    with pytest.raises(ValueError, match="cannot be written"):
        flat(b"123", writable=True)
    pieces = [bytearray(3), bytearray(0), bytearray(5)]
    scatter = Scatter(memoryview(piece) for piece in pieces)
    scatter.write(2, memoryview(b"abcd"))
    assert pieces == [bytearray(b"\0\0a"), bytearray(), bytearray(b"bcd\0\0")]


def oracle(groups: list[Presence], block: int, limit: int) -> list[int]:
    """Rule 2, said directly: a row is there if its page is."""

    def has(group: Presence, first: int, end: int) -> bool:
        rows = range(max(0, first), end)
        return all(r // group.page_tokens < len(group.present) and group.present[r // group.page_tokens] for r in rows)

    def supports(group: Presence, n: int) -> bool:
        if group.need is Need.HISTORY:
            return has(group, 0, n)
        if group.need is Need.WINDOW:
            return has(group, n - group.window_tokens, n)
        return n % group.page_tokens == 0 and has(group, n - 1, n)

    required = [group for group in groups if group.required]
    return [
        n for n in range(block, limit + 1, block) if required and all(supports(group, n) for group in required)
    ]


def test_resume_points_equal_the_brute_force_model(rng: random.Random) -> None:
    for _ in range(4_000):
        groups = []
        for _ in range(rng.randrange(1, 5)):
            page = rng.choice([1, 2, 4, 8, 16])
            chance = rng.choice([0.5, 0.8, 0.95, 1.0])
            present = [rng.random() < chance for _ in range(rng.randrange(0, 64 // page + 1))]
            need = rng.choice(list(Need))
            groups.append(Presence(need, page, present, rng.randrange(1, 20), required=rng.random() < 0.8))
        block, limit = rng.choice([1, 4, 8]), rng.randrange(0, 64)
        assert resume_points(groups, block, limit) == oracle(groups, block, limit), (groups, block, limit)


def test_ranks_have_in_common_what_each_of_them_has() -> None:
    assert common([[512, 1024, 1536], [512, 1536]]) == [512, 1536]
    assert common([[512, 1536], [1024]]) == [] and common([]) == []


class Refused(grpc.RpcError):
    """What gRPC reports of a call that the node refused."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        self._code, self._details = code, details

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._details


def test_who_is_refused_amid_an_erasure_is_told_what_to_do() -> None:
    said = "the tenant is being erased; try again after that"
    error = from_rpc(Refused(grpc.StatusCode.ABORTED, said), "node:7410")
    assert isinstance(error, esker.Conflict) and not error.retry
    told = "node:7410: the tenant is being erased; try again after that"
    assert str(error) == f"{told} (look the prefix up again, put what is missing, and begin anew)"
    # Where the node's own words say all there is to do, nothing is added.
    assert str(from_rpc(Refused(grpc.StatusCode.ALREADY_EXISTS, said), "node:7410")) == told
