"""Codecs: what they store byte by byte, how far decoded values may be off, and what stays approximate."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from chunk_cache import (
    CODECS,
    ChunkCacheError,
    ChunkKV,
    Codec,
    CodecError,
    LayerKV,
    codec_named,
    encode_layers,
)
from chunk_cache.codecs.kivi import GROUP

Make = Callable[..., ChunkKV]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LOSSY = ("fp8", "kivi8", "kivi4")


@st.composite
def layers(draw: st.DrawFn) -> LayerKV:
    """Random layers: odd sizes, offsets by channel, magnitudes from tiny to large, some channels constant."""
    tokens, heads = draw(st.integers(0, 70)), draw(st.integers(1, 3))
    sizes = draw(st.integers(1, 40)), draw(st.integers(1, 70))
    dtype = draw(st.sampled_from(DTYPES))
    magnitude = draw(st.sampled_from([1e-7, 1e-3, 1.0, 100.0]))
    offset = draw(st.sampled_from([0.0, 1.0, 30.0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def part(size: int) -> Tensor:
        x = torch.randn(tokens, heads, size, generator=generator)
        x += offset * torch.randn(1, heads, size, generator=generator)
        x[:, :, torch.rand(size, generator=generator) < 0.1] = draw(st.sampled_from([0.0, 1.5]))
        return (x * magnitude).to(dtype)

    return LayerKV(part(sizes[0]), part(sizes[1]))


def once(name: str, layer: LayerKV) -> LayerKV:
    return codec_named(name).decode(codec_named(name).encode(layer), layer.k.dtype)


def rounding(x: Tensor) -> Tensor:
    """Most that rounding a value about as large as `x` to its dtype may change it."""
    info = torch.finfo(x.dtype)
    return x.double().abs() * info.eps + info.tiny * info.eps


def half_step(x: Tensor, dim: int, bits: int) -> Tensor:
    """Half the distance of two levels in the group of each value, where a group runs along `dim`."""
    parts = []
    for group in x.double().split(GROUP, dim):
        width = group.amax(dim, keepdim=True) - group.amin(dim, keepdim=True)
        parts.append((width / (2**bits - 1) / 2).expand_as(group))
    return torch.cat(parts, dim)


def assert_within(decoded: Tensor, x: Tensor, bound: Tensor) -> None:
    # Rounding is that of the largest value of the computation: a group's end, not the value itself.
    largest = x.abs().amax() if x.numel() else torch.zeros((), dtype=x.dtype)
    error = (decoded.double() - x.double()).abs()
    assert bool((error <= bound * (1 + 1e-6) + rounding(largest)).all())


@given(layers())
def test_plain_gives_back_every_bit(layer):
    for stored, x in zip(once("plain", layer), layer, strict=True):
        assert stored.dtype == x.dtype
        assert torch.equal(stored, x)


def test_plain_keeps_what_is_not_finite():
    x = torch.tensor([[[float("nan"), float("inf"), -0.0]]])
    stored = once("plain", LayerKV(x, -x))
    assert torch.equal(stored.k.view(torch.int32), x.view(torch.int32))
    assert torch.equal(stored.v.view(torch.int32), (-x).view(torch.int32))


@pytest.mark.parametrize("name", LOSSY)
@given(layer=layers())
def test_shapes_and_dtype_come_back_and_all_is_finite(name, layer):
    for decoded, x in zip(once(name, layer), layer, strict=True):
        assert decoded.shape == x.shape
        assert decoded.dtype == x.dtype
        assert decoded.is_contiguous()
        assert bool(torch.isfinite(decoded).all())


@pytest.mark.parametrize("name", LOSSY)
@given(layer=layers())
def test_a_second_time_changes_nothing(name, layer):
    first = once(name, layer)
    for again, before in zip(once(name, first), first, strict=True):
        assert torch.equal(again, before)


@pytest.mark.parametrize(("name", "bits"), [("kivi8", 8), ("kivi4", 4)])
@given(layer=layers())
def test_kivi_is_off_by_half_a_step_at_most(name, bits, layer):
    decoded = once(name, layer)
    full = layer.k.shape[0] // GROUP * GROUP
    assert torch.equal(decoded.k[full:], layer.k[full:])
    if full:
        assert_within(decoded.k[:full], layer.k[:full], half_step(layer.k[:full], 0, bits))
    assert_within(decoded.v, layer.v, half_step(layer.v, -1, bits))


@given(layer=layers())
def test_fp8_is_off_by_a_sixteenth_or_a_part_of_the_smallest_step(layer):
    for decoded, x in zip(once("fp8", layer), layer, strict=True):
        if x.numel():
            most = x.double().abs().amax(dim=(0, 2))[:, None]
            bound = torch.maximum(x.double().abs() / 16, most / 448 / 1024)
            assert bool(((decoded.double() - x.double()).abs() <= bound + rounding(x)).all())


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("value", [0.0, 1.0, -3.140625, 1e-30])
@pytest.mark.parametrize("tokens", [1, GROUP, GROUP + 3])
def test_what_is_all_the_same_is_exact(name, value, tokens):
    x = torch.full((tokens, 2, 33), value)
    for decoded in once(name, LayerKV(x, x[..., :5].contiguous())):
        assert torch.equal(decoded, torch.full_like(decoded, value))


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        # 70 tokens, 3 heads, D = 5, D_v = 33, 2 bytes a value; 64 tokens in 2 full groups, 6 behind them.
        ("plain", {"k": 70 * 15 * 2, "v": 70 * 99 * 2}),
        ("fp8", {"k_codes": 70 * 15, "k_most": 3 * 2, "v_codes": 70 * 99, "v_most": 3 * 2}),
        (
            "kivi8",
            {
                "k_codes": 64 * 15,
                "k_ranges": 2 * 2 * 15 * 2,
                "k_tail": 6 * 15 * 2,
                "v_codes": 70 * 99,
                "v_ranges": 2 * 70 * 3 * 2 * 2,
            },
        ),
        (
            "kivi4",
            {
                "k_codes": 32 * 15,
                "k_ranges": 2 * 2 * 15 * 2,
                "k_tail": 6 * 15 * 2,
                "v_codes": 35 * 99,
                "v_ranges": 2 * 70 * 3 * 2 * 2,
            },
        ),
    ],
)
def test_bytes_are_those_counted_by_hand(name, wanted):
    layer = LayerKV(
        torch.randn(70, 3, 5, dtype=torch.bfloat16), torch.randn(70, 3, 33, dtype=torch.bfloat16)
    )
    encoded = codec_named(name).encode(layer)
    assert {key: part.nbytes for key, part in encoded.items()} == wanted
    assert all(part.is_contiguous() for part in encoded.values())


def test_kivi4_packs_two_tokens_in_a_byte():
    values = torch.arange(16.0).repeat(2)[:, None, None]  # levels 0 to 15, twice
    encoded = codec_named("kivi4").encode(LayerKV(values, values[:3].contiguous()))
    wanted = [low | (low + 1) << 4 for low in range(0, 16, 2)] * 2
    assert encoded["k_codes"].flatten().tolist() == wanted
    assert encoded["k_ranges"].flatten().tolist() == [0.0, 15.0]
    # A value alone in its group is the group's smallest: level 0. The third token has no partner.
    assert encoded["v_codes"].flatten().tolist() == [0, 0]
    assert torch.equal(once("kivi4", LayerKV(values, values)).k, values)


def test_keys_are_rounded_by_channel_and_values_by_token():
    outlier = torch.randn(GROUP, 1, 64, generator=torch.Generator().manual_seed(0))
    outlier[..., 7] += 1000.0
    k, v = once("kivi4", LayerKV(outlier, outlier.clone()))
    others = [channel for channel in range(64) if channel != 7]
    assert (k - outlier)[..., others].abs().max() < 0.3
    assert (v - outlier)[
        ..., :GROUP
    ].abs().max() > 0.9  # one channel spoils its group in each token
    assert (v - outlier)[..., GROUP:].abs().max() < 0.3


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_what_is_not_finite_is_refused(name, bad):
    good, x = torch.ones(40, 1, 4), torch.ones(40, 1, 4)
    x[17, 0, 2] = bad
    for layer in (LayerKV(x, good), LayerKV(good, x)):
        with pytest.raises(CodecError, match="store it plain"):
            codec_named(name).encode(layer)


@pytest.mark.parametrize("name", LOSSY)
def test_other_shapes_and_dtypes_are_refused(name):
    good = torch.ones(4, 1, 4)
    for x in (torch.ones(4, 4), torch.ones(4, 1, 4, dtype=torch.int32), good.double()):
        with pytest.raises(CodecError, match=r"give \[tokens, heads, size\]"):
            codec_named(name).encode(LayerKV(x, good))


@pytest.mark.parametrize("name", CODECS.names())
def test_tensors_that_the_codec_did_not_write_are_refused(name):
    layer = LayerKV(torch.randn(40, 2, 6), torch.randn(40, 2, 6))
    codec = codec_named(name)
    encoded = codec.encode(layer)
    with pytest.raises(CodecError):
        codec.decode(encoded, torch.bfloat16)
    with pytest.raises(CodecError, match="expected"):
        codec.decode({**encoded, "more": layer.k}, torch.float32)
    with pytest.raises(CodecError, match="expected"):
        codec.decode({}, torch.float32)
    if name.startswith("kivi"):
        with pytest.raises(CodecError, match="k_tail"):
            codec.decode({**encoded, "k_tail": encoded["k_tail"][1:]}, torch.float32)


def test_a_record_is_written_with_the_codec_that_is_wanted(make_record: Make):
    record = make_record(range(40), layers=3)
    assert record.is_lossless
    used, encoded = encode_layers(record, "kivi4")
    assert used == "kivi4"
    assert len(encoded) == 3
    decoded = codec_named("kivi4").decode(encoded[2], torch.bfloat16)
    assert torch.equal(decoded.v, once("kivi4", record.layer(2)).v)


def test_what_a_codec_refuses_is_written_lossless(make_record: Make):
    record = make_record(range(40), layers=3)
    record.v[1, 3, 0, 0] = float("inf")
    used, encoded = encode_layers(record, "fp8")
    assert used == "plain"
    assert all(parts.keys() == {"k", "v"} for parts in encoded)


def test_approximate_kv_keeps_its_codec_and_is_written_without_further_loss(make_record: Make):
    record = make_record(range(40))
    read_back = approximate(record, "kivi4")
    assert not read_back.is_lossless
    for wanted in ("plain", "kivi8", "kivi4"):
        used, encoded = encode_layers(read_back, wanted)
        assert used == "kivi4"
        for index, parts in enumerate(encoded):
            again = codec_named(used).decode(parts, torch.bfloat16)
            assert torch.equal(again.k, read_back.layer(index).k)
            assert torch.equal(again.v, read_back.layer(index).v)


def test_approximate_kv_that_its_codec_refuses_is_not_written_as_lossless(make_record: Make):
    record = dataclasses.replace(make_record(range(40)), codec="fp8")
    record.k[0, 0, 0, 0] = float("nan")
    with pytest.raises(CodecError):
        encode_layers(record, "plain")


def test_a_record_remembers_its_codec_when_it_is_copied(make_record: Make):
    record = approximate(make_record(range(40)), "fp8")
    assert dataclasses.replace(record, base_position=9).codec == "fp8"
    assert record.sealed().codec == "fp8"


def test_an_unknown_codec_is_refused_in_one_line(make_record: Make):
    with pytest.raises(ChunkCacheError, match="'zip' is not known; choose one of plain, fp8"):
        dataclasses.replace(make_record(range(4)), codec="zip")
    with pytest.raises(ChunkCacheError, match="'zip' is not known"):
        encode_layers(make_record(range(4)), "zip")


class HalfCodec(Codec):
    """Rounds to bfloat16: a codec of another distribution."""

    name: ClassVar[str] = "half"

    def encode(self, layer):
        return {"k": layer.k.bfloat16(), "v": layer.v.bfloat16()}

    def decode(self, tensors, dtype):
        return LayerKV(tensors["k"].to(dtype), tensors["v"].to(dtype))


def test_a_codec_of_somebody_else_counts_as_lossy_unless_it_says_otherwise(make_record: Make):
    CODECS.register("half", HalfCodec)
    try:
        record = make_record(range(40), dtype=torch.float32)
        assert encode_layers(record, "half")[0] == "half"
        assert not dataclasses.replace(record, codec="half").is_lossless
    finally:
        CODECS.unregister("half")


def approximate(record: ChunkKV, codec: str) -> ChunkKV:
    """The record as it is read back through a codec."""
    read = [once(codec, record.layer(index)) for index in range(record.num_layers)]
    return dataclasses.replace(
        record,
        k=torch.stack([layer.k for layer in read]),
        v=torch.stack([layer.v for layer in read]),
        codec=codec,
    )


def test_a_folder_keeps_the_fact_that_kv_is_approximate(make_record: Make, tmp_path):
    from chunk_cache import StoreFolder

    folder = StoreFolder(tmp_path / "store", create=True)
    exact, rough = make_record(range(40)), approximate(make_record(range(50)), "kivi8")
    for record in (exact, rough):
        assert folder.put(record)
        read = folder.read(record.key)
        assert read is not None
        assert read.is_lossless == record.is_lossless
        assert torch.equal(read.k, record.k)
        assert np.array_equal(read.token_ids, record.token_ids)


def test_memory_keeps_the_full_precision_that_it_has(make_record: Make, make_store):
    record, store = make_record(range(40)), make_store()
    assert store.put(record)
    assert not store.put(approximate(record, "kivi4"))
    with store.borrow(record.key) as held:
        assert held.is_lossless
