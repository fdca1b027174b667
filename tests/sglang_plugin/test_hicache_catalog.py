"""The catalog of a HiCache backend: lists of conversations, which nobody ever takes away."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from chunk_cache import ChunkKey
from rag_pipeline.sglang_plugin.hicache import catalog as module
from rag_pipeline.sglang_plugin.hicache.catalog import Catalog


def key_of(number: int) -> ChunkKey:
    return ChunkKey(32 * "a", f"{number:064x}", 30)


def test_the_lists_that_were_noted_longest_ago_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MOST_GROUPS", 32)
    catalog = Catalog(tmp_path)
    names = [f"{number:032x}" for number in range(32)]
    for age, name in enumerate(names):
        catalog.note_member(name, key_of(age))
        os.utime(tmp_path / "groups" / name, (age, age))
    catalog.note_member(names[0], key_of(100))  # known: nothing goes for it, and it is the newest
    assert len(list((tmp_path / "groups").iterdir())) == 32
    catalog.note_member(32 * "f", key_of(101))
    assert catalog.members(32 * "f") == [key_of(101)]
    assert [bool(catalog.members(name)) for name in names[:4]] == [True, False, False, True]


def test_a_removal_waits_for_no_list_of_a_conversation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What makes a record exist is its header: only its folder has to reach the disk."""
    catalog, synced = Catalog(tmp_path), []
    catalog.add(key_of(1), b"header", "label")
    catalog.note_member(32 * "f", key_of(1))
    monkeypatch.setattr(module, "sync_folder", synced.append)
    assert catalog.remove(key_of(1))
    catalog.sync()
    assert synced == [tmp_path / (32 * "a") / "00", tmp_path]
