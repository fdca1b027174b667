"""Whether the latents of the engine's model are sliced over its ranks, and in which basis; said by the environment."""

from __future__ import annotations

import os
from pathlib import Path

from rag_pipeline.errors import EngineError

__all__ = ["STATISTICS", "TPLA", "chosen_basis", "statistics_file"]

TPLA = "RAG_PIPELINE_TPLA"
"""Environment variable: ``off`` (default) or the basis, one of ``identity``, ``hadamard``, ``pca`` and ``output``."""

STATISTICS = "RAG_PIPELINE_TPLA_STATISTICS"
"""Environment variable: the file of ``rag-pipeline tpla calibrate``; by default the one of the weights in the own folder."""


def chosen_basis() -> str | None:
    """Name of the basis, or None where nothing is sliced.

    Raises
    ------
    EngineError
        No such basis; one line.
    """
    value = os.environ.get(TPLA, "").strip() or "off"
    if value == "off":
        return None
    from rag_kernels.latent import BASES

    if value not in BASES:
        raise EngineError(f"{TPLA} is {value!r}; allowed are 'off', {', '.join(map(repr, BASES))}.")
    return value


def statistics_file(fingerprint: str) -> Path:
    """Where statistics of the weights with this fingerprint are expected."""
    from rag_pipeline.config import tpla_dir

    given = os.environ.get(STATISTICS, "").strip()
    return Path(given) if given else tpla_dir() / f"{fingerprint}.safetensors"
