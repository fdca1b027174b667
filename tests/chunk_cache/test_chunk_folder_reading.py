"""Files of the folder tier, read layer by layer, whatever happens to them meanwhile."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from chunk_cache import ChunkKV, LayerKV, StoreFolder
from chunk_cache.tiers import encoding
from chunk_cache.tiers.disk import reader as reading
from chunk_cache.tiers.encoding import DamagedRecordError

Make = Callable[..., ChunkKV]


@pytest.fixture
def record(make_record: Make) -> ChunkKV:
    return make_record(range(300), layers=4)


@pytest.fixture
def folder(tmp_path: Path, record: ChunkKV) -> StoreFolder:
    made = StoreFolder(tmp_path / "kv", create=True)
    made.put(record)
    return made


def file_of(folder: StoreFolder, record: ChunkKV) -> Path:
    (path,) = folder.path.rglob(f"{record.key.digest}*.safetensors")
    return path


def same_layer(reader: Any, record: ChunkKV, n: int, start: int = 0, end: int | None = None):
    layer = reader.layer(n, start, end)
    return torch.equal(layer.k, record.k[n, start:end]) and torch.equal(
        layer.v, record.v[n, start:end]
    )


def test_opening_reads_the_header_and_a_layer_reads_its_own_range(
    folder: StoreFolder, record: ChunkKV, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[int, int]] = []
    real = os.preadv

    def seen(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        read.append((offset, offset + sum(map(len, buffers))))
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", seen)
    monkeypatch.setattr(reading, "_FIRST_BYTES", 64)  # the header is longer: read in two steps
    reader = folder.open(record.key, record.token_ids)
    assert reader is not None
    assert read == [(0, 64), (0, reader.header.header_bytes)]
    assert (reader.layout, reader.base_position) == (record.layout, record.base_position)
    assert (reader.num_layers, reader.num_tokens) == (4, 300)
    assert reader.token_ids.tolist() == record.token_ids.tolist()
    for n in (2, 0, 3, 2):
        read.clear()
        assert same_layer(reader, record, n, 7, 41)
        assert read == [reader.header.layer_range(n)]


def test_an_open_file_stays_readable_though_it_is_removed_replaced_or_its_folder_goes(
    folder: StoreFolder, record: ChunkKV
) -> None:
    reader = folder.open(record.key, record.token_ids)
    assert reader is not None
    assert same_layer(reader, record, 0)
    folder.put(record)
    assert same_layer(reader, record, 1)
    StoreFolder(folder.path).remove(record.key)
    assert same_layer(reader, record, 2)
    for path in sorted(folder.path.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.path.rmdir()
    assert same_layer(reader, record, 3)
    reader.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        reader.layer(3)
    assert folder.corrupt_files == 0
    # What is gone is a miss for whoever asks next, and the next write makes the folder again.
    assert folder.open(record.key, record.token_ids) is None
    assert not folder.contains(record.key)
    assert list(folder.keys()) == []
    folder.used([record.key])
    assert folder.put(record)
    assert list(StoreFolder(folder.path).keys()) == [record.key]


def test_files_are_closed_when_nobody_holds_their_reader(
    folder: StoreFolder, record: ChunkKV, make_record: Make
) -> None:
    def opened() -> int:
        links = Path("/proc/self/fd").iterdir()
        return sum(os.path.realpath(link).startswith(str(folder.path)) for link in links)

    before = opened()
    for _ in range(20):
        reader = folder.open(record.key, record.token_ids)
        assert reader is not None
        assert reader.num_layers == 4
        del reader
        assert folder.open(record.key, make_record(range(5)).token_ids) is None
        assert folder.read(record.key) is not None
        assert folder.token_ids(record.key) is not None
        assert folder.verify() == []
    assert opened() == before


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_layer_that_is_damaged_while_it_is_open_is_raised_counted_and_deleted(
    damage: str, folder: StoreFolder, record: ChunkKV, caplog: pytest.LogCaptureFixture
) -> None:
    reader = folder.open(record.key, record.token_ids)
    assert reader is not None
    path = file_of(folder, record)
    folder.pin(record.key)
    start, end = reader.header.layer_range(2)
    if damage == "flip":
        with path.open("r+b") as file:
            file.seek(start)
            byte = file.read(1)[0]
            file.seek(start)
            file.write(bytes([byte ^ 16]))
    else:
        os.truncate(path, end - 1 if damage == "cut" else 0)
    if damage != "empty":
        assert same_layer(reader, record, 1)
    with (
        caplog.at_level(logging.WARNING, "chunk_cache"),
        pytest.raises(DamagedRecordError, match="layer 2"),
    ):
        reader.layer(2)
    assert folder.corrupt_files == 1
    assert "is deleted" in caplog.text
    assert record.key.digest in caplog.text
    assert not path.exists()
    assert not folder.is_pinned(record.key)
    assert not folder.contains(record.key)
    assert list(folder.keys()) == []
    assert folder.put(record)
    assert folder.get(record.key, record.token_ids) is not None


def test_a_good_file_that_took_a_damaged_ones_place_is_not_deleted(
    folder: StoreFolder, record: ChunkKV
) -> None:
    path = file_of(folder, record)
    os.truncate(path, path.stat().st_size - 1)
    again = path.read_bytes()
    path.unlink()
    assert StoreFolder(folder.path).put(record)
    good = path.rename(path.with_suffix(".good"))
    path.write_bytes(again)
    path_of_reader = os.open(path, os.O_RDONLY)
    good.replace(path)
    os.close(path_of_reader)
    reader = folder.open(record.key, record.token_ids)
    assert reader is not None
    reader._damaged(-1)  # as a reader of the file that was there before
    assert folder.corrupt_files == 1
    assert path.exists()


def test_what_the_disk_refuses_to_read_is_a_counted_miss_and_stays(
    folder: StoreFolder, record: ChunkKV, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = folder.open(record.key, record.token_ids)
    assert reader is not None

    def refuse(*_: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", refuse)
        assert folder.open(record.key, record.token_ids) is None
        assert folder.read(record.key) is None
        with pytest.raises(OSError, match="Input/output"):
            reader.layer(0)
    real = os.open

    def forbid(path: Any, *rest: Any, **more: Any) -> int:
        if str(path).endswith(".safetensors"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", forbid)
        assert folder.get(record.key, record.token_ids) is None
        assert folder.token_ids(record.key) is None
    assert (folder.failed_reads, folder.corrupt_files) == (3, 0)
    assert folder.get(record.key, record.token_ids) is not None


def test_a_record_of_a_codec_that_is_not_known_here_is_a_miss_and_stays(
    folder: StoreFolder, record: ChunkKV, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [{"k": layer.k, "v": layer.v} for layer in map(record.layer, range(4))]
    monkeypatch.setattr(encoding, "encode_layers", lambda *_: ("zip", parts))
    assert folder.put(record)
    assert folder.open(record.key, record.token_ids) is None
    assert folder.get(record.key, record.token_ids) is None
    assert folder.verify(remove=True) == []
    assert folder.contains(record.key)
    assert folder.corrupt_files == 0


def empty_layer(record: ChunkKV) -> LayerKV:
    return LayerKV(torch.full_like(record.k[0], 7.0), torch.full_like(record.v[0], 7.0))


def test_a_layer_is_read_straight_into_its_place(folder: StoreFolder, record: ChunkKV) -> None:
    reader = folder.open(record.key, record.token_ids)
    assert reader is not None
    for n in (2, 0):
        place = empty_layer(record)
        assert reader.layers_into(n, [place])
        assert torch.equal(place.k, record.k[n])
        assert torch.equal(place.v, record.v[n])


def test_layers_are_read_together_though_a_call_brings_little(
    folder: StoreFolder, record: ChunkKV, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = folder.open(record.key, record.token_ids)
    assert reader is not None
    preadv = os.preadv

    def little(descriptor: int, views: Any, at: int) -> int:
        return preadv(descriptor, [views[0][:1000]], at)

    monkeypatch.setattr(os, "preadv", little)
    places = [empty_layer(record) for _ in range(3)]
    assert reader.layers_into(1, places)
    for n, place in enumerate(places, 1):
        assert torch.equal(place.k, record.k[n])
        assert torch.equal(place.v, record.v[n])


def test_what_is_stored_otherwise_is_not_read_straight(
    tmp_path: Path, folder: StoreFolder, record: ChunkKV
) -> None:
    encoded = StoreFolder(tmp_path / "fp8", create=True, codec="fp8")
    encoded.put(record)
    shorter = LayerKV(*(part[:-1] for part in empty_layer(record)))
    other_type = LayerKV(*(part.half() for part in empty_layer(record)))
    for source, place in (
        (encoded, empty_layer(record)),
        (folder, shorter),
        (folder, other_type),
        (folder, LayerKV(*(part[:, ::2].repeat(1, 2, 1)[:, ::2] for part in empty_layer(record)))),
    ):
        reader = source.open(record.key, record.token_ids)
        assert reader is not None
        assert not reader.layers_into(1, [place])
        assert all(bool((part == 7.0).all()) for part in place)


@pytest.mark.parametrize("at", ["k", "v"])
def test_damage_is_seen_when_a_layer_is_read_straight(
    folder: StoreFolder, record: ChunkKV, at: str
) -> None:
    reader = folder.open(record.key, record.token_ids)
    assert reader is not None
    one = next(tensor for tensor in reader.header.tensors[3] if tensor.name == at)
    path = file_of(folder, record)
    data = bytearray(path.read_bytes())
    data[one.end - 1] ^= 1
    with path.open("r+b") as file:
        file.write(data)
    assert reader.layers_into(2, [empty_layer(record)])
    with pytest.raises(DamagedRecordError, match="layer 3"):
        reader.layers_into(3, [empty_layer(record)])
    assert not path.exists()
    assert folder.corrupt_files == 1


def test_a_file_that_was_cut_is_damaged_when_a_layer_is_read_straight(
    folder: StoreFolder, record: ChunkKV
) -> None:
    reader = folder.open(record.key, record.token_ids)
    assert reader is not None
    os.truncate(file_of(folder, record), reader.header.layer_range(3)[0] + 5)
    place = LayerKV(record.k[3].clone(), record.v[3].clone())
    place.v[-1] += 1  # what is not overwritten is not what was written
    with pytest.raises(DamagedRecordError):
        reader.layers_into(3, [place])
