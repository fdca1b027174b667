"""How the rows of a request are cut for SALE: which keys each block of rows reads anyway, and which are looked at.

A block of rows always reads the first block of keys, its own keys and at least ``local_window`` keys in front of it.
The keys between are candidates; they end at a whole number of segments, so that neighbouring blocks of rows share them
and are computed together. All of it follows from absolute positions: pieces of a prompt agree.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rag_kernels.host_copy import to_device


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RowGroup:
    """Blocks of rows with the same candidates.

    Attributes
    ----------
    num_candidates : int
        Keys ``0 .. num_candidates - 1`` may be left out, but for the first block.
    end : int
        One past the last position of a row of the group.
    blocks : Tensor
        int64 ``[B]`` on the device: the query blocks.
    rows, positions : Tensor
        int64 ``[B, W]`` on the device: sorted rows of each and where they stand; a block with fewer rows repeats its
        last.
    counts : Tensor
        int64 ``[B]`` on the device: rows of each block; what is repeated behind them counts for nothing.
    """

    num_candidates: int
    end: int
    blocks: Tensor
    rows: Tensor
    positions: Tensor
    counts: Tensor


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RequestLayout:
    """Rows of one request.

    Attributes
    ----------
    first_block, num_blocks : int
        Query blocks from the first row to the last.
    num_keys : int
        One past the last position.
    num_dense : int
        The first query blocks that read everything.
    groups : tuple of RowGroup
        The others, by rising position; at least one.
    """

    first_block: int
    num_blocks: int
    num_keys: int
    num_dense: int
    groups: tuple[RowGroup, ...]


def lay_out_rows(
    positions: Tensor,
    first_row: int,
    device: torch.device,
    *,
    block_q: int,
    block_k: int,
    local_window: int,
    segment: int,
    min_tokens: int,
) -> RequestLayout | None:
    """Cut the rows of a request.

    Parameters
    ----------
    positions : Tensor
        Integer ``[R]`` on the host, rising.
    first_row : int
        Index of the first of them among the sorted rows of the pass.
    device : torch.device
        Where the index lists go.
    block_q, block_k, local_window, segment, min_tokens : int
        See :class:`~rag_kernels.sparse.sale.method.SaleConfig`.

    Returns
    -------
    RequestLayout or None
        None where every row reads everything.
    """
    if not positions.numel():
        return None
    found, counts = torch.unique_consecutive(positions.long() // block_q, return_counts=True)
    starts = (counts.cumsum(0) - counts).tolist()
    by_candidates: dict[int, list[tuple[int, int, int]]] = {}
    last_dense = -1
    for block, start, count in zip(found.tolist(), starts, counts.tolist(), strict=True):
        candidates = max(0, block * block_q - local_window) // segment * segment
        if block * block_q < min_tokens or candidates <= block_k:
            last_dense = block
        else:
            by_candidates.setdefault(candidates, []).append((block, start, count))
    if not by_candidates:
        return None
    groups = []
    for candidates, members in by_candidates.items():
        width = max(count for _, _, count in members)
        rows = torch.tensor(
            [[start + min(i, count - 1) for i in range(width)] for _, start, count in members]
        )
        groups.append(
            RowGroup(
                num_candidates=candidates,
                end=int(positions[rows[-1, -1]]) + 1,
                blocks=to_device(torch.tensor([block for block, _, _ in members]), device),
                rows=to_device(rows + first_row, device),
                positions=to_device(positions[rows], device, torch.int64),
                counts=to_device(torch.tensor([count for _, _, count in members]), device),
            )
        )
    first = int(found[0])
    return RequestLayout(
        first_block=first,
        num_blocks=int(found[-1]) - first + 1,
        num_keys=int(positions[-1]) + 1,
        num_dense=max(0, last_dense - first + 1),
        groups=tuple(groups),
    )
