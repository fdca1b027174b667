"""Attention methods as the options of a benchmark name them, and how much of a prompt static ones read."""

from __future__ import annotations

import torch

from rag_eval.errors import EvalError
from rag_kernels import AttentionMethod, create_attention_method
from rag_kernels.sparse.static_blocks import StaticBlocks


def named_method(text: str) -> AttentionMethod:
    """Make a method; a text that names none is one line."""
    try:
        return create_attention_method(text)
    except ValueError as error:
        raise EvalError(str(error)) from None


def static_named(text: str) -> StaticBlocks:
    """Make a static method; a text that names none is one line."""
    method = named_method(text)
    if not isinstance(method, StaticBlocks):
        raise EvalError(f"{text!r} chooses by the prompt; give methods that are static")
    return method


def static_density(method: StaticBlocks, tokens: int) -> float:
    """Keys that the rows of a prompt read of those up to their own, in layers that are not dense."""
    size = method.config.block
    blocks = -(-tokens // size)
    counts = torch.full((blocks,), size)
    counts[-1] = tokens - (blocks - 1) * size
    before = method.allowed(0, blocks - 1).tril(-1).long() @ counts
    pairs = int((counts * before + counts * (counts + 1) // 2).sum())
    return pairs / (tokens * (tokens + 1) // 2)
