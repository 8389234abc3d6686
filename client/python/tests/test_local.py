"""The local fast path: the same calls with payload through shared memory, and nothing that a dead or greedy side does breaks it."""

from __future__ import annotations

import asyncio
import os
import pathlib
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

import esker
from esker import Kind, Object, Outcome, buffers, calls
from esker.buffers import Ended
from esker.chunks import ChunkStore
from esker.connectors.identity import identity
from esker.local import Arena, PutRoom
from layouts import DSA, WINDOWED, blocks, fill, state
from support import Node, within


@pytest.fixture
def local(tmp_path: pathlib.Path) -> Iterator[tuple[Node, str]]:
    path = str(tmp_path / "s")
    node = Node(tmp_path / "data", "--codec", "raw", "--segment-mib", "64", "--capacity", "2GiB", "--local", path)
    yield node, f"unix:{path}"
    node.kill()


def register(client: esker.Client, layout: esker.Layout = DSA) -> esker.Namespace:
    return client.register_namespace(weights=b"w" * 32, tokenizer=b"t" * 32, layout=layout)


def test_what_is_put_comes_back_through_shared_memory(local: tuple[Node, str]) -> None:
    _, address = local
    with esker.Client(address) as client:
        namespace = register(client)
        tokens = list(range(1000))
        assert [one.outcome for one in client.put(namespace, blocks(DSA, 7), tokens=tokens)] == [Outcome.STORED] * 7
        assert client._arena is not None, "payload went through the arena"
        found = client.lookup(namespace, tokens)
        size = DSA.object_bytes(Kind.BLOCK)
        memory = bytearray(7 * size)
        fetched = client.fetch(namespace, found.grant, into=memory)
        assert fetched.usable_tokens == 896 and len(fetched.whole) == 7
        assert memory == b"".join(b"".join(fill(DSA, Kind.BLOCK, (at + 1) * 128)) for at in range(7))
        assert set(client.fetch(namespace, found.grant, blocks=[2]).objects) == {(Kind.BLOCK, 384)}
        # What the one path stored the other finds.
        with esker.Client(local[0].address) as remote:
            assert remote.lookup(register(remote), tokens, grant=False).tokens == 896
        states = register(client, WINDOWED)
        client.put(states, [*blocks(WINDOWED, 4), state(WINDOWED, 512)], tokens=tokens[:600])
        found = client.lookup(states, tokens[:600])
        fetched = client.fetch(states, found.grant)
        assert [bytes(fetched.objects[Kind.STATE, 512][at]) for at in range(2)] == fill(WINDOWED, Kind.STATE, 512)


def test_more_than_the_arena_holds_and_many_at_a_time(local: tuple[Node, str]) -> None:
    client = esker.Client(local[1])
    chunks = ChunkStore(client, identity("test", "one", "", {}), "test", 1 << 20)
    keys = [os.urandom(32) for _ in range(96)]
    data = {at: os.urandom(1 << 20) for at in range(96)}
    assert all(chunks.put(keys, data).values())
    memory = {at: bytearray(1 << 20) for at in range(96)}
    wrong: list[int] = []

    def load(first: int) -> None:
        some = {at: memory[at] for at in range(first, 96, 3)}
        loaded = chunks.get(keys, some)
        wrong.extend(at for at in some if not loaded[at] or memory[at] != data[at])

    threads = [threading.Thread(target=load, args=(first,)) for first in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and chunks.counters.errors == 0


def test_a_put_asks_first_only_after_something_was_there(
    local: tuple[Node, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    client = esker.Client(local[1])
    for chained in (False, True):
        chunks = ChunkStore(client, identity("test", "asks", "", {}), f"asks {chained}", 50_000, chained=chained)
        keys, data = [os.urandom(32) for _ in range(8)], {at: os.urandom(50_000) for at in range(8)}
        lookups: list[int] = []
        lookup = client.lookup
        monkeypatch.setattr(client, "lookup", lambda *args, **named: (lookups.append(1), lookup(*args, **named))[1])

        def asked(positions: range) -> int:
            lookups.clear()
            assert all(chunks.put(keys, {at: data[at] for at in positions}).values())
            return len(lookups)

        # Nothing is known; nothing was there; all of it is, which the node says; that is asked; some of it.
        assert [asked(range(*some)) for some in [(0, 2), (2, 4), (0, 4), (0, 4), (2, 6)]] == [1, 0, 0, 1, 1], chained
        # What another writer put there with other bytes is there, too.
        assert asked(range(6, 7)) == 1
        other = {7: os.urandom(50_000)}
        assert chunks.put(keys, {7: data[7]})[7] and chunks.put(keys, other)[7]
        memory = {at: bytearray(50_000) for at in range(8)}
        assert all(chunks.get(keys, memory).values()) and memory == data
        monkeypatch.undo()


def test_a_restarted_node_hands_out_a_new_arena(local: tuple[Node, str]) -> None:
    node, address = local
    chunks = ChunkStore(esker.Client(address), identity("test", "one", "", {}), "test", 50_000)
    keys, data = [os.urandom(32)], {0: os.urandom(50_000)}
    assert chunks.put(keys, data)[0]
    node.restart()
    memory = bytearray(50_000)
    assert within(20, lambda: chunks.get(keys, {0: memory})[0]) and memory == data[0]
    node.kill()
    assert not chunks.get(keys, {0: memory})[0] and not chunks.put([os.urandom(32)], data)[0]


def test_a_call_that_fails_leaves_the_others_their_arena(local: tuple[Node, str], monkeypatch: pytest.MonkeyPatch) -> None:
    client = esker.Client(local[1])
    namespace = register(client)
    tokens = range(2000)
    client.put(namespace, blocks(DSA, 15), tokens=tokens)
    chunks = ChunkStore(client, identity("test", "one", "", {}), "test", 1 << 20)
    keys, data = [os.urandom(32) for _ in range(96)], {at: os.urandom(1 << 20) for at in range(96)}
    assert all(chunks.put(keys, data).values())
    has_begun, goes_on = threading.Event(), threading.Event()
    read = Arena.read

    def slow(arena: Arena, filled: object, take: object) -> None:
        has_begun.set()
        goes_on.wait(20)
        read(arena, filled, take)

    def overdue() -> Iterator[Object]:
        yield from blocks(DSA, 1)
        time.sleep(1)

    memory = {at: bytearray(1 << 20) for at in range(96)}
    with ThreadPoolExecutor(1) as threads:
        with monkeypatch.context() as patched:
            patched.setattr(Arena, "read", slow)
            # More than fits in the arena: the node waits for the thread before it can go on.
            loading = threads.submit(chunks.get, keys, memory)
            assert has_begun.wait(10)
        with pytest.raises(esker.DeadlineExceeded):
            client.put(namespace, overdue(), tokens=range(5000, 5200), timeout_s=0.3)
        with pytest.raises(esker.NotFound):
            client.fetch(namespace, os.urandom(16))
        found = client.lookup(namespace, tokens)
        assert client.fetch(namespace, found.grant).usable_tokens == 15 * 128
        goes_on.set()
        assert all(loading.result().values()) and memory == data


def test_an_arena_is_given_back_with_its_last_call(local: tuple[Node, str]) -> None:
    arenas = [Arena(local[1].removeprefix("unix:")) for _ in range(8)]
    with pytest.raises(esker.LimitReached):
        Arena(local[1].removeprefix("unix:"))
    assert arenas[0].begin() and arenas[0].begin()
    arenas[0].close()
    arenas[0].end()
    assert not arenas[0].begin()
    with pytest.raises(esker.LimitReached):
        Arena(local[1].removeprefix("unix:"))
    arenas[0].end()
    within(10, lambda: _quiet(lambda: Arena(local[1].removeprefix("unix:")))).close()
    for arena in arenas[1:]:
        arena.close()


def test_damage_is_missing_here_too(local: tuple[Node, str]) -> None:
    node, address = local
    with esker.Client(address) as client:
        namespace = register(client)
        tokens = list(range(600))
        client.put(namespace, blocks(DSA, 4), tokens=tokens)
        node.kill()
        assert node.damage(fill(DSA, Kind.BLOCK, 384)[1][:64]) == 1
        node.start()
        found = within(20, lambda: _quiet(lambda: client.lookup(namespace, tokens)))
        if found.tokens == 512:
            fetched = within(20, lambda: _quiet(lambda: client.fetch(namespace, found.grant)))
            assert (Kind.BLOCK, 384) not in fetched.whole and fetched.usable_tokens == 256


def test_asyncio_takes_the_same_path(local: tuple[Node, str]) -> None:
    async def work() -> None:
        async with esker.AsyncClient(local[1]) as client:
            namespace = await client.register_namespace(weights=b"w" * 32, tokenizer=b"t" * 32, layout=DSA)
            tokens = list(range(600))
            assert all(one.stored for one in await client.put(namespace, blocks(DSA, 4), tokens=tokens))
            found = await client.lookup(namespace, tokens)
            memory = bytearray(4 * DSA.object_bytes(Kind.BLOCK))
            assert (await client.fetch(namespace, found.grant, into=memory)).usable_tokens == 512
            assert memory[-64:] == fill(DSA, Kind.BLOCK, 512)[1][-64:]

    asyncio.run(work())


def test_a_cancelled_fetch_writes_nothing_any_more(local: tuple[Node, str]) -> None:
    has_begun = threading.Event()
    memory = bytearray(4 * DSA.object_bytes(Kind.BLOCK))
    planes = [spec.len_bytes for spec in DSA.planes(Kind.BLOCK)]

    def slow(kind: Kind, tokens: int, plane: int) -> memoryview:
        has_begun.set()
        time.sleep(0.2)
        at = (tokens // 128 - 1) * sum(planes) + sum(planes[:plane])
        return memoryview(memory)[at : at + planes[plane]]

    async def work() -> None:
        async with esker.AsyncClient(local[1]) as client:
            namespace = await client.register_namespace(weights=b"w" * 32, tokenizer=b"t" * 32, layout=DSA)
            tokens = list(range(600))
            await client.put(namespace, blocks(DSA, 4), tokens=tokens)
            found = await client.lookup(namespace, tokens)
            fetching = asyncio.ensure_future(client.fetch(namespace, found.grant, into=slow))
            while not has_begun.is_set():
                await asyncio.sleep(0.01)
            # Also where it is cancelled again while it ends.
            for _ in range(2):
                fetching.cancel()
                await asyncio.sleep(0)
            with pytest.raises(asyncio.CancelledError):
                await fetching
            memory[:] = bytes(len(memory))
            await asyncio.sleep(1)
            assert not any(memory)
            # Nothing of it is in the way of the next one.
            assert (await client.fetch(namespace, found.grant)).usable_tokens == 512

    asyncio.run(work())


@pytest.mark.parametrize("through", ["shared memory", "gRPC"])
def test_a_cancelled_put_reads_nothing_any_more(
    local: tuple[Node, str], through: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_begun = threading.Event()
    reads: list[float] = []

    def slow(read):  # type: ignore[no-untyped-def]
        def slowly(*arguments):  # type: ignore[no-untyped-def]
            has_begun.set()
            time.sleep(0.3)
            reads.append(time.monotonic())
            return read(*arguments)

        return slowly

    if through == "gRPC":
        monkeypatch.setattr("esker.calls.put_chunks", slow(calls.put_chunks))
    else:
        monkeypatch.setattr("esker.local.copy", slow(buffers.copy))

    async def work() -> None:
        async with esker.AsyncClient(local[1] if through == "shared memory" else local[0].address) as client:
            namespace = await client.register_namespace(weights=b"w" * 32, tokenizer=b"t" * 32, layout=DSA)
            putting = asyncio.ensure_future(client.put(namespace, blocks(DSA, 4), tokens=list(range(600))))
            while not has_begun.is_set():
                await asyncio.sleep(0.01)
            putting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await putting
            ended = time.monotonic()
            await asyncio.sleep(1)
            assert max(reads) <= ended

    asyncio.run(work())


def test_errors_say_what_to_do(local: tuple[Node, str]) -> None:
    with pytest.raises(esker.Unreachable, match="--local"):
        Arena("/nowhere/esker")
    with esker.Client(local[1]) as client:
        namespace = register(client)
        with pytest.raises(ValueError, match="has 2 planes"):
            client.put(namespace, [Object(128, [b""])], tokens=list(range(200)))
        with pytest.raises(esker.InvalidRequest, match="does not fit"):
            client.put(namespace, blocks(DSA, 3), tokens=list(range(200)))
        assert client.put(namespace, blocks(DSA, 1), tokens=list(range(200)))[0].stored


def test_the_put_area_is_a_ring() -> None:
    area = memoryview(bytearray(1000 + 10 * 4096))
    room = PutRoom(area, 1000, 1000 + 10 * 4096)
    places = [room.place(3 * 4096 - 100) for _ in range(3)]
    assert all(b - a >= 3 * 4096 - 100 for a, b in zip(places, places[1:])) and places[-1] + 3 * 4096 - 100 <= 1000 + 10 * 4096
    assert room._fits(3 * 4096) is None
    room.free(1)
    assert room.place(2 * 4096) == 1000
    room.write(1000, [b"ab", [b"c", b"d"]])
    assert area[1000:1004] == b"abcd"
    room.close()
    with pytest.raises(Ended):
        room.place(1)
    with pytest.raises(Ended):
        room.write(1000, [b"xxxx"])
    assert area[1000:1004] == b"abcd"


def test_a_writer_that_is_late_writes_nothing_into_the_puts_that_follow(
    local: tuple[Node, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    node, address = local
    client = esker.Client(address)
    namespace = register(client)
    # The arena is there before the node is stopped.
    assert client.put(namespace, blocks(DSA, 1), tokens=range(3, 131))[0].stored
    goes_on, is_through = threading.Event(), threading.Event()
    first = threading.Lock()

    def copy(into: memoryview, data: memoryview) -> None:
        if first.acquire(blocking=False):
            node.signal(signal.SIGCONT)
            goes_on.wait(2)
        buffers.copy(into, data)

    def late() -> Iterator[Object]:
        try:
            yield from blocks(DSA, 1, salt=1)
        finally:
            is_through.set()

    def following() -> Iterator[Object]:
        yield from blocks(DSA, 1, salt=2)
        # It is written and not announced yet.
        goes_on.set()
        is_through.wait(5)

    monkeypatch.setattr("esker.local.copy", copy)
    # The node ends this call at its first message, when the thread is at the first object.
    node.signal(signal.SIGSTOP)
    with pytest.raises(esker.InvalidRequest):
        client.put(namespace, late(), tokens=range(128), engine_hashes=[os.urandom(32)])
    # Two puts may be under way at a time: the second from here comes where the late one was.
    assert client.put(namespace, blocks(DSA, 1, salt=3), tokens=range(1, 129))[0].stored
    tokens = range(2, 131)
    assert client.put(namespace, following(), tokens=tokens)[0].stored
    fetched = client.fetch(namespace, client.lookup(namespace, tokens).grant)
    planes = fetched.objects[Kind.BLOCK, 128]
    assert [bytes(planes[at]) for at in sorted(planes)] == fill(DSA, Kind.BLOCK, 128, salt=2)


def test_memory_that_the_node_may_still_read_is_not_written_again(local: tuple[Node, str]) -> None:
    client = esker.Client(local[1])
    namespace = register(client)
    tokens = range(400)
    assert client.put(namespace, blocks(DSA, 1), tokens=tokens)[0].stored
    arena = client._arena

    def overdue() -> Iterator[Object]:
        yield from blocks(DSA, 2)
        time.sleep(1)

    # Of a call that the node ended with an answer the node wants nothing more.
    with pytest.raises(esker.InvalidRequest):
        client.put(namespace, blocks(DSA, 9), tokens=tokens)
    assert client.put(namespace, blocks(DSA, 2), tokens=tokens)[1].stored and client._arena is arena
    # Of one that ended at this side it may.
    with pytest.raises(ValueError, match="has 2 planes"):
        client.put(namespace, [*blocks(DSA, 2), Object(384, [b""])], tokens=tokens)
    assert client.put(namespace, blocks(DSA, 2), tokens=tokens)[1].stored and client._arena is not arena
    arena = client._arena
    with pytest.raises(esker.DeadlineExceeded):
        client.put(namespace, overdue(), tokens=tokens, timeout_s=0.3)
    assert client.put(namespace, blocks(DSA, 3), tokens=tokens)[2].stored and client._arena is not arena


def test_a_room_of_the_put_area_is_closed_for_good(local: tuple[Node, str]) -> None:
    arena = Arena(local[1].removeprefix("unix:"))
    with arena.room() as room:
        at = room.place(100)
        room.free(1)
    # The second of these has the same memory.
    for _ in range(2):
        with arena.room():
            with pytest.raises(Ended):
                room.place(100)
            with pytest.raises(Ended):
                room.write(at, [b"late"])
    arena.close()


def _quiet(work):  # type: ignore[no-untyped-def]
    try:
        return work()
    except esker.EskerError as error:
        assert error.retry or isinstance(error, esker.NotFound), error
        return None
