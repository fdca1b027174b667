"""Causal attention on a CPU with the softmax written out: for caps and sinks, which torch's fused attention has not."""

from __future__ import annotations

import torch
from torch import Tensor

from rag_kernels.attention.torch_sdpa import QUERY_BLOCK, causal_mask


def written_out_attention(
    q_THD: Tensor,
    k_NKD: Tensor,
    v_NKE: Tensor,
    *,
    scale: float,
    window: int | None = None,
    logit_cap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of one request's last tokens over all its keys; logits and softmax are fp32.

    Query ``i`` stands at position ``N - T + i``.

    Parameters
    ----------
    q_THD : Tensor
        Queries of the ``T`` last tokens, ``[T, H, D]``; ``H`` a multiple of ``K``.
    k_NKD, v_NKE : Tensor
        Keys ``[N, K, D]`` and values ``[N, K, E]`` of the whole request.
    scale : float
        Factor on the logits.
    window : int, optional
        As in :func:`~rag_kernels.attention.torch_sdpa.causal_mask`.
    logit_cap : float, optional
        Logits become ``cap * tanh(logit / cap)``.
    sinks : Tensor, optional
        ``[H]``: logit per query head of a key without a value that every query reads too, never capped.

    Returns
    -------
    Tensor
        ``[T, H, E]``, dtype of ``q_THD``.
    """
    rows, heads, dim = q_THD.shape
    num_keys, kv_heads, _ = k_NKD.shape
    group, prefix = heads // kv_heads, num_keys - rows
    out_THE = q_THD.new_empty(rows, heads, v_NKE.shape[2])
    for start in range(0, rows, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, rows)
        first = 0 if window is None else max(0, prefix + start - window)
        last = prefix + stop
        q = q_THD[start:stop].reshape(-1, kv_heads, group, dim).permute(1, 2, 0, 3).float() * scale
        k, v = k_NKD[first:last].float(), v_NKE[first:last].float()
        logits = torch.einsum("kgtd,nkd->kgtn", q, k)
        if logit_cap is not None:
            logits = logits.div_(logit_cap).tanh_().mul_(logit_cap)
        positions = torch.arange(prefix + start, last)
        logits += causal_mask(positions, first, last, window=window, dtype=torch.float32)
        if sinks is not None:
            sink = sinks.float().view(kv_heads, group, 1, 1).expand(-1, -1, stop - start, 1)
            logits = torch.cat([logits, sink], dim=-1)
        weights = logits.softmax(dim=-1)[..., : last - first]
        out = torch.einsum("kgtn,nke->tkge", weights, v)
        out_THE[start:stop] = out.flatten(1, 2).to(q_THD.dtype)
    return out_THE
