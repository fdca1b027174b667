"""An engine whose only tier is a store that several servers share; no model runs here."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from valkey_server import Server, free_port

from chunk_cache import Candidate, ChunkKey, ChunkKV, KVContext, RecordForm
from chunk_cache.tiers.remote.connect import connect_remote
from rag_pipeline.sglang_plugin.fusion.builds import persistence
from rag_pipeline.sglang_plugin.fusion.config import FusionConfig
from rag_pipeline.sglang_plugin.fusion.runtime.runtime import FusionRuntime

FIELDS = {
    "model_fingerprint": "tiny",
    "dtype": "bfloat16",
    "kv_dtype": "bfloat16",
    "rope": "{}",
}
CONTEXT = KVContext(**FIELDS, prefix_digest="none")


def a_record() -> ChunkKV:
    ids = np.arange(8, dtype=np.int32)
    k = torch.randn(2, 8, 2, 4)
    return ChunkKV(key=ChunkKey.of(CONTEXT, ids), token_ids=ids, base_position=0, k=k, v=k.clone())


def start(port: int, record: ChunkKV) -> FusionRuntime:
    url = f"valkey://127.0.0.1:{port}?timeout=5"
    facts: Any = SimpleNamespace(context_fields=FIELDS)
    runtime = FusionRuntime(dataclasses.replace(FusionConfig(), remote=url), facts)
    assert runtime.is_on
    runtime.record_form = RecordForm.of(record)
    persistence.start_tiers(runtime, "no-model")
    return runtime


@pytest.mark.parametrize("is_up", [True, False])
def test_it_is_asked_when_a_chunk_is_missed_and_not_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_up: bool
) -> None:
    """What all servers have is too much to be read at a start, and the store may come up later."""
    monkeypatch.setenv("RAG_PIPELINE_HOME", str(tmp_path / "home"))
    record, server = a_record(), Server(tmp_path)
    try:
        tier = connect_remote(server.url + "?timeout=5", byte_budget=1 << 30, model="")
        assert tier.put(record, context=CONTEXT)
        runtime = start(server.port if is_up else free_port(), record)
        assert not runtime.store.keys()
        assert runtime.tiers is not None
        assert runtime.fetcher is not None
        runtime.fetcher.begin([[Candidate(record.key, record.token_ids, CONTEXT, "")]])
        assert runtime.fetcher.drain(60)
        assert runtime.store.keys() == [record.key] * is_up
        assert runtime.fetcher.close(60)
        assert runtime.tiers.close(60)
    finally:
        server.kill()
