"""The loading controller in an engine: `adaptive` recomputes more where loading takes long, and says how much."""

from __future__ import annotations

import pytest
from fusion_helpers import report

from chunk_cache import TIERS
from rag_pipeline.sglang_plugin.fusion.runtime.rates import MEMORY, Rates
from tests.fusion.test_fusion_tiers import FUSE, SlowFolder, opened

ADAPTIVE = FUSE | {"policy": "adaptive", "passage": False}


def ratio_of(req) -> float:
    told = report(req)
    assert told["fallback"] == ""
    assert told["policy"] == "adaptive"
    assert told["reused_tokens"] + told["recomputed_tokens"] > 100
    return told["ratio"]


@pytest.fixture
def below(engine, monkeypatch, tmp_path):
    local = engine("llama")
    monkeypatch.setattr(local.runtime, "rates", Rates())
    with registered_slow(), opened(local, monkeypatch, "slow", tmp_path / "kv") as made:
        yield made
        SlowFolder.layer_s = 0.0


def registered_slow():
    from fusion_helpers import registered

    SlowFolder.opens.set()
    return registered(TIERS, SlowFolder)


def measure(below, times=18):
    """Serve the same prompt from the folder often enough to know how fast it is, and memory and computing too."""
    for _ in range(times):
        below.forget()
        below.ask(**ADAPTIVE)
        below.local.flush()
        below.ask(**ADAPTIVE)  # from memory
        below.local.flush()


def test_the_ratio_rises_where_loading_is_the_longer_part(below):
    rates = below.runtime.rates
    assert ratio_of(below.ask(**ADAPTIVE)) == 0.15  # nothing is known yet
    below.local.flush()
    measure(below)
    assert rates.row_s is not None
    assert rates.load_s(MEMORY, 1) is not None
    memory = ratio_of(below.ask(**ADAPTIVE))
    below.forget()
    disk = ratio_of(below.ask(**ADAPTIVE))
    SlowFolder.layer_s = 0.015
    for _ in range(6):
        below.forget()
        below.ask(**ADAPTIVE)
    below.forget()
    throttled = ratio_of(below.ask(**ADAPTIVE))
    print(f"adaptive chose {memory:.3f} on memory, {disk:.3f} on disk, {throttled:.3f} throttled")
    print(rates.to_json())
    assert memory < throttled <= 0.5
    assert memory <= disk <= throttled
    counts = below.runtime.metrics.to_json()
    assert counts["planned_ratio.count"] == 1  # since memory was emptied
    assert below.runtime.status()["rates"]["bytes_per_s"].keys() == {MEMORY, "slow"}


def test_a_tier_that_takes_longer_than_computing_is_not_read(below):
    for _ in range(16):  # as if measured: 1 s per layer
        below.runtime.rates.note_load("slow", 10_000, 1.0)
        below.runtime.rates.note_forward(100, 0.01)
    below.forget()
    told = report(below.ask(**ADAPTIVE))
    assert below.runtime.fetcher.drain(60)
    assert told["fallback"] == "miss"
    assert told["fresh_tokens"] > 100
    assert below.counts()["too_slow"] == 3
    assert "opened" not in below.counts()
