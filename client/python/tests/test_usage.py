"""Accounts: what a request used of the cache is settled once, summed and exported."""

from __future__ import annotations

import asyncio

import pytest

import esker
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
