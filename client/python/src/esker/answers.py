"""What calls give back: plain values, in the units of the protocol (tokens, bytes, seconds)."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any

from .layout import Kind, Layout


@dataclasses.dataclass(frozen=True)
class Namespace:
    """A registered namespace: everything that decides the bytes of its blocks, and the layout that says how they are cut."""

    id: bytes
    layout: Layout


@dataclasses.dataclass(frozen=True)
class ResumePoint:
    """A prefix length that can be resumed exactly."""

    tokens: int
    bytes_by_group: dict[str, int]
    missing_optional: tuple[str, ...] = ()  # groups that nobody needs to resume and that are not stored here

    @property
    def raw_bytes(self) -> int:
        """Bytes to fetch."""
        return sum(self.bytes_by_group.values())


@dataclasses.dataclass(frozen=True)
class Miss:
    """Why an answer is not longer."""

    group: str
    first_missing_token: int
    reason: str


@dataclasses.dataclass(frozen=True)
class Found:
    """What a lookup found. ``tokens`` is the greatest prefix that can be resumed, 0 for none."""

    tokens: int
    replay_tokens: int  # computed again although their history is stored
    history_tokens: int
    resume_points: tuple[ResumePoint, ...]  # descending
    misses: tuple[Miss, ...]
    grant: bytes  # pins all of it for a while; empty where nothing was found or no grant was wanted
    grant_expires_in_s: float
    hashes: tuple[bytes, ...]
    _resumable: bytes

    def resumable(self, block: int) -> bool:
        """Whether the prefix that ends with this block (from 0) can be resumed. Of an unchained lookup: whether it is stored."""
        byte, bit = divmod(block, 8)
        return byte < len(self._resumable) and bool(self._resumable[byte] >> bit & 1)


class Order(enum.IntEnum):
    """Order of a fetch."""

    BY_OBJECT = 1
    BY_PLANE = 2


class Scope(enum.IntEnum):
    """Who may find what is stored."""

    PRIVATE = 1
    ORG = 2
    PUBLIC = 3


class Ttl(enum.IntEnum):
    """How long an object is kept after its last use."""

    DEFAULT = 0
    MINUTES_5 = 1
    HOUR_1 = 2
    HOURS_24 = 3
    HOURS_72 = 4


class Durability(enum.IntEnum):
    """When a put is answered."""

    DURABLE = 1  # it is flushed and found again after a crash
    BUFFERED = 2  # it is accepted; a crash within moments may lose it


class Outcome(enum.IntEnum):
    """What became of an object that was put."""

    STORED = 1
    PRESENT = 2  # the same bytes were there already
    REFUSED = 3
    DECLINED = 4  # the store is full, and this is not expected to be worth what would go for it
    WAITING = 5  # not stored yet: in the node's memory, for a minute, until its other planes or what it continues come


@dataclasses.dataclass(frozen=True)
class Missing:
    """An object that was promised and could not be proven: the prefix ends before it."""

    kind: Kind
    tokens: int
    reason: str


@dataclasses.dataclass
class Fetched:
    """The account of a fetch. ``objects`` is filled only where the caller gave no memory: planes by kind and tokens."""

    usable_tokens: int
    raw_bytes: int
    missing: list[Missing]
    whole: set[tuple[Kind, int]]  # objects of which every wanted plane arrived
    objects: dict[tuple[Kind, int], dict[int, bytearray]]


@dataclasses.dataclass(frozen=True)
class Put:
    """What became of one object."""

    kind: Kind
    tokens: int
    outcome: Outcome
    reason: str

    @property
    def stored(self) -> bool:
        """Whether it is there now."""
        return self.outcome in (Outcome.STORED, Outcome.PRESENT)


@dataclasses.dataclass(frozen=True)
class Session:
    """A chat session and what it holds."""

    session: str
    namespace: bytes
    tokens: int
    resume_tokens: int
    stored_bytes: int
    remaining_s: int
    user: str


class WarmupState(enum.IntEnum):
    """Where a warm-up job is."""

    UNSPECIFIED = 0
    QUEUED = 1
    RUNNING = 2
    DONE = 3
    STOPPED = 4
    CANCELLED = 5
    FAILED = 6
    PLANNED = 7

    @property
    def ended(self) -> bool:
        """Whether nothing more happens."""
        return self not in (WarmupState.UNSPECIFIED, WarmupState.QUEUED, WarmupState.RUNNING)


@dataclasses.dataclass(frozen=True)
class WarmupJob:
    """A warm-up job."""

    job: str
    state: WarmupState
    prompts: int
    prompts_done: int
    tokens: int
    tokens_cached: int
    tokens_computed: int
    tokens_left: int
    bytes_written: int
    bytes_left: int
    compute_ms: int
    compute_ms_left: int
    reason: str
    priority: int


@dataclasses.dataclass(frozen=True)
class Completion:
    """What a generation gave."""

    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    prompt_cache_hit_tokens: int
    prompt_cache_miss_tokens: int
    completion_tokens: int
    finish_reason: str  # "stop" or "length"
    usage_id: str
    logits_digests: tuple[bytes, ...]


@dataclasses.dataclass(frozen=True)
class Description:
    """What a node decodes with, and how much it keeps."""

    model: str
    namespace: bytes
    layout: Layout | None
    parameters: int
    max_tokens: int
    store_bytes: int


@dataclasses.dataclass(frozen=True)
class WriteTokens:
    """Tokens newly written, by how long they are kept."""

    ttl_5m: int = 0
    ttl_1h: int = 0
    ttl_24h: int = 0
    ttl_72h: int = 0
    lease: int = 0


class Status(enum.IntEnum):
    """How a request ended."""

    OK = 1
    CANCELLED = 2  # its client left after the prompt was computed
    FAILED = 3  # it was never answered: nothing of it is billed


@dataclasses.dataclass(frozen=True)
class Settled:
    """The closed account of a request, in the three shapes in which APIs report it."""

    usage_id: str
    prompt_tokens: int
    prompt_cache_hit_tokens: int
    prompt_cache_miss_tokens: int
    cached_tokens: int
    cache_creation_tokens: int
    input_tokens: int
    cache_read_input_tokens: int
    cache_creation_input_tokens: int
    cache_creation: WriteTokens


class GroupBy(enum.IntEnum):
    """What usage is summed by."""

    TENANT = 1
    NAMESPACE = 2
    SCOPE = 3
    HOUR = 4
    DAY = 5


@dataclasses.dataclass(frozen=True)
class UsageRow:
    """Sums over whole hours. Texts are empty where rows are not grouped by them."""

    tenant: str
    namespace: str
    scope: str
    start_unix_s: int
    requests: int
    incomplete_requests: int
    prompt_tokens: int
    hit_tokens: int
    miss_tokens: int
    write_tokens: WriteTokens
    bytes_served: int
    stored_byte_seconds: int
    pinned_byte_seconds: int
    completion_tokens: int
    faults: int


def fields_of(cls: Any, reply: Any, **others: Any) -> Any:
    """A value with the fields that the message has under the same names."""
    names = {field.name for field in dataclasses.fields(cls)} - others.keys()
    return cls(**{name: getattr(reply, name) for name in names}, **others)
