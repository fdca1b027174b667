"""The self-check passes on sound code, refuses every fault of the path that serves, and turns fusion off for good."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from chunk_cache.policies.signals import AttentionSignal, draft
from rag_pipeline.sglang_plugin.fusion.forward import fused_forward, fused_item, loader, scratch
from rag_pipeline.sglang_plugin.fusion.forward import layer_pass as attention
from rag_pipeline.sglang_plugin.fusion.self_check.check import SelfCheckError, run_self_check
from rag_pipeline.sglang_plugin.fusion.startup import prove

NAMES = {"rotation", "own_place", "ratio_1", "moved", "probed"}


def wrong_sign(monkeypatch):
    original = loader.plan_span_load

    def plan(slots, deltas, spec):
        return original(slots, [-delta for delta in deltas], spec)

    monkeypatch.setattr(loader, "plan_span_load", plan)


def wrong_delta(monkeypatch):
    original = loader.LoadItem

    def item(**fields):
        return original(**fields | {"delta": fields["delta"] + bool(fields["delta"])})

    monkeypatch.setattr(fused_forward, "LoadItem", item)


def one_layer_left_out(monkeypatch):
    original = loader.Loader.ensure

    def ensure(self, layer_id, k_pool, v_pool):
        if layer_id != 3:
            original(self, layer_id, k_pool, v_pool)

    monkeypatch.setattr(loader.Loader, "ensure", ensure)


def one_token_off(monkeypatch):
    original = loader.LoadItem

    def item(**fields):
        return original(**fields | {"slots": fields["slots"].roll(1)})

    monkeypatch.setattr(fused_forward, "LoadItem", item)


def wrong_mask(monkeypatch):
    original = attention.FusedPass.run_layer

    def run_layer(self, layer, pool, q, k, v, **more):
        out = original(self, layer, pool, q, k, v, **more)
        return out if layer.layer_id else out.roll(1, 0)

    monkeypatch.setattr(attention.FusedPass, "run_layer", run_layer)


def negate(monkeypatch, *fields):
    original = fused_forward.plan_mean_shift

    def plan(*args, **kwargs):
        made = original(*args, **kwargs)
        return dataclasses.replace(made, **{field: -getattr(made, field) for field in fields})

    monkeypatch.setattr(fused_forward, "plan_mean_shift", plan)


def shift_the_other_way(monkeypatch):
    negate(monkeypatch, "weights")


def shift_of_keys_that_stay_rotated(monkeypatch):
    negate(monkeypatch, "probe_sin")


def no_shift(monkeypatch):
    monkeypatch.setattr(fused_forward.FusedForward, "_shift", lambda *args: [])


def draft_over_the_prompt(monkeypatch):
    """Its KV goes over that of a chunk: even where such a row is computed again, the mean shift has its old KV wrong."""
    original = fused_item.FusedItem.rows_behind

    def rows(item, ids, slots):
        return original(item, ids, item.kv_slots[100 : 100 + slots.numel()])

    monkeypatch.setattr(fused_item.FusedItem, "rows_behind", rows)


def draft_that_fails(monkeypatch):
    def look_up(*args):
        raise IndexError("no such token")

    monkeypatch.setattr(draft, "look_up", look_up)


def no_draft(monkeypatch):
    original = AttentionSignal._masses

    def masses(signal, *args):
        return original(AttentionSignal(signal.layers), *args)

    monkeypatch.setattr(AttentionSignal, "_masses", masses)


FAULTS = {
    wrong_sign: "moved: keys and values",
    wrong_delta: "moved: keys and values",
    one_layer_left_out: "own_place: log-probabilities",
    # In its own place that changes no answer: attention does not ask where a rotated key lies.
    one_token_off: "moved: keys and values",
    wrong_mask: "own_place: log-probabilities",
    shift_the_other_way: "moved: keys and values",
    shift_of_keys_that_stay_rotated: "moved: keys and values",
    no_shift: "moved: keys and values",
    draft_over_the_prompt: "moved: keys and values",
    draft_that_fails: "moved: not fused, internal_error",
    no_draft: "draft of the answer was never computed",
}


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sound_code_passes(engine, family, dtype):
    local = engine(family, dtype=dtype)
    errors = run_self_check(local.runtime, local.scheduler)
    assert set(errors) == NAMES
    if dtype == "float32":
        assert max(errors.values()) < 1e-3
    assert not len(local.runtime.store)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_of_the_path_that_serves_is_found(engine, monkeypatch, fault):
    local = engine("llama")
    local.runtime.metrics.counts.clear()
    fault(monkeypatch)
    with pytest.raises(SelfCheckError, match=FAULTS[fault]):
        run_self_check(local.runtime, local.scheduler)
    monkeypatch.undo()
    local.runtime.metrics.counts.clear()
    run_self_check(local.runtime, local.scheduler)


def test_a_draft_that_has_no_room_is_no_fault(engine, monkeypatch):
    local = engine("llama")
    monkeypatch.setattr(scratch, "borrow_slots", lambda *args: None)
    assert set(run_self_check(local.runtime, local.scheduler)) == NAMES


def test_at_start_a_fault_turns_fusion_off_and_serving_goes_on(engine, monkeypatch):
    local = engine("llama")
    wrong_mask(monkeypatch)
    prove(local.runtime, local.scheduler)
    assert not local.runtime.is_on
    assert "self-check failed" in local.runtime.off_reason
    monkeypatch.undo()
    ids = torch.randint(2, 256, (90,), generator=torch.Generator().manual_seed(3)).tolist()
    req = local.ask(ids, 2, fusion={"spans": [20, 80]})
    assert req.customized_info["rag_fusion"][0]["fallback"] == "fusion_off"
    local.settle()
    local.runtime.off_reason = ""
    prove(local.runtime, local.scheduler)
    assert local.runtime.is_on, local.runtime.off_reason
    stats = local.runtime.store.stats()
    assert (stats.hits, stats.misses) == (0, 0)  # nobody has asked yet
