"""A folder that cannot be looked through for deleted text: said in one line, and the others are looked through."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from erasing import CONTEXT, SECRET, texts

from chunk_cache import ChunkKV, StoreFolder, TextMarks
from chunk_cache.tiers import guard
from rag_pipeline.erasure import erase_folder, make_eraser
from retrievers import StorageError, delete_documents

EVERYTHING = TextMarks({}, everything=True)


def manifest_of(folder: Path) -> Path:
    return folder / "store.json"


def test_a_folder_that_hangs_keeps_no_other_waiting(
    home: Path,
    index: Path,
    store: StoreFolder,
    smollm2_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hung = StoreFolder(home / "hung", create=True).path
    manifest_of(hung).unlink()
    os.mkfifo(manifest_of(hung))  # opening it for reading waits for a writer, for ever
    monkeypatch.setattr(guard, "CONNECT_S", 0.5)
    kept = home / "kept"
    store.path.rename(kept)
    try:
        with pytest.raises(StorageError, match="no answer"):
            delete_documents(index, ["a"], erase=make_eraser(hung, kept))
    finally:
        os.close(os.open(manifest_of(hung), os.O_RDWR))
    assert SECRET[10:60] not in texts(StoreFolder(kept), smollm2_path)


@pytest.mark.parametrize("version", [99, "of another kind"])
def test_a_store_that_this_release_cannot_read_is_not_passed_over_in_silence(
    version: object, store: StoreFolder
) -> None:
    path = manifest_of(store.path)
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {"version": version}))
    with pytest.raises(OSError, match="was not looked through for deleted text"):
        erase_folder(store.path, EVERYTHING)
    path.write_text("{")
    with pytest.raises(OSError, match="was not looked through for deleted text"):
        erase_folder(store.path, EVERYTHING)


def test_a_store_of_an_older_format_is_emptied(store: StoreFolder) -> None:
    files = list(store.path.rglob("*.safetensors"))
    assert files
    path = manifest_of(store.path)
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {"version": 1}))
    erase_folder(store.path, TextMarks.of([(SECRET, [])]))
    assert not list(store.path.rglob("*.safetensors"))


def test_what_is_no_store_is_left_alone(tmp_path: Path, store: StoreFolder) -> None:
    manifest_of(tmp_path).write_text('{"format": "photographs", "version": 7}')
    assert erase_folder(tmp_path, EVERYTHING) == 0
    assert erase_folder(tmp_path / "absent", EVERYTHING) == 0
    assert erase_folder(manifest_of(tmp_path), EVERYTHING) == 0
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["store.json"]


def test_another_users_store_is_not_passed_over_in_silence(
    store: StoreFolder, record: Callable[..., ChunkKV], monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put(record(SECRET), context=CONTEXT)
    read_bytes = Path.read_bytes

    def refuse(path: Path) -> bytes:
        if path == manifest_of(store.path):
            raise PermissionError(13, "Permission denied", str(path))
        return read_bytes(path)

    manifest_of(store.path).chmod(0)
    if os.geteuid() == 0:  # who may read everything
        monkeypatch.setattr(Path, "read_bytes", refuse)
    try:
        with pytest.raises(OSError, match="Permission denied"):
            erase_folder(store.path, EVERYTHING)
    finally:
        manifest_of(store.path).chmod(stat.S_IRUSR | stat.S_IWUSR)
