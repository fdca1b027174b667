"""Dense attention: every row reads every key up to its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rag_kernels.attention.base import AttentionCall
from rag_kernels.attention.mask import BlockMask
from rag_kernels.sparse.base import AttentionMethod


@dataclass(frozen=True, kw_only=True)
class DenseConfig:
    """No options."""


class DenseAttention(AttentionMethod):
    """Reads everything: what a request without a method gets."""

    name = "dense"
    config_type = DenseConfig

    def mask(self, layer: int, call: AttentionCall, state: Any) -> BlockMask | None:
        """Leave nothing out."""
        return None
