"""Tiles of packed rows for device kernels, and the key blocks that each tile has to read; nothing waits for the device.

Shape suffixes: K key/value heads, T tiles, B key blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rag_kernels.attention.mask import RequestBlocks
from rag_kernels.attention.plan import PositionCausalPlan
from rag_kernels.host_copy import to_device


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Tiles:
    """Tiles of some requests of a plan, those with the most keys first, so that the last ones to start are short.

    Attributes
    ----------
    table : Tensor
        int64 ``[3, T]`` on the device: first row in sorted order, end of the rows, first slot of the request.
    slots : Tensor
        int64, the slots of all requests one behind the other.
    """

    table: Tensor
    slots: Tensor

    @property
    def count(self) -> int:
        """Tiles."""
        return int(self.table.shape[1])


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TileBlocks:
    """Key blocks that any row of a tile may read; a superset where a tile's rows skip query blocks.

    Attributes
    ----------
    count : Tensor
        int32 ``[K, T]``.
    index : Tensor
        int32 ``[K, T, B]``: the first ``count`` entries of a tile, ascending; what stands behind them has no meaning.
    """

    count: Tensor
    index: Tensor


def cut_tiles(plan: PositionCausalPlan, requests: tuple[int, ...], tile_rows: int) -> Tiles:
    """Cut the rows of some requests into tiles of at most ``tile_rows``; made once per plan.

    Parameters
    ----------
    plan : PositionCausalPlan
        Of the pass.
    requests : tuple of int
        Those whose rows are wanted.
    tile_rows : int
        Query rows of a tile, heads not counted.
    """
    key = ("tiles", requests, tile_rows)
    found: Tiles | None = plan.memo.get(key)
    if found is not None:
        return found
    starts = [0]
    for slots in plan.slots:
        starts.append(starts[-1] + slots.numel())
    wanted = set(requests)
    cut = [
        (-block.kv_len, low, min(low + tile_rows, block.row_hi), starts[block.request])
        for block in plan.blocks
        if block.request in wanted
        for low in range(block.row_lo, block.row_hi, tile_rows)
    ]
    cut.sort()
    table = torch.tensor([tile[1:] for tile in cut], dtype=torch.int64).reshape(-1, 3).t()
    slots = plan.memo.get("all_slots")
    if slots is None:
        slots = plan.memo["all_slots"] = torch.cat(plan.slots)
    made = Tiles(table=to_device(table.contiguous(), plan.device), slots=slots)
    plan.memo[key] = made
    return made


def list_blocks(plan: PositionCausalPlan, tiles: Tiles, blocks: RequestBlocks) -> TileBlocks:
    """List the key blocks of each tile of one request, on the device.

    Parameters
    ----------
    plan : PositionCausalPlan
        Of the pass.
    tiles : Tiles
        Of that request alone.
    blocks : RequestBlocks
        What its rows may read.
    """
    first = plan.sorted_positions[tiles.table[0]].long()
    last = plan.sorted_positions[tiles.table[1] - 1].long()
    allowed = blocks.allowed
    summed = torch.nn.functional.pad(allowed.to(torch.int32).cumsum(1), (0, 0, 1, 0))
    low = first // blocks.query_block - blocks.first_query_block
    high = last // blocks.query_block - blocks.first_query_block
    union_HTB = summed[:, high + 1] > summed[:, low]
    if union_HTB.shape[0] == plan.num_q_heads:
        union_HTB = union_HTB.unflatten(0, (plan.num_kv_heads, -1)).any(1)
    block_at = torch.arange(allowed.shape[2], device=allowed.device)
    own_first, own_last = (first // blocks.key_block)[:, None], (last // blocks.key_block)[:, None]
    union_KTB = (
        ((union_HTB | (block_at >= own_first)) & (block_at <= own_last))
        .expand(plan.num_kv_heads, -1, -1)
        .contiguous()
    )
    # Each wanted block goes to the place of its rank; all others share one place behind the end.
    place = torch.where(union_KTB, union_KTB.cumsum(-1) - 1, allowed.shape[2])
    index = torch.zeros(
        *union_KTB.shape[:2], allowed.shape[2] + 1, dtype=torch.int32, device=allowed.device
    )
    index.scatter_(-1, place, block_at.to(torch.int32).expand_as(place))
    return TileBlocks(count=union_KTB.sum(-1, dtype=torch.int32), index=index)
