"""Plan of one position-causal attention call: made once per forward on the host, shared by all layers.

Row ``i`` of a request at absolute position ``p_i`` attends to keys ``0 .. p_i`` of that request, wherever the
rows lie: a library's ``causal=True`` aligns the last row with the last key and would let scattered rows see
future keys. The rows of a request are sorted by position and cut into blocks; a block needs keys only up to
its last position, so the keys behind it are never read.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

AttentionPath = Literal["auto", "cpu", "flashinfer", "triton", "reference"]
_PATHS = ("auto", "cpu", "flashinfer", "triton", "reference")


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
    path : str
        ``cpu``, ``flashinfer``, ``triton`` or ``reference``.
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
    slots : tuple of Tensor
        Per request int64 ``[kv_len]`` on the device; slot ``j`` holds position ``j``.
    blocks : tuple of RowBlock
        Rows cut for the path.
    num_q_heads, num_kv_heads, head_dim : int
        Per rank.
    """

    path: str
    num_rows: int
    row_starts: tuple[int, ...]
    positions: Tensor
    order: Tensor | None
    inverse: Tensor | None
    sorted_positions: Tensor
    slots: tuple[Tensor, ...]
    blocks: tuple[RowBlock, ...]
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    device: torch.device
    # What a path derives once and keeps for the other layers (masks, index lists).
    memo: dict[Any, Any] = field(default_factory=dict, repr=False)


def plan_position_causal(
    q_positions: Sequence[Tensor],
    slots: Sequence[Tensor],
    *,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    device: torch.device | str | None = None,
    path: AttentionPath = "auto",
    block_rows: int | None = None,
) -> PositionCausalPlan:
    """Plan attention of arbitrary rows, causal by absolute position.

    Parameters
    ----------
    q_positions : sequence of Tensor
        Per request integer ``[R_b]`` on the host: the absolute position of each query row, in the order in which
        the rows stand in the query tensor. Any order; an empty tensor is a request without rows.
    slots : sequence of Tensor
        Per request integer ``[kv_len_b]``; slot ``j`` holds the key of position ``j``. ``kv_len_b`` must exceed
        the largest position.
    num_q_heads, num_kv_heads, head_dim : int
        Per rank; query heads a multiple of key/value heads.
    device : torch.device or str, optional
        Where the pool is; by default where the slots are.
    path : {"auto", "cpu", "flashinfer", "triton", "reference"}
        ``auto``: ``cpu`` on the CPU; on CUDA ``flashinfer`` where it is installed, else ``triton``; else
        ``reference``.
    block_rows : int, optional
        Most rows of a block. By default chosen by the path.

    Raises
    ------
    ValueError
        Counts that do not agree, a position outside ``0 .. kv_len - 1``, or an unknown path.
    """
    if len(q_positions) != len(slots):
        raise ValueError(
            f"{len(q_positions)} position lists for {len(slots)} slot lists; give one of each a request."
        )
    if num_kv_heads < 1 or num_q_heads % num_kv_heads:
        raise ValueError(
            f"{num_q_heads} query heads for {num_kv_heads} key/value heads; the first must be a multiple."
        )
    target = (
        torch.device(device)
        if device is not None
        else (slots[0].device if slots else torch.device("cpu"))
    )
    chosen = choose_path(path, target)
    limit = block_rows if block_rows is not None else _default_block_rows(chosen)
    if limit < 1:
        raise ValueError(f"block_rows is {block_rows}; it must be at least 1.")

    starts, orders, sorted_lists, blocks = [0], [], [], []
    is_sorted = True
    for request, (raw, slot) in enumerate(zip(q_positions, slots, strict=True)):
        pos = raw.detach().to("cpu", torch.int64).flatten()
        if pos.numel() and (int(pos.min()) < 0 or int(pos.max()) >= slot.numel()):
            raise ValueError(
                f"request {request}: positions {int(pos.min())}..{int(pos.max())} for {slot.numel()} keys; "
                "every row needs its own key in the pool."
            )
        if bool((pos[1:] < pos[:-1]).any()):
            is_sorted = False
            pos, order = torch.sort(pos, stable=True)
        else:
            order = torch.arange(pos.numel())
        orders.append(order + starts[-1])
        sorted_lists.append(pos)
        blocks.extend(cut_rows(pos, starts[-1], request, limit, chosen))
        starts.append(starts[-1] + pos.numel())
    empty = torch.empty(0, dtype=torch.int64)
    order = torch.cat(orders) if orders else empty
    sorted_positions = torch.cat(sorted_lists) if sorted_lists else empty
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel())
    positions = torch.empty_like(sorted_positions)
    positions[order] = sorted_positions
    return PositionCausalPlan(
        path=chosen,
        num_rows=starts[-1],
        row_starts=tuple(starts),
        positions=positions.to(torch.int32),
        order=None if is_sorted else order.to(target),
        inverse=None if is_sorted else inverse.to(target),
        sorted_positions=sorted_positions.to(target, torch.int32),
        slots=tuple(s.to(target, torch.int64) for s in slots),
        blocks=tuple(blocks),
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        device=target,
    )


def choose_path(path: str, device: torch.device) -> str:
    """Return the path that ``auto`` stands for on a device; refuse a path that the device cannot run."""
    if path not in _PATHS:
        raise ValueError(
            f"attention path {path!r} is not known; choose one of {', '.join(_PATHS)}."
        )
    if path == "auto":
        if device.type == "cpu":
            return "cpu"
        if device.type == "cuda":
            from rag_kernels.attention_flashinfer import flashinfer_available

            return "flashinfer" if flashinfer_available() else "triton"
        return "reference"
    if path == "cpu" and device.type != "cpu":
        raise ValueError(f"attention path 'cpu' cannot run on {device}; use 'auto'.")
    if path == "flashinfer" and device.type != "cuda":
        raise ValueError(
            f"attention path 'flashinfer' needs a CUDA device, not {device}; use 'auto'."
        )
    if path == "triton" and device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            "attention path 'triton' runs on the CPU only with TRITON_INTERPRET=1; use 'auto'."
        )
    return path


def _default_block_rows(path: str) -> int:
    # 128 rows fill one query tile of the GPU kernels; 48 measured best on the CPU (rag_eval.benchmarks.kernels).
    return 48 if path == "cpu" else 128


def cut_rows(pos: Tensor, first_row: int, request: int, limit: int, path: str) -> list[RowBlock]:
    """Cut one request's sorted rows into blocks of at most ``limit`` rows."""
    blocks = []
    for lo in range(0, pos.numel(), limit):
        part = pos[lo : lo + limit]
        first, last = int(part[0]), int(part[-1])
        blocks.append(
            RowBlock(
                request=request,
                row_lo=first_row + lo,
                row_hi=first_row + lo + part.numel(),
                open_len=first + 1,
                kv_len=last + 1,
                is_run=bool((part[1:] - part[:-1] == 1).all()),
            )
        )
    return blocks
