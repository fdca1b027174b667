"""An engine that fusion refused at its start, and forwards that it leaves alone: requests are served as usual."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from fusion_world.requests import Req
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from rag_pipeline.sglang_plugin.fusion.admission import admit as admission
from rag_pipeline.sglang_plugin.fusion.config import FusionConfig
from rag_pipeline.sglang_plugin.fusion.forward import model_forward as forward
from rag_pipeline.sglang_plugin.fusion.request.namespace import RadixNamespace
from rag_pipeline.sglang_plugin.fusion.request.state import state_of
from rag_pipeline.sglang_plugin.fusion.runtime import runtime as runtime_module
from rag_pipeline.sglang_plugin.fusion.runtime import support
from rag_pipeline.sglang_plugin.fusion.runtime.runtime import FusionRuntime

ASKED = [
    {"spans": [10, 50]},
    {"mode": "build", "spans": [10, 50], "prefix_len": 10},
    {"mode": "build", "spans": [10, 50], "prefix_len": 10, "passage": True},
    {"spans": [10, 50], "conversation": "c"},
    {"policy": "cacheblend:0.3"},
]


def batch_of(mode: ForwardMode) -> Any:
    return SimpleNamespace(
        forward_mode=mode,
        extend_seq_lens_cpu=[60],
        extend_prefix_lens_cpu=[0],
        model_specific_states=None,
        batch_size=1,
        extend_num_tokens=60,
    )


@pytest.mark.parametrize("fields", ASKED)
def test_whoever_asks_for_fusion_is_served_where_it_was_refused(
    monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any]
) -> None:
    """It was once the end of the scheduler: no facts of the model are there."""
    runtime = FusionRuntime(FusionConfig(), None, off_reason="speculative decoding")
    monkeypatch.setattr(runtime_module, "_RUNTIME", runtime)
    req = Req("r", range(3, 63), RadixNamespace(None, None), fields)
    admission.after_req_init(None, req)
    state = state_of(req)
    assert state is not None
    admission.admit(runtime, req, state)
    batch = batch_of(ForwardMode.EXTEND)
    forward.after_init_new(batch, None, SimpleNamespace(reqs=[req]), None)
    assert forward.PLAN_KEY in batch.model_specific_states
    assert forward.around_model_forward(lambda *args: "logits", None, batch) == "logits"
    # An engine without a passage builds nothing behind one.
    why = "off" if fields.get("passage") else "fusion_off"
    assert (state.report.fallback, state.report.fresh_tokens) == (why, 60)


def test_a_forward_of_some_layers_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = FusionRuntime(FusionConfig(), None, off_reason="none")
    monkeypatch.setattr(runtime_module, "_RUNTIME", runtime)
    req = Req("r", range(3, 63), RadixNamespace(None, None), ASKED[0])
    admission.after_req_init(None, req)
    batch = batch_of(ForwardMode.SPLIT_PREFILL)
    forward.after_init_new(batch, None, SimpleNamespace(reqs=[req]), None)
    assert batch.model_specific_states is None
    assert "--enable-pdmux" in str(support.refuse_settings(SimpleNamespace(enable_pdmux=True)))
