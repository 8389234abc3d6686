"""KV layouts: what a model keeps for each block of tokens and for each boundary, as a table.

The same table as in the node: it travels as JSON and its digest is part of the namespace. A layout is a list of groups; the
object of one block holds the rows of every ``history`` group, a state object those of every ``state`` group. Off the block grid
a state also brings the history rows of the tokens behind the last whole block. Objects are cut into planes, one for each group
and run of layers: :meth:`Layout.planes` gives them in restore order.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import json
from collections.abc import Sequence
from typing import Any


#: Layers of opaque chunks are joined in one plane up to this many bytes: below it, planes cost more to find than to read.
_PLANE_TARGET_BYTES = 1 << 20


class Dtype(str, enum.Enum):
    """Number format of a field."""

    U8 = "u8"
    F32 = "f32"
    BF16 = "bf16"
    F8_E4M3 = "f8_e4m3"
    F8_E8M0 = "f8_e8m0"
    F4_E2M1 = "f4_e2m1"

    @property
    def bits(self) -> int:
        """Bits of one number."""
        return {"f32": 32, "bf16": 16, "f4_e2m1": 4}.get(self.value, 8)


class Kind(enum.IntEnum):
    """What an object is."""

    BLOCK = 1
    STATE = 2


@dataclasses.dataclass(frozen=True)
class Field:
    """Part of a row: ``count`` numbers of one format."""

    name: str
    dtype: Dtype
    count: int


@dataclasses.dataclass(frozen=True)
class Group:
    """Layers that share row format, rate and retention."""

    name: str
    family: str  # "history" or "state"
    layers: tuple[int, ...]  # model layers, ascending
    rows: int  # for each layer, in one block or one state
    fields: tuple[Field, ...]
    restore_order: int = 0
    plane_layers: int = 1  # layers joined in one plane
    optional: bool = False  # a state group that an object may lack
    grain_blocks: int = 1  # blocks that share one set of rows, which lies in the last of them
    run_tokens: int = 0  # a state group with a row for each token since the last multiple of so many

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return sum(field.count * field.dtype.bits // 8 for field in self.fields)

    def rows_at(self, kind: Kind, tokens: int, block_tokens: int) -> int:
        """Rows of a layer in the object of this kind that completes a prefix of this many tokens."""
        if self.family == "state":
            return tokens % self.run_tokens if self.run_tokens else self.rows
        if kind is Kind.BLOCK:
            return self.rows if tokens // block_tokens % self.grain_blocks == 0 else 0
        return -(-self.rows * (tokens % block_tokens) // (block_tokens * self.grain_blocks))


@dataclasses.dataclass(frozen=True)
class Plane:
    """One plane of an object."""

    group: str
    layers: tuple[int, ...]
    len_bytes: int


@dataclasses.dataclass(frozen=True)
class Layout:
    """The group table. The node checks it when it is registered and says what is wrong."""

    name: str
    block_tokens: int
    groups: tuple[Group, ...]

    @classmethod
    def opaque(cls, name: str, block_tokens: int, layer_bytes: Sequence[int]) -> "Layout":
        """Chunks of bytes that only their writer understands: one history group for each run of equal ``layer_bytes``."""
        groups: list[Group] = []
        at = 0
        while at < len(layer_bytes):
            end = at
            while end < len(layer_bytes) and layer_bytes[end] == layer_bytes[at]:
                end += 1
            fields = (Field("bytes", Dtype.U8, layer_bytes[at]),)
            layers = tuple(range(at, end))
            joined = min(max(1, _PLANE_TARGET_BYTES // layer_bytes[at]), len(layers))
            groups.append(Group(f"part{len(groups)}", "history", layers, 1, fields, len(groups), joined))
            at = end
        return cls(name, block_tokens, tuple(groups))

    @classmethod
    def from_json(cls, text: str) -> "Layout":
        """Reads the JSON form."""
        table = json.loads(text)
        groups = []
        for group in table["groups"]:
            fields = tuple(Field(f["name"], Dtype(f["dtype"]), f["count"]) for f in group["fields"])
            groups.append(Group(**{**group, "layers": tuple(group["layers"]), "fields": fields}))
        return cls(table["name"], table["block_tokens"], tuple(groups))

    def to_json(self) -> str:
        """The JSON form: what travels on the wire."""

        def plain(items: list[tuple[str, Any]]) -> dict[str, Any]:
            said = [(key, value) for key, value in items if key not in _UNSAID or value != _UNSAID[key]]
            return {key: value.value if isinstance(value, enum.Enum) else value for key, value in said}

        return json.dumps(dataclasses.asdict(self, dict_factory=plain), separators=(",", ":"))

    @functools.cached_property
    def _planes(self) -> dict[Kind, tuple[Plane, ...]]:
        planes: dict[Kind, tuple[Plane, ...]] = {}
        for kind, family in ((Kind.BLOCK, "history"), (Kind.STATE, "state")):
            of_family = [group for group in self.groups if group.family == family]
            ordered = sorted(of_family, key=lambda group: group.restore_order)
            planes[kind] = tuple(
                Plane(group.name, layers, len(layers) * group.rows * group.row_bytes)
                for group in ordered
                for layers in _runs(group.layers, group.plane_layers)
            )
        return planes

    @functools.cached_property
    def _varies(self) -> dict[Kind, bool]:
        """Whether objects on the block grid differ in length."""
        return {
            Kind.BLOCK: any(group.grain_blocks > 1 for group in self.groups),
            Kind.STATE: any(group.run_tokens > 0 for group in self.groups),
        }

    def planes(self, kind: Kind, tokens: int | None = None) -> tuple[Plane, ...]:
        """Planes of the object of this kind at this many tokens, in restore order; without ``tokens`` each as long as it can be,
        on the block grid."""
        tail = kind is Kind.STATE and tokens is not None and tokens % self.block_tokens != 0
        if tokens is None or not (tail or self._varies[kind]):
            return self._planes[kind]
        by_name = {group.name: group for group in self.groups}

        def resized(plane: Plane) -> Plane:
            group = by_name[plane.group]
            rows = group.rows_at(kind, tokens, self.block_tokens)
            return dataclasses.replace(plane, len_bytes=len(plane.layers) * rows * group.row_bytes)

        return tuple(map(resized, (*self._planes[kind], *(self._planes[Kind.BLOCK] if tail else ()))))

    def is_optional(self, plane: Plane) -> bool:
        """Whether an object may lack this plane: it is empty then."""
        return any(group.optional for group in self.groups if group.name == plane.group)

    def object_bytes(self, kind: Kind, tokens: int | None = None) -> int:
        """Bytes of the object of this kind at this many tokens; without ``tokens`` as of :meth:`planes`."""
        return sum(plane.len_bytes for plane in self.planes(kind, tokens))


#: Fields of a group that are left out where they say nothing.
_UNSAID = {"optional": False, "grain_blocks": 1, "run_tokens": 0}


def _runs(layers: tuple[int, ...], length: int) -> list[tuple[int, ...]]:
    return [layers[at : at + length] for at in range(0, len(layers), length)]
