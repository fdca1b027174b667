"""Which keys the rows of a prompt read: one method per file, named by a request."""

from __future__ import annotations

from rag_kernels.sparse.base import AttentionMethod
from rag_kernels.sparse.methods_of_pass import MethodsOfPass
from rag_kernels.sparse.registry import ATTENTION_METHODS, create_attention_method
from rag_kernels.sparse.sale.thresholds import add_table_folder

__all__ = [
    "ATTENTION_METHODS",
    "AttentionMethod",
    "MethodsOfPass",
    "add_table_folder",
    "create_attention_method",
]
