"""Rotation inside of Triton kernels: the pairs of dimensions, and the rotated values."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def pair_of(dims, HALF: tl.constexpr, NEOX: tl.constexpr):
    """Of each rotated dimension: the other one of its pair, the pair, and whether it is the first of the two."""
    if NEOX:
        partner = tl.where(dims < HALF, dims + HALF, dims - HALF)
        pair = tl.where(dims < HALF, dims, dims - HALF)
        is_first = dims < HALF
    else:
        partner = dims ^ 1
        pair = dims // 2
        is_first = (dims % 2) == 0
    return partner, pair, is_first


@triton.jit
def rotated(x, other, is_first, cos, sin):
    """Rotated ``x``, where ``other`` holds the partner of each value."""
    return x * cos + tl.where(is_first, -other, other) * sin
