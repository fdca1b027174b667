"""Which rows of which request are computed in a forward pass: host-side arithmetic, no engine.

A prompt is ``[exact prefix][fresh or reused ...][question]``. Behind the exact prefix every token is either *reused*
(its KV is loaded) or *fresh*. All fresh rows and the last row of a piece are computed; a policy names the
reused rows that are computed too. With chunked prefill a prompt comes in pieces; policies that need a signal
choose in the last piece, when the question is there, over the whole prompt: the rows may then lie in front of
the piece, in slots that the request owns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from chunk_cache.policies import Policy, ReuseLayout


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """Positions ``[start, end)`` of one request that one forward extends.

    ``is_last`` says that nothing of the prompt remains behind ``end``.
    """

    start: int
    end: int
    is_last: bool


def make_layout(
    spans: Sequence[tuple[int, int]],
    *,
    num_layers: int,
    prompt_len: int,
    radix_len: int,
    exact_len: int,
    qkv_share: float,
    scoring_rows: int | None = None,
) -> ReuseLayout:
    """Layout of a whole prompt as a policy sees it.

    Parameters
    ----------
    spans : sequence of (int, int)
        Loaded positions, rising, disjoint, behind ``radix_len``.
    num_layers, prompt_len : int
        Layers of the model; tokens of the prompt.
    radix_len : int
        Tokens whose KV the radix tree holds.
    exact_len : int
        ``radix_len`` plus loaded tokens that follow it in their original place, see :func:`exact_end`.
    qkv_share : float
        See :func:`chunk_cache.policies.qkv_share`.
    scoring_rows : int, optional
        Fresh rows of a probing pass.
    """
    behind = [(max(start, exact_len), end) for start, end in spans if end > exact_len]
    return ReuseLayout(
        num_layers=num_layers,
        prompt_len=prompt_len,
        exact_len=max(radix_len, exact_len),
        spans=tuple(behind),
        num_scoring_rows=scoring_rows,
        qkv_share=qkv_share,
        # Every check is a pass from layer 0 here, and charged as one.
        probes_restart=True,
    )


def exact_end(spans: Sequence[tuple[int, int, int]], radix_len: int) -> int:
    """End of the exact part: radix prefix, then loaded runs in their original place without a gap.

    Parameters
    ----------
    spans : sequence of (int, int, int)
        ``(start, end, delta)`` with ``delta`` the positions by which the run was moved. What stands before the
        first one is exact: found in the tree or computed now. A run with ``delta == 0`` behind it was
        computed behind just these tokens (its context names the prefix, and the chunk's own tokens before
        the run are the prompt's).
    radix_len : int
        Tokens found in the tree; the answer when no run is exact.
    """
    if not spans:
        return radix_len
    end = first = spans[0][0]
    for start, stop, delta in spans:
        if start != end or delta != 0:
            break
        end = stop
    return end if end > first else radix_len


def fresh_positions(spans: Sequence[tuple[int, int]], piece: Piece) -> Tensor:
    """Positions of the piece that are not loaded, and its last one; int64, rising."""
    keep = torch.ones(piece.end - piece.start, dtype=torch.bool)
    for start, end in spans:
        lo, hi = max(start, piece.start), min(end, piece.end)
        if lo < hi:
            keep[lo - piece.start : hi - piece.start] = False
    keep[-1] = True
    return keep.nonzero().flatten() + piece.start


def early_rows(policy: Policy, layout: ReuseLayout, piece: Piece) -> Tensor | None:
    """Reused rows of the piece that are known before any layer; None where a signal must be computed.

    In a piece that is not the last one a policy with a signal computes none.
    """
    if policy.signal == "none" or not policy.needs_signal(layout):
        chosen = policy.select(layout)
        if policy.signal != "none" and piece.is_last:
            return chosen
        if policy.signal != "none":
            return chosen.new_empty(0)
        return chosen[(chosen >= piece.start) & (chosen < piece.end)]
    return None if piece.is_last else torch.empty(0, dtype=torch.int64)


def union_rows(fresh: Tensor, chosen: Tensor) -> Tensor:
    """Sorted union of two sets of positions, int64."""
    return torch.unique(torch.cat([fresh, chosen.to("cpu", torch.int64)]))


def skipped_rows(spans: Sequence[tuple[int, int]], start: int, end: int) -> int:
    """Count loaded tokens within ``[start, end)``: rows that a scheduler need not charge."""
    return sum(max(0, min(hi, end) - max(lo, start)) for lo, hi in spans)
