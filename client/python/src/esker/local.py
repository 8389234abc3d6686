"""The local fast path: payload through shared memory, for a node on the same host (``esker serve --local PATH``).

The node hands each client an arena over a Unix socket: slots that the node fills and a put area that the client fills. A fetched
part counts only if the slot's stamp is the promised one *after* the part was copied out, so a slot that was taken back meanwhile
is never mistaken for what was asked for. Described in ``proto/esker/v1/local.proto``.
"""

from __future__ import annotations

import collections
import contextlib
import mmap
import queue
import socket
import struct
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from .buffers import Buffers, Ended, Lent, copy, pieces
from .errors import LimitReached, ProtocolError, Unreachable
from .wire import MAX_MESSAGE_BYTES, PlaneChunk, message, message_class

#: How long the node may take to hand out an arena, in seconds.
ATTACH_TIMEOUT_S = 5.0
#: How long an object waits for room in the put area, in seconds.
ROOM_TIMEOUT_S = 30.0
_ALIGN = 4096


class Arena:
    """Shared memory of one client, for as long as its socket is open: until it is closed and the last call that uses it has ended."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(ATTACH_TIMEOUT_S)
        try:
            self._socket.connect(path + ".arena")
            attached, descriptor = self._attached()
        except OSError as error:
            self._socket.close()
            raise Unreachable(f"{path}.arena: {error} (is `esker serve --local {path}` running?)") from error
        except Exception:
            self._socket.close()
            raise
        try:
            self._memory = mmap.mmap(descriptor, attached.arena_bytes)
        finally:
            socket.close(descriptor)
        self._view = memoryview(self._memory)
        self._lock = threading.Lock()
        self._calls = 0
        self._closed = False
        #: Whether a part of the put area is lost, as the node may still read it.
        self.is_spent = False
        self.id: bytes = attached.arena
        #: Whether the node takes several objects, and gives several results, in one message.
        self.together: bool = attached.together
        self._slots = attached.slots
        self._slot_bytes = attached.slot_bytes
        self._slots_at = attached.slots_at
        # Two puts at a time, each with half of the put area: while the node takes the one to the drive, the other is filled.
        middle = attached.put_at + (attached.arena_bytes - attached.put_at) // (2 * _ALIGN) * _ALIGN
        halves = [(attached.put_at, middle), (middle, attached.arena_bytes)]
        self.largest_object = min(end - start for start, end in halves)
        self._halves: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
        for half in halves:
            self._halves.put(half)

    def _attached(self) -> tuple[Any, int]:
        head, descriptors, _, _ = socket.recv_fds(self._socket, 4, 1)
        frame = bytearray(head)
        self._fill(frame, 4)
        (length,) = struct.unpack("<I", frame)
        if length > MAX_MESSAGE_BYTES:
            raise ProtocolError("the node's first frame on the arena socket is too long")
        body = bytearray()
        self._fill(body, length)
        attached = message_class("Attached").FromString(bytes(body))
        if attached.refused or not descriptors:
            for descriptor in descriptors:
                socket.close(descriptor)
            raise LimitReached(f"the node gives no arena: {attached.refused or 'it sent no descriptor'}")
        return attached, descriptors[0]

    def _fill(self, into: bytearray, length: int) -> None:
        while len(into) < length:
            more = self._socket.recv(length - len(into))
            if not more:
                raise ProtocolError("the node closed the arena socket before it handed one out")
            into += more

    def begin(self) -> bool:
        """A call begins, and until :meth:`end` the node keeps the arena; False if it was closed before."""
        with self._lock:
            self._calls += not self._closed
            return not self._closed

    def end(self) -> None:
        """A call has ended."""
        with self._lock:
            self._calls -= 1
            is_over = self._closed and self._calls == 0
        if is_over:
            self._socket.close()

    def read(self, filled: Any, take: Any) -> None:
        """Gives each part of a filled slot to ``take``, and makes sure afterwards that it still was what was promised."""
        if filled.slot >= self._slots:
            raise ProtocolError(f"the node names slot {filled.slot} of {self._slots}")
        start = self._slots_at + filled.slot * self._slot_bytes
        for part in filled.parts:
            if part.at + part.bytes > self._slot_bytes:
                raise ProtocolError("a part reaches beyond its slot")
            data = self._view[start + part.at : start + part.at + part.bytes]
            take(PlaneChunk(part.kind, part.tokens, part.plane, part.plane_bytes, part.offset, data))
        (stamp,) = struct.unpack_from("<Q", self._view, filled.slot * 8)
        if stamp != filled.stamp:
            raise ProtocolError("a slot was taken back while it was read: its lease was over")

    @contextlib.contextmanager
    def room(self) -> Iterator[PutRoom]:
        """A part of the put area, for one put alone; waits for one."""
        try:
            half = self._halves.get(timeout=ROOM_TIMEOUT_S)
        except queue.Empty:
            raise LimitReached("other puts of this client hold the whole put area") from None
        room = PutRoom(self._view, *half)
        try:
            yield room
        finally:
            room.close()
            if room.is_free:
                self._halves.put(half)
            else:
                self.is_spent = True

    def close(self) -> None:
        """Gives the arena back when the last call that uses it has ended."""
        with self._lock:
            self._closed = True
            is_over = self._calls == 0
        if is_over:
            self._socket.close()


class PutRoom:
    """What one put has of the put area, as a ring: objects are placed in order and their places are free again in the same order.

    Each put has a new one: a thread that is late with an old one finds it closed, whoever has the memory now.
    """

    def __init__(self, arena: memoryview, start: int, end: int) -> None:
        self._arena = arena
        self._start = start
        self._end = end
        self._lent = Lent()
        self._placed: collections.deque[tuple[int, int]] = collections.deque()
        self._changed = threading.Condition()
        self._closed = False

    def has_room(self, length: int) -> bool:
        """Whether :meth:`place` would not wait."""
        with self._changed:
            return self._closed or self._fits(length) is not None

    def place(self, length: int) -> int:
        """Where an object of this length may be written; waits for room. :class:`Ended` if the put is over."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._closed or self._fits(length) is not None, ROOM_TIMEOUT_S):
                raise LimitReached("the node does not take objects out of the put area")
            if self._closed:
                raise Ended
            at = self._fits(length)
            assert at is not None
            self._placed.append((at, length))
            return at

    def write(self, at: int, planes: Sequence[Buffers]) -> None:
        """Copies planes to their place. :class:`Ended` if the put is over."""
        with self._lent.using():
            for plane in planes:
                for piece in pieces(plane):
                    copy(self._arena[at : at + len(piece)], piece)
                    at += len(piece)

    def _fits(self, length: int) -> int | None:
        if not self._placed:
            return self._start
        first = self._placed[0][0]
        at, last = self._placed[-1]
        after = -(-(at + last) // _ALIGN) * _ALIGN
        if at >= first:
            if after + length <= self._end:
                return after
            return self._start if self._start + length <= first else None
        return after if after + length <= first else None

    def free(self, objects: int) -> None:
        """The oldest objects were taken."""
        with self._changed:
            for _ in range(min(objects, len(self._placed))):
                self._placed.popleft()
            self._changed.notify_all()

    def free_all(self) -> None:
        """The node has ended the put: it takes nothing more."""
        self.free(len(self._placed))

    @property
    def is_free(self) -> bool:
        """Whether the node is through with it. Where this side ended the call, the node may be about to take what was announced."""
        with self._changed:
            return not self._placed

    def close(self) -> None:
        """The put has ended: nobody waits any more, and nothing is written any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._lent.end()


class Requests:
    """What a fetch sends: its start, then releases of slots as they are read."""

    def __init__(self, start: Any) -> None:
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._queue.put(message("FetchLocalRequest", start=start))

    def release(self, slots: Sequence[int]) -> None:
        """Slots were read."""
        self._queue.put(message("FetchLocalRequest", release=message("ReleaseSlots", slots=slots)))

    def end(self) -> None:
        """Nothing more is sent."""
        self._queue.put(None)

    def __iter__(self) -> Iterator[Any]:
        while (request := self._queue.get()) is not None:
            yield request
