"""The clients against a real node: what is put comes back, into the caller's memory, and nothing else ever does."""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import esker
from esker import Kind, Object, Outcome
from esker.aio import MAX_BLOCKING
from esker.buffers import flat
from layouts import DSA, WINDOWED, blocks, fill, state
from support import Node, within


@pytest.fixture
def client(node: Node):  # type: ignore[no-untyped-def]
    with esker.Client(node.address) as client:
        yield client


def register(client: esker.Client, layout: esker.Layout = DSA, weights: int = 1, adapter: str = "") -> esker.Namespace:
    return client.register_namespace(weights=bytes([weights] * 32), tokenizer=b"t" * 32, layout=layout, adapter=adapter)


def test_what_is_put_comes_back_into_the_callers_memory(client: esker.Client) -> None:
    namespace = register(client)
    tokens = list(range(1000))
    results = client.put(namespace, blocks(DSA, 7), tokens=tokens)
    assert [result.outcome for result in results] == [Outcome.STORED] * 7
    assert all(result.stored for result in results)
    again = client.put(namespace, blocks(DSA, 7), tokens=tokens)
    assert [result.outcome for result in again] == [Outcome.PRESENT] * 7

    found = client.lookup(namespace, tokens, want_hashes=True)
    assert (found.tokens, found.history_tokens, found.replay_tokens) == (896, 896, 0)
    assert len(found.hashes) == 7 and found.grant and found.grant_expires_in_s > 1

    size = DSA.object_bytes(Kind.BLOCK)
    expected = b"".join(b"".join(fill(DSA, Kind.BLOCK, (at + 1) * 128)) for at in range(7))
    for memory in (bytearray(7 * size), np.zeros((7, size), dtype=np.uint8), mmap.mmap(-1, 7 * size)):
        fetched = client.fetch(namespace, found.grant, into=memory)
        assert fetched.usable_tokens == 896 and fetched.raw_bytes == 7 * size and not fetched.missing
        assert fetched.whole == {(Kind.BLOCK, (at + 1) * 128) for at in range(7)}
        assert bytes(flat(memory)) == expected
    client.release(found.grant)
    with pytest.raises(esker.NotFound, match="look the prefix up again"):
        client.fetch(namespace, found.grant)


def test_rows_behind_the_last_block_go_behind_it(client: esker.Client) -> None:
    namespace = register(client)
    tokens = list(range(300))
    client.put(namespace, [*blocks(DSA, 2), state(DSA, 290)], tokens=tokens)
    found = client.lookup(namespace, tokens)
    assert (found.tokens, found.history_tokens) == (290, 256)
    memory = bytearray(DSA.object_bytes(Kind.BLOCK) * 2 + DSA.object_bytes(Kind.STATE, 290))
    fetched = client.fetch(namespace, found.grant, into=memory)
    assert fetched.whole == {(Kind.BLOCK, 128), (Kind.BLOCK, 256), (Kind.STATE, 290)}
    parts = [fill(DSA, Kind.BLOCK, 128), fill(DSA, Kind.BLOCK, 256), fill(DSA, Kind.STATE, 290)]
    assert bytes(memory) == b"".join(map(b"".join, parts))
    # Who has room for whole blocks alone is told what to ask for.
    memory = bytearray(DSA.object_bytes(Kind.BLOCK) * 2)
    with pytest.raises(ValueError, match="no room for the 34 tokens behind the last whole block: fetch 256 tokens"):
        client.fetch(namespace, found.grant, into=memory)
    assert client.fetch(namespace, found.grant, 256, into=memory).usable_tokens == 256


def test_planes_groups_and_blocks_can_be_chosen(client: esker.Client) -> None:
    namespace = register(client)
    tokens = list(range(600))
    client.put(namespace, blocks(DSA, 4), tokens=tokens)
    found = client.lookup(namespace, tokens)

    fetched = client.fetch(namespace, found.grant, groups=["indexer"])
    assert set(fetched.objects) == {(Kind.BLOCK, 128 * n) for n in (1, 2, 3, 4)}
    assert fetched.whole == set(fetched.objects)
    assert all(list(planes) == [0] for planes in fetched.objects.values())

    fetched = client.fetch(namespace, found.grant, blocks=[2])
    assert set(fetched.objects) == {(Kind.BLOCK, 384)}
    assert bytes(fetched.objects[Kind.BLOCK, 384][1]) == fill(DSA, Kind.BLOCK, 384)[1]

    # A plane may be scattered over several pieces of memory.
    halves: dict[tuple[int, int], list[bytearray]] = {}

    def place(kind: Kind, tokens: int, plane: int) -> list[bytearray]:
        size = DSA.planes(kind)[plane].len_bytes
        return halves.setdefault((tokens, plane), [bytearray(size // 3), bytearray(size - size // 3)])

    client.fetch(namespace, found.grant, into=place, order=esker.Order.BY_PLANE)
    for (tokens_of, plane), parts in halves.items():
        assert b"".join(parts) == fill(DSA, Kind.BLOCK, tokens_of)[plane]

    with pytest.raises(ValueError, match="the memory given for plane"):
        client.fetch(namespace, found.grant, into=lambda kind, tokens, plane: bytearray(3))
    with pytest.raises(ValueError, match="cannot be written"):
        client.fetch(namespace, found.grant, into=b"read only")


def test_hashes_and_engine_hashes_name_prefixes_too(client: esker.Client) -> None:
    namespace = register(client)
    tokens = list(range(600))
    client.put(namespace, blocks(DSA, 4), tokens=tokens)
    hashes = client.lookup(namespace, tokens, want_hashes=True).hashes
    assert client.lookup(namespace, hashes=hashes, grant=False).tokens == 512
    assert client.lookup(namespace, hashes=hashes, prompt_tokens=512, grant=False).tokens == 384

    names = [os.urandom(16) for _ in range(4)]
    client.put(namespace, blocks(DSA, 3, salt=1), engine_hashes=names)
    assert client.lookup(namespace, engine_hashes=names, grant=False).tokens == 384
    assert client.lookup(namespace, engine_hashes=names[1:], grant=False).tokens in (0, 256)

    alone = [os.urandom(40) for _ in range(5)]
    client.put(namespace, blocks(DSA, 5, first=3, salt=2), engine_hashes=alone, unchained=True)
    found = client.lookup(namespace, engine_hashes=alone, unchained=True)
    assert [found.resumable(at) for at in range(6)] == [False, False, False, True, True, False]
    fetched = client.fetch(namespace, found.grant, blocks=[4])
    assert bytes(fetched.objects[Kind.BLOCK, 640][0]) == fill(DSA, Kind.BLOCK, 640, salt=2)[0]


def test_many_lookups_in_one_call(client: esker.Client) -> None:
    namespace = register(client)
    client.put(namespace, blocks(DSA, 2), tokens=list(range(300)))
    questions = [esker.Question(namespace, list(range(length)), grant=False) for length in (100, 200, 300)]
    assert [found.tokens for found in client.lookup_many(questions)] == [0, 128, 256]


def test_a_state_is_fetched_with_its_prefix(client: esker.Client) -> None:
    namespace = register(client, WINDOWED)
    tokens = list(range(700))
    client.put(namespace, [*blocks(WINDOWED, 4), state(WINDOWED, 256), state(WINDOWED, 512)], tokens=tokens)
    found = client.lookup(namespace, tokens)
    assert [point.tokens for point in found.resume_points] == [512, 256]
    fetched = client.fetch(namespace, found.grant, 256)
    assert [bytes(fetched.objects[Kind.STATE, 256][at]) for at in range(2)] == fill(WINDOWED, Kind.STATE, 256)
    assert found.resume_points[1].raw_bytes == fetched.raw_bytes


def test_objects_larger_than_a_message(client: esker.Client) -> None:
    layout = esker.Layout.opaque("large", 16, [5_000_001])
    namespace = register(client, layout)
    data = os.urandom(5_000_001)
    assert client.put(namespace, [Object(16, data)], engine_hashes=[b"x"], unchained=True)[0].stored
    found = client.lookup(namespace, engine_hashes=[b"x"], unchained=True)
    memory = bytearray(5_000_001)
    assert client.fetch(namespace, found.grant, into=memory, blocks=[0]).whole
    assert memory == data


def test_other_bytes_under_a_name_are_refused(client: esker.Client) -> None:
    namespace = register(client)
    tokens = list(range(200))
    client.put(namespace, blocks(DSA, 1), tokens=tokens)
    result = client.put(namespace, blocks(DSA, 1, salt=9), tokens=tokens)[0]
    assert result.outcome is Outcome.REFUSED and result.reason and not result.stored


def test_errors_say_what_to_do(client: esker.Client, node: Node) -> None:
    namespace = register(client)
    with pytest.raises(esker.InvalidRequest, match="does not fit"):
        client.put(namespace, blocks(DSA, 3), tokens=list(range(200)))
    with pytest.raises(ValueError, match="has 2 planes"):
        client.put(namespace, [Object(128, [b""])], tokens=list(range(200)))
    with pytest.raises(esker.InvalidRequest, match="named in one way"):
        client.lookup(namespace, [1, 2], hashes=[b"h" * 32])
    unknown = esker.Namespace(b"n" * 32, DSA)
    with pytest.raises(esker.NotFound, match="RegisterNamespace"):
        client.lookup(unknown, [1] * 200)
    with pytest.raises(esker.EskerError):
        client.register_namespace(weights=b"short", tokenizer=b"t" * 32, layout=DSA)
    node.kill()
    with pytest.raises(esker.Unreachable, match="esker serve") as error:
        client.lookup(namespace, [1] * 200, timeout_s=2)
    assert error.value.retry
    with esker.Client("127.0.0.1:1") as nobody, pytest.raises(esker.Unreachable):
        nobody.describe()


def test_a_closed_client_says_that_it_is_closed() -> None:
    closed = esker.Client("127.0.0.1:1")
    closed.close()
    namespace = esker.Namespace(b"n" * 32, DSA)
    for call in (closed.describe, lambda: closed.put(namespace, blocks(DSA, 1), tokens=list(range(200)))):
        with pytest.raises(esker.ClientClosed, match="open another one") as error:
            call()
        assert not error.value.retry
    with pytest.raises(esker.ClientClosed):
        closed.generate("x")

    async def later() -> None:
        client = esker.AsyncClient("127.0.0.1:1")
        await client.close()
        await client.close()
        with pytest.raises(esker.ClientClosed):
            await client.describe()
        with pytest.raises(esker.ClientClosed):
            await client.put(namespace, blocks(DSA, 1), tokens=list(range(200)))
        with pytest.raises(esker.ClientClosed):
            await client.generate("x")

    asyncio.run(later())


def test_a_restarted_node_is_found_again_and_has_everything(client: esker.Client, node: Node) -> None:
    namespace = register(client)
    tokens = list(range(600))
    client.put(namespace, blocks(DSA, 4), tokens=tokens)
    node.restart()

    def found() -> int:
        try:
            return client.lookup(namespace, tokens, grant=False).tokens
        except esker.EskerError as error:
            assert error.retry
            return 0

    assert within(10, found) == 512


def test_damage_shortens_the_answer_and_never_changes_bytes(client: esker.Client, node: Node) -> None:
    namespace = register(client)
    tokens = list(range(600))
    client.put(namespace, blocks(DSA, 4), tokens=tokens)
    node.kill()
    assert node.damage(fill(DSA, Kind.BLOCK, 384)[1][:64]) == 1
    node.start()
    found = within(10, lambda: client.lookup(namespace, tokens))
    if found.tokens == 512:
        fetched = client.fetch(namespace, found.grant)
        assert fetched.usable_tokens == 256
        assert [missing.tokens for missing in fetched.missing][0] == 384
        assert (Kind.BLOCK, 384) not in fetched.whole
        for kind, at in fetched.whole:
            assert [bytes(plane) for _, plane in sorted(fetched.objects[kind, at].items())] == fill(DSA, kind, at)
    else:
        assert found.tokens == 256
    assert within(10, lambda: client.lookup(namespace, tokens, grant=False).tokens == 256)


def test_sessions(client: esker.Client) -> None:
    namespace = register(client)
    tokens = list(range(600))
    client.put(namespace, blocks(DSA, 4), tokens=tokens)
    session = client.open_session("chat-1", namespace, tokens[:300], keep_s=3600)
    assert (session.tokens, session.resume_tokens) == (256, 256) and session.stored_bytes > 0
    assert 3590 <= session.remaining_s <= 3600
    assert client.extend_session("chat-1", tokens).tokens == 512
    assert client.renew_session("chat-1", 7200).remaining_s > 7000
    assert [one.session for one in client.list_sessions()] == ["chat-1"]
    assert client.close_session("chat-1") and not client.close_session("chat-1")
    with pytest.raises(esker.NotFound):
        client.renew_session("chat-1")


def test_asyncio_client_has_the_same_calls(node: Node) -> None:
    async def work() -> None:
        async with esker.AsyncClient(node.address) as client:
            namespace = await client.register_namespace(weights=b"a" * 32, tokenizer=b"t" * 32, layout=DSA)
            tokens = list(range(600))
            results = await client.put(namespace, blocks(DSA, 4), tokens=tokens)
            assert [result.outcome for result in results] == [Outcome.STORED] * 4
            found = await client.lookup(namespace, tokens)
            memory = bytearray(4 * DSA.object_bytes(Kind.BLOCK))
            fetched = await client.fetch(namespace, found.grant, into=memory)
            assert fetched.usable_tokens == 512
            assert memory[-64:] == fill(DSA, Kind.BLOCK, 512)[1][-64:]
            await client.release(found.grant)
            many = await asyncio.gather(*(client.lookup(namespace, tokens[:at]) for at in range(1, 600, 50)))
            assert [one.tokens for one in many] == [(at - 1) // 128 * 128 for at in range(1, 600, 50)]
            with pytest.raises(esker.InvalidRequest, match="does not fit"):
                await client.put(namespace, blocks(DSA, 3), tokens=tokens[:200])
            with pytest.raises(esker.NotFound):
                await client.renew_session("none")
            assert await client.list_sessions() == []

    asyncio.run(work())
    sync = {name for name in vars(esker.Client) if not name.startswith("_")}
    assert sync == {name for name in vars(esker.AsyncClient) if not name.startswith("_")}


def test_the_asyncio_client_has_threads_of_its_own_and_ends_them(node: Node) -> None:
    """Who fills the loop's own threads does not hold its puts up."""
    wait = threading.Event()

    def threads() -> int:
        return sum(thread.name.startswith("esker-aio") for thread in threading.enumerate())

    async def work() -> None:
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(1))
        held = loop.run_in_executor(None, wait.wait)
        try:
            async with esker.AsyncClient(node.address) as client:
                namespace = await client.register_namespace(weights=b"a" * 32, tokenizer=b"t" * 32, layout=DSA)
                puts = [client.put(namespace, blocks(DSA, 1, salt=at), tokens=[at] * 200) for at in range(3 * MAX_BLOCKING)]
                results = await asyncio.wait_for(asyncio.gather(*puts), 30)
                assert all(result[0].stored for result in results)
                assert 0 < threads() <= MAX_BLOCKING
                last = asyncio.ensure_future(client.put(namespace, blocks(DSA, 4), tokens=list(range(600))))
                await asyncio.sleep(0)
            # It ended with the client, one way or the other: nobody waits for ever.
            with contextlib.suppress(esker.EskerError, ValueError):
                await asyncio.wait_for(last, 30)
            with pytest.raises(esker.ClientClosed):
                await client.put(namespace, blocks(DSA, 1), tokens=[1] * 200)
        finally:
            wait.set()
            await held

    asyncio.run(work())
    assert within(10, lambda: threads() == 0)
