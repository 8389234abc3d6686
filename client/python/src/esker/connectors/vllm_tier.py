"""vLLM: a ``SecondaryTierManager`` for the tiering offload connector, which moves chunks between the CPU tier and Esker.

Loaded out of tree: ``{"type": "EskerTier", "module_path": "esker.connectors.vllm_tier", ...}`` among ``secondary_tiers``.

Invariants:
- Every method returns at once: the scheduler holds its lock. Questions of a step go out together when the step ends; a question
  that is not answered in twice the lookup's time-out is a miss, so nothing is asked for ever.
- A hit lies inside the longest prefix that can be restored, over all groups asked about: see vllm_verdicts.py. A verdict of a request
  does not change while the request lives, except that what failed to load becomes a miss for all.
- Each job is reported once, whatever happened. A partly loaded chunk is never reported as loaded.
- A slot is read only while its job is not reported: a store that has waited too long fails, so that slow storage does not hold
  the CPU tier.
- After ``drain_jobs``, which vLLM calls when weights change in place, nothing is read and nothing is written: the revision is not
  known any more.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

from vllm.v1.kv_offload import base as offload
from vllm.v1.kv_offload.base import LookupResult, Medium, OffloadingEvent, OffloadKey, ReqContext
from vllm.v1.kv_offload.tiering.base import (
    JobResult,
    RequestOffloadingContext,
    ScheduleEndContext,
    SecondaryTierManager,
    TransferJob,
)

from ..chunks import ChunkStore
from .identity import config_digest, identity, tokenizer_digest, weights_revision
from .settings import Settings
from .vllm_verdicts import Groups, Verdicts

log = logging.getLogger("esker")

#: A store that has waited this long fails, in seconds.
STORE_AGE_S = 30.0
#: Jobs that wait; one more fails at once.
MAX_JOBS = 256
#: One question of a step goes out while the one before it is not answered.
LOOKUP_THREADS = 2

_ENGINE_KEYS = frozenset({"locality", "enable_kv_events"})


class EskerTier(SecondaryTierManager):
    """See the module."""

    medium: ClassVar[Medium] = Medium.STORAGE

    def __init__(
        self,
        offloading_spec: Any,
        primary_kv_view: memoryview,
        tier_type: str,
        backpressure_detector: Any = None,
        locality: str | None = None,
        enable_kv_events: bool = False,
        **given: Any,
    ) -> None:
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)
        locality_type = getattr(offload, "Locality", None)
        self.locality = locality_type(locality) if locality is not None and locality_type else None
        self._settings = Settings.read(given, _ENGINE_KEYS)
        self._client = self._settings.client()
        self._stores = Stores(self._client, self._settings, offloading_spec.config, self._used_bytes())
        self._row_bytes = self._used_bytes()
        # Apart: behind bulk transfers every question would be too late, and loads are waited for where stores are not.
        self._threads = {
            "lookup": ThreadPoolExecutor(LOOKUP_THREADS, thread_name_prefix="esker-lookup"),
            "load": ThreadPoolExecutor(self._settings.threads, thread_name_prefix="esker-load"),
            "store": ThreadPoolExecutor(self._settings.threads, thread_name_prefix="esker-store"),
        }
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._running = 0
        self._finished: list[JobResult] = []
        self._failed_keys: set[OffloadKey] = set()
        self._silent = False
        config = offloading_spec.config
        self._groups = Groups(config.groups, config.cache.blocks_per_chunk)
        #: By request: verdicts, when those that are asked give up, and what the next batch asks, each key with its end in the prompt.
        self._verdicts: dict[str, Verdicts] = {}
        self._asked: dict[str, dict[OffloadKey, float]] = {}
        self._batch: dict[str, list[tuple[OffloadKey, int | None]]] = {}
        # Held while verdicts are worked out, which the scheduler never waits for.
        self._judging = threading.Lock()
        events = enable_kv_events and offloading_spec.kv_events_config.enable_kv_cache_events
        self._events: list[OffloadingEvent] | None = [] if events else None

    def _used_bytes(self) -> int:
        """Bytes of a row that mean something: of replicated latents the row holds one copy and then nothing."""
        config = self._offloading_spec.config
        if config.replicated_layout and not config.canonical_layout:
            return min(self._block_size_bytes, config.worker_kv_bytes_per_block * config.cache.blocks_per_chunk)
        return self._block_size_bytes

    # Lookup

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        return RequestOffloadingContext()

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        if self._silent:
            return LookupResult.MISS
        request = req_context.req_id
        with self._lock:
            verdicts = self._verdicts.get(request)
            if verdicts is None:
                verdicts = self._verdicts[request] = Verdicts(self._groups)
            verdict = verdicts.of(key)
            if verdict is not None:
                return LookupResult.HIT if verdict else LookupResult.MISS
            asked = self._asked.setdefault(request, {})
            deadline = asked.get(key)
            now = time.monotonic()
            if deadline is None:
                asked[key] = now + 2 * self._settings.lookup_timeout_s
                self._batch.setdefault(request, []).append((key, _end(key, req_context)))
                return LookupResult.RETRY
            if now >= deadline:
                verdicts.give({key: False})
                return LookupResult.MISS
        return LookupResult.RETRY

    def on_schedule_end(self, context: ScheduleEndContext) -> None:
        with self._lock:
            batch, self._batch = self._batch, {}
        if batch:
            self._threads["lookup"].submit(self._ask, batch)

    def _ask(self, batch: Mapping[str, list[tuple[OffloadKey, int | None]]]) -> None:
        keys = list(dict.fromkeys(key for asked in batch.values() for key, _ in asked))
        present: set[OffloadKey] = set()
        try:
            present.update(key for key, there in self._stores.exists(keys).items() if there)
        except Exception as error:  # noqa: BLE001: a miss
            log.warning("esker: a lookup failed and counts as a miss: %s", error)
        with self._judging:
            for request, asked in batch.items():
                with self._lock:
                    verdicts = self._verdicts.get(request)
                    present -= self._failed_keys
                if verdicts is not None:
                    judged = verdicts.judge(asked, present)
                    with self._lock:
                        verdicts.give({key: hit and key not in self._failed_keys for key, hit in judged.items()})

    def on_request_finished(self, req_context: ReqContext) -> None:
        with self._lock:
            for table in (self._verdicts, self._asked, self._batch):
                table.pop(req_context.req_id, None)
            if not self._verdicts:
                self._failed_keys.clear()

    def has_pending_work(self) -> bool:
        """Keeps the engine stepping until every job is reported."""
        with self._lock:
            return self._running > 0 or bool(self._finished)

    # Jobs

    def submit_store(self, job_metadata: TransferJob) -> None:
        self._submit("store", job_metadata, self._store)

    def submit_load(self, job_metadata: TransferJob) -> None:
        self._submit("load", job_metadata, self._load)

    def _submit(self, what: str, job: TransferJob, work: Any) -> None:
        with self._lock:
            refused = self._silent or self._running >= MAX_JOBS
            if refused:
                self._finish(job, [], 0.0, store=what == "store")
            else:
                self._running += 1
        if not refused:
            self._threads[what].submit(self._run, what, job, work)

    def _run(self, what: str, job: TransferJob, work: Any) -> None:
        started = time.monotonic()
        done: list[OffloadKey] = []
        try:
            done = work(job)
        except Exception as error:  # noqa: BLE001: reported as failed
            log.warning("esker: a job of the tier failed: %s", error)
        with self._lock:
            self._running -= 1
            self._finish(job, done, time.monotonic() - started, store=what == "store")
            self._idle.notify_all()

    def _finish(self, job: TransferJob, done: Collection[OffloadKey], seconds: float, store: bool) -> None:
        keys = list(job.keys)
        success = len(done) == len(keys)
        size = len(done) * self._row_bytes
        if store:
            if done and self._events is not None:
                self._events.append(
                    OffloadingEvent(keys=list(done), medium=self.medium, removed=False, locality=self.locality)
                )
            result = JobResult(job.job_id, success, transfer_time=seconds, transfer_bytes=size)
        else:
            failed = set(keys) - set(done)
            self._failed_keys |= failed
            for verdicts in self._verdicts.values():
                verdicts.refuse(failed)
            partly = tuple(done) if done and not success else None
            result = JobResult(job.job_id, success, successful_keys=partly, transfer_time=seconds, transfer_bytes=size)
        self._finished.append(result)

    def _store(self, job: TransferJob) -> list[OffloadKey]:
        if time.monotonic() - job.submit_time > STORE_AGE_S:
            return []
        stored = self._stores.put(_views(self._primary_kv_view, job, self._row_bytes))
        return [key for key in job.keys if stored.get(key)]

    def _load(self, job: TransferJob) -> list[OffloadKey]:
        loaded = self._stores.get(_views(self._primary_kv_view, job, self._row_bytes))
        # In the job's order, which is that of the prefix.
        return [key for key in job.keys if loaded.get(key)]

    def get_finished_jobs(self) -> Iterable[JobResult]:
        with self._lock:
            finished, self._finished = self._finished, []
        return finished

    def take_events(self) -> Iterable[OffloadingEvent]:
        with self._lock:
            events, self._events = self._events or [], [] if self._events is not None else None
        return events

    def drain_jobs(self) -> None:
        with self._lock:
            while self._running:
                self._idle.wait()
            self._verdicts.clear()
            self._asked.clear()
            self._batch.clear()
            if self._settings.weights_fixed:
                return
            if not self._silent:
                log.error(
                    "esker: the engine's cache was reset, which it does when weights change in place; their revision is not "
                    "known any more, so nothing is read and nothing is written until the engine is started with its new revision"
                )
            self._silent = True

    def shutdown(self) -> None:
        try:
            for threads in self._threads.values():
                threads.shutdown(wait=True, cancel_futures=False)
            self._client.close()
        except Exception as error:  # noqa: BLE001: the primary tier is unmapped after this
            log.warning("esker: the tier did not end cleanly: %s", error)

    @classmethod
    def config_info_keys(cls, tier_config: dict[str, Any]) -> tuple[str, ...]:
        return tuple(key for key in ("endpoint", "weights_revision", "ttl") if key in tier_config)


class Stores:
    """One store of chunks for each group: the last four bytes of a key name the group, the rest are vLLM's block hash."""

    def __init__(self, client: Any, settings: Settings, config: Any, row_bytes: int) -> None:
        self._client = client
        self._settings = settings
        self._row_bytes = row_bytes
        self._config = config
        model = config.extra_config.get("model_path", config.model.name)
        self._revision = weights_revision(settings.weights_revision, model)
        self._tokenizer = tokenizer_digest(model, config.model.name)
        parallel = config.parallel
        alone = config.replicated_layout or getattr(parallel, "is_parallelism_agnostic", False)
        self._facts = {
            "model": config.model.name,
            "dtype": str(config.model.dtype),
            # Rope and quantisation, of which the tier is told nothing.
            "config": config_digest(model),
            "model_facts": settings.model_facts,
            "adapter_revision": settings.adapter_revision,
            "tokens_per_hash": config.cache.tokens_per_hash,
            "blocks_per_chunk": config.cache.blocks_per_chunk,
            "kv_layout": config.kv_cache_layout,
            "canonical": config.canonical_layout,
            "replicated": config.replicated_layout,
            "groups": [(group.tokens_per_block, list(group.layer_names)) for group in config.groups],
            # A row is that of all ranks together.
            "parallel": "any"
            if alone
            else [parallel.tp_size, parallel.pp_size, parallel.pcp_size, parallel.dcp_size],
        }
        self._by_group: dict[int, ChunkStore] = {}
        self._lock = threading.Lock()

    def exists(self, keys: Collection[OffloadKey]) -> dict[OffloadKey, bool]:
        """Which keys are stored."""
        present: dict[OffloadKey, bool] = {}
        for group, of_group in _by_group(keys).items():
            answers = self._of(group).exists([bytes(key[:-4]) for key in of_group])
            present.update(zip(of_group, answers))
        return present

    def get(self, rows: Mapping[OffloadKey, memoryview]) -> dict[OffloadKey, bool]:
        """Loads rows."""
        return self._move(rows, lambda store, hashes, memory: store.get(hashes, memory))

    def put(self, rows: Mapping[OffloadKey, memoryview]) -> dict[OffloadKey, bool]:
        """Stores rows."""
        return self._move(rows, lambda store, hashes, memory: store.put(hashes, memory))

    def _move(self, rows: Mapping[OffloadKey, memoryview], move: Any) -> dict[OffloadKey, bool]:
        moved: dict[OffloadKey, bool] = {}
        for group, of_group in _by_group(rows).items():
            hashes = [bytes(key[:-4]) for key in of_group]
            answers = move(self._of(group), hashes, {at: rows[key] for at, key in enumerate(of_group)})
            moved.update((key, answers[at]) for at, key in enumerate(of_group))
        return moved

    def _of(self, group: int) -> ChunkStore:
        with self._lock:
            store = self._by_group.get(group)
            if store is None:
                facts = {**self._facts, "group": group}
                tokens = self._config.groups[0].tokens_per_block * self._config.cache.blocks_per_chunk
                store = self._by_group[group] = ChunkStore(
                    self._client,
                    identity("vllm-tier", self._revision, self._tokenizer, facts),
                    f"vllm-tier-group{group}",
                    self._row_bytes,
                    chunk_tokens=tokens,
                    **self._settings.store_options(),
                )
            return store


def _end(key: OffloadKey, req_context: ReqContext) -> int | None:
    """Where in the prompt a key's chunk ends, in tokens. Older releases do not say."""
    position = getattr(req_context, "get_offload_key_position", None)
    return position(key) if position is not None else None


def _by_group(keys: Iterable[OffloadKey]) -> dict[int, list[OffloadKey]]:
    groups: dict[int, list[OffloadKey]] = {}
    for key in keys:
        groups.setdefault(int.from_bytes(key[-4:], "big"), []).append(key)
    return groups


def _views(view: memoryview, job: TransferJob, row_bytes: int) -> dict[OffloadKey, memoryview]:
    """The slot of each key, as bytes. A memoryview of two dimensions cannot be indexed by row: the flat one is cut."""
    stride = view.strides[0] if view.strides else 0
    flat = view.cast("B")
    return {
        key: flat[int(slot) * stride : int(slot) * stride + row_bytes] for key, slot in zip(job.keys, job.chunk_ids)
    }
