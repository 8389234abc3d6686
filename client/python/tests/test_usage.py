"""Accounts: what a request used of the cache is settled once, summed and exported."""

from __future__ import annotations

import asyncio
import os
import time

import pytest

import esker
from esker.chunks import Account, ChunkStore
from esker.connectors.identity import identity
from layouts import DSA, blocks
from support import Node, within


def test_settle_usage_and_export(node: Node) -> None:
    with esker.Client(node.address) as client:
        namespace = client.register_namespace(weights=b"w" * 32, tokenizer=b"t" * 32, layout=DSA)
        tokens = list(range(600))
        client.put(namespace, blocks(DSA, 4), tokens=tokens)
        found = client.lookup(namespace, tokens)
        client.fetch(namespace, found.grant)
        account = {"grant": found.grant, "used_tokens": 512, "computed_tokens": 88, "model": "m"}
        settled = client.settle("request-1", **account)
        assert (settled.prompt_tokens, settled.prompt_cache_hit_tokens, settled.prompt_cache_miss_tokens) == (600, 512, 88)
        assert settled.cached_tokens == settled.cache_read_input_tokens == 512 and len(settled.usage_id) == 32
        # The same again is answered alike; another account under this name is refused.
        assert client.settle("request-1", **account).usage_id == settled.usage_id
        with pytest.raises(esker.EskerError):
            client.settle("request-1", **{**account, "used_tokens": 384, "computed_tokens": 216})
        written = esker.WriteTokens(ttl_24h=128)
        miss = client.settle("request-2", namespace=namespace.id, computed_tokens=200, write_tokens=written)
        assert (miss.prompt_tokens, miss.cached_tokens, miss.cache_creation) == (200, 0, written)

        def counted() -> esker.UsageRow | None:
            rows = client.usage(group_by=[esker.GroupBy.NAMESPACE])
            of_namespace = [row for row in rows if row.namespace == namespace.id.hex()]
            return of_namespace[0] if of_namespace and of_namespace[0].requests == 2 else None

        row = within(10, counted)
        assert (row.prompt_tokens, row.hit_tokens, row.miss_tokens) == (800, 512, 288)
        assert row.write_tokens == written
        records = [event.record for event in client.export_usage(timeout_s=10) if event.HasField("record")]
        assert {record.request_id for record in records} >= {"request-1", "request-2"}

    async def work() -> None:
        async with esker.AsyncClient(node.address) as client:
            rows = await client.usage()
            assert rows[0].requests == 2
            exported = [event async for event in client.export_usage(timeout_s=10)]
            assert len(exported) >= 2
            settled = await client.settle("request-3", namespace=namespace.id, computed_tokens=10)
            assert settled.input_tokens == 10

    asyncio.run(work())


def test_chunks_settle_what_was_loaded_off_the_path(node: Node) -> None:
    client = esker.Client(node.address)
    for chained in (False, True):
        name = f"chained {chained}"
        chunks = ChunkStore(client, identity("test", name, "", {}), name, 20_000, chunk_tokens=64, chained=chained)
        keys = [os.urandom(32) for _ in range(4)]
        assert all(chunks.put(keys[:3], {at: os.urandom(20_000) for at in range(3)}).values())
        memory = {at: bytearray(20_000) for at in range(4)}
        # The first page is in the engine's own memory, and the last one is not stored.
        assert chunks.get(keys, {at: memory[at] for at in (1, 2, 3)}, Account(f"{name}: one", 300)) == {1: True, 2: True, 3: False}
        # Only some count; nothing does; nothing is there.
        chunks.get(keys[:3], {at: memory[at] for at in range(3)}, Account(f"{name}: two", 300, counts=[1]))
        chunks.get(keys[:3], {at: memory[at] for at in range(3)}, Account(f"{name}: three", 300, counts=[]))
        chunks.get([os.urandom(32)], {0: memory[0]}, Account(f"{name}: four", 300))
        chunks.settle_miss(Account(f"{name}: five", 300))
        # Whose prompt is not known: what was used, and one more. With nothing used it is nothing.
        chunks.get(keys[:3], {at: memory[at] for at in range(3)}, Account(f"{name}: six"))
        chunks.get([os.urandom(32)], {0: memory[0]}, Account(f"{name}: seven"))
        # The same again counts once.
        chunks.settle_miss(Account(f"{name}: five", 300))
        chunks.close()
        events = client.export_usage(timeout_s=10)
        records = {event.record.request_id: event.record for event in events if event.HasField("record")}
        mine = {key.split(": ")[1]: record for key, record in records.items() if key.startswith(name)}
        assert {key: (record.prompt_tokens, record.hit_tokens) for key, record in mine.items()} == {
            "one": (300, 128),
            "two": (300, 64),
            "three": (300, 0),
            "four": (300, 0),
            "five": (300, 0),
            "six": (193, 192),
        }
    assert client.usage()[0].requests == 12 and client.usage()[0].hit_tokens == 2 * (128 + 64 + 192)


def test_accounts_never_wait_for_a_node_that_is_gone(node: Node) -> None:
    client = esker.Client(node.address)
    chunks = ChunkStore(client, identity("test", "gone", "", {}), "gone", 20_000, chunk_tokens=64)
    keys, memory = [os.urandom(32)], {0: bytearray(20_000)}
    assert chunks.put(keys, memory)[0]
    node.kill()
    started = time.monotonic()
    for at in range(5_000):
        chunks.settle_miss(Account(f"request {at}", 10))
    assert time.monotonic() - started < 2, "thousands of accounts are handed over or dropped at once"
    assert chunks._unsent <= 1024
    assert chunks.get(keys, memory, Account("load", 100)) == {0: False}
    chunks.close()
