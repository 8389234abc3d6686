"""Layouts that the tests use, small in bytes and shaped like the real ones."""

from esker import Dtype, Field, Group, Kind, Layout, Object


def group(name: str, family: str, rows: int, layers: int = 2, order: int = 0) -> Group:
    """A group of 64-byte rows."""
    return Group(name, family, tuple(range(layers)), rows, (Field("row", Dtype.U8, 64),), order, layers)


#: Latents and indexer keys: history alone.
DSA = Layout("dsa", 128, (group("latent", "history", 128, 2, 1), group("indexer", "history", 128, 1, 0)))
#: History and a window with what compressors hold.
WINDOWED = Layout(
    "windowed",
    128,
    (
        group("csa", "history", 32, 2, 1),
        group("indexer", "history", 32, 1, 0),
        group("window", "state", 128, 2, 0),
        group("carry", "state", 4, 1, 1),
    ),
)
#: Full attention and one large snapshot.
HYBRID = Layout("hybrid", 128, (group("full", "history", 16, 1), group("recurrent", "state", 4096, 1)))


def fill(layout: Layout, kind: Kind, tokens: int, salt: int = 0) -> list[bytes]:
    """Planes of an object: bytes that say which object, plane and place they are, and that do not compress to nothing."""
    planes = []
    for index, plane in enumerate(layout.planes(kind, tokens)):
        seed = (tokens * 31 + index * 7 + int(kind) * 3 + salt * 1009).to_bytes(8, "little")
        import hashlib

        planes.append(hashlib.shake_256(seed).digest(plane.len_bytes))
    return planes


def blocks(layout: Layout, count: int, first: int = 0, salt: int = 0) -> list[Object]:
    """Block objects number `first` up to `count`."""
    sizes = [(at + 1) * layout.block_tokens for at in range(first, count)]
    return [Object(tokens, fill(layout, Kind.BLOCK, tokens, salt)) for tokens in sizes]


def state(layout: Layout, tokens: int, salt: int = 0) -> Object:
    """The state object at a boundary."""
    return Object(tokens, fill(layout, Kind.STATE, tokens, salt), Kind.STATE)
