"""Memory that belongs to the caller: anything with the buffer protocol (bytearray, memoryview, numpy, mmap) or a torch tensor on
the CPU becomes a flat view of bytes. Nothing is copied.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar, Union

_T = TypeVar("_T")

#: What is accepted as memory: an object with the buffer protocol, a torch tensor, or several of them, filled one after another.
Buffer = Any
Buffers = Union[Buffer, Sequence[Buffer]]


def flat(buffer: Buffer, writable: bool = False) -> memoryview:
    """A flat view of the bytes of ``buffer``."""
    if hasattr(buffer, "data_ptr") and hasattr(buffer, "is_contiguous"):
        buffer = _tensor(buffer)
    view = memoryview(buffer)
    if not view.c_contiguous:
        raise ValueError("the buffer is not contiguous: give a contiguous one, or several pieces as a list")
    if writable and view.readonly:
        raise ValueError("the buffer cannot be written to: give a bytearray, a writable array, or a tensor")
    if view.nbytes == 0:
        return memoryview(bytearray())
    return view if view.format == "B" and view.ndim == 1 else view.cast("B")


def pieces(buffers: Buffers, writable: bool = False) -> list[memoryview]:
    """One flat view for each piece."""
    several = isinstance(buffers, (list, tuple))
    return [flat(buffer, writable) for buffer in (buffers if several else [buffers])]


#: From here on copying is worth letting other threads of Python run meanwhile.
_LONG_COPY_BYTES = 64 << 10


def copy(into: memoryview, data: memoryview) -> None:
    """Copies flat bytes onto as many others."""
    if len(data) < _LONG_COPY_BYTES or data.readonly or len(into) != len(data):
        into[:] = data
        return
    # A slice assignment would hold Python's lock; ctypes lets it go. The objects keep the memory where it is.
    target, source = ctypes.c_char.from_buffer(into), ctypes.c_char.from_buffer(data)
    ctypes.memmove(ctypes.addressof(target), ctypes.addressof(source), len(data))


def _tensor(tensor: Any) -> Any:
    if tensor.device.type != "cpu":
        raise ValueError(f"the tensor is on {tensor.device}: copy it to a CPU tensor first")
    if not tensor.is_contiguous():
        raise ValueError("the tensor is not contiguous: give tensor.contiguous(), or several pieces as a list")
    import torch

    # As bytes: numpy has no bfloat16 or FP8.
    return tensor.detach().reshape(-1).view(torch.uint8).numpy()


class Ended(Exception):
    """The call is over: what was lent to it is not looked at any more."""


class Lent:
    """Memory that one call may use until :meth:`end`. What a put sends is read by a thread of gRPC, which may still be at it when the
    node has ended the call and the caller wants its memory back."""

    def __init__(self) -> None:
        self._using = threading.Lock()
        self._ended = False

    @contextlib.contextmanager
    def using(self) -> Iterator[None]:
        """For as long as one copy takes; :class:`Ended` if the call is over."""
        with self._using:
            if self._ended:
                raise Ended
            yield

    def each(self, made: Iterator[_T]) -> Iterator[_T]:
        """What is made from the memory, one at a time."""
        while True:
            with self.using():
                one = next(made, None)
            if one is None:
                return
            yield one

    def end(self) -> None:
        """Waits for the copy that is being made; there is none after this."""
        with self._using:
            self._ended = True


class Scatter:
    """Fills pieces one after another, as if they were one buffer."""

    def __init__(self, into: Iterable[memoryview]) -> None:
        self.pieces = list(into)
        self.len_bytes = sum(len(piece) for piece in self.pieces)

    def write(self, offset: int, data: memoryview) -> None:
        """Copies ``data`` to ``offset``; it must fit."""
        for piece in self.pieces:
            if not data:
                return
            if offset >= len(piece):
                offset -= len(piece)
                continue
            part = data[: len(piece) - offset]
            copy(piece[offset : offset + len(part)], part)
            data = data[len(part) :]
            offset = 0
