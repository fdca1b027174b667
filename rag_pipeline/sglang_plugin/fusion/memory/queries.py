"""Queries that score: taken out of the layers of a forward, fused and ordinary alike, as they pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rag_pipeline.sglang_plugin.fusion.request.memory_work import MemoryWork

TAP_KEY = "rag_memory_tap"


@dataclasses.dataclass(frozen=True, slots=True)
class QueryTap:
    """Which rows of a batch are wanted, by whom; travels in ``ForwardBatch.model_specific_states``."""

    parts: tuple[tuple[MemoryWork, slice], ...]

    def take(self, layer: Any, q: Tensor) -> None:
        """Copy what is wanted of a layer's rotated queries ``[R, Q * D]`` or ``[R, Q, D]``."""
        rows = q.reshape(q.shape[0], layer.tp_q_head_num, layer.qk_head_dim)
        for work, at in self.parts:
            work.note_queries(int(layer.layer_id), rows[at].clone())


def wanted_rows(work: MemoryWork | None, positions: Tensor, first: int) -> slice | None:
    """Rows of a pass that score, of a request whose rows stand at rising positions; None for none.

    Parameters
    ----------
    work : MemoryWork or None
        Of the request.
    positions : Tensor
        int64, on the host.
    first : int
        Row of the pass where the request begins.
    """
    target = None if work is None else work.target
    if target is None or target.first_query >= target.last_query:
        return None
    edges = torch.tensor([target.first_query, target.last_query])
    low, high = torch.searchsorted(positions, edges).tolist()
    return slice(first + low, first + high) if low < high else None


def add_tap(batch: Any, rows: Sequence[tuple[MemoryWork | None, Tensor]]) -> None:
    """Hang a tap on a batch where some row of it scores.

    Parameters
    ----------
    batch : ForwardBatch
        Its ``model_specific_states`` are replaced.
    rows : sequence of (MemoryWork or None, Tensor)
        Of each request in order: its work, and the positions of its rows.
    """
    parts, first = [], 0
    for work, positions in rows:
        at = wanted_rows(work, positions, first)
        if work is not None and at is not None:
            parts.append((work, at))
        first += int(positions.numel())
    if parts:
        batch.model_specific_states = {
            **(batch.model_specific_states or {}),
            TAP_KEY: QueryTap(tuple(parts)),
        }


def find_tap(batch: Any) -> QueryTap | None:
    """Return the tap of a batch, or None."""
    states = batch.model_specific_states
    found = states.get(TAP_KEY) if states else None
    return found if isinstance(found, QueryTap) else None
