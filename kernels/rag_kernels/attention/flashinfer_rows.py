"""The arguments that FlashInfer's paged prefill is planned with: rows in runs, and rows that lie scattered.

Rows of a request that stand one behind the other are a *run*: for them FlashInfer's ``causal=True``, which aligns the
last row with the last key, is exact, so they may go to its fastest kernels. All other rows need the mask by position.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from rag_kernels.attention.plan import PositionCausalPlan
from rag_kernels.host_copy import to_device

LEAST_RUN = 64
"""Rows of a run that is worth a pseudo-request of its own: half a tile of the kernels."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PagedLayout:
    """Arguments of a wrapper's ``plan``: host index pointers, device page lists, page size 1.

    Attributes
    ----------
    rows : Tensor or None
        int64 ``[rows]`` on the device: which rows, in sorted order; None for all.
    qo_indptr, kv_indptr : Tensor
        int32 ``[pseudo-requests + 1]`` on the host, so that planning does not wait for the device.
    kv_indices : Tensor
        int32 ``[sum of kv_len]`` on the device.
    last_page_len : Tensor
        int32 ``[pseudo-requests]`` ones, on the host.
    q_pos : Tensor
        int32 ``[rows]`` on the device.
    """

    rows: Tensor | None
    qo_indptr: Tensor
    kv_indptr: Tensor
    kv_indices: Tensor
    last_page_len: Tensor
    q_pos: Tensor


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RowGroups:
    """The rows of a plan by the kernel that they need; each row is in one of the two.

    Attributes
    ----------
    runs : PagedLayout or None
        A pseudo-request per run of at least :data:`LEAST_RUN` rows, keys cut at its last position.
    scattered : PagedLayout or None
        Pseudo-requests of at most as many rows as the plan's blocks have.
    """

    runs: PagedLayout | None
    scattered: PagedLayout | None


def group_rows(plan: PositionCausalPlan) -> RowGroups:
    """Sort the rows of a plan into runs and others."""
    limit = max((block.row_hi - block.row_lo for block in plan.blocks), default=1)
    runs: list[tuple[int, int, int]] = []
    scattered: list[tuple[int, int, int]] = []
    positions = plan.positions.to(torch.int64)
    ends: list[int] = []
    for request in range(len(plan.slots)):
        low, high = plan.row_starts[request], plan.row_starts[request + 1]
        at = positions[low:high].sort().values
        breaks = ((at[1:] - at[:-1] != 1).nonzero().flatten() + 1).tolist()
        edges = [0, *breaks, high - low]
        open_from = 0
        for start, end in itertools.pairwise(edges):
            if end - start >= LEAST_RUN:
                scattered += _cut(request, low + open_from, low + start, limit)
                runs.append((request, low + start, low + end))
                open_from = end
        scattered += _cut(request, low + open_from, high, limit)
        ends += (at + 1).tolist()
    return RowGroups(
        runs=_layout(plan, runs, ends),
        scattered=_layout(plan, scattered, ends),
    )


def _cut(request: int, low: int, high: int, limit: int) -> list[tuple[int, int, int]]:
    return [(request, at, min(at + limit, high)) for at in range(low, high, limit)]


def _layout(
    plan: PositionCausalPlan, groups: list[tuple[int, int, int]], ends: list[int]
) -> PagedLayout | None:
    """Arguments for some ranges of rows; ``ends`` are the keys that each sorted row sees."""
    if not groups:
        return None
    rows, keys, pages, picked = [0], [0], [], []
    for request, low, high in groups:
        kv_len = ends[high - 1]
        rows.append(rows[-1] + high - low)
        keys.append(keys[-1] + kv_len)
        pages.append(plan.slots[request][:kv_len])
        picked.append(torch.arange(low, high))
    index = None if rows[-1] == plan.num_rows else to_device(torch.cat(picked), plan.device)
    positions = plan.sorted_positions
    return PagedLayout(
        rows=index,
        qo_indptr=torch.tensor(rows, dtype=torch.int32),
        kv_indptr=torch.tensor(keys, dtype=torch.int32),
        kv_indices=torch.cat(pages).to(torch.int32),
        last_page_len=torch.ones(len(groups), dtype=torch.int32),
        q_pos=positions if index is None else positions.index_select(0, index),
    )
