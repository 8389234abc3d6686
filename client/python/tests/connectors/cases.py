"""The conformance cases of prefix lookup that are about what is stored, for connectors that keep each group page by page.

Counted in pages of the smallest group. Where a case of the table in lookup.md has a state at a boundary, here the window's pages
before the boundary are stored.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Group:
    """Stored pages of a group; ``window`` is 0 of history. ``size`` is how many of the smallest group's pages one of its pages has."""

    stored: Sequence[int]
    window: int = 0
    size: int = 1


@dataclasses.dataclass(frozen=True)
class Case:
    """What is stored of a prompt of so many pages, and every length that can be resumed."""

    groups: tuple[Group, ...]
    pages: int
    points: tuple[int, ...]

    @property
    def best(self) -> int:
        """The greatest of them, or 0."""
        return max(self.points, default=0)


def history(pages: int) -> Group:
    return Group(range(pages))


def window(*stored: int, of: int = 3) -> Group:
    return Group(stored, of)


L1 = Case((history(10), history(10)), 10, tuple(range(1, 11)))
#: The window before 16 has a hole.
L2 = Case((history(16), window(5, 6, 7, 13, 15)), 16, (8,))
L3 = Case((history(16), history(5)), 16, (1, 2, 3, 4, 5))
#: The window before 16 is there; history ends at 12, then it is filled.
L4 = Case((history(12), window(5, 6, 7, 13, 14, 15)), 16, (8,))
L4_FILLED = dataclasses.replace(L4, groups=(history(16), L4.groups[1]), points=(8, 16))
L5 = Case((history(16), window(3, 4, 5)), 16, (6,))
#: A snapshot is the page that ends at the boundary.
L10 = Case((history(16), window(3, 11, of=1)), 16, (4, 12))
#: A group of pages four times as large closes at 12; nothing else is rounded to it.
L17 = Case((history(15), Group(range(3), size=4)), 15, tuple(range(1, 13)))
#: Windows without the history that they need.
L18 = Case((history(0), window(5, 6, 7)), 8, ())
