"""The arguments that FlashInfer's paged prefill is planned with: rows in runs, and rows that lie scattered.

Rows of a request that stand one behind the other are a *run*: for them FlashInfer's ``causal=True``, which aligns the
last row with the last key, is exact, so they may go to its fastest kernels. All other rows need the mask by position.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from rag_kernels.attention.mask import BlockMask, RequestBlocks
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
        int32 ``[pseudo-requests + 1]`` on the host, page-locked beside a GPU: planning does not wait for the device.
    kv_indices : Tensor
        int32 ``[sum of kv_len]`` on the device.
    last_page_len : Tensor
        int32 ``[pseudo-requests]`` ones, on the host.
    q_pos : Tensor
        int32 ``[rows]`` on the device: where the key of each row stands among the pages of its pseudo-request.
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


@dataclass(frozen=True, slots=True, eq=False)
class _Group:
    """Rows ``low .. high - 1`` in sorted order, and the slots of the keys that the last of them reads."""

    low: int
    high: int
    pages: Tensor


def group_rows(plan: PositionCausalPlan, mask: BlockMask | None = None) -> RowGroups:
    """Sort the rows of a plan into runs and others.

    With a mask the keys of a block of rows are those of the blocks that it keeps, and of its own block up to its last
    row: paged attention does not ask whether pages stand one behind the other. So a run is still causal at the end, and
    the others are masked by where their own key stands among the kept ones.

    Parameters
    ----------
    plan : PositionCausalPlan
        Of the pass.
    mask : BlockMask, optional
        One that :func:`refuse_mask` does not refuse.
    """
    limit = max((block.row_hi - block.row_lo for block in plan.blocks), default=1)
    runs: list[_Group] = []
    scattered: list[_Group] = []
    own_at = plan.sorted_on_host.to(torch.int64, copy=True)
    for request, slots in enumerate(plan.slots):
        low, high = plan.row_starts[request], plan.row_starts[request + 1]
        at = plan.sorted_on_host[low:high].long()
        blocks = None if mask is None else mask.requests[request]
        if blocks is None:
            _sort_rows(at, low, slots, limit, runs, scattered)
            continue
        kept = _kept_keys(at, blocks)
        index = torch.cat([keys for _, _, keys in kept]) if kept else at
        pages = slots.index_select(0, to_device(index, plan.device))
        for (first, end, keys), part in zip(
            kept, pages.split([keys.numel() for _, _, keys in kept]), strict=True
        ):
            places = at[first:end] - at[end - 1] + keys.numel() - 1
            own_at[low + first : low + end] = places
            _sort_rows(places, low + first, part, limit, runs, scattered)
    return RowGroups(
        runs=_layout(plan, runs, own_at, mask is not None),
        scattered=_layout(plan, scattered, own_at, mask is not None),
    )


def refuse_mask(mask: BlockMask) -> str | None:
    """Reason why a mask cannot be planned on the host, or None."""
    for blocks in mask.requests:
        if blocks is None:
            continue
        if blocks.on_host is None:
            return "reads no block mask that queries decide"
        if blocks.on_host.shape[0] != 1 or blocks.query_block != blocks.key_block:
            return "reads block masks of one pattern for all heads and square blocks only"
    return None


def _kept_keys(at: Tensor, blocks: RequestBlocks) -> list[tuple[int, int, Tensor]]:
    """Per block of rows: its rows, and the positions of the keys that the last of them reads."""
    assert blocks.on_host is not None
    size = blocks.key_block
    found, counts = torch.unique_consecutive(at // size, return_counts=True)
    made, first = [], 0
    for block, count in zip(found.tolist(), counts.tolist(), strict=True):
        end = first + count
        before = blocks.on_host[0, block - blocks.first_query_block, :block].nonzero()
        keys = (before * size + torch.arange(size)).flatten()
        own = torch.arange(block * size, int(at[end - 1]) + 1)
        made.append((first, end, torch.cat([keys, own])))
        first = end
    return made


def _sort_rows(
    at: Tensor,
    first: int,
    slots: Tensor,
    limit: int,
    runs: list[_Group],
    scattered: list[_Group],
) -> None:
    """Cut rows whose own keys are the slots at ``at``, rising, each of which reads all slots up to its own."""
    breaks = ((at[1:] - at[:-1] != 1).nonzero().flatten() + 1).tolist()
    ends = (at + 1).tolist()

    def cut(low: int, high: int) -> None:
        for begin in range(low, high, limit):
            stop = min(begin + limit, high)
            scattered.append(_Group(first + begin, first + stop, slots[: ends[stop - 1]]))

    open_from = 0
    for start, end in itertools.pairwise([0, *breaks, at.numel()]):
        if end - start >= LEAST_RUN:
            cut(open_from, start)
            runs.append(_Group(first + start, first + end, slots[: ends[end - 1]]))
            open_from = end
    cut(open_from, at.numel())


def _layout(
    plan: PositionCausalPlan, groups: list[_Group], own_at: Tensor, is_masked: bool
) -> PagedLayout | None:
    """Arguments for some groups of rows; ``own_at`` is where each sorted row's own key stands among its keys."""
    if not groups:
        return None
    counts = torch.tensor([[group.high - group.low, group.pages.numel()] for group in groups])
    indptr = torch.nn.functional.pad(counts.cumsum(0), (0, 0, 1, 0)).to(torch.int32).unbind(1)
    is_all = int(indptr[0][-1]) == plan.num_rows
    picked = torch.cat([torch.arange(group.low, group.high) for group in groups])
    index = None if is_all else to_device(picked, plan.device)
    if is_masked:
        positions = to_device(own_at[picked], plan.device, torch.int32)
    else:
        positions = plan.sorted_positions
        positions = positions if index is None else positions.index_select(0, index)
    return PagedLayout(
        rows=index,
        qo_indptr=_pinned(indptr[0], plan.device),
        kv_indptr=_pinned(indptr[1], plan.device),
        kv_indices=torch.cat([group.pages for group in groups]).to(torch.int32),
        last_page_len=_pinned(torch.ones(len(groups), dtype=torch.int32), plan.device),
        q_pos=positions,
    )


def _pinned(table: Tensor, device: torch.device) -> Tensor:
    # FlashInfer reads it on the host and copies it; from page-locked memory the copy makes nobody wait.
    table = table.contiguous()
    return table.pin_memory() if device.type == "cuda" else table
