"""Position-causal attention in torch operations on the CPU: short blocks of sorted rows against the keys they see.

For machines on which ``cpp`` cannot be built, and for what that one refuses.

Why not one masked call of torch's fused attention: with a mask it computes every key for every row, 1.8 times the
causal triangle, and on 16-bit types it multiplies at fp32 speed. Here the query heads that share a key head
are stacked into one matrix product, logits are fp32, and the product with V runs in bf16 where V is bf16 (twice
the fp32 rate on AVX512-BF16; the fused kernel rounds the probabilities alike). Keys behind a block's
last position are never read, and only the keys behind its first position need a mask.

Measured with ``rag_eval.benchmarks.kernels`` (AMD EPYC with AVX512-BF16, one thread, bf16, 9 query / 3 key heads of 64,
2,460 keys, median CPU time of 7 on a busy machine): 364 scattered rows take 17.7 ms against 23.9 ms in four masked
calls and 32.2 ms in one; all rows take 96.9 ms against 111.8 ms of torch's causal call. In fp32 19.8, 22.2, 30.8,
116.0 and 105.0 ms. Blocks of 32 to 64 rows measured alike, 16 and 128 slower.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rag_kernels.attention.base import AttentionCall, AttentionKernel
from rag_kernels.attention.mask import RequestBlocks
from rag_kernels.attention.plan import PositionCausalPlan, RowBlock


class CpuKernel(AttentionKernel):
    """Blocks of sorted rows as matrix products; see the module."""

    name = "cpu"
    block_rows = 48
    """Measured best (``rag_eval.benchmarks.kernels``)."""
    reads_masks = True
    reads_sinks = True

    def refuse_device(self, device: torch.device) -> str | None:
        """Refuse everything but the CPU."""
        return None if device.type == "cpu" else f"cannot run on {device}"

    def attend(self, call: AttentionCall) -> Tensor:
        """Compute the call."""
        return _attend(call)


def _attend(call: AttentionCall) -> Tensor:
    plan, k_pool, v_pool = call.plan, call.k_pool, call.v_pool
    kv_heads, dim = plan.num_kv_heads, plan.head_dim
    group = plan.num_q_heads // kv_heads
    q = call.sorted_q
    rows = plan.num_rows
    # [Hk, rows * group, D]: the query heads of one key head stand together, row by row.
    packed = (
        q.reshape(rows, kv_heads, group, dim).transpose(0, 1).reshape(kv_heads, rows * group, dim)
    )
    packed = (
        packed.float() * call.scale
    )  # never in place: with one key head this is a view of the caller's queries
    # bf16 products accumulate in fp32 and are fast; fp16 ones are emulated, so they are done in fp32.
    pv_dtype = torch.bfloat16 if v_pool.dtype == torch.bfloat16 else torch.float32
    out = torch.empty(packed.shape, dtype=pv_dtype)
    sinks = None if call.sinks is None else call.sinks.float().view(kv_heads, group)
    request = -1
    k_heads = v_heads = packed
    for block in plan.blocks:
        if block.request != request:
            request = block.request
            slots = plan.slots[request]
            k_heads = k_pool.index_select(0, slots).transpose(0, 1).float()
            v_heads = v_pool.index_select(0, slots).transpose(0, 1).to(pv_dtype)
        lo, hi = block.row_lo * group, block.row_hi * group
        blocks = None if call.mask is None else call.mask.requests[request]
        sparse = None if blocks is None else _sparse_keys(call, block, blocks)
        if sparse is not None:
            for head, (keys, bias) in enumerate(sparse):
                logits = torch.mm(packed[head, lo:hi], k_heads[head, keys].t())
                if call.logit_cap:
                    logits = logits.div_(call.logit_cap).tanh_().mul_(call.logit_cap)
                weights = _weights(logits.add_(bias), sinks, head).to(pv_dtype)
                torch.mm(weights, v_heads[head, keys], out=out[head, lo:hi])
            continue
        first, bias = _bias(plan, block, group, call.sliding_window)
        masked = slice(block.kv_len - first - bias.shape[1], None)
        for head in range(kv_heads):
            logits = torch.mm(packed[head, lo:hi], k_heads[head, first : block.kv_len].t())
            if call.logit_cap:
                logits = logits.div_(call.logit_cap).tanh_().mul_(call.logit_cap)
            if bias.shape[1]:
                logits[:, masked].add_(bias)
            weights = _weights(logits, sinks, head).to(pv_dtype)
            torch.mm(weights, v_heads[head, first : block.kv_len], out=out[head, lo:hi])
    rejoined = (
        out.view(kv_heads, rows, group, dim).transpose(0, 1).reshape(rows, plan.num_q_heads, dim)
    )
    return call.unsorted(rejoined.to(call.q_RNH.dtype))


def _weights(logits: Tensor, sinks: Tensor | None, head: int) -> Tensor:
    """Softmax of one key/value head, ``[rows * group, n]``; a sink ``[Hk, group]`` takes its share and is left out."""
    if sinks is None:
        return torch.softmax(logits, dim=-1)
    sink = sinks[head].repeat(logits.shape[0] // sinks.shape[1])[:, None]
    return torch.softmax(torch.cat([logits, sink], dim=-1), dim=-1)[:, :-1]


def _sparse_keys(
    call: AttentionCall, block: RowBlock, blocks: RequestBlocks
) -> list[tuple[Tensor, Tensor]] | None:
    """Keys to read and the additive mask over them, one pair per key/value head; None where nothing is left out.

    The keys ``[n]`` are those that some row of the block reads with some head of the group; the mask is
    ``[rows * group, n]``. Where a block of rows reads every key before its own, the dense path computes it: the same
    bits as without a mask.
    """
    plan = call.plan
    positions = plan.sorted_positions[block.row_lo : block.row_hi].long()
    allowed = blocks.rows(positions)
    own = (positions // blocks.key_block)[:, None]
    is_behind = torch.arange(allowed.shape[2])[None, :] > own
    if bool((allowed | is_behind).all()):
        return None
    kv_heads = plan.num_kv_heads
    group = plan.num_q_heads // kv_heads
    # [heads of the mask, 1 or group, rows, key blocks]: which of them share a key head
    each = allowed.shape[0] // kv_heads if allowed.shape[0] > 1 else 1
    parts = allowed.view(-1, each, *allowed.shape[1:])
    found = []
    for part in parts:
        read = part.any(dim=0).any(dim=0)
        keys = read.repeat_interleave(blocks.key_block)[: block.kv_len].nonzero().flatten()
        hidden = ~part[:, :, keys // blocks.key_block] | (keys[None, :] > positions[:, None])
        if call.sliding_window is not None:
            hidden |= keys[None, :] <= positions[:, None] - call.sliding_window
        # Row by row, the heads of the group behind each other, as the queries are packed.
        hidden = hidden.expand(group, -1, -1).transpose(0, 1).reshape(-1, keys.numel())
        found.append((keys, torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf"))))
    return found * kv_heads if len(found) == 1 else found


def _bias(
    plan: PositionCausalPlan, block: RowBlock, group: int, sliding_window: int | None
) -> tuple[int, Tensor]:
    """First key of the block and the additive mask of its last keys, ``[rows * group, masked keys]``."""
    first = 0 if sliding_window is None else max(0, block.open_len - sliding_window)
    # Every run of n rows has the same triangle; with a window only while it starts at the same distance.
    key = (
        ("run", block.row_hi - block.row_lo, block.open_len - first, sliding_window)
        if block.is_run and sliding_window is not None
        else ("run", block.row_hi - block.row_lo)
        if block.is_run
        else (block.row_lo, sliding_window)
    )
    bias = plan.memo.get(key)
    if bias is None:
        rows = plan.sorted_positions[block.row_lo : block.row_hi].long()[:, None]
        masked_from = block.open_len if sliding_window is None else first
        keys = torch.arange(masked_from, block.kv_len)[None, :]
        hidden = keys > rows
        if sliding_window is not None:
            hidden |= keys <= rows - sliding_window
        bias = (
            torch.zeros(hidden.shape)
            .masked_fill_(hidden, float("-inf"))
            .repeat_interleave(group, dim=0)
        )
        plan.memo[key] = bias
    return first, bias
