"""From a grouped-query layer to its latent form: virtual heads per frequency, and one latent for all that has no position.

Keys of all heads at one frequency are complex numbers that RoPE turns alike, so any complex combination of heads
commutes with RoPE. Per frequency the combination is chosen by principal components of the keys, weighted by the
energy of the queries that read them and need to know where. The first components keep their position. The others are
read as if they stood at the distances that a head's attention reaches, by the mean rotation over these, and share a
latent with the values; the latent keeps what matters most for logits and outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rag_pipeline.conversion.layers import LatentLayer
from rag_pipeline.conversion.source import LayerWeights, SourceShape
from rag_pipeline.conversion.statistics import LayerStatistics

_LEAST = 1e-6
"""Smallest eigenvalue that is inverted, relative to the largest."""


def as_real(maps: Tensor) -> Tensor:
    """Real matrix of complex maps per frequency.

    Parameters
    ----------
    maps : Tensor
        Complex ``(F, rows, columns)``: one matrix over heads per frequency.

    Returns
    -------
    Tensor
        ``(rows * 2F, columns * 2F)``, over heads that hold real parts before imaginary ones.
    """
    count, rows, columns = maps.shape
    out = torch.zeros(rows, 2, count, columns, 2, count, dtype=maps.real.dtype)
    at = torch.arange(count)
    for row, column, part in (
        (0, 0, maps.real),
        (0, 1, -maps.imag),
        (1, 0, maps.imag),
        (1, 1, maps.real),
    ):
        out[:, row, at, :, column, at] = part
    return out.reshape(rows * 2 * count, columns * 2 * count)


def virtual_heads(
    statistics: LayerStatistics, shape: SourceShape, mean_HF: Tensor
) -> tuple[Tensor, Tensor]:
    """Find virtual heads, the most important first.

    Parameters
    ----------
    statistics, shape : LayerStatistics, SourceShape
        Of the original.
    mean_HF : Tensor
        Mean rotation of each query head, complex: a query that reads one distance only needs no position.

    Returns
    -------
    tuple of Tensor
        Complex ``(F, K, K)``: from heads to virtual heads, and back.
    """
    heads, half = shape.kv_heads, shape.head_dim // 2
    width = shape.kv_width
    keys = (statistics.kv[:width, :width] / statistics.tokens).view(heads, 2, half, heads, 2, half)
    moments = torch.diagonal(keys, dim1=2, dim2=5)  # (K, 2, K, 2, F)
    covariance = torch.complex(
        moments[:, 0, :, 0] + moments[:, 1, :, 1], moments[:, 1, :, 0] - moments[:, 0, :, 1]
    ).permute(2, 0, 1)
    queries = torch.diagonal(statistics.q_HEE, dim1=1, dim2=2) / statistics.tokens
    unknown = (1 - mean_HF.abs() ** 2).clamp(min=_LEAST)
    energy = queries.view(heads, -1, 2, half).sum(2) * unknown.view(heads, -1, half)
    energy = energy.sum(1).T.sqrt()  # (F, K)
    energy = energy.clamp(min=max(float(energy.max()) * _LEAST, torch.finfo(energy.dtype).tiny))
    weighted = energy[:, :, None] * covariance * energy[:, None, :]
    basis = torch.linalg.eigh(weighted).eigenvectors.flip(-1)
    return basis.mH * energy[:, None, :], basis / energy[:, :, None]


def roots(metric: Tensor) -> tuple[Tensor, Tensor]:
    """Square root of a symmetric matrix that is not negative, and its inverse."""
    values, vectors = torch.linalg.eigh(metric)
    most = float(values.max())
    values = values.clamp(min=0) + (_LEAST * most if most > 0 else 1.0)
    return (vectors * values.sqrt()) @ vectors.T, (vectors * values.rsqrt()) @ vectors.T


def factorise(
    layer: LayerWeights,
    statistics: LayerStatistics,
    shape: SourceShape,
    *,
    rope_heads: int,
    latent: int,
) -> tuple[LatentLayer, float]:
    """Find the latent form of a layer.

    Parameters
    ----------
    layer : LayerWeights
        The original.
    statistics : LayerStatistics
        Of the layer's own inputs.
    shape : SourceShape
        Of the original.
    rope_heads : int
        Virtual heads that keep their position, 0 to ``kv_heads``; a stock checkpoint holds one.
    latent : int
        Numbers of the latent.

    Returns
    -------
    tuple
        The latent form, and the share of the weighted energy that the latent lost, 0 to 1.
    """
    head, heads, width = shape.head_dim, shape.heads, shape.kv_width
    group, rope = heads // shape.kv_heads, rope_heads * shape.head_dim
    kv = statistics.kv / statistics.tokens
    queries = statistics.q_HEE / statistics.tokens
    q, k, v, o = (x.double() for x in (layer.q, layer.k, layer.v, layer.o))
    q = q.view(heads, head, shape.hidden)

    mean = statistics.mean_rotations(shape.frequencies)
    there, back = virtual_heads(statistics, shape, mean)
    to_virtual = as_real(there)  # (K E, K E): keys
    # What a head's query becomes at each virtual head: the conjugate of the way back.
    read = back.repeat_interleave(group, 1)  # (F, H, K)
    read[:, :, rope_heads:] *= mean.T[:, :, None]
    query_maps = torch.stack([as_real(read[:, [number]].mH) for number in range(heads)])

    positioned, rest = to_virtual[:rope], to_virtual[rope:]
    inputs = torch.block_diag(rest, torch.eye(width, dtype=torch.float64))
    covariance = inputs @ kv @ inputs.T
    metric = error_metric(query_maps[:, rope:], queries, o, kv[width:, width:], shape)
    root, inverse = roots(metric)
    values, vectors = torch.linalg.eigh(root @ covariance @ root)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)[:, :latent]
    down, up = vectors.T @ root, inverse @ vectors
    size = (torch.trace(down @ covariance @ down.T) / latent).sqrt().clamp(min=1e-30)
    down, up = down / size, up * size  # of mean square 1

    scale = ((head + rope) / head) ** 0.5
    split = len(rest)
    found = LatentLayer(
        q_HED=q * scale,
        q_rope_HRD=query_maps[:, :rope] @ q * scale,
        latent_CD=down @ torch.cat([rest @ k, v]),
        k_rope_RD=positioned @ k,
        k_up_HEC=query_maps[:, rope:].mT @ up[:split],
        v_up_HEC=up[split:].view(shape.kv_heads, head, latent).repeat_interleave(group, 0),
        o=o,
    )
    lost = float(values[latent:].sum() / values.sum().clamp(min=1e-300))
    return LatentLayer.of({name: x.float() for name, x in found.tensors().items()}), lost


def error_metric(
    query_maps: Tensor, queries: Tensor, o: Tensor, values: Tensor, shape: SourceShape
) -> Tensor:
    """Weigh errors of keys without a position and of values by what they do to a layer's output.

    Parameters
    ----------
    query_maps : Tensor
        ``(H, N, E)``: from a head's query to what reads the N keys without a position.
    queries : Tensor
        ``(H, E, E)``: mean products of queries.
    o, values : Tensor
        Output projection ``(D, H E)``, and mean products of values ``(K E, K E)``.
    shape : SourceShape
        Of the original.

    Returns
    -------
    Tensor
        ``(N + K E, N + K E)``: an error's square is its expected effect, logits to first order.
    """
    head, group = shape.head_dim, shape.heads // shape.kv_heads
    keys = torch.zeros(query_maps.shape[1], query_maps.shape[1], dtype=torch.float64)
    outputs = torch.zeros(shape.kv_width, shape.kv_width, dtype=torch.float64)
    for number, (maps, products) in enumerate(zip(query_maps, queries, strict=True)):
        at = slice(number // group * head, (number // group + 1) * head)
        effect = o[:, number * head : (number + 1) * head]
        effect = effect.T @ effect
        outputs[at, at] += effect
        # A logit that is off moves the output by as much as the values differ: by their energy.
        keys += torch.trace(effect @ values[at, at]) / head * (maps @ products @ maps.T)
    return torch.block_diag(keys, outputs)
