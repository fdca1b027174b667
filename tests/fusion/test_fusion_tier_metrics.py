"""What ``/metrics`` says of the tiers: real tiers, SGLang's multi-process folder, prometheus' own parser."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families
from valkey_server import Server

SCHEDULER = """
import sys, numpy as np, torch
from types import SimpleNamespace
from chunk_cache import Candidate, ChunkKey, ChunkKV, KVContext, RecordForm, StoreFolder
from chunk_cache.tiers.remote.connect import connect_remote
from rag_pipeline.sglang_plugin.fusion.builds import persistence
from rag_pipeline.sglang_plugin.fusion.builds.erased import ErasedText
from rag_pipeline.sglang_plugin.fusion.config import FusionConfig
from rag_pipeline.sglang_plugin.fusion.runtime.metrics import FusionMetrics
from rag_pipeline.sglang_plugin.fusion.runtime.runtime import FusionRuntime

folder, url = sys.argv[1:]
context = KVContext(model_fingerprint="m", dtype="float32", kv_dtype="float32", rope="{}", prefix_digest="d")
runtime = FusionRuntime(FusionConfig(store_dir=folder, remote=url), None)
runtime.metrics = FusionMetrics(export=True, labels={"model_name": "m"})
runtime.erased = ErasedText(runtime, "")
empty = torch.zeros(2, 0, 2, 8)
runtime.record_form = RecordForm("heads", empty, empty)
tiers = {
    "disk": StoreFolder(folder, create=True),
    "remote": connect_remote(url, byte_budget=1 << 20, model=""),
}
persistence._start(runtime, tiers)

def record(first, tokens=70):
    ids = np.arange(first, first + tokens, dtype=np.int32)
    kv = torch.randn(2, tokens, 2, 8)
    return ChunkKV(key=ChunkKey.of(context, ids), token_ids=ids, base_position=0, k=kv, v=kv.clone())

one = record(0)
assert runtime.tiers.put(one, context=context) and runtime.tiers.drain(60)
tiers["disk"].remove(one.key)
candidate = Candidate(one.key, one.token_ids, context, "")
absent = record(500)
for wanted in (candidate, Candidate(absent.key, absent.token_ids, context, "")):
    (fetch,) = runtime.fetcher.begin([[wanted]])
    assert runtime.fetcher.wait(lambda: fetch.is_ended, 60)
assert runtime.tiers.drain(60)
for link in runtime.tiers._links:
    link.writer._queue_bytes = 10  # nothing fits any more
assert not runtime.tiers.put(record(900), context=context)
persistence._show_queues(runtime)
runtime.metrics.show_store(runtime.store.stats())
"""


def test_a_scrape_tells_hits_bytes_seconds_queue_and_drops_per_tier(tmp_path: Path) -> None:
    server = Server(tmp_path, "--requirepass", "hunter22")
    folder = tmp_path / "metrics"
    folder.mkdir()
    environment = os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(folder)}
    url = f"{server.url.replace('//', '//:hunter22@')}?timeout=5"
    words = ["-c", SCHEDULER, str(tmp_path / "kv"), url]
    try:
        subprocess.run([sys.executable, *words], env=environment, check=True, timeout=300)
    finally:
        server.kill()
    scrape = """
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
registry = CollectorRegistry()
MultiProcessCollector(registry)
print(generate_latest(registry).decode())
"""
    told = subprocess.run(
        [sys.executable, "-c", scrape], env=environment, check=True, capture_output=True, text=True
    ).stdout
    values = {
        (sample.name, sample.labels["tier"], sample.labels["kind"]): sample.value
        for family in text_string_to_metric_families(told)
        for sample in family.samples
        if "tier" in sample.labels
    }

    def count(kind: str, tier: str, family: str = "tiers_total") -> float:
        return values.get((f"rag_fusion:{family}", tier, kind), 0.0)

    size = 2 * 2 * 70 * 2 * 8 * 4
    # The disk lost the record: a miss there, a hit below, and it is written back; another one is nowhere.
    assert [count(kind, "disk") for kind in ("hit", "miss", "written", "dropped")] == [0, 2, 2, 1]
    assert [count(kind, "remote") for kind in ("hit", "miss", "written", "dropped")] == [1, 1, 1, 1]
    assert count("fetched", "remote") == 1
    assert count("read", "remote", "tier_bytes_total") == size
    assert count("written", "disk", "tier_bytes_total") >= 2 * size
    assert count("read", "remote", "tier_seconds_total") > 0
    assert count("written", "disk", "tier_seconds_total") > 0
    for tier in ("disk", "remote"):
        for kind in ("records", "bytes"):
            assert values["rag_fusion:tier_queue", tier, kind] == 0
    assert count("stored", "memory") == 1
    assert "hunter22" not in told
