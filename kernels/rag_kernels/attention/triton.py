"""Position-causal attention in Triton: the portable GPU path, with sliding window, logit cap and block masks.

Requests without a block mask share one launch; each request with one has its own. Checked in Triton's interpreter
(fp32, fp16) and compiled for sm_90a; not run on a GPU here, so its speed is unmeasured.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import triton
from torch import Tensor

from rag_kernels.attention.base import AttentionCall, AttentionKernel
from rag_kernels.attention.mask import RequestBlocks
from rag_kernels.attention.tiles import TileBlocks, cut_tiles, list_blocks
from rag_kernels.attention.triton_kernel import position_causal_kernel

_KEYS_PER_STEP = 64
_FEWEST_ROWS = 16  # smallest side of a tile of tl.dot
_MOST_ROWS = 128  # packed rows of a tile


class TritonKernel(AttentionKernel):
    """The portable GPU kernel."""

    name = "triton"
    reads_masks = True

    def refuse_device(self, device: torch.device) -> str | None:
        """Refuse the CPU, unless Triton interprets."""
        if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            return "runs on the CPU only with TRITON_INTERPRET=1"
        return None

    def is_default_on(self, device: torch.device) -> bool:
        """Be chosen on CUDA only: nothing else was compiled for."""
        return str(device.type) == "cuda"

    def refuse(self, call: AttentionCall) -> str | None:
        """Refuse key blocks that are no tile."""
        for blocks in call.mask.requests if call.mask is not None else ():
            if blocks is not None and not _is_tile(blocks.key_block):
                return f"key blocks of {blocks.key_block}; give a power of two from 16 on"
        return super().refuse(call)

    def attend(self, call: AttentionCall) -> Tensor:
        """Compute the call."""
        q = call.sorted_q
        if q.stride(-1) != 1:
            q = q.contiguous()
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        masks: tuple[RequestBlocks | None, ...] = (
            (None,) * len(call.plan.slots) if call.mask is None else call.mask.requests
        )
        plain = tuple(request for request, blocks in enumerate(masks) if blocks is None)
        if plain:
            _launch(call, q, out, plain, None)
        for request, blocks in enumerate(masks):
            if blocks is not None:
                _launch(call, q, out, (request,), blocks)
        return call.unsorted(out)


def _is_tile(size: int) -> bool:
    return size >= _FEWEST_ROWS and size & (size - 1) == 0


def _launch(
    call: AttentionCall,
    q: Tensor,
    out: Tensor,
    requests: tuple[int, ...],
    blocks: RequestBlocks | None,
) -> None:
    plan, k_pool, v_pool = call.plan, call.k_pool, call.v_pool
    group = plan.num_q_heads // plan.num_kv_heads
    most = max(
        (plan.row_starts[request + 1] - plan.row_starts[request] for request in requests), default=0
    )
    if most == 0:
        return
    packed = min(_MOST_ROWS, max(_FEWEST_ROWS, triton.next_power_of_2(most * group)))
    packed = max(packed, triton.next_power_of_2(group))
    tiles = cut_tiles(plan, requests, packed // group)
    mask: dict[str, Any] = _no_mask(call)
    if blocks is not None:
        mask = _mask_arguments(call, blocks, list_blocks(plan, tiles, blocks))
    position_causal_kernel[(tiles.count, plan.num_kv_heads)](
        q_ptr=q,
        k_ptr=k_pool,
        v_ptr=v_pool,
        out_ptr=out,
        positions_ptr=plan.sorted_positions,
        slots_ptr=tiles.slots,
        tiles_ptr=tiles.table,
        scale=call.scale,
        logit_cap=call.logit_cap or 1.0,
        window=call.sliding_window or 0,
        num_tiles=tiles.count,
        q_row=q.stride(0),
        q_head=q.stride(1),
        k_slot=k_pool.stride(0),
        k_head=k_pool.stride(1),
        v_slot=v_pool.stride(0),
        v_head=v_pool.stride(1),
        out_row=out.stride(0),
        out_head=out.stride(1),
        GROUP=group,
        DIM=plan.head_dim,
        DIM_PAD=max(16, triton.next_power_of_2(plan.head_dim)),
        ROWS=packed,
        KEYS=min(_KEYS_PER_STEP, blocks.key_block) if blocks is not None else _KEYS_PER_STEP,
        HAS_CAP=bool(call.logit_cap),
        HAS_WINDOW=call.sliding_window is not None,
        num_warps=8 if packed >= 128 else 4,
        num_stages=2,
        **mask,
    )


def _no_mask(call: AttentionCall) -> dict[str, Any]:
    unused = call.plan.sorted_positions  # a pointer is wanted; it is not read
    return {
        "allowed_ptr": unused,
        "block_count_ptr": unused,
        "block_index_ptr": unused,
        "mask_kv_head": 0,
        "mask_group": 0,
        "mask_row": 0,
        "max_blocks": 0,
        "first_query_block": 0,
        "query_block": 1,
        "KEY_BLOCK": 0,
    }


def _mask_arguments(
    call: AttentionCall, blocks: RequestBlocks, lists: TileBlocks
) -> dict[str, Any]:
    plan, allowed = call.plan, blocks.allowed.contiguous()
    heads, head = allowed.shape[0], allowed.stride(0)
    per_query_head = heads == plan.num_q_heads and heads > 1
    group = plan.num_q_heads // plan.num_kv_heads
    return {
        "allowed_ptr": allowed.view(torch.uint8),
        "block_count_ptr": lists.count,
        "block_index_ptr": lists.index,
        "mask_kv_head": 0 if heads == 1 else head * group if per_query_head else head,
        "mask_group": head if per_query_head else 0,
        "mask_row": allowed.stride(1),
        "max_blocks": lists.index.shape[2],
        "first_query_block": blocks.first_query_block,
        "query_block": blocks.query_block,
        "KEY_BLOCK": blocks.key_block,
    }
