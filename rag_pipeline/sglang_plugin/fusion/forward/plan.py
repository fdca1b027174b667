"""Which rows of which request are computed in a forward pass: host-side arithmetic, no engine.

A prompt is ``[exact prefix][fresh or reused ...][question]``. Behind the exact prefix every token is either *reused*
(its KV is loaded) or *fresh*. All fresh rows and the last row of a piece are computed; a policy names the
reused rows that are computed too. With chunked prefill a prompt comes in pieces; policies that need a signal
choose in the last piece, when the question is there, over the whole prompt: the rows may then lie in front of
the piece, in slots that the request owns. Fresh rows behind them are computed once more, as they would be in one piece.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from chunk_cache import Match
from chunk_cache.policies import Policy, ReuseLayout, ScoredPolicy
from rag_pipeline.sglang_plugin.fusion.request.attempt import ReuseCost


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
    cost: ReuseCost | None = None,
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
        End of what is exact, loaded tokens in their original place included, see :func:`exact_end`.
    qkv_share : float
        See :func:`chunk_cache.policies.qkv_share`.
    scoring_rows : int, optional
        Fresh rows of a probing pass.
    cost : ReuseCost, optional
        What was measured.
    """
    behind = [(max(start, exact_len), end) for start, end in spans if end > exact_len]
    return ReuseLayout(
        num_layers=num_layers,
        prompt_len=prompt_len,
        exact_len=max(radix_len, exact_len),
        spans=tuple(behind),
        num_scoring_rows=scoring_rows,
        qkv_share=qkv_share,
        prefill_s=None if cost is None else cost.row_s * sum(end - start for start, end in behind),
        load_s=None if cost is None else cost.load_s,
        # Every check is a pass from layer 0 here, and charged as one.
        probes_restart=True,
    )


def stands_in_place(
    prompt: npt.NDArray[Any],
    run: Match,
    *,
    prefix_len: int,
    chunk_ids: npt.NDArray[Any],
    base_position: int,
) -> bool:
    """Whether a run's KV is what plain prefill of the prompt computes at its place.

    The KV of a token depends on every token before it. So a run is exact only if its chunk was computed right behind
    the prompt's prefix, stands there again, and the prompt equals the chunk from its first token to the run's end:
    also in front of the run, however it was clipped.

    Parameters
    ----------
    prompt : ndarray
        Token ids ``[N]``.
    run : Match
        Of a chunk that was computed behind the prefix ``prompt[:prefix_len]`` and nothing else.
    prefix_len : int
        Tokens of that prefix.
    chunk_ids : ndarray
        Token ids of the whole chunk.
    base_position : int
        Where its first token stood when it was computed.
    """
    first = run.prompt_start - run.chunk_offset
    if not first == base_position == prefix_len:
        return False
    return bool(np.array_equal(chunk_ids[: run.chunk_end], prompt[first : run.prompt_end]))


def exact_end(runs: Sequence[tuple[int, int, bool]], radix_len: int) -> int:
    """End of the exact part: radix prefix, then loaded runs that are exact, up to the first that is not.

    Parameters
    ----------
    runs : sequence of (int, int, bool)
        ``(start, end, is_exact)`` of loaded positions, rising, see :func:`stands_in_place`. What stands between
        exact runs is computed behind them, so it is exact too.
    radix_len : int
        Tokens found in the tree; the answer when no run is exact.
    """
    end = radix_len
    for _, stop, is_exact in runs:
        if not is_exact:
            break
        end = stop
    return end


def fresh_positions(spans: Sequence[tuple[int, int]], piece: Piece) -> Tensor:
    """Positions of the piece that are not loaded, and its last one; int64, rising."""
    keep = torch.ones(piece.end - piece.start, dtype=torch.bool)
    for start, end in spans:
        lo, hi = max(start, piece.start), min(end, piece.end)
        if lo < hi:
            keep[lo - piece.start : hi - piece.start] = False
    keep[-1] = True
    return keep.nonzero().flatten() + piece.start


def outdated_positions(spans: Sequence[tuple[int, int]], start: int, piece: Piece) -> Tensor:
    """Positions in ``[start, piece.start)`` that are not loaded; int64, rising.

    Earlier pieces computed them over loaded KV. They are out of date once a token from ``start`` on is computed anew.
    """
    keep = torch.zeros(piece.start, dtype=torch.bool)
    keep[start:] = True
    for lo, hi in spans:
        keep[lo:hi] = False
    return keep.nonzero().flatten()


def early_rows(policy: Policy, layout: ReuseLayout, piece: Piece) -> Tensor | None:
    """Reused rows of the piece that are known before any layer; None where a signal must be computed.

    In a piece that is not the last one a policy with a signal computes none.
    """
    if not isinstance(policy, ScoredPolicy):
        chosen = checked_choice(policy.select(layout), layout)
        return chosen[(chosen >= piece.start) & (chosen < piece.end)]
    if not piece.is_last:
        return torch.empty(0, dtype=torch.int64)
    return None if policy.needs_signal(layout) else checked_choice(policy.select(layout), layout)


def checked_choice(chosen: Tensor, layout: ReuseLayout) -> Tensor:
    """What a policy chose, perhaps one of another distribution, on the host.

    Raises
    ------
    ValueError
        It is not rising int64 positions of reused tokens.
    """
    chosen = chosen.to("cpu")
    is_whole = chosen.dtype == torch.int64 and chosen.dim() == 1
    if not is_whole or not bool((chosen[1:] > chosen[:-1]).all()):
        raise ValueError("a policy chose something else than rising int64 positions")
    if not bool(torch.isin(chosen, layout.reused_positions(), assume_unique=True).all()):
        raise ValueError("a policy chose positions that are not reused")
    return chosen


def union_rows(fresh: Tensor, chosen: Tensor) -> Tensor:
    """Sorted union of two sets of positions, int64."""
    return torch.unique(torch.cat([fresh, chosen.to("cpu", torch.int64)]))


def skipped_rows(spans: Sequence[tuple[int, int]], start: int, end: int) -> int:
    """Count loaded tokens within ``[start, end)``: rows that a scheduler need not charge."""
    return sum(max(0, min(hi, end) - max(lo, start)) for lo, hi in spans)


def ordinary_passes(
    ranges: Sequence[tuple[int, int]], tails: Sequence[int], limit: int, *, fills_last: bool = True
) -> list[list[tuple[int, int, int]]]:
    """Cut the rows of a batch into passes of a bounded size.

    Parameters
    ----------
    ranges : sequence of (int, int)
        Positions to compute, by request, none empty.
    tails : sequence of int
        Last positions of each request whose output is wanted, at least 1: they stay in the last pass.
    limit : int
        Most rows of a pass; more only where the tails alone are more.
    fills_last : bool
        Whether the last pass may hold more than the tails.

    Returns
    -------
    list of list of (int, int, int)
        Passes in order, each ``(request, start, end)`` by request. The last one holds every request up to its end.
    """
    bodies = [max(0, end - start - tail) for (start, end), tail in zip(ranges, tails, strict=True)]
    wanted = sum(end - start for start, end in ranges) - sum(bodies)
    early = max(0, sum(bodies) - (max(0, limit - wanted) if fills_last else 0))
    passes: list[list[tuple[int, int, int]]] = [[]]
    reached, room = [start for start, _ in ranges], limit
    for index, body in enumerate(bodies):
        left = min(body, early)
        early -= left
        while left:
            if not room:
                passes.append([])
                room = limit
            count = min(left, room)
            passes[-1].append((index, reached[index], reached[index] + count))
            reached[index] += count
            left, room = left - count, room - count
    last = [(index, reached[index], end) for index, (_, end) in enumerate(ranges)]
    return [*passes, last] if passes[0] else [last]


def reach(limit: int, start: int, end: int, computed: Callable[[int], int]) -> int:
    """Furthest end of a piece from ``start`` that computes at most ``limit`` rows.

    ``computed(e)`` counts the rows of a piece that ends at ``e``; it must not fall.
    """
    return start + bisect.bisect_right(range(start + 1, end + 1), limit, key=computed)
