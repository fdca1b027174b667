"""Original and converted model side by side, layer by layer: what one layer gives the next, and each layer's latent form."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rag_pipeline.conversion.config import ConversionConfig
from rag_pipeline.conversion.factorisation import factorise
from rag_pipeline.conversion.layers import (
    LatentLayer,
    attend,
    network,
    rms_norm,
    rotations,
)
from rag_pipeline.conversion.refit import Ridge
from rag_pipeline.conversion.source import LayerWeights, SourceShape
from rag_pipeline.conversion.statistics import LayerStatistics

_REACH_WINDOWS = 12
"""About so many windows tell how far attention reaches."""


@dataclass(kw_only=True, slots=True)
class Streams:
    """Residual streams before a layer, fp32 ``(B, T, D)``; changed in place by :func:`convert_layer`.

    Parameters
    ----------
    original, converted : Tensor
        Of either model, on the same windows.
    """

    original: Tensor
    converted: Tensor

    @property
    def error(self) -> float:
        """Distance of the streams, relative to the original's size at a token: mean without windows' first tokens."""
        apart = (self.original - self.converted)[:, 1:].norm(dim=-1)
        return float((apart / self.original[:, 1:].norm(dim=-1).clamp(min=1e-30)).mean())


def convert_layer(
    layer: LayerWeights, streams: Streams, shape: SourceShape, config: ConversionConfig
) -> tuple[LatentLayer, float]:
    """Find a layer's latent form, and move both streams through the layer.

    Statistics are those of the original's own inputs. The output projection is fitted to what the converted model's
    inputs should have become: the original's stream behind its attention. Errors count relative to the size of the
    stream at their token, as the norms behind will see them: the few tokens at which models keep a stream a hundred
    times larger would decide otherwise.

    Returns
    -------
    tuple
        The latent form, and the share of the weighted energy that its latent lost.
    """
    # As the model itself computes; a large part of the time goes there.
    dtype = torch.bfloat16 if shape.dtype == "bfloat16" else torch.float32
    turn = rotations(streams.original.shape[1], shape.frequencies)
    statistics = LayerStatistics.empty(shape, streams.original.shape[1])
    often = max(1, len(streams.original) // _REACH_WINDOWS)
    for number, window in enumerate(streams.original):
        seen = attend(layer, rms_norm(window, layer.attention_norm, shape.eps), shape, turn)
        statistics.add(seen, reach=number % often == 0)
        window += seen.heads_out @ layer.o.T
    found, lost = factorise(
        layer,
        statistics,
        shape,
        rope_heads=config.rope // shape.head_dim,
        latent=config.latent,
    )
    outs: list[Tensor] = []
    fit = Ridge.empty(found.o.shape[1], shape.hidden)
    for before, wanted in zip(streams.converted, streams.original, strict=True):
        out = found.heads_out(rms_norm(before, layer.attention_norm, shape.eps), turn)
        outs.append(out)
        size = (wanted.square().mean(-1, keepdim=True) + shape.eps).rsqrt()
        # Models keep odd things at the first token; it is not what a window is made of.
        fit.add((out * size)[1:], ((wanted - before) * size)[1:])
    if config.refit:
        found = replace(found, o=fit.solve(found.o, config.ridge))
    for stream, out in zip(streams.converted, outs, strict=True):
        stream += out @ found.o.T
    for both in (streams.original, streams.converted):
        for window in both:
            window += network(layer, window, shape.eps, dtype)
    return found, lost


def embed(rows: Tensor, embedding: Tensor) -> Streams:
    """Streams before the first layer.

    Parameters
    ----------
    rows : Tensor
        Token ids ``(B, T)``.
    embedding : Tensor
        ``(vocabulary, D)``.
    """
    before = torch.nn.functional.embedding(rows, embedding)
    return Streams(original=before, converted=before.clone())
