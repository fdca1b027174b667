"""Rates that are measured while serving, and what is decided by them: the ratio, and whether a tier is asked."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from chunk_cache import ChunkKV, KVContext, LayerKV, LoadingChunk, Patience
from chunk_cache.policies import create_policy
from rag_pipeline.sglang_plugin.fusion.admission.costs import RankCost, agree, estimate
from rag_pipeline.sglang_plugin.fusion.forward.plan import make_layout
from rag_pipeline.sglang_plugin.fusion.request.attempt import ReuseCost
from rag_pipeline.sglang_plugin.fusion.runtime.device_timer import DeviceTimer
from rag_pipeline.sglang_plugin.fusion.runtime.rates import LEAST_ROWS, MEMORY, Rates

MB = 1 << 20


def measured(row_s: float = 0.001, times: int = 16, **mb_s: float) -> Rates:
    """Rates of an engine that computed 100 rows and read 1 MB of every tier so often."""
    rates = Rates()
    for _ in range(times):
        rates.note_forward(100, 100 * row_s)
        for tier, each in mb_s.items():
            rates.note_load(tier, MB, each)
    return rates


def test_a_rate_is_the_amount_over_the_seconds():
    rates = measured(0.25, disk=0.5)
    assert rates.row_s == pytest.approx(0.25)
    assert rates.load_s("disk", 3 * MB) == pytest.approx(1.5)
    assert rates.load_s("disk", 0) == 0.0
    assert rates.to_json() == {"rows_per_s": 4.0, "bytes_per_s": {"disk": 2 * MB}}


def test_nothing_is_said_without_evidence():
    rates = measured(times=15, disk=0.5)
    assert rates.row_s is None
    assert rates.load_s("disk", MB) is None
    assert rates.load_s("remote", MB) is None
    assert rates.is_worth_loading("disk", 1000 * MB, 1)
    assert rates.to_json() == {"rows_per_s": None, "bytes_per_s": {}}


def test_small_forwards_say_nothing_about_rows():
    rates = Rates()
    for _ in range(100):
        rates.note_forward(LEAST_ROWS - 1, 1.0)
    assert rates.row_s is None


def test_old_measurements_are_forgotten_slowly():
    rates = measured(disk=1.0, times=300)
    rates.note_load("disk", MB, 100.0)
    assert 1.2 < rates.load_s("disk", MB) < 2.0  # one hiccup
    for _ in range(3000):
        rates.note_load("disk", MB, 0.1)
    assert rates.load_s("disk", MB) == pytest.approx(0.1, rel=0.01)


def test_what_takes_longer_to_load_than_to_compute_is_left_there():
    rates = measured(0.001, disk=0.1)
    assert rates.is_worth_loading("disk", 2 * MB, 200)  # 0.2 s either way
    assert not rates.is_worth_loading("disk", 3 * MB, 200)
    assert rates.is_worth_loading("disk", 3 * MB, 200, parallel=2)
    assert rates.is_worth_loading("disk", MB // 4, 1)  # too little to decide about
    assert rates.is_worth_loading("remote", 3 * MB, 200)


def test_a_tier_that_was_refused_is_tried_now_and_then():
    rates = measured(0.001, disk=10.0)
    tried = [rates.is_worth_loading("disk", MB, 10) for _ in range(64)]
    assert tried.count(True) == 2


def test_the_faster_tier_is_asked_first():
    assert measured(disk=1.0, remote=2.0).by_cost(["disk", "remote"]) == ["disk", "remote"]
    slow = measured(disk=2.0, remote=1.0)
    orders = [slow.by_cost(["disk", "remote"]) for _ in range(64)]
    assert orders.count(["remote", "disk"]) == 62  # the others look whether it still is so
    assert measured(disk=2.0).by_cost(["disk", "remote"]) == ["disk", "remote"]
    assert slow.by_cost(["disk"]) == ["disk"]


def test_the_host_is_timed_at_once():
    told: list[float] = []
    timer = DeviceTimer(False)
    timer.end(timer.begin(), told.append)
    assert len(told) == 1
    assert told[0] >= 0


# -- what a request's chunks cost -------------------------------------------------------------


@pytest.fixture
def record() -> ChunkKV:
    from chunk_cache import ChunkKey, as_token_ids

    ids = as_token_ids(range(64))
    context = KVContext(
        model_fingerprint="m", dtype="float32", kv_dtype="float32", rope="{}", prefix_digest="p"
    )
    k = torch.zeros(4, 64, 8, 64)
    return ChunkKV(
        key=ChunkKey.of(context, ids), token_ids=ids, base_position=0, k=k, v=k[..., :0].clone()
    )


def span(record: ChunkKV | LoadingChunk, start: int = 0, end: int = 64) -> SimpleNamespace:
    return SimpleNamespace(start=start, end=end, lease=SimpleNamespace(record=record))


def test_a_span_costs_what_its_tier_and_memory_take_for_it(record):
    assert record.k.nbytes == MB // 2
    runtime = SimpleNamespace(
        rates=measured(memory=0.02, disk=0.4), fetcher=SimpleNamespace(num_threads=2)
    )
    (whole,) = estimate(runtime, [span(record)], ["a"]).loads.values()
    assert whole == pytest.approx(0.01)
    (half,) = estimate(runtime, [span(record, 10, 42)], ["a"]).loads.values()
    assert half == pytest.approx(0.005)
    loading = LoadingChunk(record, Patience(1.0), source="disk")
    (all_missing,) = estimate(runtime, [span(loading)], ["a"]).loads.values()
    assert all_missing == pytest.approx(0.21)
    loading.fill(0, LayerKV(*record.layer(0)))
    (rest,) = estimate(runtime, [span(loading)], ["a"]).loads.values()
    assert rest == pytest.approx(0.16)
    two = estimate(runtime, [span(loading), span(loading), span(record)], ["a", "b", "c"]).loads
    assert list(two.values()) == pytest.approx([0.085, 0.085, 0.01])  # two threads read
    unknown = LoadingChunk(record, Patience(1.0), source="remote")
    assert list(estimate(runtime, [span(unknown)], ["a"]).loads.values()) == [None]


def test_all_ranks_wait_for_the_slowest():
    costs = [RankCost(0.1, {"a": 1.0, "b": 5.0, "c": 9.0}), RankCost(0.3, {"a": 2.0, "b": 4.0})]
    assert agree(costs, {"a", "b"}) == ReuseCost(row_s=0.3, load_s=7.0)
    assert agree(costs, set()) is None
    assert agree([*costs, RankCost(None, {"a": 1.0, "b": 1.0})], {"a", "b"}) is None
    assert agree([*costs, RankCost(0.1, {"a": 1.0, "b": None})], {"a", "b"}) is None


@pytest.mark.parametrize(
    ("tier", "layer_s", "ratio"),
    [(MEMORY, 0.02, 0.15), ("disk", 0.4, 0.25), ("throttled", 2.0, 0.5)],
)
def test_the_ratio_is_what_hides_behind_loading(tier, layer_s, ratio):
    """1 MB to load, 200 tokens of 8 ms to compute: ``r = T_load / T_prefill``."""
    rates = measured(0.008, **{tier: layer_s})
    cost = ReuseCost(row_s=rates.row_s, load_s=rates.load_s(tier, MB))
    layout = make_layout(
        [(20, 120), (130, 230)],
        num_layers=10,
        prompt_len=250,
        radix_len=20,
        exact_len=20,
        qkv_share=0.1,
        cost=cost,
    )
    assert layout.prefill_s == pytest.approx(1.6)
    assert layout.load_s == pytest.approx(layer_s)
    assert create_policy("adaptive").planned_ratio(layout) == pytest.approx(ratio)
    assert create_policy("epic:0.3").planned_ratio(layout) == 0.3
