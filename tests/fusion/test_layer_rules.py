"""What is read of a model's layers before anything is fused: windows, caps, rotations, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from rag_kernels import LogitRules, create_attention_method, rotary_spec_from_config
from rag_pipeline.sglang_plugin.fusion.config import FusionConfig
from rag_pipeline.sglang_plugin.fusion.runtime.attention_methods import is_useless
from rag_pipeline.sglang_plugin.fusion.runtime.layer_rules import rules_of
from rag_pipeline.sglang_plugin.fusion.runtime.rotations import (
    UnsupportedModelError,
    read_rotations,
)
from rag_pipeline.sglang_plugin.fusion.runtime.runtime import FusionRuntime
from rag_pipeline.sglang_plugin.fusion.runtime.support import refuse_model

KINDS = ["sliding_attention", "full_attention"]


@pytest.mark.parametrize(
    ("window", "cap", "wanted"),
    [
        (-1, 0.0, LogitRules()),
        (None, None, LogitRules()),
        # SGLang counts the keys before a row's own, the kernels its own too.
        (23, 0.0, LogitRules(sliding_window=24)),
        (0, 50.0, LogitRules(sliding_window=1, logit_cap=50.0)),
    ],
)
def test_window_and_cap_of_a_layer(window, cap, wanted):
    assert rules_of(SimpleNamespace(sliding_window_size=window, logit_cap=cap)) == wanted


def nested(**changes):
    fields = {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "head_dim": 16,
        "layer_types": KINDS,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        },
    }
    return SimpleNamespace(**(fields | changes))


def embedding(theta):
    flat = SimpleNamespace(head_dim=16, rope_parameters={"rope_theta": theta})
    spec = rotary_spec_from_config(flat)
    cos, sin = spec.cos_sin(torch.arange(300))
    return SimpleNamespace(is_neox_style=True, cos_sin_cache=torch.cat([cos, sin], -1)), spec


def model_of(local, other):
    """As SGLang's Gemma 3: tables of the layers, and frequencies that the model computes with."""
    inner = SimpleNamespace(
        rotary_emb=SimpleNamespace(inv_freq=embedding(other)[1].inv_freq.float()),
        rotary_emb_local=SimpleNamespace(inv_freq=embedding(local)[1].inv_freq.float()),
    )
    modules = [SimpleNamespace(rotary_emb=embedding(theta)[0]) for theta in (1e4, 1e6)]
    return SimpleNamespace(model=inner), modules


def test_two_bases_are_read_by_layer_and_both_are_in_the_identity():
    one, two = read_rotations(nested(), *model_of(1e4, 1e6))
    assert float(one.spec.inv_freq[-1]) == pytest.approx(1e4 ** (-14 / 16))
    assert float(two.spec.inv_freq[-1]) == pytest.approx(1e6 ** (-14 / 16))
    assert one.identity != two.identity


def test_a_model_whose_two_rotations_disagree_is_refused():
    with pytest.raises(UnsupportedModelError, match="have two rotations"):
        read_rotations(nested(), *model_of(1e4, 5e5))
    swapped = nested(layer_types=KINDS[::-1])
    with pytest.raises(UnsupportedModelError, match="rad away"):
        read_rotations(swapped, *model_of(1e4, 1e6))
    with pytest.raises(UnsupportedModelError, match="1 layer_types for 2 layers"):
        read_rotations(nested(layer_types=KINDS[:1]), *model_of(1e4, 1e6))


def test_a_pool_that_forgets_is_refused_with_the_flag_that_helps():
    pool = SimpleNamespace(full_to_swa_index_mapping=None)
    reason = refuse_model(SimpleNamespace(architectures=["Gemma3ForCausalLM"]), pool, [])
    assert "--disable-hybrid-swa-memory" in str(reason)


def test_a_family_that_was_looked_at_is_refused_with_what_stands_in_the_way():
    reason = refuse_model(SimpleNamespace(architectures=["GptOssForCausalLM"]), None, [])
    assert "attention sinks" in str(reason)
    other = refuse_model(SimpleNamespace(architectures=["OtherForCausalLM"]), None, [])
    assert str(other).startswith(
        "architecture OtherForCausalLM: it is not tested; supported: Llama"
    )


def test_methods_that_weigh_logits_refuse_a_cap_and_all_refuse_windows_alone():
    capped, windows = (
        [LogitRules(sliding_window=8, logit_cap=50.0), LogitRules(logit_cap=50.0)],
        [LogitRules(sliding_window=8)],
    )
    for name, weighs in {
        "sale": True,
        "block_topk": True,
        "power": False,
        "streaming": False,
    }.items():
        method = create_attention_method(name)
        assert ("caps at 50" in str(method.refuse_layers(capped))) == weighs
        assert "sliding window" in str(method.refuse_layers(windows))
        assert method.refuse_layers([*windows, LogitRules()]) is None


@pytest.mark.parametrize("fault", ["method", "layer"])
def test_a_method_that_fails_on_the_layers_is_refused_and_said_once(fault, caplog, monkeypatch):
    """An engine starts with such a default method, and every prompt reads every key."""
    method = create_attention_method("streaming")
    layer = SimpleNamespace(sliding_window_size="wide" if fault == "layer" else -1, logit_cap=0.0)
    if fault == "method":

        def broken(self, rules):
            raise IndexError("layer 7")

        monkeypatch.setattr(type(method), "refuse_layers", broken)
    runtime = FusionRuntime(FusionConfig(), None)
    runtime.facts = SimpleNamespace(layers=[layer])
    caplog.set_level("WARNING", logger="rag_pipeline.sglang_plugin")
    assert is_useless(runtime, method)
    assert is_useless(runtime, method)
    said = [entry.getMessage() for entry in caplog.records if entry.levelname == "WARNING"]
    (line,) = (text for text in said if "streaming" in text)
    assert "Prompts read every key" in line
    assert ("IndexError: layer 7" if fault == "method" else "TypeError") in line
