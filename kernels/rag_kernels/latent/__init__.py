"""TPLA: multi-head latent attention whose latents are sliced over ranks (arXiv 2508.15881), in plain torch.

Shapes carry suffixes: ``B`` sequences, ``T`` tokens, ``H`` heads, ``N`` and ``R`` widths of a head's key without and
with position, ``V`` width of its value, ``D`` width of the latent, ``X`` width of the model.
"""

from __future__ import annotations

from rag_kernels.latent.attention import (
    LatentRows,
    gathered_attention,
    gla_attention,
    rank_attention,
    tpla_attention,
    unsliced_attention,
)
from rag_kernels.latent.bases import BASES, create_basis
from rag_kernels.latent.norm import energy_shares, exact_norm, literal_scales, sliced_norm
from rag_kernels.latent.statistics import LatentStatistics, StatisticsSum
from rag_kernels.latent.statistics_file import ModelStatistics
from rag_kernels.latent.weights import LatentWeights, rank_slice

__all__ = [
    "BASES",
    "LatentRows",
    "LatentStatistics",
    "LatentWeights",
    "ModelStatistics",
    "StatisticsSum",
    "create_basis",
    "energy_shares",
    "exact_norm",
    "gathered_attention",
    "gla_attention",
    "literal_scales",
    "rank_attention",
    "rank_slice",
    "sliced_norm",
    "tpla_attention",
    "unsliced_attention",
]
