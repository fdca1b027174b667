"""Quantised weights: what tells two checkpoints apart, and what is refused. Layers are SGLang's own; no engine."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rag_pipeline.sglang_plugin.fusion.runtime.model_identity import fingerprint_weights
from rag_pipeline.sglang_plugin.fusion.runtime.quantised import (
    refuse_kv_scales,
    refuse_quantised_layers,
)

FP8 = torch.float8_e4m3fn


def _config(name: str) -> Any:
    from sglang.srt.layers.quantization.blockwise_int8 import BlockInt8Config
    from sglang.srt.layers.quantization.fp8 import Fp8Config
    from sglang.srt.layers.quantization.modelopt_quant import ModelOptFp8Config
    from sglang.srt.layers.quantization.w8a8_fp8 import W8A8Fp8Config
    from sglang.srt.layers.quantization.w8a8_int8 import W8A8Int8Config

    made: dict[str, Callable[[], Any]] = {
        "fp8": lambda: Fp8Config(True, "dynamic"),
        "fp8, static": lambda: Fp8Config(True, "static"),
        "fp8, blocks": lambda: Fp8Config(True, "dynamic", weight_block_size=[128, 128]),
        "w8a8_fp8": lambda: W8A8Fp8Config(True),
        "w8a8_int8": lambda: W8A8Int8Config({}),
        "blockwise_int8": lambda: BlockInt8Config(True, "dynamic", weight_block_size=[128, 128]),
        "modelopt_fp8": lambda: ModelOptFp8Config(True, packed_modules_mapping={}),
    }
    return made[name]()


METHODS = (
    "fp8", "fp8, static", "fp8, blocks", "w8a8_fp8", "w8a8_int8", "blockwise_int8", "modelopt_fp8",
)  # fmt: skip


def _linear(config: Any) -> Any:
    """One layer as a loader leaves it before the method rearranges it; every weight has its own bytes."""
    from sglang.srt.layers.linear import ReplicatedLinear

    torch.manual_seed(0)
    layer = ReplicatedLinear(256, 128, bias=False, quant_config=config, params_dtype=torch.bfloat16)
    for weight in layer.parameters():
        weight.data.copy_((torch.rand(weight.shape) + 0.5).to(weight.dtype))
    return layer


@pytest.mark.parametrize("method", METHODS)
def test_every_tensor_of_a_quantised_layer_counts(method: str) -> None:
    layer = _linear(_config(method))
    before = fingerprint_weights(layer)
    names = [name for name, _ in layer.named_parameters()]
    assert any("scale" in name for name in names)
    for name in names:
        other = _linear(_config(method))
        assert fingerprint_weights(other) == before
        weight = other.get_parameter(name)
        flat = weight.data.reshape(-1).view(torch.uint8)
        flat[0] += 1
        weight.data = flat.view(weight.dtype).reshape(weight.shape)
        assert fingerprint_weights(other) != before, name


class _Scaled(nn.Module):
    """A layer whose method left its scales outside of parameters and buffers, as several of SGLang's do."""

    def __init__(self, **scales: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 2))
        self.quant_method = SimpleNamespace()
        for name, value in scales.items():
            setattr(self, name, value)


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ({"input_scale": torch.tensor(0.5)}, {"input_scale": torch.tensor(0.25)}),
        ({"k_scale_float": 0.5}, {"k_scale_float": 0.25}),
        ({"k_scale_float": None}, {"k_scale_float": 0.25}),
    ],
)
def test_scales_that_are_plain_attributes_count(one: dict[str, Any], two: dict[str, Any]) -> None:
    assert fingerprint_weights(_Scaled(**one)) == fingerprint_weights(_Scaled(**one))
    assert fingerprint_weights(_Scaled(**one)) != fingerprint_weights(_Scaled(**two))


def test_scales_that_a_method_keeps_count() -> None:
    one, two = _Scaled(), _Scaled()
    one.quant_method.scales, two.quant_method.scales = torch.ones(3), torch.ones(3) / 2
    assert fingerprint_weights(one) != fingerprint_weights(two)


def test_what_is_not_quantised_keeps_its_fingerprint() -> None:
    """It is written into files: thresholds of attention methods, folders of chunk KV."""
    one, two = _Scaled(table=torch.ones(2)), _Scaled()
    one.quant_method = two.quant_method = None
    assert fingerprint_weights(one) == fingerprint_weights(two)


def test_work_space_of_kernels_does_not_count() -> None:
    one, two = (_Scaled(workspace=torch.full((2,), value)) for value in (0.0, 1.0))
    assert fingerprint_weights(one) == fingerprint_weights(two)


def _dynamic_fp8(per_row: bool) -> Any:
    """FP8 weights whose activations are scaled as they come: over the whole batch, or row by row."""
    from sglang.srt.layers.quantization.fp8_utils import input_to_float8
    from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

    class DynamicFp8Method(UnquantizedLinearMethod):
        def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
            parts = x.split(1) if per_row else (x,)
            quantised = [input_to_float8(part, dtype=FP8) for part in parts]
            scaled = torch.cat([part.float() * scale for part, scale in quantised])
            return (scaled @ layer.weight.float().t()).to(x.dtype)

    layer = _linear(None)
    layer.quant_method = DynamicFp8Method()
    return layer


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_scales_over_a_whole_batch_are_found_and_refused(dtype: torch.dtype) -> None:
    reason = refuse_quantised_layers(nn.ModuleDict({"up": _dynamic_fp8(per_row=False)}), dtype)
    assert reason is not None
    assert "row-dependent" in reason
    assert "up" in reason
    assert refuse_quantised_layers(nn.ModuleDict({"up": _dynamic_fp8(per_row=True)}), dtype) is None


def test_every_kind_of_layer_is_tried() -> None:
    """A mixed checkpoint: the first layers are harmless, a later one is not."""
    model = nn.ModuleList(
        [_linear(None), _dynamic_fp8(True), _dynamic_fp8(True), _dynamic_fp8(False)]
    )
    reason = refuse_quantised_layers(model, torch.bfloat16)
    assert reason is not None
    assert "of 3)" in reason


def test_a_layer_whose_kernel_does_not_run_here_is_refused() -> None:
    reason = refuse_quantised_layers(
        nn.ModuleDict({"up": _linear(_config("w8a8_int8"))}), torch.bfloat16
    )
    assert reason is not None
    assert "cannot be tried" in reason


def test_a_layer_that_computes_no_numbers_is_refused_as_such() -> None:
    layer = _dynamic_fp8(per_row=True)
    layer.weight.data[0] = float("nan")
    reason = refuse_quantised_layers(nn.ModuleDict({"up": layer}), torch.bfloat16)
    assert reason is not None
    assert "not a number" in reason


def test_unquantised_layers_are_not_computed() -> None:
    layer = _linear(None)
    layer.weight = None  # would fail if it were
    assert refuse_quantised_layers(layer, torch.bfloat16) is None


def _attention(*scales: float) -> Any:
    """A layer of an FP8 model behind SGLang's own loading: scales of the checkpoint, 1 where it has none."""
    from sglang.srt.layers.quantization.fp8 import Fp8KVCacheMethod
    from sglang.srt.layers.radix_attention import RadixAttention

    layer = RadixAttention(4, 16, 0.25, 2, layer_id=3, quant_config=_config("fp8"))
    for parameter, scale in zip((layer.k_scale, layer.v_scale), scales, strict=False):
        parameter.data.fill_(scale)
    assert isinstance(layer.quant_method, Fp8KVCacheMethod)
    layer.quant_method.process_weights_after_loading(layer)
    return layer


@pytest.mark.parametrize("backend", ["rag_cpu", "torch_native", "flashinfer", "triton", "fa3"])
def test_an_fp8_model_without_scales_of_its_kv_is_accepted(backend: str) -> None:
    assert refuse_kv_scales([_attention()], (backend, backend)) is None


def test_scales_of_kv_are_refused_where_a_backend_multiplies_by_them() -> None:
    layers = [_attention(), _attention(0.25, 0.5)]
    assert refuse_kv_scales(layers, ("rag_cpu", "rag_cpu")) is None
    reason = refuse_kv_scales(layers, ("rag_cpu", "flashinfer"))
    assert reason is not None
    assert "layer 3" in reason
    assert "[0.25, 0.5]" in reason
    assert "flashinfer" in reason
