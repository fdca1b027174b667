"""Attention of one layer over slices of its latent: a rank's part, the sum over ranks, and what it is compared with.

Every function returns the heads' values ``[B, T, H, V]`` before the output projection. That projection is linear, so the
sum over ranks may stand before it or behind it; an engine has one all-reduce behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from rag_kernels.latent.weights import LatentWeights, rank_slice


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentRows:
    """What attention of one layer is given; the rows that ask are the last ``T`` of ``S`` positions.

    Attributes
    ----------
    q_nope_BTHN, q_rope_BTHR : Tensor
        ``[B, T, H, N]`` and ``[B, T, H, R]``, queries without position, and with it (rotated).
    latent_BSD : Tensor
        ``[B, S, D]``, behind the norm, in the basis of the weights.
    k_rope_BSR : Tensor
        ``[B, S, R]``, the position part that all heads share (rotated).
    """

    q_nope_BTHN: Tensor
    q_rope_BTHR: Tensor
    latent_BSD: Tensor
    k_rope_BSR: Tensor


def unsliced_attention(rows: LatentRows, weights: LatentWeights, scale: float) -> Tensor:
    """Attention over the whole latent: what the model was trained with."""
    return rank_attention(rows, weights, scale, rank=0, ranks=1)


def rank_attention(
    rows: LatentRows,
    weights: LatentWeights,
    scale: float,
    *,
    rank: int,
    ranks: int,
    logit_scale: float = 1.0,
    heads: slice | None = None,
) -> Tensor:
    """One rank's part: all heads attend over its slice of the latent and the whole position part.

    Parameters
    ----------
    rows : LatentRows
        Of which the rank reads its own slice only.
    weights : LatentWeights
        Whole; of which it reads its own slice only.
    scale : float
        The model's softmax scale.
    rank, ranks : int
        Which slice of how many.
    logit_scale : float
        Factor of the slice's logits; of the position part's there is none.
    heads : slice, optional
        Heads that it computes; the others are zero. All when not given.

    Returns
    -------
    Tensor
        ``[B, T, H, V]``, to be summed over ranks.
    """
    own = rank_slice(weights.dim, rank, ranks)
    chosen = slice(None) if heads is None else heads
    latent = rows.latent_BSD[..., own]
    w_kc = weights.w_kc_HND[chosen, :, own].to(latent.dtype) * logit_scale
    w_vc = weights.w_vc_HDV[chosen, own].to(latent.dtype)
    # q . (W c) is (q W) . c: with whole sequences it is cheaper to expand keys than to widen queries.
    k_nope = torch.einsum("bsd,hnd->bhsn", latent, w_kc)
    values = torch.einsum("bsd,hdv->bhsv", latent, w_vc)
    k_rope = rows.k_rope_BSR[:, None].expand(-1, k_nope.shape[1], -1, -1)
    query = torch.cat([rows.q_nope_BTHN, rows.q_rope_BTHR], -1)[:, :, chosen].transpose(1, 2)
    found = _causal(query, torch.cat([k_nope, k_rope], -1), values, scale).transpose(1, 2)
    if heads is None:
        return found
    whole = found.new_zeros(*rows.q_nope_BTHN.shape[:3], found.shape[-1])
    whole[:, :, chosen] = found
    return whole


def tpla_attention(
    rows: LatentRows,
    weights: LatentWeights,
    scale: float,
    *,
    ranks: int,
    logit_scales: Sequence[float] | None = None,
) -> Tensor:
    """Sum over ranks of :func:`rank_attention`: each rank has a softmax of its own.

    Parameters
    ----------
    rows, weights, scale : LatentRows, LatentWeights, float
        As for :func:`rank_attention`.
    ranks : int
        Number of slices.
    logit_scales : sequence of float, optional
        One per rank; ones when not given, which is the least-squares choice where slices are uncorrelated.
    """
    scales = (1.0,) * ranks if logit_scales is None else tuple(logit_scales)
    parts = [
        rank_attention(rows, weights, scale, rank=rank, ranks=ranks, logit_scale=factor)
        for rank, factor in zip(range(ranks), scales, strict=True)
    ]
    return torch.stack(parts).sum(0)


def gla_attention(rows: LatentRows, weights: LatentWeights, scale: float, *, ranks: int) -> Tensor:
    """Grouped latent attention of the same weights: each rank computes its group of the heads on its slice and no other."""
    heads = weights.w_kc_HND.shape[0]
    edges = [heads * rank // ranks for rank in range(ranks + 1)]
    groups = [slice(*edges[rank : rank + 2]) for rank in range(ranks)]
    parts = [
        rank_attention(rows, weights, scale, rank=rank, ranks=ranks, heads=group)
        for rank, group in enumerate(groups)
    ]
    return torch.stack(parts).sum(0)


def gathered_attention(
    rows: LatentRows, weights: LatentWeights, scale: float, *, ranks: int
) -> Tensor:
    """Ranks sum their logits before the softmax: exact, and written out plainly; for tests."""
    slices = [rank_slice(weights.dim, rank, ranks) for rank in range(ranks)]
    logits = torch.einsum("bthr,bsr->bhts", rows.q_rope_BTHR, rows.k_rope_BSR)
    for own in slices:
        absorbed = torch.einsum("bthn,hnd->bthd", rows.q_nope_BTHN, weights.w_kc_HND[..., own])
        logits = logits + torch.einsum("bthd,bsd->bhts", absorbed, rows.latent_BSD[..., own])
    asking, seen = logits.shape[-2:]
    later = torch.ones(asking, seen, dtype=torch.bool).triu(seen - asking + 1)
    shares = (logits * scale).masked_fill(later, -torch.inf).softmax(-1)
    parts = []
    for own in slices:
        read = torch.einsum("bhts,bsd->bthd", shares, rows.latent_BSD[..., own])
        parts.append(torch.einsum("bthd,hdv->bthv", read, weights.w_vc_HDV[:, own]))
    return torch.stack(parts).sum(0)


def _causal(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    asking, seen = query.shape[-2], keys.shape[-2]
    if asking == seen:
        return scaled_dot_product_attention(query, keys, values, is_causal=True, scale=scale)
    allowed = torch.ones(asking, seen, dtype=torch.bool, device=query.device).tril(seen - asking)
    return scaled_dot_product_attention(query, keys, values, attn_mask=allowed, scale=scale)
