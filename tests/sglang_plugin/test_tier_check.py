"""Tiers that cannot work end a command before its engine starts; one that is down does not."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from chunk_cache import StoreFolder
from rag_pipeline.errors import EngineError
from rag_pipeline.sglang_plugin.fusion.config import CONFIG_VARIABLE, FusionConfig
from rag_pipeline.sglang_plugin.launch import startup


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def run(**fields: str) -> None:
        monkeypatch.setenv(CONFIG_VARIABLE, FusionConfig(**fields).to_env())  # type: ignore[arg-type]
        startup.check_tiers()

    return run


def test_what_can_never_work_is_one_line(
    check: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, other = tmp_path / "file", tmp_path / "documents"
    file.write_text("text")
    other.mkdir()
    (other / "a.txt").write_text("text")
    for package in ("valkey", "mooncake"):
        monkeypatch.setitem(sys.modules, package, None)
    for fields, told in (
        ({"store_dir": str(file)}, f"{file} is a file"),
        ({"store_dir": str(file / "kv")}, f"{file} is a file"),
        ({"store_dir": str(other)}, "neither empty nor a chunk store"),
        ({"remote": "hicache+NOSUCH://x"}, "no storage backend 'nosuch'"),
        ({"remote": "valkey://localhost"}, "pip install .*valkey"),
        ({"remote": "hicache+mooncake://localhost"}, "pip install .*mooncake"),
    ):
        with pytest.raises(EngineError, match=told) as caught:
            check(**fields)
        assert "\n" not in str(caught.value)


def test_what_may_work_is_let_through_and_nothing_is_made(
    check: Callable[..., None], tmp_path: Path
) -> None:
    StoreFolder(tmp_path / "kv", create=True)
    check(store_dir=str(tmp_path / "kv"))
    check(store_dir=str(tmp_path / "new" / "kv"), remote="valkey://localhost:1")  # nobody is there
    check(remote=f"hicache+file://{tmp_path}/pages")
    assert {path.name for path in tmp_path.iterdir()} == {"kv"}


def test_an_engine_does_not_start_with_one(
    check: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("text")
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(startup, "prepare", lambda: False)
    with pytest.raises(EngineError, match="file is a file"):
        check(store_dir=str(tmp_path / "file"))
    with pytest.raises(EngineError, match="file is a file"):
        startup.create_engine(str(tmp_path))
