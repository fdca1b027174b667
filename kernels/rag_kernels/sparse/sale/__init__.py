"""SALE: sparse attention of long prompts from 4-bit estimates of the logits (arXiv 2505.24179)."""

from __future__ import annotations

from rag_kernels.sparse.sale.method import SaleAttention, SaleConfig
from rag_kernels.sparse.sale.thresholds import ThresholdTable

__all__ = ["SaleAttention", "SaleConfig", "ThresholdTable"]
