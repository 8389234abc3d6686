"""SGLang: a ``HiCacheStorage`` backend, v1 and v2, loaded through the ``dynamic`` backend. No fork.

One chunk for each page of each host pool, straight from and into the pool's memory (``get_page_buffer_meta``). Which pools a
prefix needs comes from SGLang with each call: ``ALL_PAGES`` is history, ``TRAILING_PAGES`` a window; the answer has every length
that all of them support, so that ranks can intersect.

Invariants:
- Nothing here raises on the data path: every failure is a page that is not there.
- A page of a pool counts as loaded only when the node has proven it and all of it has arrived.
- The namespace binds model, revision of the weights, rope, quantisation, pool, memory layout, dtype, page size and parallel ranks. MLA ranks hold the
  same latents and share one copy, whichever writes first; Mamba state is each rank's own.
"""

from __future__ import annotations

import ctypes
import itertools
import logging
import threading
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import torch
from sglang.srt.mem_cache.hicache_storage import (
    HiCacheStorage,
    HiCacheStorageConfig,
    HiCacheStorageExtraInfo,
    PoolHitPolicy,
    PoolName,
    PoolTransfer,
    PoolTransferResult,
)
from sglang.srt.runtime_context import get_server_args

from ..chunks import Account, ChunkStore
from ..resume import Need, Presence, resume_points
from .identity import config_digest, identity, weights_revision
from .settings import Settings

log = logging.getLogger("esker")

_ENGINE_KEYS = frozenset(
    {
        "backend_name",
        "module_path",
        "class_name",
        "interface_v1",
        "hicache_storage_pass_prefix_keys",
        "prefetch_threshold",
        "prefetch_timeout_base",
        "prefetch_timeout_per_ki_token",
        "model_path",
        "tp_lcm_size",
        "should_split_heads",
    }
)
#: Pools whose pages differ from rank to rank even where the model's latents do not.
_OF_EACH_RANK = frozenset({"mamba"})
_KV = str(PoolName.KV)


class EskerHiCache(HiCacheStorage):
    """See the module."""

    def __init__(self, storage_config: HiCacheStorageConfig, kwargs: dict[str, Any] | None = None) -> None:
        extra = dict(storage_config.extra_config or {})
        self._config = storage_config
        self._settings = Settings.read(extra, _ENGINE_KEYS)
        self._zero_copy = bool(extra.get("interface_v1", 0))
        model = extra.get("model_path") or storage_config.model_name
        self._revision = weights_revision(self._settings.weights_revision, model)
        self._flags = _flags(model)
        self._client = self._settings.client()
        self._pools: dict[str, Pool] = {}
        self._lock = threading.Lock()
        # Ranks load parts of the same tokens: one of them settles.
        places = ("tp_rank", "pp_rank", "attn_cp_rank", "dcp_rank")
        self._settles = all(not getattr(storage_config, place, 0) for place in places)
        self._loads = itertools.count()
        self._instance = uuid.uuid4().hex

    def _account(self, pool: str) -> Account | None:
        """Of one load: nothing says which request it is for."""
        if pool != _KV or not self._settles:
            return None
        return Account(f"sglang/{self._instance}/{next(self._loads)}")

    # Pools

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        super().register_mem_pool_host(mem_pool_host)
        self._register(_KV, mem_pool_host)

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        super().register_mem_host_pool_v2(host_pool, host_pool_name)
        self._register(str(host_pool_name), host_pool)

    def _register(self, name: str, memory: Any) -> None:
        with self._lock:
            self._pools[name] = Pool(name, memory, lambda pool, way: self._store(pool, way))

    def _store(self, pool: "Pool", way: str) -> ChunkStore:
        config = self._config
        replicated = config.is_mla_model and pool.name not in _OF_EACH_RANK
        facts = {
            "model": config.model_name,
            "pool": pool.name,
            "way": way,
            "layout": pool.layout,
            "format": str(getattr(pool.memory, "storage_format_tag", None)),
            "dtype": pool.dtype,
            "flags": self._flags,
            "model_facts": self._settings.model_facts,
            "adapter_revision": self._settings.adapter_revision,
            "page_tokens": pool.page_tokens,
            "page_bytes": pool.page_bytes(way),
            "tp": "any" if replicated else [config.tp_rank, config.tp_size],
            "pp": [config.pp_rank, config.pp_size],
            "cp": [config.attn_cp_rank, config.attn_cp_size],
            "dcp": [getattr(config, "dcp_rank", 0), getattr(config, "dcp_size", 1)],
            "logical_page": getattr(config, "logical_page_size", None),
        }
        return ChunkStore(
            self._client,
            identity("sglang", self._revision, "", facts),
            f"sglang-{pool.name}",
            pool.page_bytes(way),
            chunk_tokens=pool.page_tokens,
            **self._settings.store_options(),
        )

    # v2: several pools

    def batch_exists_v2(
        self,
        keys: list[str],
        pool_transfers: list[PoolTransfer] | None = None,
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> PoolTransferResult:
        return _quiet(PoolTransferResult.empty, lambda: self._exists_v2(keys, pool_transfers or []))

    def _exists_v2(self, keys: list[str], transfers: Sequence[PoolTransfer]) -> PoolTransferResult:
        # In pages: a page is one token of the arithmetic.
        kv = Presence(Need.HISTORY, 1, self._pools[_KV].store("pages").exists(_names(keys)))
        closed = kv.closed_tokens()
        groups = [kv]
        hits: dict[str, int] = {PoolName.KV: closed} if closed else {}
        for transfer in transfers:
            if closed == 0:
                break
            if transfer.hit_policy not in (PoolHitPolicy.ALL_PAGES, PoolHitPolicy.TRAILING_PAGES):
                # Whole groups have their own verdict and never gate the hit: none is given.
                continue
            present = self._pools[str(transfer.name)].store("pages").exists(_names(keys[:closed]))
            trailing = transfer.hit_policy == PoolHitPolicy.TRAILING_PAGES
            window = max(1, len(transfer.keys or ())) if trailing else 0
            group = Presence(Need.WINDOW if trailing else Need.HISTORY, 1, present, window)
            alone = resume_points([group], 1, closed)
            if alone:
                hits[transfer.name] = alone[-1]
            groups.append(group)
        restorable = resume_points(groups, 1, closed)
        return PoolTransferResult(restorable[-1] if restorable else 0, hits, restorable)

    def batch_get_v2(
        self, transfers: list[PoolTransfer], extra_info: HiCacheStorageExtraInfo | None = None
    ) -> dict[str, list[bool]]:
        def read(pool: Pool, keys: list[str], indices: torch.Tensor) -> list[bool]:
            return pool.read(keys, indices, self._account(pool.name))

        return {transfer.name: self._move(transfer, read) for transfer in transfers}

    def batch_set_v2(
        self, transfers: list[PoolTransfer], extra_info: HiCacheStorageExtraInfo | None = None
    ) -> dict[str, list[bool]]:
        return {transfer.name: self._move(transfer, Pool.write) for transfer in transfers}

    def _move(self, transfer: PoolTransfer, move: Callable[..., list[bool]]) -> list[bool]:
        keys = transfer.keys or []
        return _quiet(
            lambda: [False] * len(keys),
            lambda: move(self._pools[str(transfer.name)], keys, transfer.host_indices),
        )

    # v1: the KV pool alone

    def batch_exists(self, keys: list[str], extra_info: HiCacheStorageExtraInfo | None = None) -> int:
        way = "pages" if self._zero_copy else "flat"

        def leading() -> int:
            present = self._pools[_KV].store(way).exists(_names(keys))
            return Presence(Need.HISTORY, 1, present).closed_tokens()

        return _quiet(lambda: 0, leading)

    def batch_get_v1(
        self, keys: list[str], host_indices: torch.Tensor, extra_info: HiCacheStorageExtraInfo | None = None
    ) -> list[bool]:
        return _quiet(lambda: [False] * len(keys), lambda: self._pools[_KV].read(keys, host_indices, self._account(_KV)))

    def batch_set_v1(
        self, keys: list[str], host_indices: torch.Tensor, extra_info: HiCacheStorageExtraInfo | None = None
    ) -> list[bool]:
        return _quiet(lambda: [False] * len(keys), lambda: self._pools[_KV].write(keys, host_indices))

    # Older calls, with tensors of flat pages

    def exists(self, key: str) -> bool:
        return self.batch_exists([key]) == 1

    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> torch.Tensor | None:
        return self.batch_get([key], [target_location])[0]

    def batch_get(
        self, keys: list[str], target_locations: Any = None, target_sizes: Any = None
    ) -> list[torch.Tensor | None]:
        def read() -> list[torch.Tensor | None]:
            store = self._pools[_KV].store("flat")
            into = {at: target for at, target in enumerate(target_locations)}
            loaded = store.get(_names(keys), into, self._account(_KV))
            return [target if loaded[at] else None for at, target in enumerate(target_locations)]

        return _quiet(lambda: [None] * len(keys), read)

    def set(self, key: str, value: Any = None, target_location: Any = None, target_sizes: Any = None) -> bool:
        return self.batch_set([key], [value])

    def batch_set(
        self, keys: list[str], values: Any = None, target_locations: Any = None, target_sizes: Any = None
    ) -> bool:
        def write() -> bool:
            store = self._pools[_KV].store("flat")
            flat = {at: value.contiguous() for at, value in enumerate(values)}
            return all(store.put(_names(keys), flat).values())

        return _quiet(lambda: False, write)

    def clear(self) -> bool:
        log.warning(
            "esker: a cache that other engines share is not cleared from here; the operator erases a tenant, and other weights "
            "are other names"
        )
        return False

    def close(self) -> None:
        """Sends the accounts that wait, and ends the connection."""
        for pool in self._pools.values():
            pool.close()
        self._client.close()


class Pool:
    """A host pool: where its pages lie, and the store of each way of cutting them."""

    def __init__(self, name: str, memory: Any, make: Callable[["Pool", str], ChunkStore]) -> None:
        self.name = name
        self.memory = memory
        self.layout = str(getattr(memory, "layout", ""))
        self.dtype = str(getattr(memory, "dtype", ""))
        self.page_tokens = int(getattr(memory, "page_size", 1) or 1)
        # Under context parallelism a page of the prompt is longer than the rank's own.
        self.index_tokens = int(getattr(memory, "logical_page_size", None) or self.page_tokens)
        self._make = make
        self._stores: dict[str, ChunkStore] = {}
        self._lock = threading.Lock()
        self._by_pointer = self._has_pointers()

    def _has_pointers(self) -> bool:
        if not hasattr(self.memory, "get_page_buffer_meta"):
            return False
        try:
            self._pointers(torch.arange(self.index_tokens))
            return True
        except Exception:  # noqa: BLE001: this layout is read and written through flat pages
            return False

    def store(self, way: str) -> ChunkStore:
        """The store of pages (as they lie in memory) or of flat pages."""
        with self._lock:
            store = self._stores.get(way)
            if store is None:
                store = self._stores[way] = self._make(self, way)
            return store

    def page_bytes(self, way: str) -> int:
        """Bytes of one page."""
        if way == "pages" and self._by_pointer:
            return sum(size for _, size in self._pointers(torch.arange(self.index_tokens))[0])
        flat = self.memory.get_dummy_flat_data_page()
        return int(flat.numel() * flat.element_size())

    def _pointers(self, indices: torch.Tensor) -> list[list[tuple[int, int]]]:
        """Pieces (address, bytes) of each page."""
        pointers, sizes = self.memory.get_page_buffer_meta(indices)
        pages = len(indices) // self.index_tokens
        each = len(pointers) // max(1, pages)
        pieces = list(zip(pointers, sizes))
        return [pieces[at : at + each] for at in range(0, len(pieces), each)] if pieces else []

    def _fits(self, keys: list[str], indices: torch.Tensor | None) -> bool:
        expected = len(keys) * self.index_tokens
        if indices is None or indices.numel() != expected:
            got = 0 if indices is None else indices.numel()
            log.error("esker: pool %s: %d keys need %d indices, got %d", self.name, len(keys), expected, got)
            return False
        return bool(keys)

    def close(self) -> None:
        """Sends the accounts that wait."""
        with self._lock:
            stores = list(self._stores.values())
        for store in stores:
            store.close()

    def read(self, keys: list[str], indices: torch.Tensor, account: Account | None = None) -> list[bool]:
        """Loads pages into the pool, on an account."""
        if not self._fits(keys, indices):
            return [False] * len(keys)
        store = self.store("pages")
        if self._by_pointer:
            into: dict[int, Any] = {at: _memory(page) for at, page in enumerate(self._pointers(indices))}
        else:
            into = {at: self.memory.get_dummy_flat_data_page() for at in range(len(keys))}
        loaded = store.get(_names(keys), into, account)
        if not self._by_pointer:
            for at, there in loaded.items():
                if there:
                    self.memory.set_from_flat_data_page(self._first(indices, at), into[at])
        return [loaded[at] for at in range(len(keys))]

    def write(self, keys: list[str], indices: torch.Tensor) -> list[bool]:
        """Stores pages of the pool."""
        if not self._fits(keys, indices):
            return [False] * len(keys)
        if self._by_pointer:
            chunks: dict[int, Any] = {at: _memory(page) for at, page in enumerate(self._pointers(indices))}
        else:
            pages = (self.memory.get_data_page(self._first(indices, at), flat=True) for at in range(len(keys)))
            chunks = {at: page.contiguous() for at, page in enumerate(pages)}
        stored = self.store("pages").put(_names(keys), chunks)
        return [stored[at] for at in range(len(keys))]

    def _first(self, indices: torch.Tensor, page: int) -> int:
        return int(indices[page * self.index_tokens].item())


def _flags(model: str | None) -> dict[str, str]:
    """Rope and quantisation, as the model's folder and the engine's flags say; what else there is comes as `model_facts`."""
    facts = {"config": config_digest(model)}
    try:
        given = get_server_args()
    except ValueError:  # not inside an engine
        return facts
    names = ("quantization", "kv_cache_dtype", "json_model_override_args", "dtype")
    return facts | {name: str(getattr(given, name, None)) for name in names}


def _memory(pieces: list[tuple[int, int]]) -> list[memoryview]:
    """The pool's own memory: it lives as long as the pool, which outlives its transfers."""
    return [memoryview((ctypes.c_ubyte * size).from_address(address)).cast("B") for address, size in pieces]


def _names(keys: Sequence[str]) -> list[bytes]:
    return [key.encode() for key in keys]


def _quiet(otherwise: Callable[[], Any], work: Callable[[], Any]) -> Any:
    try:
        return work()
    except Exception as error:  # noqa: BLE001: the engine's data path must never see one
        log.warning("esker: a call of the storage backend failed and counts as a miss: %s: %s", type(error).__name__, error)
        return otherwise()
