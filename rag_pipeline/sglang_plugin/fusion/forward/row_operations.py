"""Operations of a fused pass on a CPU: one call each for norms, rotations and gated units, and products for few rows.

A fused pass has few rows. On a CPU SGLang computes most of these operations with several torch operations each, which
then take longer to begin than to compute and use one thread. Every other batch keeps SGLang's own operations, and so its
bits. So does a model in fp32: there a fused pass is compared with plain prefill bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from rag_kernels import gate_rows, linear_rows, norm_rows, turn_rows

_depth = 0
"""Fused passes that this process is in; a scheduler computes on one thread of Python."""


@contextmanager
def row_operations() -> Iterator[None]:
    """Within it, the operations of this module serve what they can."""
    global _depth
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1


def _serves(x: Tensor) -> bool:
    """Whether it is one of a fused pass on the CPU, in a number format that rounds more than the order of a sum does."""
    return _depth > 0 and x.is_cpu and x.dtype is not torch.float32


def around_norm(
    original: Callable[..., Any],
    norm: Any,
    x: Tensor,
    residual: Tensor | None = None,
    post_residual_addition: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Wrap ``RMSNorm.forward_native``."""
    if _serves(x) and post_residual_addition is None and _is_plain(norm, x):
        found = norm_rows(x, norm.weight, norm.variance_epsilon, residual)
        if found is not None:
            return found[0] if residual is None else found
    return original(norm, x, residual, post_residual_addition, *args, **kwargs)


def _is_plain(norm: Any, x: Tensor) -> bool:
    """Whether a norm is the common one; a weight of another width is refused by the original."""
    return (
        norm.override_orig_dtype in (None, x.dtype)
        and norm.variance_size_override is None
        and not norm.cast_x_before_out_mul
        and not norm.fp32_residual
    )


def around_rotation(
    original: Callable[..., Any],
    rotation: Any,
    positions: Tensor,
    query: Tensor,
    key: Tensor,
    offsets: Tensor | None = None,
    fused_set_kv_buffer_arg: Any = None,
) -> Any:
    """Wrap ``RotaryEmbedding.forward_native``."""
    if (
        _serves(query)
        and offsets is None
        and fused_set_kv_buffer_arg is None
        and not hasattr(rotation, "sin_cos_cache")
    ):
        found = turn_rows(
            query,
            key,
            positions,
            rotation.cos_sin_cache,
            head_dim=rotation.head_size,
            is_neox_style=rotation.is_neox_style,
        )
        if found is not None:
            return found
    return original(rotation, positions, query, key, offsets, fused_set_kv_buffer_arg)


def around_gate(original: Callable[..., Tensor], gate: Any, x: Tensor) -> Tensor:
    """Wrap ``SiluAndMul.forward_native``."""
    found = gate_rows(x) if _serves(x) else None
    return original(gate, x) if found is None else found


def around_linear(
    original: Callable[..., Tensor],
    method: Any,
    module: Any,
    x: Tensor,
    bias: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """Wrap ``UnquantizedLinearMethod.apply``; a weight that SGLang has packed for AMX stays with it."""
    if _serves(x) and not kwargs and not getattr(module, "use_intel_amx_backend", False):
        found = linear_rows(x, module.weight, bias)
        if found is not None:
            return found
    return original(method, module, x, bias, **kwargs)
