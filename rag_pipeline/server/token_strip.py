"""A prompt as runs of tokens, each with what was done for it: the data of the page's strip."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rag_pipeline.protocol import Usage
from rag_pipeline.types import PromptLayout

KINDS = ("exact_prefix", "reused", "recomputed", "fresh")
"""By the numbers that the engine's report uses."""


def segments_of(layout: PromptLayout, usage: Usage, report: Mapping[str, Any]) -> dict[str, Any]:
    """Runs that cover the prompt in order.

    Parameters
    ----------
    layout : PromptLayout
        Where the parts stand.
    usage : Usage
        Counts of each kind.
    report : mapping
        The engine's report of the fusion; empty where there is none.

    Returns
    -------
    dict
        ``resolution`` and ``runs``, each ``{kind, start, end, part}``. ``part`` is ``system``, the
        number of a chunk, or ``question``. Resolution ``token``: the engine named every row, each
        kind is exact. Resolution ``part``: it gave counts only, and a part whose tokens went different
        ways, or may have gone, has the kind ``mixed``.
    """
    rows = report.get("runs")
    exact = usage.exact_prefix_tokens
    if rows:
        named = [(KINDS[int(kind)], int(length)) for kind, length in rows]
        return {"resolution": "token", "runs": _cut(named, layout)}
    taken = usage.reused_tokens + usage.recomputed_tokens
    if not taken:
        # Only a prefix and fresh tokens: counts say everything.
        plain = [("exact_prefix", exact), ("fresh", usage.prompt_tokens - exact)]
        return {"resolution": "token", "runs": _cut(plain, layout)}
    runs = [("exact_prefix", exact)]
    edges = [layout.system_span, *layout.chunk_spans, layout.question_span]
    chunks = range(1, len(edges) - 1)
    behind = sum(max(0, edges[i].end - max(edges[i].start, exact)) for i in chunks)
    for number, span in enumerate(edges):
        length = span.end - max(span.start, exact)
        if length <= 0:
            continue
        if number not in chunks:
            kind = "fresh"
        elif taken == behind and not usage.recomputed_tokens:
            kind = "reused"
        else:
            kind = "mixed"
        runs.append((kind, length))
    return {"resolution": "part", "runs": _cut(runs, layout)}


def _cut(runs: list[tuple[str, int]], layout: PromptLayout) -> list[dict[str, Any]]:
    """Give runs their places and cut them where a part of the prompt ends."""
    parts: list[tuple[int, str | int]] = [(layout.system_span.end, "system")]
    parts += [(span.end, number) for number, span in enumerate(layout.chunk_spans, start=1)]
    parts.append((layout.question_span.end, "question"))
    out: list[dict[str, Any]] = []
    start, at = 0, 0
    for kind, length in runs:
        end = start + length
        while start < end:
            while at < len(parts) - 1 and parts[at][0] <= start:
                at += 1
            stop = min(end, parts[at][0]) if parts[at][0] > start else end
            out.append({"kind": kind, "start": start, "end": stop, "part": parts[at][1]})
            start = stop
    return out
