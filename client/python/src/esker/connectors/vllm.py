"""vLLM: a ``KVConnectorBase_V1`` that keeps whole KV pages in Esker. No fork: loaded by ``kv_connector_module_path``.

What is kept: one chunk for each page of each KV-cache group, the bytes of all its layers, under vLLM's own block hash. Full
attention (MLA included) is history; a sliding window needs only the pages of its last rows. A prefix length is offered only if
every group, on every rank, has what it needs there, and the answer for a request never changes while the request waits.

Invariants:
- What failed to load is not asked for again by the same request: the promise would be broken for ever.
- The scheduler never waits: a lookup is asked by a thread of its own, the scheduler is told to come back (``None``), and after
  twice the lookup's time-out it counts as a miss.
- Pages reach the engine's memory only when the node has proven them and all of a page has arrived. What fails is reported by
  block, and vLLM computes it (``kv_load_failure_policy: recompute``).
- Each request is settled once, by threads of their own: what the first load gave it when that ended (a grant does not live as long
  as a request may), or as computed when it finished without one.
- A step is never failed by the store: saving copies pages and hands them to a bounded queue; what has no room is dropped.
- The namespace binds model, revision of the weights, dtype, page layout, group and parallel rank. Ranks that hold identical
  latents (MLA) share one namespace, so one copy is kept, whichever rank writes first. What an adapter (LoRA) computed is named by
  its revision too, and neither loaded nor stored where that is not known.
- After ``reset_cache`` (vLLM calls it when weights were changed in place) the revision is not known any more: nothing is read
  and nothing is written until the engine is started again.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import threading
import time
import uuid
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)
from vllm.v1 import kv_cache_interface as specs
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from ..chunks import Account, ChunkStore
from ..client import Client
from ..resume import Need, Presence, common, resume_points
from .adapters import Adapters
from .identity import identity, tokenizer_digest, weights_revision
from .settings import Settings
from .vllm_stats import EskerStats

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

log = logging.getLogger("esker")

#: Block 0 stands for "no block" in vLLM's tables.
NULL_BLOCK = 0
#: Longest name of an account, in bytes.
MAX_NAME_BYTES = 128


@dataclasses.dataclass(frozen=True)
class Group:
    """A KV-cache group as this connector sees it."""

    index: int
    page_tokens: int
    need: Need
    window_tokens: int
    layers: tuple[tuple[str, int], ...]  # name, bytes of its part of a page
    replicated: bool  # the same bytes on every rank

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a page over all layers."""
        return sum(size for _, size in self.layers)

    def presence(self, present: list[bool]) -> Presence:
        """Its pages as the lookup found them."""
        return Presence(self.need, self.page_tokens, present, self.window_tokens)


@dataclasses.dataclass
class Pages:
    """Pages of one group and one request to move. ``hashes`` runs from the first page of the prompt."""

    group: int
    hashes: list[bytes]
    blocks: dict[int, int]  # page -> block


@dataclasses.dataclass
class Load:
    """What a request waits for."""

    request: str
    pages: list[Pages]
    #: What it is settled as; None where the request was settled before.
    account: Account | None = None


@dataclasses.dataclass
class EskerMetadata(KVConnectorMetadata):
    """From the scheduler to the workers, each step."""

    loads: list[Load] = dataclasses.field(default_factory=list)
    saves: list[Pages] = dataclasses.field(default_factory=list)
    reset: bool = False


@dataclasses.dataclass
class Verdict:
    """The answer for one request: fixed once given."""

    deadline: float
    answer: "Future[tuple[list[int], list[list[bool]]]]"
    local_tokens: int = 0
    #: Preemptions of the request when its pages were last loaded; None before that.
    loaded_at: int | None = None
    #: What was promised could not be loaded: it is not asked for again, and stored anew.
    failed: bool = False

    def points(self) -> list[int] | None:
        """Lengths that can be resumed, ascending; None while it is not known and there is time left."""
        if self.answer.done():
            return self.answer.result()[0]
        return [] if time.monotonic() >= self.deadline else None

    def present(self, group: int) -> list[bool]:
        """Pages of a group that are stored."""
        return self.answer.result()[1][group] if self.answer.done() and not self.failed else []


@dataclasses.dataclass
class Tracked:
    """A request that is being computed."""

    request: "Request"
    tables: list[list[int]]  # by group
    saved_pages: list[int]  # by group: pages below are stored or on their way


class EskerConnector(KVConnectorBase_V1, SupportsHMA):
    """See the module."""

    _cache_hit_source = CacheHitSource.DISK

    def __init__(self, vllm_config: "VllmConfig", role: KVConnectorRole, kv_cache_config: "KVCacheConfig") -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        extra = self._kv_transfer_config.kv_connector_extra_config or {}
        settings = Settings.read(extra)
        shape = Shape(vllm_config, kv_cache_config, settings)
        client = settings.client()
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        if role == KVConnectorRole.SCHEDULER:
            self._scheduler = SchedulerSide(settings, shape, client)
        else:
            self._worker = WorkerSide(settings, shape, client)

    @property
    def requires_kv_delivery(self) -> bool:
        """A cache: a save that is dropped is a later miss."""
        return False

    # Scheduler

    def on_new_request(self, request: "Request") -> None:
        assert self._scheduler is not None
        self._scheduler.ask(request)

    def get_num_new_matched_tokens(self, request: "Request", num_computed_tokens: int) -> tuple[int | None, bool]:
        assert self._scheduler is not None
        return self._scheduler.matched(request, num_computed_tokens)

    def update_state_after_alloc(self, request: "Request", blocks: "KVCacheBlocks", num_external_tokens: int) -> None:
        assert self._scheduler is not None
        self._scheduler.allocated(request, blocks.get_block_ids(), num_external_tokens)

    def build_connector_meta(self, scheduler_output: "SchedulerOutput") -> KVConnectorMetadata:
        assert self._scheduler is not None
        return self._scheduler.metadata(scheduler_output)

    def update_connector_output(self, connector_output: Any) -> None:
        assert self._scheduler is not None
        self._scheduler.told(
            set(connector_output.invalid_block_ids or ()), set(connector_output.finished_recving or ())
        )

    def request_finished(self, request: "Request", block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished_all_groups(request, (block_ids,))

    def request_finished_all_groups(
        self, request: "Request", block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        assert self._scheduler is not None
        self._scheduler.finished(request)
        # Pages were copied when they were saved: nothing here keeps blocks alive.
        return False, None

    def reset_cache(self) -> bool | None:
        if self._scheduler is not None:
            self._scheduler.reset()
        return True

    # Worker

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        assert self._worker is not None
        self._worker.register(kv_caches)

    def start_load_kv(self, forward_context: "ForwardContext", **kwargs: Any) -> None:
        metadata = self._get_connector_metadata()
        assert self._worker is not None and isinstance(metadata, EskerMetadata)
        self._worker.load(metadata)

    def wait_for_layer_load(self, layer_name: str) -> None:
        return

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        return

    def wait_for_save(self) -> None:
        metadata = self._get_connector_metadata()
        assert self._worker is not None and isinstance(metadata, EskerMetadata)
        self._worker.save(metadata)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        assert self._worker is not None
        return None, self._worker.take_loaded()

    def get_block_ids_with_load_errors(self) -> set[int]:
        assert self._worker is not None
        return self._worker.take_failed()

    def get_kv_connector_stats(self) -> EskerStats | None:
        return self._worker.take_stats() if self._worker is not None else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> EskerStats | None:
        return EskerStats(data=data) if data is not None else EskerStats()

    def shutdown(self) -> None:
        for side in (self._scheduler, self._worker):
            if side is not None:
                side.shutdown()


class Shape:
    """What the engine's configuration says about pages, and the namespaces that follow from it."""

    def __init__(self, config: "VllmConfig", kv: "KVCacheConfig", settings: Settings) -> None:
        model, parallel = config.model_config, config.parallel_config
        for name in ("pipeline_parallel_size", "decode_context_parallel_size", "prefill_context_parallel_size"):
            if getattr(parallel, name, 1) > 1:
                raise ValueError(f"esker: {name} above 1 is not supported by this connector; use the tiering connector")
        self.tp_size: int = parallel.tensor_parallel_size
        #: Names accounts: request ids begin anew with each engine.
        self.engine = str(getattr(getattr(config, "kv_transfer_config", None), "engine_id", None) or uuid.uuid4())
        self._settings = settings
        self._adapters = Adapters(settings.adapter_revision)
        self._revision = weights_revision(settings.weights_revision, model.model, getattr(model, "revision", None))
        self._tokenizer = tokenizer_digest(getattr(model, "tokenizer", None), str(model.model))
        self.groups = [self._group(index, group, kv) for index, group in enumerate(kv.kv_cache_groups)]
        pages = [group.page_tokens for group in self.groups]
        self.hash_tokens: int = getattr(kv, "hash_block_size", None) or math.gcd(*pages)
        #: Offers are multiples of this.
        self.offer_tokens: int = getattr(kv, "cache_hit_alignment_tokens", None) or math.lcm(*pages)
        self._facts = {
            "model": model.model,
            "dtype": str(model.dtype),
            "kv_dtype": str(config.cache_config.cache_dtype),
            "quantization": str(model.quantization),
            "hash": config.cache_config.prefix_caching_hash_algo,
            "kv_layout": getattr(kv, "kv_cache_layout", None),
            "max_model_len_rope": _rope(getattr(model, "hf_text_config", None) or model.hf_config),
            "model_facts": settings.model_facts,
            "speculative": str(getattr(config.speculative_config, "model", None)),
            "tp": self.tp_size,
        }

    def _group(self, index: int, group: Any, kv: Any) -> Group:
        spec = group.kv_cache_spec
        by_layer = getattr(spec, "kv_cache_specs", None) or dict.fromkeys(group.layer_names, spec)
        layers = tuple((name, by_layer[name].page_size_bytes) for name in group.layer_names)
        one = next(iter(by_layer.values()))
        windowed = isinstance(one, (specs.SlidingWindowSpec, specs.ChunkedLocalAttentionSpec))
        if not isinstance(one, (specs.FullAttentionSpec, specs.SlidingWindowSpec, specs.ChunkedLocalAttentionSpec)):
            raise ValueError(
                f"esker: group {index} has {type(one).__name__}, which this connector does not keep; use vLLM's "
                "OffloadingConnector with esker's tier (docs/vllm.md)"
            )
        window = getattr(one, "sliding_window", None) or getattr(one, "attention_chunk_size", None) or 0
        replicated = isinstance(one, specs.MLAAttentionSpec) or getattr(kv, "kv_tp_replicas", 1) == self.tp_size
        need = Need.WINDOW if windowed else Need.HISTORY
        return Group(index, spec.block_size, need, int(window) if windowed else 0, layers, replicated)

    def store(self, client: Client, group: Group, rank: int) -> ChunkStore:
        """Pages of one group of one rank."""
        facts = {
            **self._facts,
            "group": group.index,
            "need": group.need.value,
            "page_tokens": group.page_tokens,
            "layers": group.layers,
            "rank": "all" if group.replicated else rank,
        }
        if group.replicated:
            facts["tp"] = "any"
        return ChunkStore(
            client,
            identity("vllm", self._revision, self._tokenizer, facts),
            f"vllm-group{group.index}",
            group.chunk_bytes,
            chunk_tokens=group.page_tokens,
            chained=group.need is Need.HISTORY,
            **self._settings.store_options(),
        )

    def hashes(self, request: "Request", group: Group) -> list[bytes]:
        """Names of the request's whole pages: the hash of the tokens up to each page's end, and the adapter. None of them if
        nothing says which revision of the adapter this is."""
        step = group.page_tokens // self.hash_tokens
        hashes = request.block_hashes
        keys = [bytes(hashes[at]) for at in range(step - 1, len(hashes), step)]
        return self._adapters.names(getattr(request, "lora_request", None), keys)


class SchedulerSide:
    """Runs in the scheduler, under its lock: only hands over and looks at what has arrived."""

    def __init__(self, settings: Settings, shape: Shape, client: Client) -> None:
        self._settings = settings
        self._shape = shape
        self._client = client
        self._threads = ThreadPoolExecutor(settings.threads, thread_name_prefix="esker-lookup")
        # Where ranks differ, each has its own pages: all of them are asked.
        self._stores = [
            [shape.store(client, group, rank) for rank in range(1 if group.replicated else shape.tp_size)]
            for group in shape.groups
        ]
        self._verdicts: dict[str, Verdict] = {}
        self._tracked: dict[str, Tracked] = {}
        self._loads: list[Load] = []
        self._waiting: dict[str, set[int]] = {}
        self._silent = False
        self._tell_reset = False

    def ask(self, request: "Request") -> Verdict:
        """Starts the lookup of a request, once."""
        verdict = self._verdicts.get(request.request_id)
        if verdict is None:
            hashes = [self._shape.hashes(request, group) for group in self._shape.groups]
            # The last token is always computed: its logits are what the caller came for.
            limit = (request.num_tokens - 1) // self._shape.offer_tokens * self._shape.offer_tokens
            answer: Future[Any] = Future()
            if self._silent or request.skip_reading_prefix_cache or limit <= 0:
                answer.set_result(([], [[] for _ in hashes]))
            else:
                answer = self._threads.submit(self._look, hashes, limit)
            verdict = Verdict(time.monotonic() + 2 * self._settings.lookup_timeout_s, answer)
            self._verdicts[request.request_id] = verdict
        return verdict

    def _look(self, hashes: list[list[bytes]], limit: int) -> tuple[list[int], list[list[bool]]]:
        present = [
            [store.exists(names) for store in stores] for stores, names in zip(self._stores, hashes)
        ]
        ranks = []
        for rank in range(self._shape.tp_size):
            of_rank = [
                group.presence(pages[min(rank, len(pages) - 1)]) for group, pages in zip(self._shape.groups, present)
            ]
            ranks.append(resume_points(of_rank, self._shape.offer_tokens, limit))
        on_all = [[all(page) for page in zip(*pages)] for pages in present]
        return common(ranks), on_all

    def matched(self, request: "Request", local_tokens: int) -> tuple[int | None, bool]:
        """Tokens beyond ``local_tokens`` that can be loaded."""
        verdict = self.ask(request)
        points = verdict.points()
        if points is None:
            return None, False
        verdict.local_tokens = local_tokens
        # A load that failed would fail again: each request loads once, and once more after each preemption.
        if verdict.failed or verdict.loaded_at == request.num_preemptions:
            return 0, False
        best = max((tokens for tokens in points if tokens < request.num_tokens), default=0)
        return (best - local_tokens, True) if best > local_tokens else (0, False)

    def allocated(self, request: "Request", tables: tuple[list[int], ...], external_tokens: int) -> None:
        """Blocks are there for what is to be loaded."""
        tracked = self._track(request)
        tracked.tables = [list(table) for table in tables]
        if external_tokens <= 0 or self._silent:
            return
        verdict = self._verdicts[request.request_id]
        account = self._account(request) if verdict.loaded_at is None else None
        verdict.loaded_at = request.num_preemptions
        local = verdict.local_tokens
        end = local + external_tokens
        load = Load(request.request_id, [], account)
        for group, table in zip(self._shape.groups, tables):
            present = group.presence([True] * (end // group.page_tokens))
            blocks = {
                page: table[page]
                for page in present.pages(end)
                if (page + 1) * group.page_tokens > local and page < len(table) and table[page] != NULL_BLOCK
            }
            if blocks:
                hashes = self._shape.hashes(request, group)[: max(blocks) + 1]
                load.pages.append(Pages(group.index, hashes, blocks))
        self._loads.append(load)
        self._waiting[request.request_id] = {block for pages in load.pages for block in pages.blocks.values()}

    def told(self, failed: set[int], finished: set[str]) -> None:
        """What the workers could not load, and which requests wait no more."""
        for request_id, blocks in self._waiting.items():
            if blocks & failed and (verdict := self._verdicts.get(request_id)) is not None:
                verdict.failed = True
        for request_id in finished:
            self._waiting.pop(request_id, None)

    def metadata(self, output: "SchedulerOutput") -> EskerMetadata:
        """What the workers do in this step."""
        metadata = EskerMetadata(loads=self._loads, reset=self._tell_reset)
        self._loads, self._tell_reset = [], False
        for new in output.scheduled_new_reqs:
            tracked = self._tracked.get(new.req_id)
            if tracked is not None:
                tracked.tables = [list(table) for table in new.block_ids]
                self._save(tracked, new.num_computed_tokens + output.num_scheduled_tokens[new.req_id], metadata)
        cached = output.scheduled_cached_reqs
        for at, request_id in enumerate(cached.req_ids):
            tracked = self._tracked.get(request_id)
            if tracked is None:
                continue
            more = cached.new_block_ids[at]
            if request_id in cached.resumed_req_ids:
                tracked.tables = [list(table) for table in more or ()] or tracked.tables
            elif more is not None:
                for table, blocks in zip(tracked.tables, more):
                    table.extend(blocks)
            self._save(tracked, cached.num_computed_tokens[at] + output.num_scheduled_tokens[request_id], metadata)
        return metadata

    def _track(self, request: "Request") -> Tracked:
        tracked = self._tracked.get(request.request_id)
        if tracked is None:
            groups = len(self._shape.groups)
            tracked = self._tracked[request.request_id] = Tracked(request, [[] for _ in range(groups)], [0] * groups)
        return tracked

    def _save(self, tracked: Tracked, computed_tokens: int, metadata: EskerMetadata) -> None:
        """Pages that are whole after this step and not stored yet."""
        if self._silent:
            return
        request = tracked.request
        verdict = self._verdicts.get(request.request_id)
        # A page has a name only once its tokens are final, so what drafts were computed for is never saved.
        known = min(computed_tokens, len(request.block_hashes) * self._shape.hash_tokens)
        for group, table in zip(self._shape.groups, tracked.tables):
            first, end = tracked.saved_pages[group.index], known // group.page_tokens
            if end <= first:
                continue
            tracked.saved_pages[group.index] = end
            present = verdict.present(group.index) if verdict is not None else []
            blocks = {
                page: table[page]
                for page in range(first, min(end, len(table)))
                if table[page] != NULL_BLOCK and not (page < len(present) and present[page])
            }
            # What has no name now is not saved later: a block of a window may be another request's by then.
            if blocks and (hashes := self._shape.hashes(request, group)):
                metadata.saves.append(Pages(group.index, hashes[:end], blocks))

    def _account(self, request: "Request") -> Account:
        return Account(f"vllm/{self._shape.engine}/{request.request_id}"[-MAX_NAME_BYTES:], request.num_prompt_tokens)

    def finished(self, request: "Request") -> None:
        """A request ended: what loaded nothing is settled here, as computed."""
        verdict = self._verdicts.get(request.request_id)
        if verdict is not None and verdict.loaded_at is None and not self._silent:
            self._stores[0][0].settle_miss(self._account(request))
        self.forget(request.request_id)

    def forget(self, request_id: str) -> None:
        """Nothing more is known of a request."""
        verdict = self._verdicts.pop(request_id, None)
        if verdict is not None:
            verdict.answer.cancel()
        self._tracked.pop(request_id, None)
        self._waiting.pop(request_id, None)
        self._loads = [load for load in self._loads if load.request != request_id]

    def reset(self) -> None:
        """Weights may have changed in place: nothing says which they are now."""
        if self._settings.weights_fixed:
            return
        if not self._silent:
            log.error(
                "esker: the engine's cache was reset, which it does when weights change in place; their revision is not known "
                "any more, so nothing is read and nothing is written until the engine is started with its new revision"
            )
        self._silent = self._tell_reset = True
        for request_id in list(self._verdicts):
            self.forget(request_id)

    def shutdown(self) -> None:
        """Ends; accounts that wait are still sent."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._stores[0][0].close()
        self._client.close()


class WorkerSide:
    """Runs in a worker: moves pages between the engine's memory and the node, on threads of its own."""

    def __init__(self, settings: Settings, shape: Shape, client: Client) -> None:
        from vllm.distributed import parallel_state

        rank = parallel_state.get_tensor_model_parallel_rank()
        self._settings = settings
        self._shape = shape
        self._client = client
        self._stores = [shape.store(client, group, rank) for group in shape.groups]
        # Ranks and groups load parts of the same tokens: one of each settles.
        history = [group.index for group in shape.groups if group.need is Need.HISTORY]
        self._settles = (history[0] if history else 0) if rank == 0 else None
        self._threads = ThreadPoolExecutor(settings.threads, thread_name_prefix="esker-load")
        # One thread: pages are stored in the order in which they were computed, parents first.
        self._saving = ThreadPoolExecutor(1, thread_name_prefix="esker-save")
        self._lock = threading.Lock()
        self._pages: dict[str, torch.Tensor] = {}  # by layer: [blocks, bytes of a page]
        self._loaded: set[str] = set()
        self._failed: set[int] = set()
        self._pending_bytes = 0
        self._stats = EskerStats()
        self._silent = False
        self._stream: Any = None

    def register(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Looks at the engine's memory as pages of bytes."""
        for group in self._shape.groups:
            for name, page_bytes in group.layers:
                self._pages[name] = _as_pages(name, kv_caches[name], page_bytes)
        device = next(iter(self._pages.values())).device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def load(self, metadata: EskerMetadata) -> None:
        """Starts what this step wants loaded."""
        if metadata.reset:
            self._silent = True
        for load in metadata.loads:
            self._threads.submit(self._load, load)

    def _load(self, load: Load) -> None:
        failed: set[int] = set()
        started = time.monotonic()
        pages_loaded = bytes_loaded = 0
        account = load.account
        if account is not None and self._settles is not None and all(pages.group != self._settles for pages in load.pages):
            self._stores[self._settles].settle_miss(account)
        # The one that settles comes last: of a load that failed elsewhere nothing was used.
        for pages in sorted(load.pages, key=lambda pages: pages.group == self._settles):
            group = self._shape.groups[pages.group]
            missing = set(pages.blocks)
            on_account = None
            if account is not None and pages.group == self._settles:
                on_account = dataclasses.replace(account, counts=()) if failed else account
            try:
                staged = {page: torch.empty(group.chunk_bytes, dtype=torch.uint8) for page in pages.blocks}
                if not self._silent:
                    loaded = self._stores[pages.group].get(pages.hashes, staged, on_account)
                    whole = {page for page, there in loaded.items() if there}
                    self._scatter(group, {pages.blocks[page]: staged[page] for page in whole})
                    missing -= whole
                    pages_loaded += len(whole)
                    bytes_loaded += len(whole) * group.chunk_bytes
            except Exception as error:  # noqa: BLE001: what is not loaded is computed
                log.warning("esker: a load failed and is computed instead: %s", error)
            failed |= {pages.blocks[page] for page in missing}
        with self._lock:
            self._stats.record_load(pages_loaded, bytes_loaded, time.monotonic() - started, len(failed))
            self._failed |= failed
            self._loaded.add(load.request)

    def _scatter(self, group: Group, chunks: dict[int, torch.Tensor]) -> None:
        context = torch.cuda.stream(self._stream) if self._stream is not None else _Nothing()
        with context:
            for block, chunk in chunks.items():
                at = 0
                for name, size in group.layers:
                    self._pages[name][block].copy_(chunk[at : at + size])
                    at += size
        if self._stream is not None:
            self._stream.synchronize()

    def save(self, metadata: EskerMetadata) -> None:
        """Copies what this step completed and hands it over."""
        if self._silent:
            return
        for pages in metadata.saves:
            group = self._shape.groups[pages.group]
            size = len(pages.blocks) * group.chunk_bytes
            with self._lock:
                room = self._pending_bytes + size <= self._settings.max_pending_bytes
                if room:
                    self._pending_bytes += size
                else:
                    self._stats.record_dropped(len(pages.blocks))
            if room:
                try:
                    chunks = {page: self._gather(group, block) for page, block in pages.blocks.items()}
                    self._saving.submit(self._save, pages, chunks, size)
                except Exception as error:  # noqa: BLE001: a step is never failed by the store
                    log.warning("esker: pages were not saved: %s", error)
                    with self._lock:
                        self._pending_bytes -= size

    def _gather(self, group: Group, block: int) -> torch.Tensor:
        chunk = torch.empty(group.chunk_bytes, dtype=torch.uint8)
        at = 0
        for name, size in group.layers:
            chunk[at : at + size].copy_(self._pages[name][block])
            at += size
        return chunk

    def _save(self, pages: Pages, chunks: dict[int, torch.Tensor], size: int) -> None:
        started = time.monotonic()
        stored = 0
        try:
            stored = sum(self._stores[pages.group].put(pages.hashes, chunks).values())
        except Exception as error:  # noqa: BLE001
            log.warning("esker: pages were not saved: %s", error)
        finally:
            with self._lock:
                self._pending_bytes -= size
                bytes_stored = stored * self._shape.groups[pages.group].chunk_bytes
                self._stats.record_save(stored, bytes_stored, time.monotonic() - started)

    def take_loaded(self) -> set[str] | None:
        """Requests that wait for nothing more."""
        with self._lock:
            loaded, self._loaded = self._loaded, set()
        return loaded or None

    def take_failed(self) -> set[int]:
        """Blocks that were promised and are not there."""
        with self._lock:
            failed, self._failed = self._failed, set()
        return failed

    def take_stats(self) -> EskerStats | None:
        """What happened since the last call."""
        with self._lock:
            stats, self._stats = self._stats, EskerStats()
        return None if stats.is_empty() else stats

    def shutdown(self) -> None:
        """Ends; what was handed over is still stored."""
        self._saving.shutdown(wait=True)
        self._threads.shutdown(wait=True, cancel_futures=True)
        for store in self._stores:
            store.close()
        self._client.close()


def _rope(config: Any) -> str:
    names = ("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor")
    return str({name: getattr(config, name, None) for name in names})


class _Nothing:
    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: Iterable[Any]) -> None:
        return None


def _as_pages(name: str, cache: torch.Tensor, page_bytes: int) -> torch.Tensor:
    """``[blocks, page_bytes]`` bytes over the memory of a layer."""
    size = cache.element_size()
    total = cache.untyped_storage().nbytes() - cache.storage_offset() * size
    # An engine may cut a page into smaller blocks for its kernels: rows of the first axis that follow one another.
    stride = cache.stride(0) * size
    if stride == 0 or page_bytes % stride not in (0, page_bytes):
        raise ValueError(f"esker: layer {name!r} is not cut into pages (shape {tuple(cache.shape)}, {cache.stride()})")
    row = max(stride, page_bytes)
    blocks = cache.shape[0] * stride // row
    if blocks * row > total + row - page_bytes:
        raise ValueError(f"esker: layer {name!r} is smaller than its pages (shape {tuple(cache.shape)})")
    flat = torch.empty(0, dtype=torch.uint8, device=cache.device)
    return flat.set_(cache.untyped_storage(), cache.storage_offset() * size, (blocks, page_bytes), (row, 1))
