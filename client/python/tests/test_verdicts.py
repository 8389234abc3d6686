"""Which keys of a request are hits, against a model that tries every length: random groups, holes, and what is not asked for."""

from __future__ import annotations

import random
import types

from esker.connectors.vllm_verdicts import Groups, Verdicts

Key = bytes


def key(group: int, chunk: int) -> Key:
    return chunk.to_bytes(8, "big") + group.to_bytes(4, "big")


def test_hits_are_the_greatest_length_that_every_group_supports(rng: random.Random) -> None:
    for _ in range(3000):
        sizes = [rng.choice([16, 32, 64]) for _ in range(rng.randint(1, 3))]
        windows = [rng.choice([None, 1, 2, 3]) for _ in sizes]
        groups = Groups(
            [
                types.SimpleNamespace(tokens_per_block=size, group_id=at, sliding_window_size_in_chunks=window)
                for at, (size, window) in enumerate(zip(sizes, windows))
            ],
            1,
        )
        length = 64 * rng.randint(1, 8)
        # By group: None is not asked for, as the engine has it.
        chunks = [[rng.choice([True] * 5 + [False, None]) for _ in range(length // size)] for size in sizes]
        asked = [(key(group, at), (at + 1) * sizes[group]) for group, of in enumerate(chunks) for at, have in enumerate(of) if have is not None]
        present = {key(group, at) for group, of in enumerate(chunks) for at, have in enumerate(of) if have}
        hits = {one for one, hit in Verdicts(groups).judge(asked, present).items() if hit}

        limit = max((end for _, end in asked), default=0)

        def supports(group: int, tokens: int) -> bool:
            size, window = sizes[group], windows[group]
            first = 0 if window is None else max(0, tokens - window * size) // size
            needed = range(first, -(-tokens // size))
            return all(chunks[group][at] is not False and (at + 1) * size <= limit for at in needed)

        step = min(sizes)
        asking = {int.from_bytes(one[-4:], "big") for one, _ in asked}
        best = max([0, *(tokens for tokens in range(step, limit + 1, step) if all(supports(group, tokens) for group in asking))])
        for one, end in asked:
            group = int.from_bytes(one[-4:], "big")
            inside, window = end - sizes[group] < best, windows[group]
            # Of a window, what lies well before the end of the prefix is a miss; one chunk more may be a hit.
            if window is None or end > best - window * sizes[group]:
                assert (one in hits) == (inside and one in present), (sizes, windows, chunks, best, one)
            elif end <= best - (window + 1) * sizes[group]:
                assert one not in hits, (sizes, windows, chunks, best, one)


def test_a_key_that_is_not_at_the_end_of_a_chunk_is_judged_alone() -> None:
    groups = Groups([types.SimpleNamespace(tokens_per_block=16)], 2)
    verdicts = Verdicts(groups)
    tail, unknown = key(0, 99), key(7, 0)
    judged = verdicts.judge([(key(0, 0), 32), (key(0, 1), 64), (tail, 80), (unknown, None)], {key(0, 1), tail, unknown})
    assert judged == {key(0, 0): False, key(0, 1): False, tail: True, unknown: True}
    verdicts.give(judged)
    verdicts.refuse([tail, key(0, 5)])
    assert verdicts.of(tail) is False and verdicts.of(key(0, 5)) is None
