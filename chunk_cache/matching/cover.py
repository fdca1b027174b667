"""From overlapping runs to disjoint matches: as many tokens as possible, in as few pieces.

With trimming allowed, the largest cover of a set of intervals is their union, so the weight of the
interval scheduling problem is decided and what remains is the number of pieces. The greedy sweep
(at each uncovered point take the run that reaches furthest) gives the fewest, by the usual exchange
argument.
"""

from __future__ import annotations

from collections.abc import Sequence

from chunk_cache.spans import Match


def longest_cover(runs: Sequence[Match], *, min_piece: int = 16) -> list[Match]:
    """Choose and trim runs into the longest disjoint cover with the fewest pieces.

    Deterministic: among runs that reach equally far, the one that starts earliest wins, then a
    whole chunk, then the smaller offset, then the smaller digest. Where two chosen runs overlap the
    longer keeps the common part (a token deep in a long run saw more of its own chunk), but gives
    up as much as the other needs to have ``min_piece`` tokens, if it can spare them.

    Parameters
    ----------
    runs : sequence of Match
        Verified matches, in any order; they may overlap.
    min_piece : int
        Wanted length of a trimmed piece, tokens. Never costs coverage.

    Returns
    -------
    list[Match]
        Disjoint matches in prompt order whose union is the union of ``runs``.
    """
    chosen = _fewest(runs)
    if not chosen:
        return []
    cover: list[Match] = []
    start = chosen[0].prompt_start
    for match, following in zip(chosen, [*chosen[1:], None], strict=True):
        end = match.prompt_end
        if following is not None and following.prompt_start < end:
            end = _cut(match, following, start, min_piece)
        cover.append(match.clipped(start, end))
        start = end if following is None else max(end, following.prompt_start)
    return cover


def _fewest(runs: Sequence[Match]) -> list[Match]:
    ordered = sorted(runs, key=_preference)
    chosen: list[Match] = []
    point = -1  # everything coverable before it is covered
    at = 0
    while at < len(ordered):
        best: Match | None = None
        while at < len(ordered) and ordered[at].prompt_start <= point:
            if best is None or ordered[at].prompt_end > best.prompt_end:
                best = ordered[at]
            at += 1
        if best is not None and best.prompt_end > point:
            chosen.append(best)
            point = best.prompt_end
        elif at < len(ordered):
            point = ordered[at].prompt_start  # a gap that no run covers
    return chosen


def _preference(match: Match) -> tuple[int, int, bool, int, str]:
    is_part = match.num_tokens != match.key.num_tokens
    return (
        match.prompt_start,
        -match.prompt_end,
        is_part,
        match.chunk_offset,
        match.key.digest,
    )


def _cut(match: Match, following: Match, start: int, min_piece: int) -> int:
    """Where in their common part ``match`` (already trimmed to ``start``) hands over."""
    low, high = max(following.prompt_start, start + 1), match.prompt_end
    enough_here = min(max(low, start + min_piece), high)
    enough_there = max(min(high, following.prompt_end - min_piece), low)
    if match.num_tokens >= following.num_tokens:
        return max(enough_here, enough_there)
    return min(enough_here, enough_there)
