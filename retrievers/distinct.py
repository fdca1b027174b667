"""Hits that say something new: a passage that better ones already hold is left out.

Corpora repeat themselves (a page and the chapter that gathers it, copies of a file, boilerplate). The
copies rank side by side and fill a prompt with one text several times.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from retrievers.types import Retriever, SearchHit

FETCHED = 3
"""Hits looked at for each that is wanted."""

_WORD = re.compile(r"\w+")
_RUN = 4
_HELD = 0.7


def distinct(hits: Sequence[SearchHit], k: int) -> list[SearchHit]:
    """Best hits of which each adds something to those before it.

    Parameters
    ----------
    hits : sequence of SearchHit
        Best first.
    k : int
        Hits at most.

    Returns
    -------
    list of SearchHit
        In the same order. A hit is left out when better ones hold 70% of its runs of four words,
        punctuation and case aside. Texts of fewer words are compared whole.
    """
    held: set[tuple[str, ...]] = set()
    kept: list[SearchHit] = []
    for hit in hits:
        runs = _runs(hit.chunk.text)
        if runs and len(runs & held) >= _HELD * len(runs):
            continue
        kept.append(hit)
        if len(kept) == k:
            break
        held |= runs
    return kept


def _runs(text: str) -> set[tuple[str, ...]]:
    words = _WORD.findall(text.lower())
    if len(words) < _RUN:
        return {tuple(words)} if words else set()
    return {tuple(words[i : i + _RUN]) for i in range(len(words) - _RUN + 1)}


class DistinctRetriever:
    """Takes more hits of another retriever and returns the best that differ.

    Parameters
    ----------
    base : Retriever
        Ranks; asked for three times as many hits.
    """

    def __init__(self, base: Retriever) -> None:
        self._base = base

    def search(
        self, query: str, *, k: int, where: Mapping[str, object] | None = None
    ) -> list[SearchHit]:
        """Return at most `k` hits, best first; fewer where the rest repeats them."""
        return distinct(self._base.search(query, k=FETCHED * k, where=where), k)
