"""Plan of one position-causal attention call: made once per forward on the host, shared by all layers.

Row ``i`` of a request at absolute position ``p_i`` attends to keys ``0 .. p_i`` of that request, wherever the
rows lie: a library's ``causal=True`` aligns the last row with the last key and would let scattered rows see
future keys. The rows of a request are sorted by position and cut into blocks; a block needs keys only up to
its last position, so the keys behind it are never read.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class RowBlock:
    """Rows of one request computed together.

    Attributes
    ----------
    request : int
        Index of the request.
    row_lo, row_hi : int
        Half-open range of rows in the order sorted by position, counted over the whole batch.
    open_len : int
        Keys ``0 .. open_len - 1`` that every row of the block sees: no mask needed.
    kv_len : int
        One past the last key that any row of the block sees.
    is_run : bool
        Positions are ``open_len - 1, open_len, ...`` without a gap: the masked part is a plain triangle.
    """

    request: int
    row_lo: int
    row_hi: int
    open_len: int
    kv_len: int
    is_run: bool


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PositionCausalPlan:
    """What every layer needs to attend; made by :func:`plan_position_causal`.

    Attributes
    ----------
    kernel : str
        Name of the :class:`~rag_kernels.attention.AttentionKernel` that the rows are cut for.
    num_rows : int
        Rows of the query tensor, over all requests.
    row_starts : tuple of int
        Request ``b`` owns rows ``row_starts[b] .. row_starts[b + 1] - 1``.
    positions : Tensor
        int32 ``[num_rows]`` on the host, in the order of the query rows.
    order : Tensor or None
        int64 ``[num_rows]`` on the device: query row of each sorted row; None when rows come sorted.
    inverse : Tensor or None
        int64 ``[num_rows]`` on the device: sorted row of each query row.
    sorted_positions : Tensor
        int32 ``[num_rows]`` on the device, sorted within each request.
    sorted_on_host : Tensor
        The same on the host.
    slots : tuple of Tensor
        Per request int64 ``[kv_len]`` on the device; slot ``j`` holds position ``j``.
    blocks : tuple of RowBlock
        Rows cut for the kernel.
    num_q_heads, num_kv_heads, head_dim : int
        Per rank.
    """

    kernel: str
    num_rows: int
    row_starts: tuple[int, ...]
    positions: Tensor
    order: Tensor | None
    inverse: Tensor | None
    sorted_positions: Tensor
    sorted_on_host: Tensor
    slots: tuple[Tensor, ...]
    blocks: tuple[RowBlock, ...]
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    device: torch.device
    # What a kernel derives once and keeps for the other layers (masks, index lists).
    memo: dict[Any, Any] = field(default_factory=dict, repr=False)
