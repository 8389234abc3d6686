"""The backend as SGLang makes and calls it: its factory, its host pools on CPU tensors, MLA with an indexer and a sliding window."""

from __future__ import annotations

import json
import pathlib
import time
import types
from collections.abc import Iterator

import pytest

pytest.importorskip("sglang")

import torch  # noqa: E402
from sglang.srt.mem_cache.device_pool_info import KVBufferLayout, KVBuffers, MHABufferInfo, MLABufferInfo  # noqa: E402
from sglang.srt.mem_cache.hicache_storage import (  # noqa: E402
    HiCacheStorageConfig,
    PoolHitPolicy,
    PoolName,
    PoolTransfer,
)
from sglang.srt.mem_cache.pool_host.dsa import DSAIndexerPoolHost  # noqa: E402
from sglang.srt.mem_cache.pool_host.host_pool_decl import HostPoolStorageInfo  # noqa: E402
from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost  # noqa: E402
from sglang.srt.mem_cache.pool_host.mla import MLATokenToKVPoolHost  # noqa: E402
from sglang.srt.mem_cache.storage.backend_factory import StorageBackendFactory  # noqa: E402

from esker.chunks import Identity  # noqa: E402
from esker.connectors.sglang import EskerHiCache  # noqa: E402
from support import Node, documented, usage, within  # noqa: E402

PAGE = 64
PAGES = 16
LAYERS = 3
CPU = torch.device("cpu")


def extra_config(address: str, **more: object) -> dict:
    """What docs/sglang.md says, with the node of the test."""
    return {**documented("sglang.md"), "endpoint": address, **more}


def pointers(tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return torch.tensor([tensor.data_ptr() for tensor in tensors], dtype=torch.uint64)


def mla_pool(layout: str) -> MLATokenToKVPoolHost:
    buffers = tuple(torch.zeros(PAGE * 4, 1, 576, dtype=torch.bfloat16) for _ in range(LAYERS))
    info = MLABufferInfo(
        buffers=buffers,
        data_ptrs=pointers(buffers),
        layer_indices=tuple(range(LAYERS)),
        device_layer_num=LAYERS,
        page_size=PAGE,
        kv_lora_rank=512,
        qk_rope_head_dim=64,
        kv_cache_dim=576,
        dtype=torch.bfloat16,
        device=CPU,
    )
    return MLATokenToKVPoolHost(
        info,
        2.0,
        0,
        PAGE,
        layout,
        pin_memory=False,
        device_capacity_tokens=PAGE * 4,
        start_layer=0,
        end_layer=LAYERS,
        target_layer_num=LAYERS,
        host_token_capacity=PAGE * PAGES,
    )


def indexer_pool(anchor: MLATokenToKVPoolHost) -> DSAIndexerPoolHost:
    device = types.SimpleNamespace(
        store_dtype=torch.uint8,
        start_layer=0,
        end_layer=LAYERS,
        device="cpu",
        index_k_with_scale_buffer=[torch.zeros(4, PAGE * 132, dtype=torch.uint8) for _ in range(LAYERS)],
        layer_num=LAYERS,
        layer_shard_enabled=False,
    )
    decl = types.SimpleNamespace(
        storage_info=HostPoolStorageInfo(bytes_per_token_per_layer=132, dtype=torch.uint8),
        device_pool=device,
        owned_device_layers=None,
        pool_name=PoolName.INDEXER,
    )
    return DSAIndexerPoolHost(decl, anchor, pin_memory=False)


def window_pool(layout: str) -> MHATokenToKVPoolHost:
    k = tuple(torch.zeros(PAGE * 4, 2, 32, dtype=torch.bfloat16) for _ in range(LAYERS))
    v = tuple(torch.zeros(PAGE * 4, 2, 32, dtype=torch.bfloat16) for _ in range(LAYERS))
    buffers = KVBuffers(
        k=k, v=v, k_data_ptrs=pointers(k), v_data_ptrs=pointers(v), layout=list(KVBufferLayout)[0]
    )
    info = MHABufferInfo(
        buffers=buffers, page_size=PAGE, head_num=2, head_dim=32, v_head_dim=32, dtype=torch.bfloat16, device=CPU
    )
    return MHATokenToKVPoolHost(
        info,
        2.0,
        0,
        PAGE,
        layout,
        pin_memory=False,
        device_capacity_tokens=PAGE * 4,
        start_layer=0,
        end_layer=LAYERS,
        pool_label="swa",
        host_token_capacity=PAGE * PAGES,
    )


class Rank:
    """A rank with its three host pools and the backend that SGLang's factory makes for it."""

    def __init__(self, node: Node, layout: str = "page_first", rank: int = 0, ranks: int = 1, mla: bool = True, **more: object) -> None:
        config = HiCacheStorageConfig(
            tp_rank=rank,
            tp_size=ranks,
            pp_rank=0,
            pp_size=1,
            attn_cp_rank=0,
            attn_cp_size=1,
            is_mla_model=mla,
            enable_storage_metrics=False,
            is_page_first_layout=layout == "page_first",
            model_name="org/model",
            extra_config=extra_config(node.address, **more),
        )
        self.kv = mla_pool(layout)
        self.indexer = indexer_pool(self.kv)
        self.swa = window_pool(layout)
        self.pools = {PoolName.KV: self.kv, PoolName.INDEXER: self.indexer, PoolName.SWA: self.swa}
        self.backend = StorageBackendFactory.create_backend("dynamic", config, self.kv)
        assert isinstance(self.backend, EskerHiCache)
        self.backend.register_mem_pool_host(self.kv)
        for name, pool in self.pools.items():
            self.backend.register_mem_host_pool_v2(pool, name)
        self.backend.on_host_pools_registered()

    def fill(self, seed: int) -> None:
        """Random bytes in every pool."""
        torch.manual_seed(seed)
        for memory in self.memories():
            memory.view(torch.uint8).copy_(torch.randint(0, 256, memory.view(torch.uint8).shape, dtype=torch.uint8))

    def clear(self) -> None:
        for memory in self.memories():
            memory.zero_()

    def memories(self) -> list[torch.Tensor]:
        return [self.kv.kv_buffer, self.indexer.index_k_with_scale_buffer, self.swa.kv_buffer]

    def page(self, pool: PoolName, index: int) -> torch.Tensor:
        return self.pools[pool].get_data_page(index * PAGE, flat=True).clone().view(torch.uint8)

    def transfer(self, pool: PoolName, keys: list[str], pages: list[int], **more: object) -> PoolTransfer:
        indices = torch.cat([torch.arange(page * PAGE, (page + 1) * PAGE) for page in pages]) if pages else None
        return PoolTransfer(name=pool, host_indices=indices, keys=keys, **more)


def keys(count: int, prefix: str = "a") -> list[str]:
    return [f"{prefix}{at:063x}" for at in range(count)]


@pytest.fixture
def ranks() -> Iterator[list[Rank]]:
    made: list[Rank] = []
    yield made
    for rank in made:
        rank.backend.close()


@pytest.mark.parametrize("layout", ["page_first", "page_first_direct", "layer_first"])
def test_pages_of_all_pools_come_back_byte_equal(node: Node, ranks: list[Rank], layout: str) -> None:
    rank = Rank(node, layout)
    ranks.append(rank)
    rank.fill(1)
    names = keys(6)
    before = {(pool, at): rank.page(pool, at) for pool in rank.pools for at in range(6)}
    writes = [rank.transfer(pool, names, list(range(6))) for pool in rank.pools]
    assert rank.backend.batch_set_v2(writes) == {pool: [True] * 6 for pool in rank.pools}
    rank.clear()
    # Into other places than they came from.
    reads = [rank.transfer(pool, names, [9, 8, 7, 6, 5, 4]) for pool in rank.pools]
    assert rank.backend.batch_get_v2(reads) == {pool: [True] * 6 for pool in rank.pools}
    for (pool, at), content in before.items():
        assert torch.equal(rank.page(pool, 9 - at), content), (pool, at)
        assert not rank.page(pool, 12).any()


def test_restorable_lengths_are_all_that_every_pool_supports(node: Node, ranks: list[Rank]) -> None:
    rank = Rank(node)
    ranks.append(rank)
    rank.fill(2)
    names = keys(8, "b")
    # KV to 8 pages, indexer to 7, window pages 0, 1, 2 and 4, 5.
    rank.backend.batch_set_v2([rank.transfer(PoolName.KV, names, list(range(8)))])
    rank.backend.batch_set_v2([rank.transfer(PoolName.INDEXER, names[:7], list(range(7)))])
    kept = [0, 1, 2, 4, 5]
    rank.backend.batch_set_v2([rank.transfer(PoolName.SWA, [names[at] for at in kept], kept)])
    indexer = PoolTransfer(name=PoolName.INDEXER, keys=names, hit_policy=PoolHitPolicy.ALL_PAGES)
    window = PoolTransfer(name=PoolName.SWA, keys=names[-2:], hit_policy=PoolHitPolicy.TRAILING_PAGES)
    found = rank.backend.batch_exists_v2(names, [indexer, window])
    assert found.restorable_prefix_pages == [1, 2, 3, 6]
    assert found.kv_hit_pages == 6
    assert found.extra_pool_hit_pages == {PoolName.KV: 8, PoolName.INDEXER: 7, PoolName.SWA: 6}
    # Without windows: history alone, and the indexer gates it.
    assert rank.backend.batch_exists_v2(names, [indexer]).restorable_prefix_pages == list(range(1, 8))
    assert rank.backend.batch_exists_v2(names).kv_hit_pages == rank.backend.batch_exists(names) == 8
    # A policy that has a verdict of its own never gates.
    groups = PoolTransfer(name=PoolName.SWA, keys=names, hit_policy=PoolHitPolicy.BLOCK_GROUPS, block_pages=1, group_pages=1)
    assert rank.backend.batch_exists_v2(names, [groups]).kv_hit_pages == 8


def test_v1_and_the_older_calls(node: Node, ranks: list[Rank]) -> None:
    rank = Rank(node)
    ranks.append(rank)
    rank.fill(3)
    names = keys(4, "c")
    indices = torch.arange(4 * PAGE)
    before = rank.kv.kv_buffer[: 4 * PAGE].view(torch.uint8).clone()
    assert rank.backend.batch_exists(names) == 0
    assert rank.backend.batch_set_v1(names, indices) == [True] * 4
    rank.clear()
    assert rank.backend.batch_get_v1([*names, "f" * 64], torch.arange(5 * PAGE)) == [True] * 4 + [False]
    assert torch.equal(rank.kv.kv_buffer[: 4 * PAGE].view(torch.uint8), before)
    assert rank.backend.batch_get_v1(names, torch.arange(3)) == [False] * 4, "indices that do not fit"
    flat = [torch.randn_like(rank.kv.get_dummy_flat_data_page()) for _ in range(2)]
    older = Rank(node, interface_v1=0)
    ranks.append(older)
    assert older.backend.batch_set(["d" * 64, "e" * 64], flat) and older.backend.exists("d" * 64)
    targets = [rank.kv.get_dummy_flat_data_page() for _ in range(2)]
    loaded = older.backend.batch_get(["d" * 64, "0" * 64], targets)
    assert torch.equal(loaded[0].view(torch.uint8), flat[0].view(torch.uint8)) and loaded[1] is None


def test_ranks_of_mla_share_one_copy_and_others_do_not(node: Node, ranks: list[Rank]) -> None:
    first, second = Rank(node, rank=0, ranks=2), Rank(node, rank=1, ranks=2)
    ranks += [first, second]
    names = keys(3, "d")
    first.fill(4)
    second.fill(4)
    # Whichever writes first.
    assert second.backend.batch_set_v1(names, torch.arange(3 * PAGE)) == [True] * 3
    assert first.backend.batch_set_v1(names, torch.arange(3 * PAGE)) == [True] * 3
    assert second.backend._pools["kv"].store("pages").counters.stored == 3
    assert first.backend._pools["kv"].store("pages").counters.stored == 0
    assert first.backend._pools["kv"].store("pages").counters.present == 3
    of_each = [Rank(node, rank=rank, ranks=2, mla=False) for rank in (0, 1)]
    ranks += of_each
    assert of_each[0].backend.batch_set_v1(names, torch.arange(3 * PAGE)) == [True] * 3
    assert of_each[1].backend.batch_exists(names) == 0
    other = Rank(node, weights_revision="r2")
    ranks.append(other)
    assert other.backend.batch_exists(names) == 0


def test_each_fact_alone_gives_another_namespace(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = ("tp_rank", "pp_rank", "attn_cp_rank")
    flags = {"quantization": None, "kv_cache_dtype": "auto", "json_model_override_args": "{}", "dtype": "auto"}

    def of(rope: str = "yarn", *, told: dict[str, str] = {}, pool: dict[str, object] = {}, **changes: object) -> Identity:
        (tmp_path / "config.json").write_text(json.dumps({"rope_parameters": rope}))
        given = {name: changes.pop(name, value) for name, value in flags.items()}
        monkeypatch.setattr("esker.connectors.sglang.get_server_args", lambda: types.SimpleNamespace(**given))
        extra = extra_config("127.0.0.1:1", model_path=str(tmp_path), **told)
        defaults = {"is_mla_model": False, "enable_storage_metrics": False, "is_page_first_layout": True}
        sizes = {name.replace("rank", "size"): 4 for name in ranks}
        facts = {**dict.fromkeys(ranks, 0), **sizes, **defaults, "model_name": "org/model", **changes}
        backend = EskerHiCache(HiCacheStorageConfig(**facts, extra_config=extra))
        memory = {
            "layout": "page_first",
            "dtype": torch.bfloat16,
            "page_size": PAGE,
            "get_dummy_flat_data_page": lambda: torch.zeros(1024, dtype=torch.uint8),
            **pool,
        }
        name = str(memory.pop("name", PoolName.KV))
        backend._register(name, types.SimpleNamespace(**memory))
        return backend._pools[name].store("pages")._identity

    others = [
        of("linear"),
        of(told={"weights_revision": "r2"}),
        of(told={"model_facts": "a patched kernel"}),
        of(told={"adapter_revision": "a1"}),
        *(of(**{name: "other"}) for name in flags),
        *(of(**{name: 1}) for name in ranks),
        *(of(**{name.replace("rank", "size"): 8}) for name in ranks),
        of(model_name="org/other"),
        of(logical_page_size=4 * PAGE),
        of(pool={"name": PoolName.SWA}),
        of(pool={"layout": "page_head"}),
        of(pool={"dtype": torch.float16}),
        of(pool={"page_size": 2 * PAGE}),
        of(pool={"storage_format_tag": "packed"}),
        of(pool={"get_dummy_flat_data_page": lambda: torch.zeros(2048, dtype=torch.uint8)}),
    ]
    assert of() == of() and of() not in others
    assert all(one not in others[:at] for at, one in enumerate(others))


def test_what_was_loaded_is_on_the_bill_by_one_rank_and_once(node: Node, ranks: list[Rank]) -> None:
    of_each = [Rank(node, rank=rank, ranks=2, mla=False) for rank in (0, 1)]
    ranks += of_each
    names = keys(5, "s")
    for rank in of_each:
        rank.fill(5)
        writes = [rank.transfer(pool, names[:4], list(range(4))) for pool in rank.pools]
        assert rank.backend.batch_set_v2(writes) == {pool: [True] * 4 for pool in rank.pools}
    assert of_each[0].backend.batch_exists(names) == 4 and usage(node) == (0, 0, 0)
    # Both ranks load all pools, which are parts of the same tokens.
    for rank in of_each:
        reads = [rank.transfer(pool, names, list(range(5))) for pool in rank.pools]
        assert rank.backend.batch_get_v2(reads) == {pool: [True] * 4 + [False] for pool in rank.pools}
    assert within(10, lambda: usage(node) == (1, 4 * PAGE + 1, 4 * PAGE)), usage(node)
    assert of_each[0].backend.batch_get_v1(names[:3], torch.arange(3 * PAGE)) == [True] * 3
    assert of_each[1].backend.batch_get_v1(names[:3], torch.arange(3 * PAGE)) == [True] * 3
    for rank in of_each:
        rank.backend.close()
    assert usage(node) == (2, 7 * PAGE + 2, 7 * PAGE)


def test_a_node_that_is_gone_never_raises(node: Node, ranks: list[Rank]) -> None:
    rank = Rank(node)
    ranks.append(rank)
    rank.fill(5)
    names = keys(3, "e")
    indices = torch.arange(3 * PAGE)
    before = rank.kv.kv_buffer[: 3 * PAGE].view(torch.uint8).clone()
    assert rank.backend.batch_set_v1(names, indices) == [True] * 3
    node.kill()
    assert rank.backend.batch_exists(names) == 0
    assert rank.backend.batch_get_v1(names, indices) == [False] * 3
    assert rank.backend.batch_set_v1(keys(3, "f"), indices) == [False] * 3
    window = PoolTransfer(name=PoolName.SWA, keys=names[-1:], hit_policy=PoolHitPolicy.TRAILING_PAGES)
    assert rank.backend.batch_exists_v2(names, [window]).kv_hit_pages == 0
    assert rank.backend.batch_get_v2([rank.transfer(PoolName.SWA, names, [0, 1, 2])]) == {PoolName.SWA: [False] * 3}
    unknown = PoolTransfer(name=PoolName.MAMBA, keys=names, host_indices=indices)
    assert rank.backend.batch_set_v2([unknown]) == {PoolName.MAMBA: [False] * 3}
    node.start()
    time.sleep(1.2)
    rank.clear()
    assert within(20, lambda: rank.backend.batch_exists(names) == 3)
    assert rank.backend.batch_get_v1(names, indices) == [True] * 3
    assert torch.equal(rank.kv.kv_buffer[: 3 * PAGE].view(torch.uint8), before)


def test_damage_is_a_page_that_is_not_there(node: Node, ranks: list[Rank]) -> None:
    rank = Rank(node)
    ranks.append(rank)
    rank.fill(6)
    names = keys(3, "0")
    assert rank.backend.batch_set_v1(names, torch.arange(3 * PAGE)) == [True] * 3
    node.kill()
    assert node.damage(rank.page(PoolName.KV, 1)[5000:5064].numpy().tobytes()) == 1
    node.start()
    time.sleep(1.2)
    assert rank.backend.batch_get_v1(names, torch.arange(3 * PAGE)) == [True, False, True]


def test_under_sglangs_own_failure_injector(node: Node, ranks: list[Rank], monkeypatch: pytest.MonkeyPatch) -> None:
    rank = Rank(node)
    ranks.append(rank)
    from sglang.srt.mem_cache.hicache_storage import HiCacheStorageFailureInjector

    rank.fill(7)
    injected = HiCacheStorageFailureInjector(rank.backend, 0.001, 0.5)
    names = keys(4, "9")
    before = rank.kv.kv_buffer[: 4 * PAGE].view(torch.uint8).clone()
    wrote = [injected.batch_set_v1(names, torch.arange(4 * PAGE)) for _ in range(20)]
    assert [True] * 4 in wrote and [False] * 4 in wrote
    rank.clear()
    read = [injected.batch_get_v1(names, torch.arange(4 * PAGE)) for _ in range(20)]
    assert [True] * 4 in read and [False] * 4 in read
    assert torch.equal(rank.kv.kv_buffer[: 4 * PAGE].view(torch.uint8), before)
