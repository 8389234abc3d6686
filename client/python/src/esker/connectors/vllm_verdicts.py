"""What the tier answers for one request: a key is a hit inside the longest prefix that can be restored, and a miss elsewhere.

vLLM asks key by key, and begins to load what is answered with a hit. A group's chunks behind a hole of another group would be moved
for nothing, and a window is needed only where the prefix ends. So keys are placed (group, end in the prompt) and judged together.

Invariants:
- A verdict never changes, except that what failed to load becomes a miss.
- What was not asked counts as present: the engine does not ask for what it has itself, or what a tier above this one has. Beyond the
  end of all that was asked there are no whole chunks.
- What is asked later is judged by the longest prefix that the verdicts given so far allow.
- A key that the engine does not place, or not at the end of a chunk, is judged alone: the engine weighs it itself.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from ..resume import Need, Presence, best_point

#: Of a group that is not known to be history or window: some of its last rows are needed, whatever it is.
_LAST_CHUNK = 1
_UNKNOWN: Any = object()


@dataclasses.dataclass
class _Group:
    chunk_tokens: int
    #: None while it is not known.
    need: Need | None
    window_chunks: int = 0

    def presence(self, present: Sequence[bool]) -> Presence:
        if self.need is Need.HISTORY:
            return Presence(Need.HISTORY, self.chunk_tokens, present)
        window_tokens = self.window_chunks * self.chunk_tokens or _LAST_CHUNK
        return Presence(Need.WINDOW, self.chunk_tokens, present, window_tokens)

    def needs(self, chunk: int, tokens: int) -> bool:
        """Whether a prefix of this length loads this chunk."""
        start = chunk * self.chunk_tokens
        if self.need is not Need.WINDOW:
            return start < tokens
        # One chunk more: the engine may resume somewhat before the end of the last chunk, with a window of the same length.
        return tokens - (self.window_chunks + 1) * self.chunk_tokens <= start < tokens


class Groups:
    """The engine's groups, by the number in their keys.

    Where the engine's configuration does not say of a group whether it has a window, and how long it is, it is seen from how the engine
    asks: for history from the front, for windows from the end.
    """

    def __init__(self, groups: Iterable[Any], blocks_per_chunk: int) -> None:
        self._by_number: dict[int, _Group] = {}
        for index, group in enumerate(groups):
            window = getattr(group, "sliding_window_size_in_chunks", _UNKNOWN)
            made = _Group(group.tokens_per_block * blocks_per_chunk, None)
            if window is None:
                made.need = Need.HISTORY
            elif window is not _UNKNOWN:
                made.need, made.window_chunks = Need.WINDOW, int(window)
            self._by_number[getattr(group, "group_id", index)] = made
        #: Prefixes that the engine may resume at are multiples of this.
        self.step_tokens = math.gcd(*(group.chunk_tokens for group in self._by_number.values()))

    def __getitem__(self, number: int) -> _Group:
        return self._by_number[number]

    def place(self, key: bytes, end: int | None) -> tuple[int, int] | None:
        """Group and chunk of a key that ends here in the prompt; None where it cannot be placed."""
        number = int.from_bytes(key[-4:], "big")
        group = self._by_number.get(number)
        if group is None or not end or end % group.chunk_tokens:
            return None
        return number, end // group.chunk_tokens - 1

    def learn(self, number: int, chunks: Sequence[int]) -> None:
        """Chunks of a group in the order in which the engine asked for them."""
        group = self._by_number[number]
        if group.need is None and len(chunks) > 1 and all(a < b for a, b in zip(chunks, chunks[1:])):
            group.need = Need.HISTORY


class Verdicts:
    """The verdicts of one request. One thread at a time judges; others may read meanwhile."""

    def __init__(self, groups: Groups) -> None:
        self._groups = groups
        self._given: dict[bytes, bool] = {}
        self._chunks: dict[int, dict[int, bytes]] = {}  # by group: the keys of chunks of the prompt

    def of(self, key: bytes) -> bool | None:
        """The verdict of a key; None while there is none."""
        return self._given.get(key)

    def give(self, verdicts: dict[bytes, bool]) -> None:
        """Fixes verdicts; those that were given before stay."""
        for key, verdict in verdicts.items():
            self._given.setdefault(key, verdict)

    def refuse(self, keys: Iterable[bytes]) -> None:
        """These failed to load: misses from now on."""
        self._given.update(dict.fromkeys(self._given.keys() & set(keys), False))

    def judge(self, asked: Sequence[tuple[bytes, int | None]], present: Collection[bytes]) -> dict[bytes, bool]:
        """Verdicts for keys, each with its end in the prompt, of which these are present."""
        places = {key: self._groups.place(key, end) for key, end in asked}
        order: dict[int, list[int]] = {}
        for key, place in places.items():
            if place is not None:
                number, chunk = place
                self._chunks.setdefault(number, {})[chunk] = key
                order.setdefault(number, []).append(chunk)
        for number, chunks in order.items():
            self._groups.learn(number, chunks)
        best = self._best(present) if order else 0
        verdicts = {}
        for key, place in places.items():
            needed = place is None or self._groups[place[0]].needs(place[1], best)
            verdicts[key] = needed and key in present
        return verdicts

    def _best(self, present: Collection[bytes]) -> int:
        """The longest prefix that can be restored, in tokens, as far as is known."""
        groups = {number: self._groups[number] for number in self._chunks}
        limit = max((max(self._chunks[number]) + 1) * group.chunk_tokens for number, group in groups.items())
        presence = []
        for number, group in groups.items():
            keys = self._chunks[number]
            there = [True] * (limit // group.chunk_tokens)
            for chunk, key in keys.items():
                given = self._given.get(key)
                there[chunk] = key in present if given is None else given
            presence.append(group.presence(there))
        return best_point(presence, self._groups.step_tokens, limit)
