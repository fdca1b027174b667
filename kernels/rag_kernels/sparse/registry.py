"""From ``NAME`` or ``NAME:OPTION=VALUE+OPTION=VALUE`` to an attention method."""

from __future__ import annotations

from rag_kernels.options import create_named
from rag_kernels.registry import Registry
from rag_kernels.sparse.base import AttentionMethod

ATTENTION_METHODS: Registry[type[AttentionMethod]] = Registry(
    "attention method",
    "rag_pipeline.attention_methods",
    {
        "dense": "rag_kernels.sparse.dense:DenseAttention",
        "power": "rag_kernels.sparse.power:PowerAttention",
        "streaming": "rag_kernels.sparse.streaming:StreamingAttention",
        "strided": "rag_kernels.sparse.strided:StridedAttention",
        "dilated": "rag_kernels.sparse.dilated:DilatedAttention",
        "longnet": "rag_kernels.sparse.longnet:LongNetAttention",
        "vertical_slash": "rag_kernels.sparse.vertical_slash:VerticalSlashAttention",
        "block_topk": "rag_kernels.sparse.block_topk:BlockTopKAttention",
        "xattention": "rag_kernels.sparse.xattention:XAttention",
        "sale": "rag_kernels.sparse.sale.method:SaleAttention",
    },
    base=AttentionMethod,
)
"""Methods by name. A client names one in its request; each process that reads it must know it."""


def create_attention_method(text: str) -> AttentionMethod:
    """Make a method.

    Parameters
    ----------
    text : str
        A name in :data:`ATTENTION_METHODS`, with options behind a colon: ``mine:blocks=4+sink=true``.

    Raises
    ------
    ValueError
        An unknown name or option, a wrong type or value; one line that says what is allowed.
    """
    return create_named(ATTENTION_METHODS, text)
