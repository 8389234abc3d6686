"""Which prefix lengths can be resumed, where each group of a model's cache is stored apart from the others.

Connectors store the pages of each group under names of their own, so it is here, not in the node, that the groups meet. A length
can be resumed if every *history* group has every page before it, every *window* group the pages of its last rows, and every
*snapshot* group the page that ends exactly there. Each group rounds by itself; nothing is rounded to a common multiple.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterator, Sequence


class Need(enum.Enum):
    """What of a group a resumed prefix needs."""

    HISTORY = "history"  # every row of [0, n)
    WINDOW = "window"  # the rows of [n - window, n)
    SNAPSHOT = "snapshot"  # the page that ends at n


@dataclasses.dataclass(frozen=True)
class Presence:
    """Which pages of a group are stored, from the start of the prompt."""

    need: Need
    page_tokens: int
    present: Sequence[bool]
    window_tokens: int = 0  # of a window
    required: bool = True

    def closed_tokens(self) -> int:
        """Tokens before the first missing page."""
        for page, there in enumerate(self.present):
            if not there:
                return page * self.page_tokens
        return len(self.present) * self.page_tokens

    def supports(self, tokens: int) -> bool:
        """Whether a prefix of this length has what it needs of this group."""
        return all(page < len(self.present) and self.present[page] for page in self.pages(tokens))

    def pages(self, tokens: int) -> Sequence[int]:
        """The pages that a prefix of this length needs; a page that cannot exist stands for what can never be had."""
        end = -(-tokens // self.page_tokens)
        if self.need is Need.HISTORY:
            return range(end)
        if self.need is Need.SNAPSHOT:
            return [tokens // self.page_tokens - 1] if tokens % self.page_tokens == 0 else [len(self.present)]
        return range(max(0, tokens - self.window_tokens) // self.page_tokens, end)


def resume_points(groups: Sequence[Presence], block_tokens: int, limit_tokens: int) -> list[int]:
    """Every multiple of ``block_tokens`` up to ``limit_tokens`` that all required groups support, ascending.

    A rank must give all of them, never only the greatest: what all ranks have in common may be shorter than each one's best.
    """
    return list(_descending(groups, block_tokens, limit_tokens))[::-1]


def best_point(groups: Sequence[Presence], block_tokens: int, limit_tokens: int) -> int:
    """The greatest of them, or 0: for who has all ranks' state in one place."""
    return next(_descending(groups, block_tokens, limit_tokens), 0)


def _descending(groups: Sequence[Presence], block_tokens: int, limit_tokens: int) -> Iterator[int]:
    required = [group for group in groups if group.required]
    if not required:
        return
    for group in required:
        if group.need is Need.HISTORY:
            limit_tokens = min(limit_tokens, group.closed_tokens())
    rest = [group for group in required if group.need is not Need.HISTORY]
    for tokens in range(limit_tokens // block_tokens * block_tokens, 0, -block_tokens):
        if all(group.supports(tokens) for group in rest):
            yield tokens


def common(ranks: Sequence[Sequence[int]]) -> list[int]:
    """Lengths that every rank can resume, ascending."""
    if not ranks:
        return []
    both = set(ranks[0])
    for lengths in ranks[1:]:
        both &= set(lengths)
    return sorted(both)
