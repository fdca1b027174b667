"""An index, and chunk KV of its texts on the disk; KV is zeros, since nobody reads it here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from erasing import CONTEXT, OTHER, SECRET, SHARED, put

from chunk_cache import ChunkKey, ChunkKV, KVContext, StoreFolder
from retrievers import (
    HFTokenizer,
)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RAG_PIPELINE_HOME", str(tmp_path / "home"))
    return tmp_path


@pytest.fixture
def index(home: Path) -> Path:
    put(home / "index", {"a": f"{SECRET}\n{SHARED}", "b": f"{OTHER}\n{SHARED}"})
    return home / "index"


@pytest.fixture
def record(smollm2_path: Path) -> Callable[..., ChunkKV]:
    tokenizer = HFTokenizer(smollm2_path)

    def make(text: str, context: KVContext = CONTEXT) -> ChunkKV:
        ids = np.array(tokenizer.encode(text), dtype=np.int32)
        kv = torch.zeros(1, len(ids), 1, 2)
        return ChunkKV(
            key=ChunkKey.of(context, ids), token_ids=ids, base_position=0, k=kv, v=kv.clone()
        )

    return make


@pytest.fixture
def store(home: Path, smollm2_path: Path, record: Callable[..., ChunkKV]) -> StoreFolder:
    """Records as prompts make them: under a title, cut elsewhere, with a question behind."""
    folder = StoreFolder(home / "kv", create=True, model=str(smollm2_path))
    for text in (
        f"[a]\n{SECRET}\n\n",
        f"[a]\n{SHARED}\n\n",
        f"[b]\n{OTHER}\n\n",
        SECRET[10:60],
        f"What is the code?\n{OTHER} {SECRET}",
    ):
        folder.put(record(text), context=CONTEXT)
    return folder
