"""Records as bytes: a safetensors file of which no byte may change unseen, and of which one layer can be read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load

from chunk_cache import ChunkCacheError, ChunkKey, ChunkKV
from chunk_cache.tiers import encoding, record_header
from chunk_cache.tiers.encoding import (
    DamagedRecordError,
    decode_layer,
    decode_record,
    encode_record,
    header_size,
    read_header,
)

Make = Callable[..., ChunkKV]

anything = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def whole(record: ChunkKV) -> bytes:
    return b"".join(encode_record(record).parts)


def is_same(one: ChunkKV | None, other: ChunkKV) -> bool:
    return (
        one is not None
        and one.key == other.key
        and one.tokens_equal(other.token_ids)
        and one.base_position == other.base_position
        and one.layout == other.layout
        and one.k.dtype == other.k.dtype
        and torch.equal(one.k, other.k)
        and torch.equal(one.v, other.v)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("tokens", [1, 19])
def test_a_record_is_a_safetensors_file_and_comes_back_bit_equal(
    make_record: Make, dtype: torch.dtype, tokens: int
) -> None:
    record = make_record(range(tokens), layers=3, dtype=dtype)
    encoded = encode_record(record)
    data = whole(record)
    assert encoded.num_bytes == len(data)
    tensors = load(data)  # the library's own reader
    assert tensors.pop("token_ids").tolist() == record.token_ids.tolist()
    assert set(tensors) == {f"layer.{n}.{part}" for n in range(3) for part in "kv"}
    for n in range(3):
        assert torch.equal(tensors[f"layer.{n}.k"], record.k[n])
        assert torch.equal(tensors[f"layer.{n}.v"], record.v[n])
    for kind in (bytes, bytearray, memoryview):
        assert is_same(decode_record(record.key, kind(data)), record)


def test_the_header_alone_says_what_the_record_is_and_where_its_layers_lie(
    make_record: Make,
) -> None:
    record = make_record(range(19), layers=3)
    encoded = encode_record(record)
    assert header_size(record.key, encoded.header[:8]) == len(encoded.header)
    header = read_header(record.key, encoded.header)
    assert header is not None
    assert (header.key, header.base_position, header.layout) == (record.key, 5, "heads")
    assert (header.codec, header.dtype, header.can_decode) == ("plain", torch.bfloat16, True)
    assert (header.num_layers, header.num_tokens) == (3, 19)
    assert header.token_ids.tolist() == list(range(19))
    assert (header.header_bytes, header.num_bytes) == (len(encoded.header), encoded.num_bytes)
    data = whole(record)
    for n in range(3):
        start, end = header.layer_range(n)
        assert data[start:end] == encoded.layers[n]
        layer = decode_layer(header, n, data[start:end])
        assert torch.equal(layer.k, record.k[n])
        assert torch.equal(layer.v, record.v[n])
        for bad in (
            encoded.layers[(n + 1) % 3],
            data[start : end - 1],
            b"",
            data[start:end] + b"x",
        ):
            with pytest.raises(DamagedRecordError, match=f"layer {n} is damaged"):
                decode_layer(header, n, bad)


def test_no_bit_of_a_header_can_change_unseen(make_record: Make) -> None:
    record = make_record(range(19))
    good = encode_record(record).header
    assert read_header(record.key, good) is not None
    for at in range(len(good)):
        for bit in range(8):
            bad = bytearray(good)
            bad[at] ^= 1 << bit
            assert read_header(record.key, bad) is None, (at, bit)


@anything
@given(data=st.data())
def test_any_flipped_bits_anywhere_are_a_miss(make_record: Make, data: st.DataObject) -> None:
    record = make_record(range(19))
    bad = bytearray(whole(record))
    places = data.draw(st.sets(st.integers(0, 8 * len(bad) - 1), min_size=1, max_size=4))
    for place in places:
        bad[place // 8] ^= 1 << place % 8
    assert decode_record(record.key, bad) is None


def test_a_record_that_ends_early_or_goes_on_is_a_miss(make_record: Make) -> None:
    record = make_record(range(19))
    good = whole(record)
    for end in range(len(good)):
        assert decode_record(record.key, good[:end]) is None
    assert decode_record(record.key, good + b"\0") is None


def test_a_length_that_a_flipped_bit_made_huge_asks_for_no_memory(make_record: Make) -> None:
    record = make_record(range(19))
    with pytest.raises(DamagedRecordError, match="does not begin"):
        header_size(record.key, (1 << 40).to_bytes(8, "little"))
    with pytest.raises(DamagedRecordError, match="does not begin"):
        header_size(record.key, b"short")


def test_another_keys_record_is_a_miss(make_record: Make) -> None:
    one, two = make_record(range(19)), make_record(range(5, 24))
    assert read_header(one.key, whole(two)) is None
    assert decode_record(one.key, whole(two)) is None
    elsewhere = ChunkKey.of("ab" * 16, one.token_ids)
    assert decode_record(elsewhere, whole(one)) is None


@pytest.mark.parametrize("field", ["format", "version", "namespace", "digest", "num_tokens"])
def test_an_identity_that_is_written_wrong_is_a_miss_though_its_checksum_is_right(
    field: str, make_record: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = make_record(range(19))
    write = encoding.write_header

    def wrong(metadata: dict[str, str], *rest: Any) -> bytes:
        with monkeypatch.context() as patch:
            if field == "format":
                patch.setattr(record_header, "STORE_FORMAT", "another")
            elif field == "version":
                patch.setattr(record_header, "STORE_FORMAT_VERSION", 99)
            return write({**metadata, **({field: "7"} if field in metadata else {})}, *rest)

    monkeypatch.setattr(encoding, "write_header", wrong)
    bad = whole(record)
    monkeypatch.undo()
    assert len(load(bad)) == 5
    assert read_header(record.key, bad) is None


def test_a_record_that_this_release_cannot_decode_is_known_as_one(
    make_record: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = make_record(range(19))
    with pytest.raises(ChunkCacheError, match="'zip'"):
        encode_record(record, "zip")
    parts = [{"k": layer.k, "v": layer.v} for layer in map(record.layer, range(2))]
    monkeypatch.setattr(encoding, "encode_layers", lambda record, wanted: (wanted, parts))
    data = b"".join(encode_record(record, "zip").parts)
    header = read_header(record.key, data)
    assert header is not None
    assert not header.can_decode
    assert decode_record(record.key, data) is None


def test_tensors_of_any_width_lie_aligned_and_come_back(
    make_record: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = make_record(range(19), dtype=torch.float32)
    parts = {
        "a": torch.arange(7, dtype=torch.uint8),
        "b": torch.arange(3, dtype=torch.float64),
        "c": torch.zeros(0, 4),
        "d": torch.ones(5).to(torch.float8_e4m3fn),
        "e": torch.tensor(3, dtype=torch.int16),
    }
    seen: dict[str, torch.Tensor] = {}

    class Odd:
        def decode(self, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> object:
            seen.update(tensors)
            return record.layer(0)

    monkeypatch.setattr(encoding, "encode_layers", lambda *_: ("plain", [parts] * 2))
    monkeypatch.setattr(encoding, "codec_named", lambda name: Odd())
    data = whole(record)
    assert len(load(data)) == 11
    header = read_header(record.key, data)
    assert header is not None
    decode_layer(header, 1, data[slice(*header.layer_range(1))])
    for name, tensor in parts.items():
        assert (seen[name].dtype, seen[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(seen[name].view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8))
        assert seen[name].data_ptr() % tensor.element_size() == 0
    monkeypatch.setattr(Odd, "decode", lambda *_: make_record(range(9)).layer(0))
    with pytest.raises(DamagedRecordError, match="decodes to"):
        decode_layer(header, 0, data[slice(*header.layer_range(0))])


def test_a_sealed_record_that_changed_in_memory_is_not_written(make_record: Make) -> None:
    record = make_record(range(19)).sealed()
    assert is_same(decode_record(record.key, whole(record)), record)
    record.k[1, 2, 0, 0] += 1
    with pytest.raises(DamagedRecordError, match="changed in memory"):
        encode_record(record)
    assert encode_record(dataclasses.replace(record, checksum=None)).num_bytes > 0


def test_what_is_stored_as_it_is_is_not_copied(make_record: Callable[..., ChunkKV]) -> None:
    record = make_record(range(40), layers=3)
    pieces = encode_record(record).pieces
    for layer, (k, v) in enumerate(pieces):
        assert np.frombuffer(k, np.uint8).ctypes.data == record.k[layer].data_ptr()
        assert np.frombuffer(v, np.uint8).ctypes.data == record.v[layer].data_ptr()
    assert b"".join(pieces[1]) == encode_record(record).layers[1]
