"""Conversion of grouped-query models into multi-head latent attention, as stock DeepSeek-V2 checkpoints."""

from __future__ import annotations

from rag_pipeline.conversion.config import ConversionConfig, ConversionError
from rag_pipeline.conversion.convert import convert_to_mla, refuse_early
from rag_pipeline.conversion.report import ConversionReport, TextPerplexity

__all__ = [
    "ConversionConfig",
    "ConversionError",
    "ConversionReport",
    "TextPerplexity",
    "convert_to_mla",
    "refuse_early",
]
