"""How much of the evidence the cache holds that a question is answered from."""

from __future__ import annotations

from collections.abc import Sequence

Range = tuple[int, int]
"""Half-open range of true positions."""


def outside(wanted: Sequence[Range], verbatim: Sequence[Range]) -> list[Range]:
    """Parts of the wanted ranges that stand in none of the verbatim ones, in order and without empty ones."""
    parts = list(wanted)
    for low, high in verbatim:
        parts = [
            part
            for start, end in parts
            for part in ((start, min(end, low)), (max(start, high), end))
            if part[0] < part[1]
        ]
    return sorted(parts)


def evidence_recall(
    wanted: Sequence[Range], parts: Sequence[Range], shares: Sequence[float]
) -> float:
    """Share of the evidence tokens in the cache, mean over layers and heads.

    Parameters
    ----------
    wanted : sequence of Range
        Positions of the evidence; at least one token.
    parts : sequence of Range
        What :func:`outside` gives; everything else stands verbatim in the prompt and counts in full.
    shares : sequence of float
        Share of each part in the record, mean over layers and heads; none where nothing was loaded.

    Raises
    ------
    ValueError
        Shares of another number than the parts.
    """
    if shares and len(shares) != len(parts):
        raise ValueError(f"{len(shares)} kept shares for {len(parts)} spans")
    total = sum(end - start for start, end in wanted)
    behind = sum(end - start for start, end in parts)
    kept = sum(
        share * (end - start)
        for share, (start, end) in zip(shares or [0.0] * len(parts), parts, strict=True)
    )
    return (total - behind + kept) / total
