"""Operations of a fused pass on a CPU: within one the library's, in every other batch SGLang's own, bit for bit."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from rag_kernels import gate_rows, linear_rows, norm_rows, turn_rows
from rag_kernels.native.library import load_library
from rag_pipeline.sglang_plugin.fusion.forward.row_operations import (
    around_gate,
    around_linear,
    around_norm,
    around_rotation,
    row_operations,
)

pytestmark = pytest.mark.skipif(
    load_library() is None, reason="the library cannot be built on this machine"
)


@pytest.fixture
def original():
    """Stands for SGLang's own method, which takes more than is wrapped."""

    def call(*args, **kwargs):
        return "SGLang's"

    return call


@pytest.fixture(scope="module")
def norm():
    from sglang.srt.layers.layernorm import RMSNorm

    norm = RMSNorm(64, weight_dtype=torch.bfloat16)
    norm.weight.data.uniform_()
    return norm


@pytest.fixture
def x():
    return torch.randn(5, 64).bfloat16()


@torch.no_grad()
def test_norms(original, norm, x):
    assert around_norm(original, norm, x, x) == "SGLang's"
    with row_operations():
        assert torch.equal(
            around_norm(original, norm, x), norm_rows(x, norm.weight, norm.variance_epsilon)[0]
        )
        out, total = around_norm(original, norm, x, residual=x)
        assert around_norm(original, norm, x, x, x) == "SGLang's"
        assert around_norm(original, norm, x.float()) == "SGLang's"
    want, want_total = type(norm).forward_native(norm, x, x)
    torch.testing.assert_close(out, want, atol=1e-2, rtol=1e-2)
    assert torch.equal(total, want_total)
    assert around_norm(original, norm, x) == "SGLang's"


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("override_orig_dtype", torch.float32),
        ("variance_size_override", 32),
        ("cast_x_before_out_mul", True),
        ("fp32_residual", True),
    ],
)
def test_a_norm_of_another_kind_is_sglangs(original, norm, x, name, value, monkeypatch):
    monkeypatch.setattr(norm, name, value)
    with row_operations():
        assert around_norm(original, norm, x, x) == "SGLang's"


@torch.no_grad()
def test_rotations(original, x):
    from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding

    rotation = RotaryEmbedding(16, 16, 128, 10000, True, torch.bfloat16)
    positions = torch.tensor([3, 0, 127, 64, 3])
    assert around_rotation(original, rotation, positions, x, x) == "SGLang's"
    with row_operations():
        found = around_rotation(original, rotation, positions, x, x[:, :32])
        table = rotation.cos_sin_cache
        again = turn_rows(x, x[:, :32], positions, table, head_dim=16, is_neox_style=True)
        assert around_rotation(original, rotation, positions, x, x, positions) == "SGLang's"
    want = type(rotation).forward_native(rotation, positions, x, x[:, :32])
    for one, same, other in zip(found, again, want, strict=True):
        assert torch.equal(one, same)
        assert torch.equal(one, other)


@torch.no_grad()
def test_gated_units(original, x):
    from sglang.srt.layers.activation import SiluAndMul

    assert around_gate(original, None, x) == "SGLang's"
    with row_operations(), row_operations():
        found = around_gate(original, None, x)
    assert torch.equal(found, gate_rows(x))
    torch.testing.assert_close(found, SiluAndMul.forward_native(None, x), atol=1e-2, rtol=1e-2)


@torch.no_grad()
def test_products(original, x):
    layer = SimpleNamespace(weight=torch.randn(32, 64).bfloat16())
    assert around_linear(original, None, layer, x) == "SGLang's"
    wanted = linear_rows(x, layer.weight)
    with row_operations():
        if wanted is None:  # this CPU has no such instructions, or something better
            assert around_linear(original, None, layer, x) == "SGLang's"
        else:
            assert torch.equal(around_linear(original, None, layer, x), wanted)
        assert around_linear(original, None, layer, x.float()) == "SGLang's"
        narrow = SimpleNamespace(weight=layer.weight[:24])  # what the library declines on every CPU
        assert around_linear(original, None, narrow, x) == "SGLang's"
        layer.use_intel_amx_backend = True
        assert around_linear(original, None, layer, x) == "SGLang's"


def test_a_pass_that_fails_leaves_them_off(original, x):
    with pytest.raises(RuntimeError), row_operations():
        raise RuntimeError
    assert around_gate(original, None, x) == "SGLang's"
