"""The blocking client of one node.

Safe to use from several threads; all share one connection, which is made when it is first needed and made again when the node
comes back. gRPC waits outside Python's lock.
"""

from __future__ import annotations

import contextlib
import threading
import time
import types
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Union

import grpc

from . import calls
from .answers import (
    Completion,
    Description,
    Durability,
    Fetched,
    Found,
    GroupBy,
    Namespace,
    Order,
    Put,
    Scope,
    Session,
    Settled,
    Status,
    Ttl,
    UsageRow,
    WarmupJob,
    WriteTokens,
)
from .buffers import Ended, Lent
from .calls import Into, Method, Object, Question
from .credentials import Credentials
from .errors import ClientClosed, DeadlineExceeded, EskerError, LimitReached, NodeFailed, NotFound, Unreachable, from_rpc
from .layout import Kind, Layout
from .local import Arena, PutRoom, Requests
from .stop import STOP
from .wire import message

#: How long a call may take unless it says otherwise, in seconds.
DEFAULT_TIMEOUT_S = 30.0
#: A node that gave no arena is asked again after this time, in seconds.
ATTACH_AGAIN_S = 30.0


#: Objects in shared memory are announced to the node when they are this many bytes, then more each time, or this many objects.
FIRST_ANNOUNCE_BYTES = 2 << 20
ANNOUNCE_BYTES = 8 << 20
MAX_ANNOUNCED = 1024
#: Errors that gRPC may have made at this side, so that they do not say that the node has ended the call.
_OF_EITHER_SIDE = (DeadlineExceeded, NodeFailed, Unreachable)


def _announced(objects: list[Any], together: bool) -> Iterator[Any]:
    if together and objects:
        yield message("PutLocalRequest", objects=message("LocalObjects", objects=objects))
    else:
        yield from (message("PutLocalRequest", object=object) for object in objects)


def local_path(address: str) -> str | None:
    """The path of a Unix socket, where the address names one."""
    return address.removeprefix("unix:").replace("//", "", 1) if address.startswith("unix:") else None


class Client:
    """A connection to one node.

    ``address`` is ``HOST:PORT``, or ``unix:PATH`` of a node on the same host (``esker serve --local PATH``): payload then passes
    through shared memory. With ``credentials`` the connection uses TLS and says who calls. ``timeout_s`` bounds each call
    that does not give its own.
    """

    def __init__(
        self,
        address: str = "127.0.0.1:7410",
        *,
        credentials: Credentials | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> None:
        self.address = address
        self._timeout_s = timeout_s
        self._credentials = credentials or Credentials()
        channel = self._credentials.channel()
        if channel is None:
            self._channel = grpc.insecure_channel(address, options=calls.channel_options(address))
        else:
            self._channel = grpc.secure_channel(address, channel, options=calls.channel_options(address))
        self._stubs: dict[tuple[str, str], Any] = {}
        self._closed = False
        self._socket = local_path(address) if calls.LOCAL else None
        self._arena: Arena | None = None
        self._attaching = threading.Lock()
        self._attach_after = 0.0

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection; calls in flight end with an error, later ones with :class:`ClientClosed`."""
        self._closed = True
        if (arena := self._arena) is not None:
            self._detach(arena)
        self._channel.close()

    # The prefix cache

    def register_namespace(self, *, weights: bytes, tokenizer: bytes, layout: Layout, adapter: str = "") -> Namespace:
        """Makes a namespace known: 32-byte digests of weights and tokenizer, the layout, the id of a LoRA adapter. Idempotent."""
        reply = self._call(calls.REGISTER, calls.register(weights, tokenizer, layout, adapter))
        return Namespace(reply.namespace, layout)

    def lookup(
        self,
        namespace: Namespace,
        tokens: Sequence[int] = (),
        *,
        hashes: Sequence[bytes] = (),
        tail_tokens: Sequence[int] = (),
        engine_hashes: Sequence[bytes] = (),
        prompt_tokens: int = 0,
        unchained: bool = False,
        user: str = "",
        grant: bool = True,
        want_hashes: bool = False,
        timeout_s: float | None = None,
    ) -> Found:
        """Which prefix lengths of a prompt can be resumed.

        The prefix is named by its ``tokens``, by ``hashes`` that an earlier lookup gave, or by an engine's own ``engine_hashes``,
        one for each block. ``tail_tokens`` are those behind the last of ``hashes``; ``prompt_tokens`` is the length of the prompt
        where hashes are given. What is found is pinned under ``Found.grant`` unless ``grant=False``: give it to :meth:`fetch`,
        then to :meth:`release` or :meth:`settle`.
        """
        question = Question(
            namespace, tokens, hashes, tail_tokens, engine_hashes, prompt_tokens, unchained, user, grant, want_hashes
        )
        return calls.found(self._call(calls.LOOKUP, calls.lookup(question), timeout_s))

    def lookup_many(self, questions: Sequence[Question], timeout_s: float | None = None) -> list[Found]:
        """Many lookups in one call, answered in order: at most 64, of at most 65,536 blocks together."""
        lookups = [calls.lookup(question) for question in questions]
        reply = self._call(calls.LOOKUP_MANY, message("LookupManyRequest", lookups=lookups), timeout_s)
        return [calls.found(one) for one in reply.replies]

    def fetch(
        self,
        namespace: Namespace,
        grant: bytes,
        tokens: int = 0,
        *,
        into: Into = None,
        groups: Sequence[str] = (),
        order: Order = Order.BY_OBJECT,
        layers: tuple[int, int] = (0, 0),
        blocks: Sequence[int] = (),
        timeout_s: float | None = None,
    ) -> Fetched:
        """The planes of a granted prefix, written straight into the caller's memory.

        ``into`` is one buffer for all blocks, one after another, or a function that gives the memory of each plane; without it
        the planes are in ``Fetched.objects``. Only what ``Fetched.whole`` names has arrived and is proven: the rest of the memory
        may hold parts. Damage shortens the answer and is listed in ``Fetched.missing``; it never raises.
        """
        receiver = calls.Receiver(namespace.layout, into, groups, layers)
        request = calls.fetch(grant, tokens, groups, order, layers, blocks)
        with self._through_arena() as arena:
            if arena is not None:
                return self._fetch_local(arena, receiver, request, timeout_s)
        for reply in self._stream(calls.FETCH, request, timeout_s):
            receiver.take(reply)
        return receiver.finish()

    def put(
        self,
        namespace: Namespace,
        objects: Iterable[Object],
        *,
        tokens: Sequence[int] = (),
        engine_hashes: Sequence[bytes] = (),
        unchained: bool = False,
        user: str = "",
        scope: Scope = Scope.PRIVATE,
        ttl: Ttl = Ttl.DEFAULT,
        durability: Durability = Durability.DURABLE,
        timeout_s: float | None = None,
    ) -> list[Put]:
        """Stores objects of one prefix, parents first. One result per object: a refusal is a result too."""
        with self._through_arena() as arena:
            if arena is not None and max(map(namespace.layout.object_bytes, Kind)) <= arena.largest_object:
                prefix = calls.put_prefix(namespace, tokens, engine_hashes, unchained, user, scope, ttl, durability)
                return self._put_local(arena, namespace.layout, prefix, objects, timeout_s)
        lent = Lent()
        requests = calls.put(namespace, objects, tokens, engine_hashes, unchained, user, scope, ttl, durability, lent)
        failed: list[Exception] = []

        def sent() -> Iterator[bytes]:
            # gRPC runs this on a thread of its own and would swallow what it raises.
            try:
                yield from requests
            except Ended:
                pass
            except Exception as error:
                failed.append(error)
                raise

        try:
            return [calls.put_result(reply) for reply in self._both_ways(calls.PUT, sent(), timeout_s)]
        except grpc.RpcError as error:
            if failed:
                raise failed[0] from None
            raise from_rpc(error, self.address) from error
        finally:
            lent.end()

    def release(self, grant: bytes, timeout_s: float | None = None) -> None:
        """Gives a grant up: nothing was used."""
        self._call(calls.RELEASE, message("ReleaseRequest", grant=grant), timeout_s)

    def settle(
        self,
        request_id: str,
        *,
        grant: bytes = b"",
        used_tokens: int = 0,
        computed_tokens: int,
        write_tokens: WriteTokens = WriteTokens(),
        status: Status = Status.OK,
        namespace: bytes = b"",
        model: str = "",
        timeout_s: float | None = None,
    ) -> Settled:
        """Closes the account of one request and ends its grant: what came from the cache, what was computed, what was written.

        ``used_tokens + computed_tokens`` is the prompt. Without a grant (nothing was found) give ``namespace``. The same
        ``request_id`` with the same content is answered alike and counts once.
        """
        request = calls.settle(
            request_id, grant, used_tokens, computed_tokens, write_tokens, status, namespace, model
        )
        return calls.settled(self._call(calls.SETTLE, request, timeout_s))

    # Usage

    def usage(
        self,
        *,
        start_unix_s: int = 0,
        end_unix_s: int = 0,
        group_by: Sequence[GroupBy] = (),
        tenant: str = "",
        namespace: str = "",
    ) -> list[UsageRow]:
        """Sums over whole UTC hours; one row of everything unless rows are grouped."""
        request = message(
            "QueryUsageRequest",
            start_unix_s=start_unix_s,
            end_unix_s=end_unix_s,
            group_by=[int(by) for by in group_by],
            tenant=tenant,
            namespace=namespace,
        )
        reply = self._call(calls.QUERY_USAGE, request)
        return [calls.usage_row(row) for row in reply.rows]

    def export_usage(
        self, *, cursor: str = "", consumer: str = "", follow: bool = False, limit: int = 0, timeout_s: float = 86_400
    ) -> Iterator[Any]:
        """The records of the ledger in order, as messages with ``record`` or ``gap`` and the ``cursor`` behind them.

        With ``consumer`` the node keeps the cursor under this name, and giving a cursor acknowledges everything up to it.
        """
        request = message("ExportUsageRequest", cursor=cursor, consumer=consumer, follow=follow, limit=limit)
        for reply in self._stream(calls.EXPORT_USAGE, request, timeout_s):
            yield reply

    # Chat sessions

    def open_session(
        self, session: str, namespace: Namespace, tokens: Sequence[int], keep_s: int, user: str = ""
    ) -> Session:
        """Keeps a stored prefix for ``keep_s`` seconds, whatever else needs the space."""
        request = message(
            "OpenSessionRequest", session=session, namespace=namespace.id, tokens=tokens, keep_s=keep_s, user=user
        )
        return calls.session(self._call(calls.OPEN_SESSION, request))

    def extend_session(self, session: str, tokens: Sequence[int], keep_s: int = 0) -> Session:
        """The conversation went on: the session keeps this longer prefix."""
        request = message("ExtendSessionRequest", session=session, tokens=tokens, keep_s=keep_s)
        return calls.session(self._call(calls.EXTEND_SESSION, request))

    def renew_session(self, session: str, keep_s: int = 0) -> Session:
        """Keeps what the session holds for longer."""
        return calls.session(
            self._call(calls.RENEW_SESSION, message("RenewSessionRequest", session=session, keep_s=keep_s))
        )

    def close_session(self, session: str) -> bool:
        """Ends the session; whether there was one."""
        return bool(self._call(calls.CLOSE_SESSION, message("CloseSessionRequest", session=session)).closed)

    def list_sessions(self, after: str = "", limit: int = 0) -> list[Session]:
        """Sessions of the tenant, by name."""
        reply = self._call(calls.LIST_SESSIONS, message("ListSessionsRequest", after=after, limit=limit))
        return [calls.session(one) for one in reply.sessions]

    # Warm-up

    def warm_up(
        self,
        job: str,
        prompts: Sequence[Union[str, Sequence[int], Sequence[bytes]]],
        *,
        namespace: bytes = b"",
        scope: Scope = Scope.PRIVATE,
        ttl: Ttl = Ttl.DEFAULT,
        user: str = "",
        max_tokens: int = 0,
        max_bytes: int = 0,
        deadline_s: int = 0,
        priority: int = 0,
        dry_run: bool = False,
    ) -> WarmupJob:
        """Has prefixes computed and stored before traffic asks for them. Durable when this returns."""
        request = calls.warmup(
            job, prompts, namespace, scope, ttl, user, max_tokens, max_bytes, deadline_s, priority, dry_run
        )
        return calls.warmup_job(self._call(calls.SUBMIT_WARMUP, request))

    def warmup(self, job: str) -> WarmupJob:
        """Where a job is."""
        return calls.warmup_job(self._call(calls.GET_WARMUP, message("GetWarmupRequest", job=job)))

    def watch_warmup(self, job: str, timeout_s: float | None = None) -> Iterator[WarmupJob]:
        """The job now and after each step, until it ends."""
        for reply in self._stream(calls.WATCH_WARMUP, message("GetWarmupRequest", job=job), timeout_s or 86_400):
            yield calls.warmup_job(reply)

    def list_warmups(self, after: str = "", limit: int = 0) -> list[WarmupJob]:
        """Jobs of the tenant, by name."""
        reply = self._call(calls.LIST_WARMUPS, message("ListWarmupsRequest", after=after, limit=limit))
        return [calls.warmup_job(one) for one in reply.jobs]

    def cancel_warmup(self, job: str) -> WarmupJob:
        """Stops a job; what it stored stays."""
        return calls.warmup_job(self._call(calls.CANCEL_WARMUP, message("CancelWarmupRequest", job=job)))

    # The bundled decoder

    def describe(self) -> Description:
        """What the node decodes with, and how much it keeps."""
        return calls.description(self._call(calls.DESCRIBE, message("DescribeRequest")))

    def tokenize(self, text: str) -> list[int]:
        """Text to tokens, with the node's tokenizer."""
        return list(self._call(calls.TOKENIZE, message("TokenizeRequest", text=text)).tokens)

    def generate(
        self,
        prompt: Union[str, Sequence[int]],
        *,
        max_new_tokens: int = 0,
        temperature: float = 0.0,
        top_p: float = 0.0,
        seed: int = 0,
        logits_digest: bool = False,
        user: str = "",
        ttl: Ttl = Ttl.DEFAULT,
        request_id: str = "",
        timeout_s: float = 600.0,
    ) -> Completion:
        """Continues a prompt with the node's own model; what it computed is stored."""
        completing = calls.Completing()
        request = calls.generate(
            prompt, max_new_tokens, temperature, top_p, seed, logits_digest, user, ttl, request_id
        )
        for reply in self._stream(calls.GENERATE, request, timeout_s):
            completing.take(reply)
        return completing.finish()

    # The local fast path

    def _attached(self) -> Arena | None:
        """The arena, where the node is on this host and gives one; without one payload goes over gRPC."""
        if self._socket is None or self._arena is not None:
            return self._arena
        with self._attaching:
            if self._closed:
                raise ClientClosed(self.address)
            if self._arena is None and time.monotonic() >= self._attach_after:
                try:
                    self._arena = Arena(self._socket)
                except LimitReached:
                    self._attach_after = time.monotonic() + ATTACH_AGAIN_S
            return self._arena

    @contextlib.contextmanager
    def _through_arena(self) -> Iterator[Arena | None]:
        """The arena for one call, if there is one; the node keeps it until the call has ended."""
        while (arena := self._attached()) is not None and not arena.begin():
            pass  # Another call has just given it up.
        try:
            yield arena
        finally:
            if arena is not None:
                arena.end()

    def _detach(self, arena: Arena) -> None:
        """The next call asks for another arena; those that use this one go on."""
        with self._attaching:
            if self._arena is arena:
                self._arena = None
        arena.close()

    def _fetch_local(self, arena: Arena, receiver: calls.Receiver, request: Any, timeout_s: float | None) -> Fetched:
        requests = Requests(message("FetchLocalStart", arena=arena.id, fetch=request, together=arena.together))
        replies = self._both_ways(calls.FETCH_LOCAL, iter(requests), timeout_s)
        try:
            for reply in replies:
                filled = [reply.filled] if reply.HasField("filled") else reply.several.slots
                for slot in filled:
                    arena.read(slot, receiver.take)
                if filled:
                    requests.release([slot.slot for slot in filled])
                else:
                    receiver.take(reply)
                    if receiver.done:
                        break
        except grpc.RpcError as error:
            raise self._failed_local(arena, error) from error
        finally:
            requests.end()
            replies.cancel()
        return receiver.finish()

    def _put_local(
        self, arena: Arena, layout: Layout, prefix: Any, objects: Iterable[Object], timeout_s: float | None
    ) -> list[Put]:
        try:
            with arena.room() as room:
                return self._put_in(arena, room, layout, prefix, objects, timeout_s)
        finally:
            if arena.is_spent:
                self._detach(arena)

    def _put_in(
        self,
        arena: Arena,
        room: PutRoom,
        layout: Layout,
        prefix: Any,
        objects: Iterable[Object],
        timeout_s: float | None,
    ) -> list[Put]:
        failed: list[Exception] = []

        def sent() -> Iterator[Any]:
            start = message("PutLocalStart", arena=arena.id, prefix=prefix, together=arena.together)
            yield message("PutLocalRequest", start=start)
            try:
                # Some at a time: each message costs as much as copying a quarter of a mebibyte.
                some: list[Any] = []
                some_bytes, enough_bytes = 0, FIRST_ANNOUNCE_BYTES
                for object in objects:
                    planes = calls.object_planes(layout, object)
                    length = layout.object_bytes(object.kind, object.tokens)
                    if some and (some_bytes >= enough_bytes or len(some) == MAX_ANNOUNCED or not room.has_room(length)):
                        yield from _announced(some, arena.together)
                        some, some_bytes, enough_bytes = [], 0, min(2 * enough_bytes, ANNOUNCE_BYTES)
                    if length > arena.largest_object:
                        raise ValueError(
                            f"the {object.kind.name} at {object.tokens} tokens has {length} bytes, more than fit in the shared "
                            f"memory at once ({arena.largest_object}): keep the state at a block boundary"
                        )
                    at = room.place(length)
                    room.write(at, planes)
                    some.append(message("LocalObject", kind=int(object.kind), tokens=object.tokens, at=at, bytes=length))
                    some_bytes += length
                yield from _announced(some, arena.together)
            except Ended:
                pass
            except Exception as error:
                failed.append(error)
                raise

        results: list[Put] = []
        free = 0
        try:
            for reply in self._both_ways(calls.PUT_LOCAL, sent(), timeout_s):
                if reply.HasField("result"):
                    results.append(calls.put_result(reply.result))
                results += map(calls.put_result, reply.results.results)
                taken = max(len(results), reply.taken)
                if taken > free:
                    room.free(taken - free)
                    free = taken
        except grpc.RpcError as error:
            if failed:
                raise failed[0] from None
            ended = self._failed_local(arena, error)
            if not isinstance(ended, _OF_EITHER_SIDE):
                room.free_all()
            raise ended from error
        return results

    def _failed_local(self, arena: Arena, error: grpc.RpcError) -> EskerError:
        """A node that started anew does not know the arena. All else that fails a call leaves it as it is."""
        failed = from_rpc(error, self.address)
        if isinstance(failed, (NotFound, Unreachable)):
            self._detach(arena)
        return failed

    def _is_local(self) -> bool:
        """Whether payload passes through shared memory, as far as the node can be reached."""
        try:
            return self._attached() is not None
        except EskerError:
            return False

    # How calls are made

    def _stub(self, method: Method, shape: str) -> Any:
        if self._closed:
            raise ClientClosed(self.address)
        stub = self._stubs.get((method.path, shape))
        if stub is None:
            make = getattr(self._channel, shape)
            stub = make(method.path, request_serializer=method.write, response_deserializer=method.read)
            self._stubs[method.path, shape] = stub
        return stub

    def _how(self, timeout_s: float | None) -> dict[str, Any]:
        timeout = self._timeout_s if timeout_s is None else timeout_s
        return {"timeout": timeout, "metadata": self._credentials.metadata()}

    def _call(self, method: Method, request: Any, timeout_s: float | None = None) -> Any:
        try:
            return self._stub(method, "unary_unary")(request, **self._how(timeout_s))
        except grpc.RpcError as error:
            raise from_rpc(error, self.address) from error

    def _both_ways(self, method: Method, requests: Iterator[Any], timeout_s: float | None) -> Any:
        replies = self._stub(method, "stream_stream")(requests, **self._how(timeout_s))
        if (stop := STOP.get()) is not None:
            stop.took(replies)
        return replies

    def _stream(self, method: Method, request: Any, timeout_s: float | None) -> Iterator[Any]:
        replies = self._stub(method, "unary_stream")(request, **self._how(timeout_s))
        try:
            yield from replies
        except grpc.RpcError as error:
            raise from_rpc(error, self.address) from error
        finally:
            replies.cancel()
