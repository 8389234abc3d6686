"""``esker.v1`` on the wire: the messages, and by hand the two that carry payload.

The messages are built from a descriptor set (``esker_v1.binpb``, made by ``tools/protos.py``), not from generated code: engines
pin protobuf 4 to 7, and generated code fits one or two of these. ``PlaneChunk`` is written and read without protobuf, so that
payload is copied once on its way to the caller's memory and once on its way out of it.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
from collections.abc import Iterator
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from .errors import ProtocolError

#: Longest run of payload bytes in one message.
MAX_CHUNK_BYTES = 1 << 20
#: Longest encoded message.
MAX_MESSAGE_BYTES = 4 << 20
#: Most blocks of one lookup or put.
MAX_CHAIN_BLOCKS = 1 << 16
#: Most lookups of one call.
MAX_LOOKUPS = 64


def _load() -> dict[str, Any]:
    # A pool of its own: another copy of these files in the process does not matter.
    pool = descriptor_pool.DescriptorPool()
    text = importlib.resources.files("esker").joinpath("esker_v1.binpb").read_bytes()
    for file in descriptor_pb2.FileDescriptorSet.FromString(text).file:
        pool.AddSerializedFile(file.SerializeToString())
    files = descriptor_pb2.FileDescriptorSet.FromString(text).file
    names = [f"{file.package}.{message.name}" for file in files for message in file.message_type]
    return {name.rsplit(".", 1)[1]: message_factory.GetMessageClass(pool.FindMessageTypeByName(name)) for name in names}


_MESSAGES = _load()


def message(name: str, **fields: Any) -> Any:
    """A message of ``esker.v1`` with these fields."""
    return _MESSAGES[name](**fields)


def message_class(name: str) -> Any:
    """The class of a message."""
    return _MESSAGES[name]


def has_message(name: str) -> bool:
    """Whether the protocol has a message of this name."""
    return name in _MESSAGES


@dataclasses.dataclass
class PlaneChunk:
    """Part of a plane; ``data`` is a view into the message as it arrived."""

    kind: int = 0
    tokens: int = 0
    plane: int = 0
    plane_bytes: int = 0
    offset: int = 0
    data: memoryview = memoryview(b"")


_FIELDS = {1: "kind", 2: "tokens", 3: "plane", 4: "plane_bytes", 5: "offset"}


def read_fetch_reply(raw: bytes) -> Any:
    """A :class:`PlaneChunk`, or a ``FetchReply`` message for all else."""
    if raw[:1] != b"\x0a":
        return _MESSAGES["FetchReply"].FromString(raw)
    view = memoryview(raw)
    length, at = _varint(view, 1)
    if at + length != len(view):
        raise ProtocolError("a fetch reply has a chunk and something else")
    chunk = PlaneChunk()
    while at < len(view):
        tag, at = _varint(view, at)
        if tag == 0x32:
            length, at = _varint(view, at)
            if at + length > len(view):
                raise ProtocolError("a chunk ends before its data")
            chunk.data = view[at : at + length]
            at += length
        elif tag & 7 == 0 and tag >> 3 in _FIELDS:
            value, at = _varint(view, at)
            setattr(chunk, _FIELDS[tag >> 3], value)
        else:
            raise ProtocolError(f"a chunk has a field with tag {tag:#x}, which this version does not know")
    return chunk


def put_chunks(kind: int, tokens: int, plane: int, data: list[memoryview]) -> Iterator[bytes]:
    """The ``PutRequest`` messages that carry one plane, given in pieces: one where it is empty. One copy: from the pieces into
    the message."""
    plane_bytes = sum(len(piece) for piece in data)
    offset = 0
    for run in _runs(data) if plane_bytes else [[]]:
        length = sum(len(piece) for piece in run)
        head = bytearray()
        for field, value in enumerate((kind, tokens, plane, plane_bytes, offset), 1):
            if value:
                head.append(field << 3)
                _put_varint(head, value)
        head.append(0x32)
        _put_varint(head, length)
        outer = bytearray(b"\x12")
        _put_varint(outer, len(head) + length)
        yield b"".join((outer, head, *run))
        offset += length


def _runs(data: list[memoryview]) -> Iterator[list[memoryview]]:
    """Pieces of at most ``MAX_CHUNK_BYTES`` together."""
    run: list[memoryview] = []
    room = MAX_CHUNK_BYTES
    for piece in data:
        while piece:
            part, piece = piece[:room], piece[room:]
            run.append(part)
            room -= len(part)
            if room == 0:
                yield run
                run, room = [], MAX_CHUNK_BYTES
    if run:
        yield run


def _varint(view: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(view) or shift > 63:
            raise ProtocolError("a fetch reply is cut short")
        byte = view[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def _put_varint(out: bytearray, value: int) -> None:
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
