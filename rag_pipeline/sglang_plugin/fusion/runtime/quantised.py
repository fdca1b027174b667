"""Quantised weights that fusion does not work with: what makes a row's result depend on more than the row.

A fused pass computes other rows together than plain prefill does. Three things of quantised checkpoints can make that
show: scales of activations that are taken over a whole batch, experts, and scales of keys and values that an attention
backend multiplies by although the pool is not quantised.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from rag_pipeline.sglang_plugin.hook_table import verify_targets
from rag_pipeline.sglang_plugin.internals import QUANTISED

BACKENDS_WITHOUT_KV_SCALES = ("rag_cpu", "torch_native")
"""They read an unquantised pool as it is. FlashInfer and Triton multiply by ``k_scale_float`` whatever the pool holds."""

_NEAR, _FAR = 1e-3, 1e3
"""Sizes of the row that is looked at and of its neighbour. Behind a scale that both share, the former is rounded to
zero in every format of 8 bits: FP8 spans a factor of 2 ** 17."""
_MAX_CHANGE = 0.25
"""Relative. Kernels for one row and for two differ by a rounding, a shared scale changes everything."""


def quantiser(module: torch.nn.Module) -> Any | None:
    """SGLang's method that quantises a layer; None where it is kept in a floating-point type of the model."""
    method = getattr(module, "quant_method", None)
    return None if type(method).__name__.startswith("Unquantized") else method


def refuse_kv_scales(layers: Iterable[Any], backends: Iterable[str]) -> str | None:
    """Reason why scales of keys and values forbid fusion over a pool that is not quantised, or None.

    SGLang gives every layer of an FP8 model scales, 1 where the checkpoint has none. Writing to a pool of the model's
    own type does not use them; reading does in some backends, and a fused pass reads the pool as it is.

    Parameters
    ----------
    layers : iterable of RadixAttention
        The model's attention layers.
    backends : iterable of str
        Names of the attention backends that prefill and decode.
    """
    guilty = sorted(set(backends) - set(BACKENDS_WITHOUT_KV_SCALES))
    if not guilty:
        return None
    for layer in layers:
        scales = [float(s) for s in (layer.k_scale, layer.v_scale) if s is not None]
        if any(scale != 1.0 for scale in scales):
            return (
                f"layer {layer.layer_id} scales keys and values by {scales}, which attention backend "
                f"{guilty[0]!r} may multiply by although the pool is not quantised"
            )
    return None


def refuse_quantised_layers(model: torch.nn.Module, dtype: torch.dtype) -> str | None:
    """Reason why the quantised layers of a loaded model forbid fusion, or None; nothing of the model changes.

    One layer of each kind is tried: a small row alone, and beside a row a million times as large.

    Parameters
    ----------
    model : torch.nn.Module
        The model, its weights in place; every tensor-parallel rank asks at the same time.
    dtype : torch.dtype
        Of the activations.
    """
    from sglang.srt.layers.linear import LinearBase
    from sglang.srt.layers.moe.fused_moe_triton import FusedMoE

    verify_targets(QUANTISED)
    tried = set()
    for name, module in model.named_modules():
        method = quantiser(module)
        if method is None:
            continue
        what = f"{type(method).__name__} of {name}"
        if isinstance(module, FusedMoE):
            return f"quantised experts ({what}): per-tensor methods scale the rows of a batch together; not tested"
        if not isinstance(module, LinearBase):
            continue
        kind = (type(method), type(getattr(module, "scheme", None)), _form(module))
        if kind in tried:
            continue
        tried.add(kind)
        try:
            change = _change_beside_a_large_row(module, dtype)
        except Exception as error:
            return f"quantised layer {what} cannot be tried: {type(error).__name__}: {error}"
        if not change <= _MAX_CHANGE:
            return (
                f"row-dependent quantisation ({what}): it scales the rows of a batch together, and a fused pass "
                "has other rows than plain prefill"
            )
    return None


def _form(module: Any) -> Sequence[Any]:
    """Names, types and ranks of the weights of a layer: a mixed checkpoint has several under one method."""
    return tuple(
        (name, weight.dtype, weight.dim(), weight.numel() == 1)
        for name, weight in module.named_parameters(recurse=False)
    )


def _change_beside_a_large_row(module: Any, dtype: torch.dtype) -> float:
    """How much a row's result changes when a large row stands beside it, relative to its largest entry."""
    width = int(getattr(module, "input_size_per_partition", None) or module.input_size)
    device = next(module.parameters(recurse=False)).device
    rows = torch.randn(2, width, generator=torch.Generator().manual_seed(0))
    rows *= torch.tensor([[_NEAR], [_FAR]])
    rows = rows.to(device=device, dtype=dtype)
    with torch.inference_mode():
        alone = module.quant_method.apply(module, rows[:1].clone(), None).float()
        beside = module.quant_method.apply(module, rows.clone(), None)[:1].float()
    change = float((beside - alone).abs().max())
    size = float(alone.abs().max())
    if change != change:
        raise ValueError("its result is not a number")
    return change / size if size else (float("inf") if change else 0.0)
