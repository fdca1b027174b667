"""Make the plan of an attention call: rows sorted by position and cut into blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rag_kernels.attention.choice import choose_kernel
from rag_kernels.attention.plan import PositionCausalPlan, RowBlock
from rag_kernels.host_copy import to_device


def plan_position_causal(
    q_positions: Sequence[Tensor],
    slots: Sequence[Tensor],
    *,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    device: torch.device | str | None = None,
    kernel: str = "auto",
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
    kernel : str
        Name in :data:`rag_kernels.ATTENTION_KERNELS`. ``auto``: on the CPU ``cpp`` where it can be
        built, else ``cpu``; on CUDA ``flashinfer`` where it is installed, else ``triton``; else ``reference``.
    block_rows : int, optional
        Most rows of a block. By default what the kernel likes.

    Raises
    ------
    ValueError
        Counts that do not agree, a position outside ``0 .. kv_len - 1``, or a kernel that is unknown or does not run there.
    """
    if len(q_positions) != len(slots):
        raise ValueError(
            f"{len(q_positions)} position lists for {len(slots)} slot lists; give one of each per request."
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
    chosen = choose_kernel(kernel, target)
    limit = block_rows if block_rows is not None else chosen.block_rows
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
        blocks.extend(cut_rows(pos, starts[-1], request, limit))
        starts.append(starts[-1] + pos.numel())
    empty = torch.empty(0, dtype=torch.int64)
    order = torch.cat(orders) if orders else empty
    sorted_positions = torch.cat(sorted_lists) if sorted_lists else empty
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel())
    positions = torch.empty_like(sorted_positions)
    positions[order] = sorted_positions
    return PositionCausalPlan(
        kernel=chosen.name,
        num_rows=starts[-1],
        row_starts=tuple(starts),
        positions=positions.to(torch.int32),
        order=None if is_sorted else to_device(order, target),
        inverse=None if is_sorted else to_device(inverse, target),
        sorted_positions=to_device(sorted_positions, target, torch.int32),
        sorted_on_host=sorted_positions.to(torch.int32),
        slots=tuple(to_device(s, target, torch.int64) for s in slots),
        blocks=tuple(blocks),
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        device=target,
    )


def cut_rows(pos: Tensor, first_row: int, request: int, limit: int) -> list[RowBlock]:
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
