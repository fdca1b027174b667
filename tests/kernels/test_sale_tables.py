"""What SALE keeps: thresholds in files, their calibration; and 4-bit keys that do not know where they stand."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from rag_kernels import AttentionCall, RotarySpec, create_attention_method, plan_position_causal
from rag_kernels.rotary import rotate
from rag_kernels.sparse.sale import SaleAttention, SaleConfig, ThresholdTable, thresholds
from rag_kernels.sparse.sale.calibration import FIRST_TAU, SMALLEST_TAU, Calibration
from rag_kernels.sparse.sale.quantization import quantize_int4

TABLE = ThresholdTable(
    model="small",
    fingerprint="0" * 32,
    theta=0.4,
    tokens=(300,),
    block_q=64,
    block_k=32,
    local_window=128,
    segment=128,
    granularity="token",
    tau=((0.008, 0.004, 0.0, 0.001), (0.002, 0.008, 0.008, 0.008)),
)
SMALL = SaleConfig(block_q=16, block_k=8, local_window=32, segment=32, min_tokens=64)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    torch.manual_seed(5)
    monkeypatch.setattr(thresholds, "_FOLDERS", [tmp_path])
    return tmp_path


# -- S8: keys by their index in the chunk ----------------------------------------------------------


def rotate_by(x, delta, spec):
    cos, sin = spec.cos_sin(torch.tensor([delta]), x.device)
    return rotate(x, cos, sin, spec)


@pytest.mark.parametrize("is_neox_style", [True, False])
@pytest.mark.parametrize(("dim", "rotary_dim"), [(64, 64), (64, 32)])
@pytest.mark.parametrize("moved_to", [0, 37, 5000])
def test_4_bit_keys_by_index_in_a_chunk_serve_wherever_the_chunk_stands(
    is_neox_style, dim, rotary_dim, moved_to
):
    """Queries rotated back by the chunk's start meet them as if the keys had been rotated there: to rounding.

    So 4-bit keys of a chunk could be kept for every place of it. They are not: see ``SaleAttention``.
    """
    inv_freq = 10000.0 ** -(torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
    spec = RotarySpec.from_inv_freq(inv_freq, rotary_dim, is_neox_style)
    tokens = 50
    plain = torch.randn(tokens, 2, dim) + 2 * torch.randn(2, dim)
    queries = rotate_by(torch.randn(3, 4, dim), moved_to + tokens + 20, spec)
    local = torch.stack([rotate_by(plain[i], i, spec) for i in range(tokens)], 1)
    mean = local.mean(1, keepdim=True)  # not that of the prompt: it stays part of the logits
    int4 = quantize_int4(local - mean, "keys")
    kept = int4.dequantize() + mean
    assert bool(((kept - local).abs() <= int4.scale[..., None] / 2 + 1e-5).all())

    def logits(q, k_NTD):
        return torch.einsum("rhd,htd->hrt", q, k_NTD.repeat_interleave(2, 0))

    moved = torch.stack([rotate_by(kept[:, i], moved_to, spec) for i in range(tokens)], 1)
    back = rotate_by(queries, -moved_to, spec)
    torch.testing.assert_close(logits(back, kept), logits(queries, moved), atol=2e-3, rtol=1e-4)
    exact = torch.stack([rotate_by(plain[i], moved_to + i, spec) for i in range(tokens)], 1)
    true = logits(queries, exact)
    assert (logits(back, kept) - true).abs().mean() < 0.1 * true.std()


# -- thresholds ------------------------------------------------------------------------------------


def test_a_table_is_found_by_name_and_by_the_weights(folder):
    (folder / "mine.json").write_text(TABLE.to_json())
    (folder / "broken.json").write_text("{")
    named = create_attention_method("sale:thresholds=mine")
    assert named.head_thresholds(1, 4).tolist() == pytest.approx(TABLE.tau[1])
    assert named.for_model(TABLE.fingerprint) is named
    with pytest.raises(ValueError, match="calibrated for other weights"):
        named.for_model("1" * 32)
    with pytest.raises(ValueError, match=r"broken\.json: .*calibrate the model again"):
        create_attention_method("sale:thresholds=broken")
    auto = create_attention_method("sale")
    bound = auto.for_model(TABLE.fingerprint)
    assert bound.table == TABLE
    assert auto.table is None
    assert auto.for_model("1" * 32).table is auto.for_model("").table is None
    assert bound.for_model("").table is None


def test_the_identity_holds_every_option_and_the_thresholds(folder):
    (folder / "mine.json").write_text(TABLE.to_json())
    texts = (
        "sale",
        "sale:thresholds=0.004",
        "sale:thresholds=mine",
        "sale:block_k=16",
        "sale:local_window=256",
        "sale:min_tokens=2048",
        "sale:granularity=thread_group",
        "sale:estimate=exact",
    )
    found = [create_attention_method(text).identity for text in texts]
    found.append(create_attention_method("sale").for_model(TABLE.fingerprint).identity)
    other = dataclasses.replace(TABLE, tau=((0.008,) * 4,) * 2)
    (folder / "mine.json").write_text(other.to_json())
    found.append(create_attention_method("sale:thresholds=mine").identity)
    assert len(set(found)) == len(found)
    assert create_attention_method("sale:thresholds=0.004").identity == found[1]


def test_a_rank_of_several_takes_the_strictest_head_that_it_may_have():
    method = SaleAttention(SaleConfig(), TABLE)
    assert method.head_thresholds(0, 2).tolist() == pytest.approx([0.0, 0.001])
    for layer, heads in ((2, 4), (0, 3)):
        with pytest.raises(ValueError, match="thresholds for 2 layers of 4 heads"):
            method.head_thresholds(layer, heads)


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        '{"format": 2}',
        '{"format": 1}',
        TABLE.to_json().replace("0.001", "-0.001"),
        TABLE.to_json().replace("0.001", "NaN"),
        TABLE.to_json().replace('"theta"', '"thetta"'),
    ],
)
def test_a_file_that_is_no_table_is_refused(text):
    with pytest.raises(ValueError, match=r"table|tau"):
        ThresholdTable.from_json(text)
    assert ThresholdTable.from_json(TABLE.to_json()) == TABLE


# -- S6: calibration -------------------------------------------------------------------------------


def prompt(seed, tokens=300):
    """Four heads: even attention, one far key per row, neighbours only, and the mean of everything."""
    torch.manual_seed(seed)
    q, k = torch.randn(tokens, 4, 16), torch.randn(tokens, 2, 16)
    q[:, 0] *= 0.05
    for row in range(120, tokens):
        q[row, 1] = 3 * k[(row * 7) % (row - 100), 0]
    near = torch.randn(tokens, 16).cumsum(0)
    near = 4 * near / near.norm(dim=1, keepdim=True)
    k[:, 1] = near
    q[:, 2] = 4 * near
    q[:, 3] = 0
    return q, k, torch.randn(tokens, 2, 16)


def test_no_head_is_further_off_than_it_may_be():
    calibration = Calibration(0.02, SMALL)
    for seed in range(3):
        error = calibration.add(0, *prompt(seed), 0.25)
        assert bool((error < 0.02).all())
    tau = calibration._tau[0].clone()
    assert len(set(tau.tolist())) > 1
    assert set((FIRST_TAU / tau[tau > 0]).tolist()) <= {2.0**i for i in range(7)}
    for seed in range(3):  # what the first sample was allowed is not undone by the last
        again = Calibration(0.02, SMALL)
        again._tau[0] = tau.clone()
        again.add(0, *prompt(seed), 0.25)
        assert torch.equal(again._tau[0], tau)


def test_a_larger_threshold_to_begin_with_spares_keys_and_no_head_the_bound_on_its_error():
    theta, largest = 0.02, 8 * FIRST_TAU
    narrow, wide = Calibration(theta, SMALL), Calibration(theta, SMALL, largest_tau=largest)
    for seed in range(3):
        narrow.add(0, *prompt(seed), 0.25)
        assert bool((wide.add(0, *prompt(seed), 0.25) < theta).all())
    small, large = narrow._tau[0], wide._tau[0]
    assert bool((large >= small).all())
    assert float(large.max()) > FIRST_TAU
    # A head that could not have the smaller one to begin with gets what it got.
    is_bound = small < FIRST_TAU
    assert bool(is_bound.any())
    assert torch.equal(large[is_bound], small[is_bound])
    with pytest.raises(ValueError, match=r"give a number above 0\.0001"):
        Calibration(theta, SMALL, largest_tau=SMALLEST_TAU)


def test_thresholds_fall_from_sample_to_sample_and_with_theta():
    calibration, last = Calibration(0.01, SMALL), torch.full((4,), FIRST_TAU, dtype=torch.float64)
    for seed in range(4):
        calibration.add(0, *prompt(seed), 0.25)
        assert bool((calibration._tau[0] <= last).all())
        last = calibration._tau[0].clone()
    strict = Calibration(1e-9, SMALL)
    strict.add(0, *prompt(0), 0.25)
    assert bool((strict._tau[0] <= last).all())
    found = strict.table("m", "f", [300])
    method = SaleAttention(SMALL, found)
    q, k, v = prompt(0)
    plan = plan_position_causal(
        [torch.arange(300)], [torch.arange(300)], num_q_heads=4, num_kv_heads=2, head_dim=16
    )
    call = AttentionCall(q_RNH=q, k_pool=k, v_pool=v, plan=plan, scale=0.25)
    mask = method.mask(0, call, method.prepare(plan, (0,)))
    for head, tau in enumerate(found.tau[0]):
        if tau == 0 and mask is not None:
            assert bool(mask.requests[0].allowed[head].all())


def test_a_prompt_that_was_no_sample_is_hardly_further_off():
    """And with thresholds that nobody calibrated it is."""
    theta = 0.02
    calibration = Calibration(theta, SMALL)
    for seed in range(3):
        calibration.add(0, *prompt(seed), 0.25)
    strict, loose = Calibration(1e9, SMALL), Calibration(1e9, SMALL)
    strict._tau[0] = calibration._tau[0].clone()
    loose._tau[0] = torch.full((4,), FIRST_TAU, dtype=torch.float64)
    for seed in range(10, 13):
        assert bool((strict.add(0, *prompt(seed), 0.25) < 1.5 * theta).all())
        assert bool((loose.add(0, *prompt(seed), 0.25) > 1.5 * theta).any())
