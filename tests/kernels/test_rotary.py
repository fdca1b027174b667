"""Rotation by a position difference against fp64, and the frequencies of real configurations."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from rag_kernels import RotarySpec, RotaryUnsupportedError, rerotate_keys, rotary_spec_from_config


def reference_rotate(x, position, inv_freq, rotary_dim, neox):
    """fp64, pair by pair, by complex numbers."""
    x = x.double()
    angle = position.double()[:, None, None] * inv_freq.double()
    turn = torch.polar(torch.ones_like(angle), angle)
    half = rotary_dim // 2
    a, b = (
        (x[..., :half], x[..., half:rotary_dim])
        if neox
        else (x[..., 0:rotary_dim:2], x[..., 1:rotary_dim:2])
    )
    z = torch.complex(a, b) * turn
    out = x.clone()
    if neox:
        out[..., :half], out[..., half:rotary_dim] = z.real, z.imag
    else:
        out[..., 0:rotary_dim:2], out[..., 1:rotary_dim:2] = z.real, z.imag
    return out


def spec_and_freq(dim, rotary_dim, neox, theta=10000.0):
    freq = theta ** -(torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
    return RotarySpec.from_inv_freq(freq.float(), rotary_dim, neox), freq.float().double()


@pytest.mark.parametrize("neox", [True, False])
@pytest.mark.parametrize(("dim", "rotary_dim"), [(64, 64), (128, 128), (80, 32)])
@pytest.mark.parametrize("delta", [1, -1, 397, -4096, 131071])
def test_fp32_rotation_stays_within_rounding_of_fp64(neox, dim, rotary_dim, delta):
    torch.manual_seed(delta & 0xFF)
    spec, freq = spec_and_freq(dim, rotary_dim, neox)
    k = torch.randn(19, 2, dim)
    got = rerotate_keys(k, delta, spec)
    want = reference_rotate(k, torch.full((19,), delta), freq, rotary_dim, neox)
    # Two products, one sum, two rounded table entries: below 4 units in the last place of the pair's length.
    length = k.abs().max() * math.sqrt(2)
    assert (got.double() - want).abs().max() <= 4 * 2**-24 * length
    assert torch.equal(got[..., rotary_dim:], k[..., rotary_dim:])


@pytest.mark.parametrize(("dtype", "ulp"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_sixteen_bit_keys_are_rounded_once(dtype, ulp):
    torch.manual_seed(0)
    spec, freq = spec_and_freq(64, 64, True)
    k = torch.randn(99, 3, 64).to(dtype)
    want = reference_rotate(k, torch.full((99,), -777), freq, 64, True)
    got = rerotate_keys(k, -777, spec).double()
    # Half a unit of the result's own size; the fp32 part adds a trace.
    assert ((got - want).abs() <= 0.5 * 2 * ulp * want.abs() + 1e-6).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tensor_delta", [False, True])
def test_no_difference_returns_the_same_bits(dtype, tensor_delta):
    spec, _ = spec_and_freq(16, 16, True)
    k = torch.randn(5, 2, 16).to(dtype)
    k[0, 0, :8] = -0.0
    delta = torch.zeros(5, dtype=torch.int64) if tensor_delta else 0
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(rerotate_keys(k, delta, spec).view(bits), k.view(bits))


def test_rows_with_no_difference_keep_their_bits_among_rows_that_move():
    spec, freq = spec_and_freq(16, 16, True)
    k = torch.randn(4, 2, 16)
    k[2] = -0.0
    delta = torch.tensor([3, 0, 0, -8])
    got = rerotate_keys(k, delta, spec)
    assert torch.equal(got[1:3].view(torch.int32), k[1:3].view(torch.int32))
    torch.testing.assert_close(
        got.double(), reference_rotate(k, delta, freq, 16, True), rtol=0, atol=1e-6
    )


def test_out_may_be_the_keys_themselves():
    spec, _ = spec_and_freq(16, 16, False)
    k = torch.randn(7, 1, 16)
    want = rerotate_keys(k, 12, spec)
    assert rerotate_keys(k, 12, spec, out=k) is k
    assert torch.equal(k, want)


def test_empty_chunk():
    spec, _ = spec_and_freq(16, 16, True)
    assert rerotate_keys(torch.empty(0, 2, 16), 5, spec).shape == (0, 2, 16)


ROPES = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 2048,
    },
}


def config(rope, **extra):
    return LlamaConfig(
        hidden_size=64,
        num_attention_heads=2,
        num_hidden_layers=1,
        rope_parameters=dict(rope),
        **extra,
    )


@pytest.mark.parametrize("kind", list(ROPES))
def test_moved_key_equals_the_models_own_key_at_the_new_position(kind):
    """Includes YaRN, whose factor on cos and sin must not be applied a second time."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    cfg = config(ROPES[kind])
    model_rope = LlamaRotaryEmbedding(cfg)
    spec = rotary_spec_from_config(cfg)
    raw = torch.randn(1, 2, 9, 32)

    def key_at(start):
        cos, sin = model_rope(raw, torch.arange(start, start + 9)[None])
        return apply_rotary_pos_emb(raw, raw, cos, sin)[1][0].transpose(0, 1)

    moved = rerotate_keys(key_at(40), 300 - 40, spec)
    # The model itself forms fp32 angles of up to 308 radians: 308 * 2^-24 each.
    torch.testing.assert_close(moved, key_at(300), rtol=1e-4, atol=1e-4)
    if kind == "yarn":
        assert model_rope.attention_scaling > 1.05  # a second factor would have been seen


def test_error_against_a_models_own_table_tells_right_from_wrong_frequencies():
    cfg = config(ROPES["llama3"])
    spec = rotary_spec_from_config(cfg)
    rope = LlamaRotaryEmbedding(cfg)
    cos, sin = rope(torch.zeros(1), torch.arange(2048)[None])
    cache = torch.cat([cos[0, :, :16], sin[0, :, :16]], dim=-1)
    assert spec.cache_error(cache) < 1e-3
    assert spec.cache_error(1.3 * cache) < 1e-3
    assert rotary_spec_from_config(config(ROPES["default"])).cache_error(cache) > 0.1


def plain_config(**values):
    """A configuration that transformers would not let us build by hand."""
    return SimpleNamespace(model_type="test", hidden_size=64, num_attention_heads=2, **values)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_length_dependent_frequencies_are_refused_with_the_reason(kind):
    with pytest.raises(RotaryUnsupportedError, match=rf"{kind}.*length of the prompt"):
        rotary_spec_from_config(
            plain_config(rope_parameters={"rope_type": kind, "rope_theta": 10000.0})
        )


def test_learned_positions_are_refused():
    with pytest.raises(RotaryUnsupportedError, match="no rope_theta"):
        rotary_spec_from_config(plain_config())


def test_partial_rotary_is_read_from_the_configuration():
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    assert rotary_spec_from_config(plain_config(rope_parameters=rope)).rotary_dim == 16


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: RotarySpec.from_inv_freq(torch.ones(8).bfloat16()), "float32 or float64"),
        (lambda: RotarySpec.from_inv_freq(torch.ones(8), 12), "needs a vector of 6"),
        (lambda: RotarySpec.from_inv_freq(torch.tensor([1.0, float("nan")])), "not finite"),
        (lambda: rerotate_keys(torch.zeros(3, 16), 1, spec_and_freq(16, 16, True)[0]), "T, N, H"),
        (
            lambda: rerotate_keys(
                torch.zeros(3, 1, 16), torch.tensor([1, 2]), spec_and_freq(16, 16, True)[0]
            ),
            "2 position differences for 3 tokens",
        ),
        (
            lambda: rerotate_keys(
                torch.zeros(3, 1, 16), torch.ones(3), spec_and_freq(16, 16, True)[0]
            ),
            "integer vector",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
