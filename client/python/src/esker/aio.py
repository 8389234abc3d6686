"""The asyncio client of one node: the same calls as :class:`esker.Client`, awaited.

Belongs to the event loop that it is first used in. The connection is made when it is first needed and made again when the node
comes back.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import types
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar, Union

import grpc
import grpc.aio

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
from .calls import Into, Method, Object, Question
from .client import DEFAULT_TIMEOUT_S, Client, local_path
from .credentials import Credentials
from .errors import ClientClosed, from_rpc
from .layout import Layout
from .stop import STOP, Stop
from .wire import message

#: Puts, and fetches through shared memory, that are under way at a time; more of them wait.
MAX_BLOCKING = 8

_T = TypeVar("_T")


class AsyncClient:
    """A connection to one node.

    ``address`` is ``HOST:PORT``, or ``unix:PATH`` of a node on the same host (``esker serve --local PATH``). With ``credentials`` the connection uses TLS and says who calls. ``timeout_s`` bounds each call
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
            self._channel = grpc.aio.insecure_channel(address, options=calls.channel_options(address))
        else:
            self._channel = grpc.aio.secure_channel(address, channel, options=calls.channel_options(address))
        self._stubs: dict[tuple[str, str], Any] = {}
        self._closed = False
        #: Puts, and payload through shared memory, go through it on threads: the loop never waits for them. It connects when used.
        self._blocking = Client(address, credentials=credentials, timeout_s=timeout_s)
        #: Threads of its own: the loop's are few, and everybody's.
        self._threads = ThreadPoolExecutor(MAX_BLOCKING, thread_name_prefix="esker-aio")
        self._is_local = bool(local_path(address))

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connection; calls in flight end with an error, later ones with :class:`ClientClosed`."""
        self._closed = True
        self._blocking.close()
        # Those that still wait find the connection closed.
        self._threads.shutdown(wait=False)
        await self._channel.close()

    # The prefix cache

    async def register_namespace(self, *, weights: bytes, tokenizer: bytes, layout: Layout, adapter: str = "") -> Namespace:
        """Makes a namespace known: 32-byte digests of weights and tokenizer, the layout, the id of a LoRA adapter. Idempotent."""
        reply = await self._call(calls.REGISTER, calls.register(weights, tokenizer, layout, adapter))
        return Namespace(reply.namespace, layout)

    async def lookup(
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
        return calls.found(await self._call(calls.LOOKUP, calls.lookup(question), timeout_s))

    async def lookup_many(self, questions: Sequence[Question], timeout_s: float | None = None) -> list[Found]:
        """Many lookups in one call, answered in order: at most 64, of at most 65,536 blocks together."""
        lookups = [calls.lookup(question) for question in questions]
        reply = await self._call(calls.LOOKUP_MANY, message("LookupManyRequest", lookups=lookups), timeout_s)
        return [calls.found(one) for one in reply.replies]

    async def fetch(
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
        if self._is_local:
            return await self._on_thread(
                self._blocking.fetch,
                namespace,
                grant,
                tokens,
                into=into,
                groups=groups,
                order=order,
                layers=layers,
                blocks=blocks,
                timeout_s=timeout_s,
            )
        receiver = calls.Receiver(namespace.layout, into, groups, layers)
        request = calls.fetch(grant, tokens, groups, order, layers, blocks)
        async for reply in self._stream(calls.FETCH, request, timeout_s):
            receiver.take(reply)
        return receiver.finish()

    async def put(
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
        # On a thread: of a stream that the node ends while it is written to, grpc.aio loses why.
        return await self._on_thread(
            self._blocking.put,
            namespace,
            objects,
            tokens=tokens,
            engine_hashes=engine_hashes,
            unchained=unchained,
            user=user,
            scope=scope,
            ttl=ttl,
            durability=durability,
            timeout_s=timeout_s,
        )

    async def release(self, grant: bytes, timeout_s: float | None = None) -> None:
        """Gives a grant up: nothing was used."""
        await self._call(calls.RELEASE, message("ReleaseRequest", grant=grant), timeout_s)

    async def settle(
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
        return calls.settled(await self._call(calls.SETTLE, request, timeout_s))

    # Usage

    async def usage(
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
        reply = await self._call(calls.QUERY_USAGE, request)
        return [calls.usage_row(row) for row in reply.rows]

    async def export_usage(
        self, *, cursor: str = "", consumer: str = "", follow: bool = False, limit: int = 0, timeout_s: float = 86_400
    ) -> AsyncIterator[Any]:
        """The records of the ledger in order, as messages with ``record`` or ``gap`` and the ``cursor`` behind them.

        With ``consumer`` the node keeps the cursor under this name, and giving a cursor acknowledges everything up to it.
        """
        request = message("ExportUsageRequest", cursor=cursor, consumer=consumer, follow=follow, limit=limit)
        async for reply in self._stream(calls.EXPORT_USAGE, request, timeout_s):
            yield reply

    # Chat sessions

    async def open_session(
        self, session: str, namespace: Namespace, tokens: Sequence[int], keep_s: int, user: str = ""
    ) -> Session:
        """Keeps a stored prefix for ``keep_s`` seconds, whatever else needs the space."""
        request = message(
            "OpenSessionRequest", session=session, namespace=namespace.id, tokens=tokens, keep_s=keep_s, user=user
        )
        return calls.session(await self._call(calls.OPEN_SESSION, request))

    async def extend_session(self, session: str, tokens: Sequence[int], keep_s: int = 0) -> Session:
        """The conversation went on: the session keeps this longer prefix."""
        request = message("ExtendSessionRequest", session=session, tokens=tokens, keep_s=keep_s)
        return calls.session(await self._call(calls.EXTEND_SESSION, request))

    async def renew_session(self, session: str, keep_s: int = 0) -> Session:
        """Keeps what the session holds for longer."""
        return calls.session(
            await self._call(calls.RENEW_SESSION, message("RenewSessionRequest", session=session, keep_s=keep_s))
        )

    async def close_session(self, session: str) -> bool:
        """Ends the session; whether there was one."""
        return bool((await self._call(calls.CLOSE_SESSION, message("CloseSessionRequest", session=session))).closed)

    async def list_sessions(self, after: str = "", limit: int = 0) -> list[Session]:
        """Sessions of the tenant, by name."""
        reply = await self._call(calls.LIST_SESSIONS, message("ListSessionsRequest", after=after, limit=limit))
        return [calls.session(one) for one in reply.sessions]

    # Warm-up

    async def warm_up(
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
        return calls.warmup_job(await self._call(calls.SUBMIT_WARMUP, request))

    async def warmup(self, job: str) -> WarmupJob:
        """Where a job is."""
        return calls.warmup_job(await self._call(calls.GET_WARMUP, message("GetWarmupRequest", job=job)))

    async def watch_warmup(self, job: str, timeout_s: float | None = None) -> AsyncIterator[WarmupJob]:
        """The job now and after each step, until it ends."""
        async for reply in self._stream(calls.WATCH_WARMUP, message("GetWarmupRequest", job=job), timeout_s or 86_400):
            yield calls.warmup_job(reply)

    async def list_warmups(self, after: str = "", limit: int = 0) -> list[WarmupJob]:
        """Jobs of the tenant, by name."""
        reply = await self._call(calls.LIST_WARMUPS, message("ListWarmupsRequest", after=after, limit=limit))
        return [calls.warmup_job(one) for one in reply.jobs]

    async def cancel_warmup(self, job: str) -> WarmupJob:
        """Stops a job; what it stored stays."""
        return calls.warmup_job(await self._call(calls.CANCEL_WARMUP, message("CancelWarmupRequest", job=job)))

    # The bundled decoder

    async def describe(self) -> Description:
        """What the node decodes with, and how much it keeps."""
        return calls.description(await self._call(calls.DESCRIBE, message("DescribeRequest")))

    async def tokenize(self, text: str) -> list[int]:
        """Text to tokens, with the node's tokenizer."""
        return list((await self._call(calls.TOKENIZE, message("TokenizeRequest", text=text))).tokens)

    async def generate(
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
        async for reply in self._stream(calls.GENERATE, request, timeout_s):
            completing.take(reply)
        return completing.finish()

    # How calls are made

    async def _on_thread(self, call: Callable[..., _T], *arguments: Any, **options: Any) -> _T:
        if self._closed:
            raise ClientClosed(self.address)
        stop = Stop()

        def work() -> _T:
            STOP.set(stop)
            return call(*arguments, **options)

        running = self._threads.submit(contextvars.copy_context().run, work)
        waiting = asyncio.wrap_future(running)
        try:
            await asyncio.wait([waiting])
        except asyncio.CancelledError:
            # The thread uses the caller's memory, which is the caller's again when this raises.
            if not running.cancel():
                stop.set()
            await _over(waiting)
            raise
        return waiting.result()

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

    async def _call(self, method: Method, request: Any, timeout_s: float | None = None) -> Any:
        try:
            return await self._stub(method, "unary_unary")(request, **self._how(timeout_s))
        except grpc.RpcError as error:
            raise from_rpc(error, self.address) from error

    async def _stream(self, method: Method, request: Any, timeout_s: float | None) -> AsyncIterator[Any]:
        replies = self._stub(method, "unary_stream")(request, **self._how(timeout_s))
        try:
            async for reply in replies:
                yield reply
        except grpc.RpcError as error:
            raise from_rpc(error, self.address) from error
        finally:
            replies.cancel()


async def _over(waiting: asyncio.Future[Any]) -> None:
    """Waits for the end, whatever it is, and however often the task is cancelled meanwhile."""
    while not waiting.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait([waiting])
    if not waiting.cancelled():
        waiting.exception()
