"""How far a layer's keys change when the context is cut: what budgets of layers are made from (arXiv 2509.17396)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from rag_eval.command import Progress, no_progress
from rag_eval.errors import EvalError
from rag_eval.retention.model import LayerCache, LayerRows, ShownModel, joined

SINKS = 128
WINDOW = 4096
GROUP = 100
"""Tokens whose keys are compared as one vector."""
_BLOCKS = 4
"""Least number of windows in a sample: a shorter sample has smaller windows."""
_FULL_BLOCK = 1024
"""Rows of a pass over the whole context, so that memory stays bounded."""


def least_tokens(sinks: int = SINKS) -> int:
    """Shortest sample whose windows reach behind the sinks."""
    return _BLOCKS * max(2, sinks)


def window_of(tokens: int) -> int:
    """Window for a sample of so many tokens: the published one, or a quarter of a short sample."""
    return min(WINDOW, tokens // _BLOCKS)


def key_sensitivity(
    model: ShownModel,
    ids: Sequence[int],
    *,
    sinks: int = SINKS,
    window: int | None = None,
    progress: Progress = no_progress,
) -> list[float]:
    """Compare every layer's keys with the full context and with a cut one.

    With the cut one a token sees the first ``sinks`` tokens, its own window up to itself, and the second half of the
    window before. Keys are rotated for their true positions.

    Parameters
    ----------
    model : ShownModel
        Which computes.
    ids : sequence of int
        A long text.
    sinks : int
        First tokens that all see.
    window : int, optional
        Tokens of a window; :func:`window_of` by default.
    progress : callable
        Told of each window.

    Returns
    -------
    list of float
        Per layer the mean cosine, over heads and groups of 100 tokens; 1 where nothing changes.

    Raises
    ------
    EvalError
        A text too short for windows behind the sinks.
    """
    window = window_of(len(ids)) if window is None else window
    if window < max(2, sinks) or len(ids) < 2 * window:
        raise EvalError(
            f"{len(ids)} tokens with windows of {window} are too short to cut the context behind {sinks} first tokens; "
            f"give {least_tokens(sinks)} tokens or more"
        )
    full: list[LayerCache] = []
    for start in range(0, len(ids), _FULL_BLOCK):
        full = joined(full, rows_at(model, ids, start, start + _FULL_BLOCK, full))
    cosines: list[Tensor] = []
    first: list[LayerCache] = []
    before: list[LayerCache] = []
    for start in range(0, len(ids), window):
        progress(f"window {start // window + 1} of {-(-len(ids) // window)}")
        rows = rows_at(model, ids, start, start + window, joined(first, before))
        cosines.append(_cosines(full, rows, start))
        if not first:
            first = [one.part(0, sinks) for one in rows]
        before = [one.part(max(window // 2, sinks - start), window) for one in rows]
    return [float(value) for value in torch.cat(cosines, 1).mean(1)]


def rows_at(
    model: ShownModel, ids: Sequence[int], start: int, end: int, caches: Sequence[LayerCache]
) -> list[LayerCache]:
    """Keys and values of some tokens of a text, computed behind caches."""
    rows: list[LayerRows] = model.forward(ids[start:end], start, caches).layers
    return [LayerCache.of_rows(one, start) for one in rows]


def _cosines(full: Sequence[LayerCache], cut: Sequence[LayerCache], start: int) -> Tensor:
    """Cosines of one window: ``[layers, groups * heads]``, whole groups only unless there is none."""
    found = []
    for whole, one in zip(full, cut, strict=True):
        heads, tokens, _ = one.k.shape
        a = whole.k[:, start : start + tokens].float()
        b = one.k.float()
        step = min(GROUP, tokens)
        groups = tokens // step
        a, b = (x[:, : groups * step].reshape(heads * groups, -1) for x in (a, b))
        found.append(cosine_similarity(a, b, dim=1))
    return torch.stack(found)
