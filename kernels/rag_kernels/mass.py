"""Attention mass that the question puts on each key: the score of the query-aware policy."""

from __future__ import annotations

import torch
from torch import Tensor

from rag_kernels.paged import gather_kv

_BLOCK_ELEMENTS = 8 << 20  # fp32 logits held at once: 32 MiB


def query_attention_mass(
    q_RNH: Tensor, k_pool: Tensor, slots: Tensor, q_pos: Tensor, kv_len: int, scale: float
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

    Returns
    -------
    Tensor
        fp32 ``[kv_len]``; sums to 1 for R > 0. Under tensor parallelism average it over the ranks.
    """
    rows, q_heads, dim = q_RNH.shape
    mass = torch.zeros(kv_len, dtype=torch.float32, device=q_RNH.device)
    if rows == 0 or kv_len == 0:
        return mass
    kv_heads = k_pool.shape[1]
    group = q_heads // kv_heads
    k_t = gather_kv(k_pool, slots[:kv_len]).permute(1, 2, 0).float()
    key_at = torch.arange(kv_len, device=q_RNH.device)
    positions = q_pos.to(q_RNH.device)
    block = max(1, _BLOCK_ELEMENTS // (q_heads * kv_len))
    for lo in range(0, rows, block):
        q = q_RNH[lo : lo + block]
        n = q.shape[0]
        packed = (
            q.float()
            .view(n, kv_heads, group, dim)
            .permute(1, 2, 0, 3)
            .reshape(kv_heads, group * n, dim)
        )
        logits = torch.bmm(packed * scale, k_t).view(q_heads, n, kv_len)
        future = key_at[None, :] > positions[lo : lo + n, None]
        logits.masked_fill_(future, float("-inf"))
        mass += torch.softmax(logits, dim=-1).sum(dim=(0, 1))
    return mass / (rows * q_heads)
