"""Chunk KV of other weights or another configuration is never found, and never stored under the name of these."""

from __future__ import annotations

import contextlib
import inspect
from types import SimpleNamespace

import pytest
import torch
from fusion_helpers import CHUNK, PREFIX, report, tokens

from rag_pipeline.sglang_plugin.fusion.runtime.model_identity import (
    describe_settings,
    fingerprint_weights,
)
from rag_pipeline.sglang_plugin.tpla.slices import LatentSlices

PREFIX_IDS, CHUNK_IDS = tokens(PREFIX, 1), tokens(CHUNK, 10)
IDS = [*PREFIX_IDS, *CHUNK_IDS, *tokens(9, 3)]
FUSION = {"spans": [PREFIX, PREFIX + CHUNK], "policy": "reuse"}


@pytest.fixture
def local(engine):
    """An engine whose epoch of the weights is the first one again when the test ends."""
    local = engine("llama")
    facts = local.runtime.facts
    yield local
    local.runtime.new_weights(in_update=False, tree_is_old=False)
    local.runtime.facts, local.runtime.epoch = facts, 0


def from_disk(local, folder, **fields):
    from sglang.srt.managers.io_struct import UpdateWeightFromDiskReqInput

    request = UpdateWeightFromDiskReqInput(model_path=str(folder), load_format="auto", **fields)
    with torch.inference_mode():
        return local.scheduler.weight_updater.update_weights_from_disk(request)


def begin(local):
    from sglang.srt.managers.io_struct import BeginWeightUpdateReqInput

    assert local.scheduler.weight_updater.begin_weight_update(BeginWeightUpdateReqInput()).success


def end(local):
    from sglang.srt.managers.io_struct import EndWeightUpdateReqInput

    assert local.scheduler.weight_updater.end_weight_update(EndWeightUpdateReqInput()).success


@pytest.mark.parametrize("how", ["disk", "session", "refused"])
def test_after_any_update_no_older_chunk_is_found_though_the_weights_look_alike(
    local, tiny_model, tmp_path, how
):
    local.build(PREFIX_IDS, CHUNK_IDS)
    (key,) = local.runtime.store.keys()
    assert local.runtime.store.pin(key)  # a pin keeps it in memory, not useful
    local.flush()
    lease = local.runtime.store.acquire(key, CHUNK_IDS)
    if how == "session":
        begin(local)
        end(local)
    elif how == "disk":
        assert from_disk(local, tiny_model("llama")).success
    else:
        with contextlib.suppress(Exception):  # whatever it had written before it broke off
            assert not from_disk(local, tmp_path).success
    assert local.runtime.store.stats().chunks_now == 0
    lease.release()
    assert report(local.ask(IDS, 1, fusion=FUSION))["built_chunks"] == 1
    assert local.runtime.store.keys() != [key]
    local.flush()
    assert report(local.ask(IDS, 1, fusion=FUSION))["reused_tokens"] == CHUNK


def test_a_prefill_that_an_update_cuts_in_two_stores_nothing(local, tiny_model, monkeypatch):
    monkeypatch.setattr(local.scheduler, "chunked_prefill_size", 32)
    req = local.submit(IDS, 2, fusion=FUSION | {"conversation": "cut"})
    local.step()
    assert not req.output_ids  # one piece is computed
    from_disk(local, tiny_model("llama"))
    local.run(req)
    assert report(req)["built_chunks"] == 0
    assert local.runtime.store.stats().chunks_now == 0
    assert all(info.state.value != "building" for info in local.runtime.store.ls())
    # What it left in the radix tree is of two weights: behind it nothing is stored until the tree is flushed.
    monkeypatch.undo()
    assert report(local.ask(IDS, 1, fusion=FUSION))["built_chunks"] == 0
    local.flush()
    assert report(local.ask(IDS, 1, fusion=FUSION))["built_chunks"] == 1


def test_while_weights_are_written_nothing_is_loaded_stored_or_built(local):
    local.build(PREFIX_IDS, CHUNK_IDS)
    local.flush()
    begin(local)
    assert report(local.ask(IDS, 1, fusion=FUSION))["fallback"] == "fusion_off"
    assert report(local.build(PREFIX_IDS, CHUNK_IDS))["built_chunks"] == 0
    end(local)
    local.flush()
    assert report(local.build(PREFIX_IDS, CHUNK_IDS))["built_chunks"] == 1


def test_every_call_that_may_write_weights_is_hooked():
    from sglang.srt.managers.scheduler_components.weight_updater import (
        SchedulerWeightUpdaterManager,
    )

    from rag_pipeline.sglang_plugin.fusion.hooks import hook_rows

    hooked = {target.path.rpartition(".")[2] for target, _ in hook_rows()}
    writers = {
        name
        for name, _ in inspect.getmembers(SchedulerWeightUpdaterManager, inspect.isfunction)
        if name.startswith(("update_", "begin_", "end_", "release_", "resume_", "load_"))
    }
    assert {"update_weights_from_disk", "resume_memory_occupation"} <= writers <= hooked


def test_the_fingerprint_sees_every_head_column_and_element():
    model = torch.nn.ModuleDict({"o_proj": torch.nn.Linear(512, 512, bias=False)}).bfloat16()
    weight = model["o_proj"].weight.data
    seen = {fingerprint_weights(model)}
    for change in (
        lambda w: w[:, 64:128].zero_(),
        lambda w: w[64:128].zero_(),
        lambda w: w[:, 300:304].zero_(),
        lambda w: w[511, 511].add_(1),
    ):
        kept = weight.clone()
        change(weight)
        seen.add(fingerprint_weights(model))
        weight.copy_(kept)
    assert len(seen) == 5
    assert fingerprint_weights(model) in seen


def config(**changes):
    from transformers import LlamaConfig

    rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "attention_factor": 1.2}
    return LlamaConfig(**({"vocab_size": 256, "rope_parameters": rope} | changes))


YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}


@pytest.mark.parametrize(
    "changes",
    [
        {"rms_norm_eps": 1e-3},
        {"rope_parameters": YARN | {"attention_factor": 1.3}},
        {"rope_parameters": YARN | {"attention_factor": 1.2, "beta_fast": 16}},
        {"mlp_bias": True},
        {"hidden_act": "gelu"},
        {"a_field_that_nobody_has_heard_of": 1},
        {"text_config": {"rms_norm_eps": 1e-3}},
    ],
)
def test_whatever_a_configuration_changes_is_another_identity(changes):
    engine = SimpleNamespace()
    assert describe_settings(config(**changes), engine, "a") != describe_settings(
        config(), engine, "a"
    )


def test_the_engine_counts_and_what_no_kv_depends_on_does_not():
    engine, same = SimpleNamespace(port=1), SimpleNamespace(port=2)
    renamed = config(name_or_path="elsewhere", transformers_version="9", initializer_range=1.0)
    wanted = describe_settings(config(), engine, "a")
    assert describe_settings(renamed, same, "a") == wanted
    # SGLang writes its --context-length there.
    assert describe_settings(config(context_len=4096), engine, "a") == wanted
    assert describe_settings(config(), engine, "b") != wanted
    for name in ("quantization", "kv_cache_dtype", "json_model_override_args", "model_impl"):
        other = SimpleNamespace(**{name: "other"})
        assert describe_settings(config(), other, "a") != wanted


def test_a_slice_of_a_latent_is_another_identity_than_the_whole_and_than_another_slice():
    """Weights do not tell: in the checkpoint's own basis, with a norm of equal weights, no byte of them changes."""

    def told(rank: int, ranks: int) -> str:
        group = SimpleNamespace(rank_in_group=rank, world_size=ranks)
        slices = LatentSlices(group=group, dim=64)
        return describe_settings(config(), SimpleNamespace(), "a", slices)

    whole = describe_settings(config(), SimpleNamespace(), "a")
    assert describe_settings(config(), SimpleNamespace(), "a", None) == whole
    assert len({whole, told(0, 2), told(1, 2), told(0, 4)}) == 4


def test_the_identity_of_an_engine_holds_what_it_really_runs(local):
    from rag_pipeline.sglang_plugin.fusion.runtime.model_facts import read_model

    runner = local.scheduler.tp_worker.model_runner

    def identity():
        facts = read_model(runner, tp_rank=0, tp_size=1)
        return facts.context(prefix_digest="p", tenant="").namespace

    before = identity()
    assert identity() == before
    settings = runner.model_config.hf_config
    kept = settings.rms_norm_eps
    try:
        settings.rms_norm_eps = 1e-3
        assert identity() != before
    finally:
        settings.rms_norm_eps = kept
    # YaRN's factor on keys lies in the table.
    table = runner.model.model.layers[0].self_attn.rotary_emb.cos_sin_cache
    kept = table.clone()
    try:
        table.mul_(1.1)
        assert identity() != before
    finally:
        table.copy_(kept)
    assert identity() == before
