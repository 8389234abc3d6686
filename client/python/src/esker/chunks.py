"""Chunks of one size under an engine's own keys: what connectors store and load.

:class:`ChunkStore` keeps the rules that an engine's data path needs and the client does not: it never raises, every failure is a
miss, and a node that does not answer is left alone for a moment instead of being waited for by every call. A chunk counts as
loaded only after the node has proven it and all of it has arrived; until then the caller's memory may hold parts of it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from .answers import Durability, Found, Namespace, Outcome, Ttl
from .buffers import Buffers, pieces
from .calls import Object
from .client import Client
from .errors import EskerError, NotFound, Unreachable
from .layout import Kind, Layout
from .wire import MAX_CHAIN_BLOCKS

log = logging.getLogger("esker")

#: A larger chunk is stored in parts: a node holds two objects of a put in memory.
MAX_PART_BYTES = 16 << 20
#: After a failure to reach the node nothing is asked for this long, in seconds.
DOWN_S = 1.0
#: A warning of one kind is logged once in this time, in seconds.
WARN_EVERY_S = 30.0
#: Chunks are moved by several calls at a time, each of at least this many bytes: while one waits for the drive, the next is on its
#: way. Through shared memory one call does so by itself, and more of them only cost more.
SIDE_BY_SIDE_BYTES = 8 << 20
SIDE_BY_SIDE = 4
#: Accounts and releases that wait to be sent; beyond it they are dropped, and the node closes their grants as unused.
MAX_UNSENT = 1024
#: What one put or get may carry, in bytes: it bounds how long a call takes and how much is lost with it.
MAX_CALL_BYTES = 128 << 20


@dataclasses.dataclass(frozen=True)
class Identity:
    """Everything beside the keys that decides the bytes. Two writers with one identity write the same bytes under one key."""

    weights: bytes  # 32 bytes
    tokenizer: bytes  # 32 bytes
    facts: str  # engine, layout version, dtype, parallel coordinates...: canonical text, see connectors/identity.py


@dataclasses.dataclass(frozen=True)
class Account:
    """Whose load it is: closed with what the node delivered, off the engine's path."""

    request_id: str
    prompt_tokens: int = 0  # 0 if the engine does not say: then what was used and one more, which is always computed
    counts: Collection[int] | None = None  # positions of the keys that count as used; None for all


@dataclasses.dataclass
class Counters:
    """What became of chunks, since the start. ``queries`` is the denominator of ``hits``."""

    queries: int = 0
    hits: int = 0
    loaded: int = 0
    loaded_bytes: int = 0
    stored: int = 0
    stored_bytes: int = 0
    present: int = 0
    refused: int = 0
    corrupt: int = 0
    errors: int = 0


class ChunkStore:
    """Chunks of ``chunk_bytes`` for one identity. Safe to use from several threads.

    ``chained`` keys each continue the one before, from the start of a prompt: what is evicted goes leaf first, and a chunk whose
    predecessor is gone is not found. Keys that are not chained stand for themselves.
    """

    def __init__(
        self,
        client: Client,
        identity: Identity,
        name: str,
        chunk_bytes: int,
        *,
        chunk_tokens: int = 1,
        chained: bool = False,
        ttl: Ttl = Ttl.DEFAULT,
        durability: Durability = Durability.DURABLE,
        lookup_timeout_s: float = 1.0,
        transfer_timeout_s: float = 60.0,
    ) -> None:
        self.counters = Counters()
        self.chunk_bytes = chunk_bytes
        self._client = client
        self._identity = identity
        self._chained = chained
        self._ttl = ttl
        self._durability = durability
        self._lookup_timeout_s = lookup_timeout_s
        self._transfer_timeout_s = transfer_timeout_s
        self._parts = max(1, -(-chunk_bytes // MAX_PART_BYTES))
        self._part_bytes = -(-chunk_bytes // self._parts)
        # The node counts in blocks of a power of two of tokens.
        block_tokens = min(1 << max(0, (max(1, chunk_tokens // self._parts)).bit_length() - 1), 65_536)
        # Planes of at most 1 MiB are read and proven side by side.
        planes = max(1, -(-self._part_bytes // (1 << 20)))
        step = -(-self._part_bytes // planes)
        sizes = [step] * (self._part_bytes // step) + [self._part_bytes % step] * bool(self._part_bytes % step)
        self._layout = Layout.opaque(name, block_tokens, sizes)
        self._namespace: Namespace | None = None
        # Whether a put through shared memory asks first: not while nothing that was put was there already.
        self._asks = True
        self._lock = threading.Lock()
        self._threads: ThreadPoolExecutor | None = None
        # Never held for longer than a moment: an engine's scheduler takes it.
        self._sending = threading.Lock()
        self._sender: ThreadPoolExecutor | None = None
        self._unsent = 0
        self._down_until = 0.0
        self._warned: dict[str, float] = {}

    @property
    def healthy(self) -> bool:
        """Whether the node answered when it was last asked."""
        return time.monotonic() >= self._down_until

    def exists(self, keys: Sequence[bytes]) -> list[bool]:
        """Which keys are stored. Of chained keys: a leading run."""
        present: list[bool] = []
        step = MAX_CHAIN_BLOCKS // self._parts
        if self._chained:
            keys = keys[:step]
        for start in range(0, len(keys), step):
            found = self._lookup(keys[start : start + step], grant=False)
            present += self._present(found, len(keys[start : start + step]))
        self._count(queries=len(keys), hits=sum(present))
        return present

    def hold(self, keys: Sequence[bytes]) -> tuple[list[bool], bytes]:
        """As :meth:`exists`, and keeps what it found from being evicted for a while: give the grant to :meth:`let_go`."""
        keys = keys[: MAX_CHAIN_BLOCKS // self._parts]
        found = self._lookup(keys, grant=True)
        present = self._present(found, len(keys))
        self._count(queries=len(keys), hits=sum(present))
        return present, found.grant if found is not None else b""

    def let_go(self, grant: bytes) -> None:
        """Ends a hold. One that has expired is gone already."""
        if grant:
            self._try("release", lambda _: self._client.release(grant, timeout_s=self._lookup_timeout_s))

    def get(
        self, keys: Sequence[bytes], into: Mapping[int, Buffers], account: Account | None = None
    ) -> dict[int, bool]:
        """Loads the keys at the positions that ``into`` names into the memory given for them.

        Chained keys are given from the start of the prompt, even where only the last of them are wanted. With an ``account``
        what was loaded is settled.
        """
        loaded = dict.fromkeys(into, False)
        if self._chained:
            loaded.update(dict.fromkeys(self._get(keys, into, account), True))
            return loaded
        ordered = sorted(into)
        step = MAX_CHAIN_BLOCKS // self._parts
        for start in range(0, len(ordered), step):
            some = ordered[start : start + step]
            part = account
            if account is not None and start > 0:
                part = dataclasses.replace(account, request_id=f"{account.request_id}/{start}", prompt_tokens=0)
            if part is not None and part.counts is not None:
                part = dataclasses.replace(part, counts=[at for at in range(len(some)) if some[at] in part.counts])
            memory = {at: into[position] for at, position in enumerate(some)}
            for at in self._get([keys[position] for position in some], memory, part):
                loaded[some[at]] = True
        return loaded

    def settle_miss(self, account: Account) -> None:
        """Closes the account of a request that found nothing. Returns at once and never raises."""
        if account.prompt_tokens > 0:
            self._later("settle", lambda: self._settle(account, b"", 0))

    def close(self) -> None:
        """Sends the accounts that wait. The client stays open."""
        with self._sending:
            sender, self._sender = self._sender, None
        if sender is not None:
            sender.shutdown(wait=True)

    def put(self, keys: Sequence[bytes], chunks: Mapping[int, Buffers]) -> dict[int, bool]:
        """Stores the chunks of the keys at these positions; whether each is there now.

        What is there already is not sent: the first writer wins, and two runs of an engine seldom give the same bits. Through
        shared memory to send it costs less than to ask, so it is asked only after something was there.
        """
        stored = dict.fromkeys(chunks, False)
        if self._asks or not self._client._is_local():
            stored = self._there(keys, chunks)
            self._asks = any(stored.values())
            self._count(present=sum(stored.values()))
        missing = {position: chunk for position, chunk in chunks.items() if not stored[position]}
        if self._chained:
            for some in self._batches(missing):
                for position in self._put(keys[: max(some) + 1], {at: chunks[at] for at in some}):
                    stored[position] = True
        else:

            def put(some: list[int]) -> list[int]:
                named = [keys[position] for position in some]
                return [some[at] for at in self._put(named, {at: chunks[position] for at, position in enumerate(some)})]

            for positions in self._side_by_side(put, missing):
                stored.update(dict.fromkeys(positions, True))
        # Another writer may have been first with other bytes meanwhile.
        refused = [position for position in missing if not stored[position]]
        if refused and self.healthy:
            stored.update(self._there(keys, refused))
        return stored

    def _there(self, keys: Sequence[bytes], positions: Iterable[int]) -> dict[int, bool]:
        asked = list(positions)
        if self._chained:
            found = self._lookup(keys[: max(asked, default=-1) + 1], grant=False)
            present = self._present(found, max(asked, default=-1) + 1)
            return {position: present[position] for position in asked}
        present = []
        step = MAX_CHAIN_BLOCKS // self._parts
        for start in range(0, len(asked), step):
            named = [keys[position] for position in asked[start : start + step]]
            present += self._present(self._lookup(named, grant=False), len(named))
        return dict(zip(asked, present))

    def _side_by_side(
        self, move: Callable[[list[int]], list[int]], positions: Iterable[int]
    ) -> Iterable[list[int]]:
        """Moves by several calls at a time, where that is of use."""
        calls = 1 if self._client._is_local() else SIDE_BY_SIDE
        ordered = sorted(positions)
        share = -(-len(ordered) * self.chunk_bytes // calls)
        batches = self._batches(ordered, max(share, SIDE_BY_SIDE_BYTES))
        if len(batches) <= 1:
            return [move(some) for some in batches]
        return self._pool().map(move, batches)

    def _pool(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._threads is None:
                self._threads = ThreadPoolExecutor(SIDE_BY_SIDE, thread_name_prefix="esker-chunks")
            return self._threads

    def _batches(self, positions: Iterable[int], call_bytes: int = MAX_CALL_BYTES) -> list[list[int]]:
        call_bytes = min(call_bytes, MAX_CALL_BYTES)
        step = max(1, min(call_bytes // max(1, self.chunk_bytes), MAX_CHAIN_BLOCKS // self._parts))
        ordered = sorted(positions)
        return [ordered[at : at + step] for at in range(0, len(ordered), step)]

    def _count(self, **amounts: int) -> None:
        with self._lock:
            for name, amount in amounts.items():
                setattr(self.counters, name, getattr(self.counters, name) + amount)

    def _names(self, keys: Sequence[bytes]) -> list[bytes]:
        """One name of 32 bytes for each part."""
        if self._parts == 1:
            return [key if len(key) == 32 else _digest(key) for key in keys]
        return [_digest(key + part.to_bytes(4, "little")) for key in keys for part in range(self._parts)]

    def _lookup(self, keys: Sequence[bytes], grant: bool) -> Found | None:
        names = self._names(keys)

        def ask(namespace: Namespace) -> Found:
            return self._client.lookup(
                namespace,
                engine_hashes=names,
                unchained=not self._chained,
                grant=grant,
                timeout_s=self._lookup_timeout_s,
            )

        return self._try("lookup", ask) if names else None

    def _present(self, found: Found | None, keys: int) -> list[bool]:
        if found is None:
            return [False] * keys
        parts = range(self._parts)
        return [all(found.resumable(key * self._parts + part) for part in parts) for key in range(keys)]

    def _get(self, keys: Sequence[bytes], into: Mapping[int, Buffers], account: Account | None) -> list[int]:
        found = self._lookup(keys, grant=True)
        if found is None or not found.grant:
            if found is not None and account is not None:
                self.settle_miss(account)
            return []
        grant = found.grant
        present = self._present(found, len(keys))
        wanted = [position for position in into if present[position]]
        loaded: list[int] = []
        try:
            for some in self._side_by_side(lambda some: self._fetch(grant, some, into), wanted):
                loaded += some
        finally:
            # Nobody waits for it.
            used_tokens = self._used_tokens(into, loaded, account)
            if account is not None and (used_tokens or account.prompt_tokens):
                self._later("settle", lambda: self._settle(account, grant, used_tokens))
            else:
                self._later("release", lambda: self._client.release(grant, timeout_s=self._lookup_timeout_s))
        self._count(loaded=len(loaded), loaded_bytes=len(loaded) * self.chunk_bytes)
        return loaded

    def _used_tokens(self, wanted: Iterable[int], loaded: Collection[int], account: Account | None) -> int:
        """Of a chain an engine uses what comes before the first that is missing."""
        there = set(loaded)
        used = list(itertools.takewhile(there.__contains__, sorted(wanted))) if self._chained else loaded
        counted = used if account is None or account.counts is None else set(used) & set(account.counts)
        return len(counted) * self._parts * self._layout.block_tokens

    def _settle(self, account: Account, grant: bytes, used_tokens: int) -> None:
        computed_tokens = max(account.prompt_tokens - used_tokens, 1)
        # The same again has the same name and counts once: a reply that was lost is asked for again.
        for _ in range(2):
            try:
                self._client.settle(
                    account.request_id,
                    grant=grant,
                    used_tokens=used_tokens,
                    computed_tokens=computed_tokens,
                    namespace=self._registered().id,
                    timeout_s=self._lookup_timeout_s,
                )
                return
            except EskerError as error:
                if not error.retry:
                    raise

    def _later(self, what: str, call: Callable[[], None]) -> None:
        """Has a call made by a thread of its own. What fails, or has no room, costs nobody anything: the grant expires as unused."""

        def send() -> None:
            try:
                if self.healthy:
                    call()
            except Exception as error:  # noqa: BLE001
                if what == "settle":
                    self._warn(what, error)
            finally:
                with self._sending:
                    self._unsent -= 1

        with self._sending:
            if self._unsent >= MAX_UNSENT:
                return
            if self._sender is None:
                self._sender = ThreadPoolExecutor(1, thread_name_prefix="esker-settle")
            try:
                self._sender.submit(send)
            except RuntimeError:  # the interpreter ends
                return
            self._unsent += 1

    def _fetch(self, grant: bytes, positions: Sequence[int], into: Mapping[int, Buffers]) -> list[int]:
        block_tokens = self._layout.block_tokens

        def fetch(namespace: Namespace) -> list[int]:
            memory = {
                position * self._parts + part: self._cut(into[position], part, writable=True)
                for position in positions
                for part in range(self._parts)
            }

            def place(kind: Kind, tokens: int, plane: int) -> Buffers:
                return memory[tokens // block_tokens - 1][plane]

            fetched = self._client.fetch(
                namespace, grant, into=place, blocks=sorted(memory), timeout_s=self._transfer_timeout_s
            )
            self._count(corrupt=len(fetched.missing))
            whole = {tokens // block_tokens - 1 for _, tokens in fetched.whole}
            parts = range(self._parts)
            return [at for at in positions if all(at * self._parts + part in whole for part in parts)]

        return self._try("load", fetch) or []

    def _put(self, keys: Sequence[bytes], chunks: Mapping[int, Buffers]) -> list[int]:
        block_tokens = self._layout.block_tokens
        names = self._names(keys)
        objects = [
            Object((position * self._parts + part + 1) * block_tokens, self._cut(chunk, part, writable=False))
            for position, chunk in sorted(chunks.items())
            for part in range(self._parts)
        ]

        def send(namespace: Namespace) -> list[int]:
            results = self._client.put(
                namespace,
                objects,
                engine_hashes=names,
                unchained=not self._chained,
                ttl=self._ttl,
                durability=self._durability,
                timeout_s=self._transfer_timeout_s,
            )
            there = {result.tokens // block_tokens - 1 for result in results if result.stored}
            present = sum(result.outcome is Outcome.PRESENT for result in results)
            self._count(present=present, refused=sum(not result.stored for result in results))
            self._asks |= present > 0
            parts = range(self._parts)
            return [at for at in chunks if all(at * self._parts + part in there for part in parts)]

        stored = self._try("store", send) or []
        self._count(stored=len(stored), stored_bytes=len(stored) * self.chunk_bytes)
        return stored

    def _cut(self, buffers: Buffers, part: int, writable: bool) -> list[list[memoryview]]:
        """The memory of a part, by plane. The last part is filled up with bytes that belong to nobody."""
        start, end = part * self._part_bytes, (part + 1) * self._part_bytes
        rest = pieces(buffers, writable)
        if sum(len(piece) for piece in rest) != self.chunk_bytes:
            raise ValueError(f"a chunk has {self.chunk_bytes} bytes, got {sum(len(piece) for piece in rest)}")
        padding = self._parts * self._part_bytes - self.chunk_bytes
        run = _slice(rest + [memoryview(bytearray(padding))] * bool(padding), start, end)
        planes, at = [], 0
        for spec in self._layout.planes(Kind.BLOCK):
            planes.append(_slice(run, at, at + spec.len_bytes))
            at += spec.len_bytes
        return planes

    def _try(self, what: str, call):  # type: ignore[no-untyped-def]
        """What the call gives, or None. A node that does not know the namespace is told it once."""
        if not self.healthy:
            self._count(errors=1)
            return None
        try:
            namespace = self._registered()
            try:
                return call(namespace)
            except NotFound:
                # The node started with an empty folder, or the grant expired: one more try with a new registration.
                if what == "release":
                    return None
                with self._lock:
                    self._namespace = None
                return call(self._registered())
        except EskerError as error:
            self._count(errors=1)
            if isinstance(error, Unreachable):
                self._down_until = time.monotonic() + DOWN_S
            self._warn(what, error)
        except Exception as error:  # noqa: BLE001: an engine's data path must never see one
            self._count(errors=1)
            self._warn(what, error)
        return None

    def _registered(self) -> Namespace:
        with self._lock:
            if self._namespace is None:
                facts = hashlib.blake2b(self._identity.facts.encode(), digest_size=32).hexdigest()
                self._namespace = self._client.register_namespace(
                    weights=self._identity.weights,
                    tokenizer=self._identity.tokenizer,
                    layout=self._layout,
                    adapter=f"connector:{facts}",
                )
            return self._namespace

    def _warn(self, what: str, error: Exception) -> None:
        now = time.monotonic()
        kind = f"{what}:{type(error).__name__}"
        if now - self._warned.get(kind, -WARN_EVERY_S) >= WARN_EVERY_S:
            self._warned[kind] = now
            end = "is not on the bill" if what == "settle" else "counts as a miss"
            log.warning("esker: a %s failed and %s: %s: %s", what, end, type(error).__name__, error)


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=32).digest()


def _slice(run: Sequence[memoryview], start: int, end: int) -> list[memoryview]:
    """Bytes ``start..end`` of the pieces taken together."""
    cut, at = [], 0
    for piece in run:
        first, last = max(start - at, 0), min(end - at, len(piece))
        if first < last:
            cut.append(piece[first:last])
        at += len(piece)
    return cut
