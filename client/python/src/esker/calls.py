"""From arguments to messages and from messages to values: what both clients share. Knows no connection and waits for nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Union

from . import answers
from .answers import Durability, Fetched, Found, Missing, Namespace, Order, Scope, Ttl
from .buffers import Buffer, Buffers, Lent, Scatter, flat, pieces
from .errors import ProtocolError
from .layout import Kind, Layout, Plane
from .wire import MAX_MESSAGE_BYTES, PlaneChunk, has_message, message, message_class, put_chunks, read_fetch_reply

#: Where fetched planes go: called with kind, tokens and plane, gives the memory of that plane in one or several pieces.
Place = Callable[[Kind, int, int], Buffers]
#: Memory for a fetch: one buffer for all blocks, one after another, or a :data:`Place`.
Into = Union[Buffer, Place, None]

_CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES + 1024),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES + 1024),
    # Credit for several chunks, so that a fetch does not wait for a round trip after every 64 KiB.
    ("grpc.http2.lookahead_bytes", 8 << 20),
    ("grpc.http2.max_frame_size", 1 << 20),
    ("grpc.http2.write_buffer_size", 1 << 20),
    # A node that was restarted is found again soon.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2000),
]


def channel_options(address: str) -> list[tuple[str, Any]]:
    """Options of a connection to this address."""
    # The path of a socket is no valid authority, and gRPC would send it as one.
    return _CHANNEL_OPTIONS + [("grpc.default_authority", "localhost")] * address.startswith("unix:")


@dataclasses.dataclass(frozen=True)
class Method:
    """A call of a service: its path, and how its messages are written and read."""

    path: str
    write: Callable[[Any], bytes]
    read: Callable[[bytes], Any]


def _method(service: str, name: str, reply: str) -> Method:
    read = message_class(reply).FromString
    return Method(f"/esker.v1.{service}/{name}", lambda request: request.SerializeToString(), read)


REGISTER = _method("PrefixCache", "RegisterNamespace", "RegisterNamespaceReply")
LOOKUP = _method("PrefixCache", "Lookup", "LookupReply")
LOOKUP_MANY = _method("PrefixCache", "LookupMany", "LookupManyReply")
FETCH = Method("/esker.v1.PrefixCache/Fetch", lambda request: request.SerializeToString(), read_fetch_reply)
PUT = Method("/esker.v1.PrefixCache/Put", lambda request: request, message_class("PutReply").FromString)
#: Whether the protocol that this package was built for has the local fast path.
LOCAL = has_message("FetchLocalReply")
FETCH_LOCAL = _method("Local", "FetchLocal", "FetchLocalReply") if LOCAL else FETCH
PUT_LOCAL = _method("Local", "PutLocal", "PutLocalReply") if LOCAL else PUT
RELEASE = _method("PrefixCache", "Release", "ReleaseReply")
SETTLE = _method("PrefixCache", "Settle", "SettleReply")
QUERY_USAGE = _method("Usage", "QueryUsage", "QueryUsageReply")
EXPORT_USAGE = _method("Usage", "ExportUsage", "ExportUsageReply")
OPEN_SESSION = _method("Sessions", "OpenSession", "Session")
EXTEND_SESSION = _method("Sessions", "ExtendSession", "Session")
RENEW_SESSION = _method("Sessions", "RenewSession", "Session")
CLOSE_SESSION = _method("Sessions", "CloseSession", "CloseSessionReply")
LIST_SESSIONS = _method("Sessions", "ListSessions", "ListSessionsReply")
SUBMIT_WARMUP = _method("Warmup", "SubmitWarmup", "WarmupJob")
GET_WARMUP = _method("Warmup", "GetWarmup", "WarmupJob")
WATCH_WARMUP = _method("Warmup", "WatchWarmup", "WarmupJob")
LIST_WARMUPS = _method("Warmup", "ListWarmups", "ListWarmupsReply")
CANCEL_WARMUP = _method("Warmup", "CancelWarmup", "WarmupJob")
DESCRIBE = _method("Decoder", "Describe", "DescribeReply")
TOKENIZE = _method("Decoder", "Tokenize", "TokenizeReply")
GENERATE = _method("Decoder", "Generate", "GenerateReply")


def register(weights: bytes, tokenizer: bytes, layout: Layout, adapter: str) -> Any:
    """Request of RegisterNamespace."""
    return message(
        "RegisterNamespaceRequest",
        weights_fingerprint=weights,
        tokenizer_digest=tokenizer,
        layout_json=layout.to_json(),
        adapter=adapter,
    )


@dataclasses.dataclass(frozen=True)
class Question:
    """One lookup of several: the arguments of :meth:`esker.Client.lookup`."""

    namespace: Namespace
    tokens: Sequence[int] = ()
    hashes: Sequence[bytes] = ()
    tail_tokens: Sequence[int] = ()
    engine_hashes: Sequence[bytes] = ()
    prompt_tokens: int = 0
    unchained: bool = False
    user: str = ""
    grant: bool = True
    want_hashes: bool = False


def lookup(question: Question) -> Any:
    """Request of Lookup."""
    return message(
        "LookupRequest",
        namespace=question.namespace.id,
        tokens=question.tokens,
        hashes=question.hashes,
        tail_tokens=question.tail_tokens,
        engine_hashes=question.engine_hashes,
        prompt_tokens=question.prompt_tokens,
        unchained=question.unchained,
        user=question.user,
        no_grant=not question.grant,
        want_hashes=question.want_hashes,
    )


def found(reply: Any) -> Found:
    """Answer of Lookup."""
    points = tuple(
        answers.ResumePoint(
            point.tokens,
            {group.group: group.bytes for group in point.bytes_by_group},
            tuple(point.missing_optional),
        )
        for point in reply.resume_points
    )
    return Found(
        tokens=reply.best.tokens,
        replay_tokens=reply.best.replay_tokens,
        history_tokens=reply.history_tokens,
        resume_points=points,
        misses=tuple(answers.Miss(miss.group, miss.first_missing_token, miss.reason) for miss in reply.misses),
        grant=reply.grant,
        grant_expires_in_s=reply.grant_expires_in_ms / 1000,
        hashes=tuple(reply.hashes),
        _resumable=reply.resumable,
    )


def fetch(
    grant: bytes, tokens: int, groups: Sequence[str], order: Order, layers: tuple[int, int], blocks: Sequence[int]
) -> Any:
    """Request of Fetch."""
    first, end = layers
    return message(
        "FetchRequest",
        grant=grant,
        tokens=tokens,
        groups=groups,
        order=int(order),
        first_layer=first,
        end_layer=end,
        blocks=blocks,
    )


class Receiver:
    """Takes the messages of a fetch and puts planes where they belong."""

    def __init__(
        self, layout: Layout, into: Into, groups: Sequence[str], layers: tuple[int, int]
    ) -> None:
        self.fetched = Fetched(0, 0, [], set(), {})
        self._layout = layout
        self._place = self._placer(into)
        self._keeps = into is None
        self._groups, self._layers = frozenset(groups), layers
        #: Of each object its planes, and how many of them come: those with a wanted group and layer.
        self._specs: dict[tuple[Kind, int], tuple[tuple[Plane, ...], int]] = {}
        self._arrived: dict[tuple[Kind, int], int] = {}
        self._plane: tuple[Kind, int, int] | None = None
        self._scatter = Scatter([])
        self._at = 0
        self.done = False

    def take(self, reply: Any) -> None:
        """Takes one message."""
        if isinstance(reply, PlaneChunk):
            self._chunk(reply)
        elif reply.HasField("missing"):
            missing = reply.missing
            self._plane = None
            self.fetched.missing.append(Missing(Kind(missing.kind), missing.tokens, missing.reason))
        elif reply.HasField("done"):
            self.done = True
            self.fetched.usable_tokens = reply.done.usable_tokens
            self.fetched.raw_bytes = reply.done.bytes

    def finish(self) -> Fetched:
        """The account; an error if the stream ended without one."""
        if not self.done:
            raise ProtocolError("the node ended a fetch without its account")
        lost = {(missing.kind, missing.tokens) for missing in self.fetched.missing}
        self.fetched.whole -= lost
        return self.fetched

    def _chunk(self, chunk: PlaneChunk) -> None:
        kind = Kind(chunk.kind)
        plane = (kind, chunk.tokens, chunk.plane)
        if self._plane != plane:
            specs, _ = self._planes(kind, chunk.tokens)
            if chunk.plane >= len(specs) or chunk.offset != 0 or not self._fits(specs[chunk.plane], chunk.plane_bytes):
                raise ProtocolError(f"plane {chunk.plane} of {kind.name} is not one of layout {self._layout.name!r}")
            self._scatter = self._place(*plane) if chunk.plane_bytes > 0 else self._lacking(*plane)
            if self._scatter.len_bytes != chunk.plane_bytes:
                raise ValueError(
                    f"the memory given for plane {chunk.plane} of the {kind.name} at {chunk.tokens} tokens has "
                    f"{self._scatter.len_bytes} bytes; the plane has {chunk.plane_bytes}"
                )
            self._plane = plane
            self._at = 0
        if chunk.offset != self._at or self._at + len(chunk.data) > chunk.plane_bytes:
            raise ProtocolError("the parts of a plane did not arrive in order")
        self._scatter.write(chunk.offset, chunk.data)
        self._at += len(chunk.data)
        if self._at == chunk.plane_bytes:
            self._plane = None
            key = (kind, chunk.tokens)
            self._arrived[key] = self._arrived.get(key, 0) + 1
            if self._arrived[key] == self._planes(*key)[1]:
                self.fetched.whole.add(key)

    def _planes(self, kind: Kind, tokens: int) -> tuple[tuple[Plane, ...], int]:
        key = (kind, tokens)
        if key not in self._specs:
            planes = self._layout.planes(kind, tokens)
            whole = not self._groups and self._layers[1] == 0
            self._specs[key] = planes, len(planes) if whole else sum(map(self._wants, planes))
        return self._specs[key]

    def _wants(self, plane: Plane) -> bool:
        first, end = self._layers
        of_layers = end == 0 or any(first <= at < end for at in plane.layers)
        return of_layers and (not self._groups or plane.group in self._groups)

    def _fits(self, plane: Plane, len_bytes: int) -> bool:
        return len_bytes == plane.len_bytes or (len_bytes == 0 and self._layout.is_optional(plane))

    def _placer(self, into: Into) -> Callable[[Kind, int, int], Scatter]:
        if into is None:
            return self._own
        if callable(into):
            return lambda kind, tokens, plane: Scatter(pieces(into(kind, tokens, plane), writable=True))
        view = flat(into, writable=True)
        block_bytes = self._layout.object_bytes(Kind.BLOCK)
        starts: list[int] = [0]
        for spec in self._layout.planes(Kind.BLOCK):
            starts.append(starts[-1] + spec.len_bytes)

        def behind(tokens: int, plane: int) -> Scatter:
            if self._layout.planes(Kind.STATE):
                raise ValueError("one buffer takes blocks only: give a function for a layout with states")
            # Rows alone, of the tokens behind the last block: they go behind it.
            tail = tokens % self._layout.block_tokens
            sizes = [spec.len_bytes for spec in self._planes(Kind.STATE, tokens)[0]]
            start = tokens // self._layout.block_tokens * block_bytes + sum(sizes[:plane])
            if start + sizes[plane] > len(view):
                raise ValueError(
                    f"the buffer has no room for the {tail} tokens behind the last whole block: fetch {tokens - tail} tokens, "
                    f"or give {sum(sizes)} bytes more"
                )
            return Scatter([view[start : start + sizes[plane]]])

        def consecutive(kind: Kind, tokens: int, plane: int) -> Scatter:
            if kind is Kind.STATE:
                return behind(tokens, plane)
            start = (tokens // self._layout.block_tokens - 1) * block_bytes + starts[plane]
            return Scatter([view[start : start + self._planes(kind, tokens)[0][plane].len_bytes]])

        return consecutive

    def _lacking(self, kind: Kind, tokens: int, plane: int) -> Scatter:
        """A plane that the object has no rows for: nobody is asked for memory."""
        if self._keeps:
            self.fetched.objects.setdefault((kind, tokens), {})[plane] = bytearray()
        return Scatter([])

    def _own(self, kind: Kind, tokens: int, plane: int) -> Scatter:
        memory = bytearray(self._planes(kind, tokens)[0][plane].len_bytes)
        self.fetched.objects.setdefault((kind, tokens), {})[plane] = memory
        return Scatter([memoryview(memory)])


@dataclasses.dataclass(frozen=True)
class Object:
    """An object to store: the rows of one block, or of the state at one boundary, which may lie inside a block.

    ``planes`` has, as :meth:`Layout.planes` lists them for its tokens, the memory of each plane in restore order, each a buffer or a list of pieces; or one buffer for all of them.
    """

    tokens: int  # prefix length that it completes
    planes: Sequence[Buffers] | Buffer
    kind: Kind = Kind.BLOCK


def put_prefix(
    namespace: Namespace,
    tokens: Sequence[int],
    engine_hashes: Sequence[bytes],
    unchained: bool,
    user: str,
    scope: Scope,
    ttl: Ttl,
    durability: Durability,
) -> Any:
    """First message of Put."""
    return message(
        "PutPrefix",
        namespace=namespace.id,
        tokens=tokens,
        engine_hashes=engine_hashes,
        unchained=unchained,
        user=user,
        scope=int(scope),
        ttl=int(ttl),
        durability=int(durability),
    )


def put(
    namespace: Namespace,
    objects: Iterable[Object],
    tokens: Sequence[int],
    engine_hashes: Sequence[bytes],
    unchained: bool,
    user: str,
    scope: Scope,
    ttl: Ttl,
    durability: Durability,
    lent: Lent,
) -> Iterator[bytes]:
    """Messages of Put, made as they are sent, for as long as the objects are lent."""
    prefix = put_prefix(namespace, tokens, engine_hashes, unchained, user, scope, ttl, durability)
    yield message("PutRequest", prefix=prefix).SerializeToString()
    for object in objects:
        yield from lent.each(object_chunks(namespace.layout, object))


def object_chunks(layout: Layout, object: Object) -> Iterator[bytes]:
    """The messages of one object."""
    for plane, data in enumerate(object_planes(layout, object)):
        yield from put_chunks(int(object.kind), object.tokens, plane, data)


def object_planes(layout: Layout, object: Object) -> list[list[memoryview]]:
    """The pieces of each plane of an object, checked against the layout."""
    specs = layout.planes(object.kind, object.tokens)
    if isinstance(object.planes, (list, tuple)):
        given = [pieces(plane) for plane in object.planes]
    else:
        whole = flat(object.planes)
        expected = sum(spec.len_bytes for spec in specs)
        if len(whole) != expected:
            raise ValueError(
                f"the {object.kind.name} at {object.tokens} tokens has {len(whole)} bytes; layout {layout.name!r} says "
                f"{expected}"
            )
        given, at = [], 0
        for spec in specs:
            given.append([whole[at : at + spec.len_bytes]])
            at += spec.len_bytes
    if len(given) != len(specs):
        raise ValueError(
            f"layout {layout.name!r} has {len(specs)} planes of {object.kind.name} at {object.tokens} tokens, got {len(given)}"
        )
    for plane, (spec, data) in enumerate(zip(specs, given)):
        length = sum(len(piece) for piece in data)
        if length != spec.len_bytes and not (length == 0 and layout.is_optional(spec)):
            raise ValueError(
                f"plane {plane} ({spec.group}) has {spec.len_bytes} bytes at {object.tokens} tokens, got {length}"
            )
    return given


def put_result(reply: Any) -> answers.Put:
    """One answer of Put."""
    return answers.Put(Kind(reply.kind), reply.tokens, answers.Outcome(reply.outcome), reply.reason)


def settle(
    request_id: str,
    grant: bytes,
    used_tokens: int,
    computed_tokens: int,
    write_tokens: answers.WriteTokens,
    status: answers.Status,
    namespace: bytes,
    model: str,
) -> Any:
    """Request of Settle."""
    return message(
        "SettleRequest",
        grant=grant,
        request_id=request_id,
        prompt_tokens=used_tokens + computed_tokens,
        used_hit_tokens=used_tokens,
        computed_tokens=computed_tokens,
        write_tokens=message("WriteTokens", **dataclasses.asdict(write_tokens)),
        status=int(status),
        namespace=namespace,
        model=model,
    )


def settled(reply: Any) -> answers.Settled:
    """Answer of Settle."""
    creation = answers.fields_of(answers.WriteTokens, reply.usage.cache_creation)
    settled: answers.Settled = answers.fields_of(
        answers.Settled, reply.usage, usage_id=reply.usage_id, cache_creation=creation
    )
    return settled


def usage_row(row: Any) -> answers.UsageRow:
    """One row of QueryUsage."""
    written = answers.fields_of(answers.WriteTokens, row.sums.write_tokens)
    names = {"tenant": row.tenant, "namespace": row.namespace, "scope": row.scope, "start_unix_s": row.start_unix_s}
    usage: answers.UsageRow = answers.fields_of(answers.UsageRow, row.sums, write_tokens=written, **names)
    return usage


def session(reply: Any) -> answers.Session:
    """Answer of the session calls."""
    session: answers.Session = answers.fields_of(answers.Session, reply, stored_bytes=reply.bytes)
    return session


def warmup(
    job: str,
    prompts: Sequence[Union[str, Sequence[int], Sequence[bytes]]],
    namespace: bytes,
    scope: Scope,
    ttl: Ttl,
    user: str,
    max_tokens: int,
    max_bytes: int,
    deadline_s: int,
    priority: int,
    dry_run: bool,
) -> Any:
    """Request of SubmitWarmup."""

    def prompt(value: Union[str, Sequence[int], Sequence[bytes]]) -> Any:
        if isinstance(value, str):
            return message("WarmupPrompt", text=value)
        if len(value) > 0 and isinstance(value[0], bytes):
            return message("WarmupPrompt", chain=message("WarmupChain", hashes=value))
        return message("WarmupPrompt", tokens=message("WarmupTokens", ids=value))

    return message(
        "SubmitWarmupRequest",
        job=job,
        prompts=[prompt(value) for value in prompts],
        namespace=namespace,
        scope=int(scope),
        ttl=int(ttl),
        user=user,
        max_tokens=max_tokens,
        max_bytes=max_bytes,
        deadline_s=deadline_s,
        priority=priority,
        dry_run=dry_run,
    )


def warmup_job(reply: Any) -> answers.WarmupJob:
    """Answer of the warm-up calls."""
    state = answers.WarmupState(reply.state)
    job: answers.WarmupJob = answers.fields_of(answers.WarmupJob, reply, state=state)
    return job


def description(reply: Any) -> answers.Description:
    """Answer of Describe."""
    layout = Layout.from_json(reply.layout_json) if reply.layout_json else None
    description: answers.Description = answers.fields_of(answers.Description, reply, layout=layout)
    return description


def generate(
    prompt: Union[str, Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    logits_digest: bool,
    user: str,
    ttl: Ttl,
    request_id: str,
) -> Any:
    """Request of Generate."""
    what: Mapping[str, Any]
    what = {"text": prompt} if isinstance(prompt, str) else {"tokens": message("Tokens", ids=prompt)}
    return message(
        "GenerateRequest",
        **what,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        logits_digest=logits_digest,
        user=user,
        ttl=int(ttl),
        request_id=request_id,
    )


class Completing:
    """Takes the events of a generation."""

    def __init__(self) -> None:
        self._text: list[str] = []
        self._tokens: list[int] = []
        self._digests: list[bytes] = []
        self._usage: Any = None

    def take(self, reply: Any) -> None:
        """Takes one event."""
        if reply.HasField("token"):
            self._text.append(reply.token.text)
            self._tokens.append(reply.token.id)
            if reply.token.logits_digest:
                self._digests.append(reply.token.logits_digest)
        elif reply.HasField("usage"):
            self._usage = reply.usage
            self._text.append(reply.usage.rest_of_text)

    def finish(self) -> answers.Completion:
        """The whole; an error if the stream ended without usage."""
        if self._usage is None:
            raise ProtocolError("the node ended a generation without usage")
        usage = self._usage
        completion: answers.Completion = answers.fields_of(
            answers.Completion,
            usage,
            text="".join(self._text),
            tokens=tuple(self._tokens),
            finish_reason={1: "stop", 2: "length"}.get(usage.finish_reason, "unknown"),
            logits_digests=tuple(self._digests),
        )
        return completion
