"""Pack the atoms between two anchors into the fewest chunks with the best borders."""

from __future__ import annotations

from collections.abc import Sequence

from retrievers.splitter.atoms import Boundary

# What a border costs, in chunks: a whole extra chunk is worth avoiding a break inside a sentence,
# but four paragraphs' worth of tidiness are not worth one.
_BORDER_COST = {
    Boundary.SECTION: 0.0,
    Boundary.PARAGRAPH: 0.05,
    Boundary.SENTENCE: 0.25,
    Boundary.WORD: 1.1,
}
# Between packings of equal worth the even one wins: one short chunk retrieves worse than two
# of middle length.
_SLACK_COST = 0.2


def pack(
    token_counts: Sequence[int], boundaries: Sequence[Boundary], limit: int
) -> list[tuple[int, int]]:
    """Divide a run of atoms into chunks of at most `limit` tokens at least total cost.

    Exact dynamic programme over the borders: ``best[j] = min over i of best[i] + cost(i, j)``.

    Parameters
    ----------
    token_counts : sequence of int
        Tokens of every atom. An atom above `limit` becomes a chunk of its own.
    boundaries : sequence of Boundary
        What stands before every atom.
    limit : int
        Most tokens of a chunk.

    Returns
    -------
    list of (int, int)
        Half-open atom ranges, in order, covering all atoms.
    """
    count = len(token_counts)
    costs = [_BORDER_COST[boundary] for boundary in boundaries]
    best = [0.0] * (count + 1)
    previous = [0] * (count + 1)
    for j in range(1, count + 1):
        tokens = token_counts[j - 1]
        slack = max(0.0, 1.0 - tokens / limit)
        least = best[j - 1] + costs[j - 1] + 1.0 + _SLACK_COST * slack * slack
        least_at = j - 1
        # No further back than `limit` atoms: some tokenizers give odd characters no token at all.
        for i in range(j - 2, max(-1, j - limit - 2), -1):
            tokens += token_counts[i]
            if tokens > limit:
                break
            slack = 1.0 - tokens / limit
            cost = best[i] + costs[i] + 1.0 + _SLACK_COST * slack * slack
            if cost < least:
                least, least_at = cost, i
        best[j], previous[j] = least, least_at
    ranges: list[tuple[int, int]] = []
    end = count
    while end:
        ranges.append((previous[end], end))
        end = previous[end]
    ranges.reverse()
    return ranges
