"""LMCache: an L2 adapter of its multiprocess server, loaded as a ``plugin``. No fork.

Objects go straight from and into LMCache's registered L1 memory. One chunk for each object key.

Invariants:
- Submitting returns at once; each task ends exactly once, by its eventfd, whatever happened: a failure is a bit that is not set.
- What a lookup locked is pinned by a grant of the node until it is unlocked or the grant expires, so a dead LMCache holds nothing
  for ever. Unlocking again, or what was never locked, is nothing.
- An object counts as loaded only when the node has proven it and all of it has arrived.
- What was loaded is settled, off the path: a load is an account of its own, as nothing says which request it is for, and a chunk
  counts once, however many ranks and groups it has objects of.
- The namespace binds model and revision of the weights, the types and bytes of an object, and what is told of rope and quantisation;
  rank, object group and LMCache's salt are part of the name.
- ``report_status`` turns unhealthy when the node cannot be reached or stores fail.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import math
import struct
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

from lmcache.lmcache_native import Bitmap
from lmcache.v1.distributed.internal_api import L2StoreResult
from lmcache.v1.distributed.l2_adapters.base import L2AdapterInterface
from lmcache.v1.distributed.l2_adapters.config import L2AdapterConfigBase
from lmcache.v1.platform.event_notifier import create_event_notifier

from ..chunks import Account, ChunkStore
from .identity import config_digest, identity, weights_revision
from .settings import Settings

if TYPE_CHECKING:
    from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
    from lmcache.v1.distributed.internal_api import L1MemoryDesc
    from lmcache.v1.memory_management import MemoryObj

log = logging.getLogger("esker")

#: Forms that the objects of one model may have: one for each object group, as a rule.
MAX_FORMS = 8
#: How long the node holds what a lookup found, in seconds, and how many locked keys are remembered before expired ones are dropped.
GRANT_S = 30.0
MAX_LOCKED = 65_536
_ENGINE_KEYS = frozenset({"model_path", "eviction", "persist", "serde", "shared", "affinity_tag"})


class EskerL2AdapterConfig(L2AdapterConfigBase):
    """``adapter_params``: the settings of every connector of Esker, and ``model_path`` where weights may be read."""

    def __init__(self, settings: Settings, model_path: str | None) -> None:
        self.settings = settings
        self.model_path = model_path

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> "EskerL2AdapterConfig":
        return cls(Settings.read(d, _ENGINE_KEYS), d.get("model_path"))

    @classmethod
    def help(cls) -> str:
        return (
            "Esker L2 adapter config fields:\n"
            "- endpoint (str): HOST:PORT of the node (optional, default 127.0.0.1:7410)\n"
            "- weights_revision (str): changes whenever the weights do (required, unless model_path has *.safetensors)\n"
            "- model_facts (str): what else decides KV and no file in model_path says, such as flags for quantisation (optional)\n"
            "- adapter_revision (str): changes whenever a LoRA adapter does under its name (optional)\n"
            "- ttl (str): 5m, 1h, 24h or 72h after the last use (optional)\n"
            "- durable (bool): a store is done when it is flushed (optional, default true)"
        )


class EskerL2Adapter(L2AdapterInterface):
    """See the module."""

    def __init__(
        self, config: EskerL2AdapterConfig | dict[str, Any], l1_memory_desc: "L1MemoryDesc | None" = None
    ) -> None:
        # No capacity: the node evicts by itself.
        super().__init__(0)
        if isinstance(config, dict):
            config = EskerL2AdapterConfig.from_dict(config)
        self._settings = config.settings
        self._client = self._settings.client()
        self._objects = Objects(self._client, self._settings, config.model_path)
        self._notifiers = {what: create_event_notifier() for what in ("store", "lookup", "load")}
        self._threads = {
            "store": ThreadPoolExecutor(2, thread_name_prefix="esker-store"),
            "lookup": ThreadPoolExecutor(2, thread_name_prefix="esker-lookup"),
            "load": ThreadPoolExecutor(max(2, self._settings.threads), thread_name_prefix="esker-load"),
        }
        self._lock = threading.Lock()
        self._next_task = 0
        self._done: dict[str, dict[int, Any]] = {"store": {}, "lookup": {}, "load": {}}
        self._holds = Holds(self._objects)
        self._failed_stores = 0
        self._loads = itertools.count()
        self._instance = uuid.uuid4().hex
        self._closed = False

    # Eventfds

    def get_store_event_fd(self) -> int:
        return int(self._notifiers["store"].fileno())

    def get_lookup_and_lock_event_fd(self) -> int:
        return int(self._notifiers["lookup"].fileno())

    def get_load_event_fd(self) -> int:
        return int(self._notifiers["load"].fileno())

    # Store

    def submit_store_task(self, keys: "list[ObjectKey]", objects: "list[MemoryObj]") -> int:
        return self._submit("store", lambda: self._store(keys, objects), L2StoreResult(False, 0))

    def _store(self, keys: "list[ObjectKey]", objects: "list[MemoryObj]") -> L2StoreResult:
        stored = self._objects.move(keys, objects, ChunkStore.put)
        sizes = [len(item.byte_array) for item in objects]
        there = [(key, size) for key, size, done in zip(keys, sizes, stored, strict=True) if done]
        with self._lock:
            self._failed_stores = 0 if len(there) == len(keys) else self._failed_stores + 1
        if there:
            self._notify_keys_stored([key for key, _ in there], [size for _, size in there])
        return L2StoreResult(len(there) == len(keys), sum(size for _, size in there))

    def pop_completed_store_tasks(self) -> dict[int, L2StoreResult]:
        with self._lock:
            done, self._done["store"] = self._done["store"], {}
        return done

    # Lookup and lock

    def submit_lookup_and_lock_task(
        self, keys: "list[ObjectKey]", group_layout_descs: "dict[int, MemoryLayoutDesc]"
    ) -> int:
        return self._submit("lookup", lambda: self._lookup(keys, group_layout_descs), Bitmap(len(keys)))

    def _lookup(self, keys: "list[ObjectKey]", layouts: "dict[int, MemoryLayoutDesc]") -> Bitmap:
        found = Bitmap(len(keys))
        for at in self._holds.hold(keys, layouts):
            found.set(at)
        return found

    def query_lookup_and_lock_result(self, task_id: int) -> Bitmap | None:
        with self._lock:
            return self._done["lookup"].pop(task_id, None)

    def submit_unlock(self, keys: "list[ObjectKey]") -> None:
        grants = self._holds.unlock(keys)
        if grants and not self._closed:
            self._threads["lookup"].submit(self._holds.release, grants)

    # Load

    def submit_load_task(self, keys: "list[ObjectKey]", objects: "list[MemoryObj]") -> int:
        return self._submit("load", lambda: self._load(keys, objects), Bitmap(len(keys)))

    def _load(self, keys: "list[ObjectKey]", objects: "list[MemoryObj]") -> Bitmap:
        loaded = Bitmap(len(keys))
        account = f"lmcache/{self._instance}/{next(self._loads)}"
        done = self._objects.move(keys, objects, ChunkStore.get, account)
        for at, there in enumerate(done):
            if there:
                loaded.set(at)
        accessed = [key for key, there in zip(keys, done, strict=True) if there]
        if accessed:
            self._notify_keys_accessed(accessed)
        return loaded

    def query_load_result(self, task_id: int) -> Bitmap | None:
        with self._lock:
            return self._done["load"].pop(task_id, None)

    # The rest

    def report_status(self) -> dict[str, Any]:
        with self._lock:
            failed = self._failed_stores
        reachable = self._objects.healthy
        return {
            "is_healthy": reachable and failed == 0 and not self._closed,
            "type": "EskerL2Adapter",
            "endpoint": self._settings.endpoint,
            "reachable": reachable,
            "failed_stores_in_a_row": failed,
            **self._objects.counters(),
        }

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        for threads in self._threads.values():
            threads.shutdown(wait=True, cancel_futures=True)
        self._objects.close()
        self._client.close()
        for notifier in self._notifiers.values():
            notifier.close()

    def _submit(self, what: str, work: Callable[[], Any], failed: Any) -> int:
        with self._lock:
            task = self._next_task
            self._next_task += 1

        def run() -> None:
            result = failed
            try:
                result = work()
            except Exception as error:  # noqa: BLE001: a task always ends
                log.warning("esker: a %s of the L2 adapter failed: %s: %s", what, type(error).__name__, error)
            with self._lock:
                self._done[what][task] = result
            self._notifiers[what].notify()

        self._threads[what].submit(run)
        return task


class Form(NamedTuple):
    """What objects have in common: KV of another type under one model's name is not the same KV, however many bytes it has."""

    len_bytes: int
    dtypes: str  # a digest of them, in hexadecimal

    @classmethod
    def of_object(cls, item: "MemoryObj") -> "Form":
        """The form of an object in memory."""
        metadata = item.metadata
        return cls(len(item.byte_array), _dtypes(metadata.dtypes or [metadata.dtype]))

    @classmethod
    def of_layout(cls, layout: "MemoryLayoutDesc | None") -> "Form":
        """The form that a lookup asks for; of no bytes where it does not say."""
        if layout is None:
            return cls(0, "")
        pairs = zip(layout.shapes, layout.dtypes, strict=True)
        return cls(sum(math.prod(shape) * dtype.itemsize for shape, dtype in pairs), _dtypes(layout.dtypes))


class Objects:
    """Chunks by object key: a store for each model and form. Rank, group and salt are part of the names."""

    def __init__(self, client: Any, settings: Settings, model_path: str | None) -> None:
        self._client = client
        self._settings = settings
        self._revision = weights_revision(settings.weights_revision, model_path)
        self._config = config_digest(model_path)
        self._stores: dict[tuple[str, Form], ChunkStore] = {}
        self._forms: dict[str, Forms] = {}
        self._lock = threading.Lock()

    @property
    def healthy(self) -> bool:
        """Whether the node answered when it was last asked."""
        with self._lock:
            return all(store.healthy for store in self._stores.values())

    def counters(self) -> dict[str, int]:
        """Sums over all stores."""
        sums: dict[str, int] = {}
        with self._lock:
            for store in self._stores.values():
                for name, value in vars(store.counters).items():
                    sums[name] = sums.get(name, 0) + value
        return sums

    def store(self, key: "ObjectKey", form: Form) -> ChunkStore:
        """The store of objects like this one."""
        kind = (key.model_name, form)
        with self._lock:
            store = self._stores.get(kind)
            if store is None:
                store = self._stores[kind] = self._make("objects", (key.model_name, *form), form.len_bytes)
            return store

    def _make(self, what: str, kind: tuple[Any, ...], size: int) -> ChunkStore:
        # LMCache says nothing of rope and quantisation.
        facts = {
            "what": what,
            "kind": kind,
            "config": self._config,
            "model_facts": self._settings.model_facts,
            "adapter_revision": self._settings.adapter_revision,
        }
        return ChunkStore(
            self._client,
            identity("lmcache", self._revision, "", facts),
            f"lmcache-{what}",
            size,
            chunk_tokens=256,
            **self._settings.store_options(),
        )

    def forms(self, key: "ObjectKey") -> "Forms":
        """Which forms objects like this one have."""
        with self._lock:
            forms = self._forms.get(key.model_name)
            if forms is None:
                forms = self._forms[key.model_name] = Forms(self._make("forms", (key.model_name,), Forms.BYTES))
            return forms

    def close(self) -> None:
        """Sends the accounts that wait."""
        with self._lock:
            stores = list(self._stores.values())
        for store in stores:
            store.close()

    def move(
        self,
        keys: "list[ObjectKey]",
        objects: "list[MemoryObj]",
        move: Callable[..., dict[int, bool]],
        account: str = "",
    ) -> list[bool]:
        """Stores objects, or loads them on an account; whether each was."""
        done = [False] * len(keys)
        groups: dict[int, tuple[ChunkStore, list[int]]] = {}
        memory = [item.byte_array for item in objects]
        forms = [Form.of_object(item) for item in objects]
        for at, (key, form) in enumerate(zip(keys, forms, strict=True)):
            store = self.store(key, form)
            groups.setdefault(id(store), (store, []))[1].append(at)
        counted: set[bytes] = set()
        for number, (store, positions) in enumerate(groups.values()):
            names = [_name(keys[at]) for at in positions]
            accounts = []
            if account:
                new = {keys[at].chunk_hash: index for index, at in enumerate(positions) if keys[at].chunk_hash not in counted}
                counted.update(new)
                accounts = [Account(f"{account}/{number}", counts=list(new.values()))]
            answers = move(store, names, {index: memory[at] for index, at in enumerate(positions)}, *accounts)
            for index, at in enumerate(positions):
                done[at] = answers[index]
            if move is ChunkStore.put and any(answers.values()):
                self.forms(keys[positions[0]]).add(forms[positions[0]])
        return done


class Forms:
    """The forms that objects of one model have, kept in the node: a lookup may come with no layout, and after a restart nothing
    else says what is stored."""

    BYTES = 64
    #: Bytes of an object, and the digest of its types.
    _RECORD = struct.Struct("<Q16s")

    def __init__(self, store: ChunkStore) -> None:
        self._store = store
        self._known: list[Form] = []
        self._read = False
        self._lock = threading.Lock()

    def all(self) -> list[Form]:
        """What is known here and in the node."""
        with self._lock:
            if not self._read:
                memory = {at: bytearray(self.BYTES) for at in range(MAX_FORMS)}
                loaded = self._store.get(self._names(), memory)
                for at, there in loaded.items():
                    form = self._decode(memory[at])
                    if there and form not in self._known:
                        self._known.append(form)
                # A node that did not answer is asked again.
                self._read = self._store.healthy and bool(self._known)
            return list(self._known)

    def add(self, form: Form) -> None:
        """Objects of this form were stored."""
        if form in self.all():
            return
        with self._lock:
            self._known.append(form)
            # Two writers may want one place: each finds the first that is free, or that has its own bytes.
            for name in self._names():
                record = bytearray(self.BYTES)
                if not self._store.exists([name])[0]:
                    self._RECORD.pack_into(record, 0, form.len_bytes, bytes.fromhex(form.dtypes))
                    self._store.put([name], {0: record})
                    record = bytearray(self.BYTES)
                if self._store.get([name], {0: record})[0] and self._decode(record) == form:
                    return

    @classmethod
    def _decode(cls, record: bytearray) -> Form:
        len_bytes, dtypes = cls._RECORD.unpack_from(record)
        return Form(len_bytes, dtypes.hex())

    @staticmethod
    def _names() -> list[bytes]:
        return [hashlib.blake2b(b"form %d" % at, digest_size=32).digest() for at in range(MAX_FORMS)]


class Holds:
    """What lookups locked: grants of the node, by key."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self._lock = threading.Lock()
        self._grants: dict[Any, list[list[Any]]] = {}  # key -> grants: [store, grant, keys that still hold it]

    def hold(self, keys: "list[ObjectKey]", layouts: "dict[int, MemoryLayoutDesc]") -> list[int]:
        """Positions of the keys that are stored, now pinned."""
        found: list[int] = []
        groups: dict[int, tuple[ChunkStore, list[int]]] = {}
        for at, key in enumerate(keys):
            form = Form.of_layout(layouts.get(key.object_group_id))
            for one in [form] if form.len_bytes else self._objects.forms(key).all():
                store = self._objects.store(key, one)
                groups.setdefault(id(store), (store, []))[1].append(at)
        for store, positions in groups.values():
            present, grant = store.hold([_name(keys[at]) for at in positions])
            there = [at for at, is_there in zip(positions, present, strict=True) if is_there]
            found += there
            if grant and there:
                entry = [store, grant, len(there), time.monotonic() + GRANT_S]
                with self._lock:
                    self._drop_expired()
                    for at in there:
                        self._grants.setdefault(keys[at], []).append(entry)
            elif grant:
                store.let_go(grant)
        return found

    def _drop_expired(self) -> None:
        """What was never unlocked: the node has let it go long since."""
        now = time.monotonic()
        if len(self._grants) > MAX_LOCKED:
            live = {key: [entry for entry in entries if entry[3] > now] for key, entries in self._grants.items()}
            self._grants = {key: entries for key, entries in live.items() if entries}

    def unlock(self, keys: "Iterable[ObjectKey]") -> list[tuple[ChunkStore, bytes]]:
        """Takes locks off; the grants that nothing holds any more."""
        free = []
        with self._lock:
            for key in keys:
                entries = self._grants.get(key)
                if not entries:
                    continue
                entry = entries.pop(0)
                if not entries:
                    del self._grants[key]
                entry[2] -= 1
                if entry[2] == 0:
                    free.append((entry[0], entry[1]))
        return free

    @staticmethod
    def release(grants: list[tuple[ChunkStore, bytes]]) -> None:
        """Gives grants back; one that the node does not hear of expires."""
        for store, grant in grants:
            store.let_go(grant)


def _name(key: "ObjectKey") -> bytes:
    hasher = hashlib.blake2b(digest_size=32)
    salt = key.cache_salt.encode()
    hasher.update(struct.pack("<QII", key.kv_rank, key.object_group_id, len(salt)) + salt + key.chunk_hash)
    return hasher.digest()


def _dtypes(dtypes: Iterable[Any]) -> str:
    return hashlib.blake2b(",".join(map(str, dtypes)).encode(), digest_size=16).hexdigest()
