"""Shared by the tests of settings: nothing of the user's own is in force."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rag_pipeline.config import HOME_VARIABLE


@pytest.fixture(autouse=True)
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty working folder and user folder, and no variable of ours but the home."""
    for name in [name for name in os.environ if name.startswith("RAG_PIPELINE_")]:
        if name != HOME_VARIABLE:
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "user"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
