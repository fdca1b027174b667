"""Causal attention of new tokens behind cached ones, and batched decode, in plain torch on a CPU.

Measured before it was chosen (2-core AMD EPYC, 1 thread, bf16, 9 query and 3 KV heads of 64;
process CPU time in ms, best of 7; "stock" is SGLang 0.5.23's ``torch_native``):

===========================  =======  ========  =======  =============  ============
new tokens behind cached      stock   one mask   merged   blocks of 256   here (packed)
===========================  =======  ========  =======  =============  ============
64 behind 2,400               106.2      5.8       5.8        5.8           5.3
512 behind 2,400              144.4     51.4      47.4       47.2          46.6
1,200 behind 1,200            101.3     92.7      74.8       81.7          74.0
2,048 behind 256               96.8    162.2      94.9      101.4          93.8
1 behind 2,400                102.0      2.3       2.5        2.3           0.4
===========================  =======  ========  =======  =============  ============

"merged" is cached part without a mask, new part causal, joined by log-sum-exp: no faster, and 22-46%
of its bf16 results differ from stock in the last bit. Of the packed form none did in 386 of 400 random
calls and at most 1.1% in the other 14 (17 calls without packing): torch multiplies another number of
rows at once. Cold prefill and decode are the same calls as stock's and have its bits.

"packed" turns the query heads that share a KV head into rows of one matrix, so K and V are not
copied once per query head, which is what torch's ``enable_gqa`` does on a CPU.
"""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

__all__ = [
    "QUERY_BLOCK",
    "causal_mask",
    "decode_attention",
    "extend_attention",
    "packed_decode_attention",
    "tree_attention",
]

QUERY_BLOCK = 256
"""Queries per call behind a cached prefix. Each call reads keys only up to its own last query, so
smaller blocks waste less above the diagonal; torch tiles rows by 256 at most, so smaller ones also
lose tiles. 64, 128, 256 and 512 were measured; 256 was best wherever it differed."""


def causal_mask(
    query_positions: torch.Tensor,
    key_start: int,
    key_stop: int,
    *,
    window: int | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Additive mask: 0 where a query may look, ``-inf`` elsewhere.

    Parameters
    ----------
    query_positions : Tensor
        Absolute positions, ``[Q]``, integer.
    key_start, key_stop : int
        The keys are those at positions ``key_start .. key_stop - 1``.
    window : int or None
        Look back at most this many tokens, the query's own not counted; None for all.
    dtype : torch.dtype
        Dtype of the result; torch wants that of the query.

    Returns
    -------
    torch.Tensor
        ``[Q, key_stop - key_start]``.
    """
    keys_N = torch.arange(key_start, key_stop)[None, :]
    query_T = query_positions[:, None]
    hidden = keys_N > query_T
    if window is not None:
        hidden |= keys_N < query_T - window
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))


def _as_wide_as_keys(values: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Values with zeros behind them: torch's fused attention takes equal widths only, any other takes 6 to 28 times as long."""
    return torch.nn.functional.pad(values, (0, head_dim - values.shape[-1]))


def extend_attention(
    q_THD: torch.Tensor,
    k_NKD: torch.Tensor,
    v_NKE: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    """Attention of one request's new tokens over its cached and new keys; causal by position.

    Query ``i`` stands at position ``N - T + i``. The cost is that of ``T`` rows, whatever ``N`` is.

    Parameters
    ----------
    q_THD : Tensor
        Queries of the ``T`` new tokens, ``[T, H, D]``; ``H`` a multiple of ``K``.
    k_NKD, v_NKE : Tensor
        Keys ``[N, K, D]`` and values ``[N, K, E]`` of the whole request, new tokens last.
    scale : float
        Factor on the logits.
    window : int, optional
        As in :func:`causal_mask`.

    Returns
    -------
    torch.Tensor
        ``[T, H, E]``, dtype of ``q_THD``.
    """
    num_new, num_heads, head_dim = q_THD.shape
    num_keys, num_kv_heads, _ = k_NKD.shape
    if v_NKE.shape[2] < head_dim:
        wide = _as_wide_as_keys(v_NKE, head_dim)
        out = extend_attention(q_THD, k_NKD, wide, scale=scale, window=window)
        return out[..., : v_NKE.shape[2]]
    k_KND, v_KNE = k_NKD.transpose(0, 1), v_NKE.transpose(0, 1)
    reaches_all = window is None or num_keys <= window + 1
    if num_new == num_keys and reaches_all:
        # Nothing cached: torch's causal path skips the tiles above the diagonal (1.8x a mask).
        out_HTE = scaled_dot_product_attention(
            q_THD.transpose(0, 1)[None],
            k_KND[None],
            v_KNE[None],
            is_causal=True,
            scale=scale,
            enable_gqa=num_heads != num_kv_heads,
        )[0]
        return out_HTE.transpose(0, 1)

    group = num_heads // num_kv_heads
    prefix = num_keys - num_new
    out_THE = q_THD.new_empty(num_new, num_heads, v_NKE.shape[2])
    for start in range(0, num_new, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, num_new)
        rows = stop - start
        first = 0 if window is None else max(0, prefix + start - window)
        last = prefix + stop
        # [rows, K, G, D] -> [K, rows * G, D]: one matrix a KV head
        q_KRD = (
            q_THD[start:stop]
            .reshape(rows, num_kv_heads, group, head_dim)
            .permute(1, 0, 2, 3)
            .reshape(num_kv_heads, rows * group, head_dim)
        )
        mask_RN = None
        if rows > 1:
            positions = torch.arange(prefix + start, last).repeat_interleave(group)
            mask_RN = causal_mask(positions, first, last, window=window, dtype=q_THD.dtype)
        out_KRE = scaled_dot_product_attention(
            q_KRD[None],
            k_KND[None, :, first:last],
            v_KNE[None, :, first:last],
            attn_mask=mask_RN,
            scale=scale,
        )[0]
        out_THE[start:stop] = (
            out_KRE.view(num_kv_heads, rows, group, -1).permute(1, 0, 2, 3).flatten(1, 2)
        )
    return out_THE


def decode_attention(
    q_BHD: torch.Tensor,
    k_BNKD: torch.Tensor,
    v_BNKE: torch.Tensor,
    *,
    scale: float,
) -> torch.Tensor:
    """Attention of one new token for each of ``B`` requests of one length, in one call.

    Bit for bit what one call per request and ``enable_gqa`` give, without a copy of K and V for each
    query head: KV heads become batch entries, and the query heads of a group read the same memory.

    Parameters
    ----------
    q_BHD : Tensor
        One query a request, ``[B, H, D]``.
    k_BNKD, v_BNKE : Tensor
        Keys ``[B, N, K, D]`` and values ``[B, N, K, E]``.
    scale : float
        Factor on the logits.

    Returns
    -------
    torch.Tensor
        ``[B, H, E]``, dtype of ``q_BHD``.
    """
    batch, num_heads, head_dim = q_BHD.shape
    _, num_keys, num_kv_heads, _ = k_BNKD.shape
    if v_BNKE.shape[3] < head_dim:
        wide = _as_wide_as_keys(v_BNKE, head_dim)
        return decode_attention(q_BHD, k_BNKD, wide, scale=scale)[..., : v_BNKE.shape[3]]
    group = num_heads // num_kv_heads

    def per_kv_head(x_BNKX: torch.Tensor) -> torch.Tensor:
        rows = x_BNKX.permute(2, 0, 1, 3).reshape(num_kv_heads * batch, 1, num_keys, -1)
        return rows.expand(-1, group, -1, -1)

    q = q_BHD.reshape(batch, num_kv_heads, group, 1, head_dim).transpose(0, 1)
    out = scaled_dot_product_attention(
        q.reshape(num_kv_heads * batch, group, 1, head_dim),
        per_kv_head(k_BNKD),
        per_kv_head(v_BNKE),
        scale=scale,
    )
    return out.reshape(num_kv_heads, batch, group, -1).transpose(0, 1).reshape(batch, num_heads, -1)


def packed_decode_attention(
    q_BHD: torch.Tensor,
    k_BNKD: torch.Tensor,
    v_BNKE: torch.Tensor,
    *,
    scale: float,
    mask_BN: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of one new token for each of ``B`` requests of any length, in one call.

    The query heads of a group are rows of one matrix: 3 to 4 times faster than
    :func:`decode_attention` (2,400 keys: 0.7 against 2.9 ms; 8 requests: 8 against 22 ms), but the
    matrix product of three rows adds up in another order than that of one, so now and then a result
    differs in its last bit (65 of 431 requests had such an element), and in a tie a greedy token.

    Parameters
    ----------
    q_BHD : Tensor
        One query a request, ``[B, H, D]``.
    k_BNKD, v_BNKE : Tensor
        Keys ``[B, N, K, D]`` and values ``[B, N, K, E]``, padded to the longest request.
    scale : float
        Factor on the logits.
    mask_BN : Tensor, optional
        Additive, ``[B, N]``, dtype of the query, ``-inf`` on padding; None when all are full.

    Returns
    -------
    torch.Tensor
        ``[B, H, E]``, dtype of ``q_BHD``.
    """
    batch, num_heads, head_dim = q_BHD.shape
    num_kv_heads = k_BNKD.shape[2]
    if v_BNKE.shape[3] < head_dim:
        wide = _as_wide_as_keys(v_BNKE, head_dim)
        out = packed_decode_attention(q_BHD, k_BNKD, wide, scale=scale, mask_BN=mask_BN)
        return out[..., : v_BNKE.shape[3]]
    out_BKGE = scaled_dot_product_attention(
        q_BHD.reshape(batch, num_kv_heads, num_heads // num_kv_heads, head_dim),
        k_BNKD.transpose(1, 2),
        v_BNKE.transpose(1, 2),
        attn_mask=None if mask_BN is None else mask_BN[:, None, None, :],
        scale=scale,
    )
    return out_BKGE.reshape(batch, num_heads, -1)


def tree_attention(
    q_THD: torch.Tensor,
    k_NKD: torch.Tensor,
    v_NKE: torch.Tensor,
    tree_TT: torch.Tensor,
    *,
    scale: float,
) -> torch.Tensor:
    """Attention of a tree of drafted tokens: each sees every key before the tree, and in it what the tree says.

    Parameters
    ----------
    q_THD, k_NKD, v_NKE : Tensor
        As for :func:`extend_attention`; the last ``T`` keys are those of the tree.
    tree_TT : Tensor
        bool ``[T, T]``: where key ``j`` of the tree is query ``i`` or an ancestor of it.
    scale : float
        Factor on the logits.

    Returns
    -------
    torch.Tensor
        ``[T, H, E]``, dtype of ``q_THD``.
    """
    num_new, num_keys = q_THD.shape[0], k_NKD.shape[0]
    seen_TN = torch.ones(num_new, num_keys, dtype=torch.bool)
    seen_TN[:, num_keys - num_new :] = tree_TT
    out_HTE = scaled_dot_product_attention(
        q_THD.transpose(0, 1)[None],
        k_NKD.transpose(0, 1)[None],
        v_NKE.transpose(0, 1)[None],
        attn_mask=seen_TN,
        scale=scale,
        enable_gqa=q_THD.shape[1] != k_NKD.shape[1],
    )[0]
    return out_HTE.transpose(0, 1)
