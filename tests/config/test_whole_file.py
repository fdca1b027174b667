"""Text files that appear whole: written beside, synced, renamed, and their names synced too."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from rag_pipeline.whole_file import write_whole


def test_a_file_and_the_names_of_all_that_is_new_are_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def note_sync(descriptor: int) -> None:
        place = Path(f"/proc/self/fd/{descriptor}").readlink()
        done.append(f"sync {place.relative_to(tmp_path).as_posix()}")
        fsync(descriptor)

    def note_rename(source: Path, target: Any) -> Path:
        done.append("rename")
        return replace(source, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(Path, "replace", note_rename)
    write_whole(tmp_path / "new" / "sub" / "a.json", "{}")
    temporary = f"sync new/sub/.a.json.{os.getpid()}.tmp"
    assert done == [temporary, "rename", "sync new/sub", "sync new", "sync ."]
    done.clear()
    write_whole(tmp_path / "new" / "sub" / "a.json", "[]")
    assert done == [temporary, "rename", "sync new/sub"]
    assert [path.name for path in (tmp_path / "new" / "sub").iterdir()] == ["a.json"]
