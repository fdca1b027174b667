"""Where stored chunks stand in a prompt: the one list that explicit and automatic finding end in."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from chunk_cache.errors import ChunkCacheError
from chunk_cache.keys import ChunkKey


class Match(NamedTuple):
    """Prompt tokens ``[prompt_start, prompt_end)`` equal a run of a stored chunk.

    The run starts at ``chunk_offset`` in the chunk. A run deep inside a chunk is as good as its
    start: its KV is that of those tokens *in their chunk*, which is all that chunk KV ever is.
    """

    prompt_start: int
    prompt_end: int
    key: ChunkKey
    chunk_offset: int = 0

    @property
    def num_tokens(self) -> int:
        """Length of the run in tokens."""
        return self.prompt_end - self.prompt_start

    @property
    def chunk_end(self) -> int:
        """End of the run inside the chunk."""
        return self.chunk_offset + self.num_tokens

    def clipped(self, start: int, end: int) -> Match:
        """Return the part inside prompt positions ``[start, end)``; it must not be empty."""
        start, end = max(start, self.prompt_start), min(end, self.prompt_end)
        if start >= end:
            raise ChunkCacheError(f"{self!r} has nothing in [{start}, {end})")
        return Match(start, end, self.key, self.chunk_offset + start - self.prompt_start)


def check_spans(spans: Iterable[tuple[int, int]], prompt_len: int) -> list[tuple[int, int]]:
    """Check client-given spans and sort them.

    Parameters
    ----------
    spans : iterable of (int, int)
        ``(start, end)`` token positions, end exclusive. Empty ones (``start == end``) are dropped:
        a document may well be empty.
    prompt_len : int
        Number of prompt tokens.

    Raises
    ------
    ChunkCacheError
        For spans that leave the prompt, run backwards or overlap.
    """
    checked: list[tuple[int, int]] = []
    for start, end in spans:
        if type(start) is not int or type(end) is not int:
            raise ChunkCacheError(f"span ({start!r}, {end!r}): give two integers")
        if not 0 <= start <= end <= prompt_len:
            raise ChunkCacheError(
                f"span ({start}, {end}) in a prompt of {prompt_len} tokens: "
                "allowed is 0 <= start <= end <= length"
            )
        if start < end:
            checked.append((start, end))
    checked.sort()
    for (a_start, a_end), (b_start, b_end) in itertools.pairwise(checked):
        if b_start < a_end:
            raise ChunkCacheError(
                f"spans ({a_start}, {a_end}) and ({b_start}, {b_end}) overlap: give disjoint spans"
            )
    return checked


def merge_matches(
    fixed: Sequence[Match], more: Sequence[Match], *, min_piece: int = 1
) -> list[Match]:
    """Fill the gaps of some matches with others; no fixed match is ever cut.

    This is the one rule for short pieces: a piece that was cut shorter than ``min_piece`` is dropped, and a match that
    nothing cut is kept as it is. How short a whole match may be is up to the matcher that found it. (Until the two
    gap fillers became this one, this function also dropped whole matches under ``min_piece``.)

    Parameters
    ----------
    fixed : sequence of Match
        Disjoint matches, in any order.
    more : sequence of Match
        Disjoint matches for the gaps.
    min_piece : int
        Shortest piece of a cut match that is worth keeping, tokens.

    Returns
    -------
    list[Match]
        Disjoint matches in prompt order.

    Raises
    ------
    ChunkCacheError
        If the fixed matches overlap each other.
    """
    walls = sorted(fixed, key=lambda match: match.prompt_start)
    for one, two in itertools.pairwise(walls):
        if two.prompt_start < one.prompt_end:
            raise ChunkCacheError(f"fixed matches {one[:2]} and {two[:2]} overlap")
    merged = list(walls)
    for match in more:
        start = match.prompt_start
        for wall in walls:
            if wall.prompt_end <= start:
                continue
            if wall.prompt_start >= match.prompt_end:
                break
            if wall.prompt_start - start >= min_piece:
                merged.append(match.clipped(start, wall.prompt_start))
            start = wall.prompt_end
        is_whole = start == match.prompt_start
        if is_whole or match.prompt_end - start >= min_piece:
            merged.append(match.clipped(start, match.prompt_end))
    return sorted(merged, key=lambda match: match.prompt_start)
