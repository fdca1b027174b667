"""Attention mass that the question puts on each key: the score of the query-aware policy."""

from __future__ import annotations

import torch
from torch import Tensor

from rag_kernels.attention.base import LogitRules
from rag_kernels.host_copy import to_device
from rag_kernels.native.selection import native_mass
from rag_kernels.paged import gather_kv

_NO_RULES = LogitRules()
_BLOCK_ELEMENTS = 8 << 20  # fp32 logits held at once: 32 MiB


def query_attention_mass(
    q_RNH: Tensor,
    k_pool: Tensor,
    slots: Tensor,
    q_pos: Tensor,
    kv_len: int,
    scale: float,
    rules: LogitRules = _NO_RULES,
) -> Tensor:
    """Softmax attention of every row, averaged over rows and heads.

    Parameters
    ----------
    q_RNH : Tensor
        ``[R, Hq, D]`` rotated queries of one request's question.
    k_pool : Tensor
        ``[num_slots, Hk, D]`` with every key of the request written.
    slots : Tensor
        Integer ``[>= kv_len]``; slot ``j`` holds the key of position ``j``.
    q_pos : Tensor
        Integer ``[R]``; row ``i`` attends to keys ``0 .. q_pos[i]``.
    kv_len : int
        Keys to score.
    scale : float
        Softmax scale.
    rules : LogitRules
        Window and cap of the layer. Attention sinks, where it has them, are not in the sum.

    Returns
    -------
    Tensor
        fp32 ``[kv_len]``; sums to 1 for R > 0. Under tensor parallelism average it over the ranks.
    """
    rows, q_heads, dim = q_RNH.shape
    mass = torch.zeros(kv_len, dtype=torch.float32, device=q_RNH.device)
    if rows == 0 or kv_len == 0:
        return mass
    native = None
    if rules == _NO_RULES:
        native = native_mass(q_RNH, k_pool, slots[:kv_len], q_pos, scale)
    if native is not None:
        return native
    kv_heads = k_pool.shape[1]
    group = q_heads // kv_heads
    keys = gather_kv(k_pool, slots[:kv_len]).transpose(0, 1).float()
    positions = to_device(q_pos, q_RNH.device, torch.int64)
    key_at = torch.arange(kv_len, device=q_RNH.device)
    packed = q_RNH.reshape(rows, kv_heads, group, dim).transpose(0, 1).float() * scale
    block = max(1, _BLOCK_ELEMENTS // (group * kv_len))
    for lo in range(0, rows, block):
        at = positions[lo : lo + block, None]
        hidden = key_at[None, :] > at
        if rules.sliding_window is not None:
            hidden |= key_at[None, :] <= at - rules.sliding_window
        hidden = hidden.repeat_interleave(group, dim=0)
        for head in range(kv_heads):
            logits = torch.mm(packed[head, lo : lo + block].reshape(-1, dim), keys[head].t())
            if rules.logit_cap:
                logits = logits.div_(rules.logit_cap).tanh_().mul_(rules.logit_cap)
            logits.masked_fill_(hidden, float("-inf"))
            mass += torch.softmax(logits, dim=-1).sum(dim=0)
    return mass / (rows * q_heads)
