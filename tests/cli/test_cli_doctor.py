"""What ``doctor`` says of fusion, from what a running engine answered; no engine is started."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from rag_pipeline.cli import doctor, main
from rag_pipeline.sglang_plugin import activation_of

PLUGIN = {
    "active": True,
    "platform": "p",
    "device_name": "cpu",
    "attention_class": "c",
    "hooks": ["a.b"],
    "unapplied": [],
    "plugin_version": "1",
    "sglang_version": "2",
    "torch_version": "3",
    "scheduler_pid": 4,
    "threads": 1,
}
ON = {"on": True, "off_reason": "", "self_check": "passed: rotation 1e-07"}
FAILED = {"on": False, "off_reason": "self-check failed: x", "self_check": "failed: x"}
REFUSED = {"on": False, "off_reason": "DeepseekV3 is not tested", "self_check": "not run"}


def engine(*fusion: dict[str, Any] | None) -> Any:
    """What ``get_server_info`` of an engine with these scheduler processes returns."""
    states = [{"attention_backend": "rag_cpu", "rag_pipeline": dict(PLUGIN)} for _ in fusion]
    for state, block in zip(states, fusion, strict=True):
        if block is not None:
            state["rag_fusion"] = block
    return SimpleNamespace(get_server_info=lambda: {"internal_states": states})


@pytest.mark.parametrize(
    ("blocks", "on", "reason", "check"),
    [
        ([ON], True, "", ON["self_check"]),
        ([ON, ON], True, "", ON["self_check"]),
        ([ON, FAILED], False, FAILED["off_reason"], FAILED["self_check"]),
        ([REFUSED], False, REFUSED["off_reason"], "not run"),
        ([None], False, "switched off by configuration", "not run"),
        ([ON, None], False, "switched off by configuration", "not run"),
    ],
)
def test_activation_tells_whether_and_why_not(blocks, on, reason, check):
    facts = activation_of(engine(*blocks))
    assert (facts.fusion_on, facts.fusion_off_reason, facts.self_check) == (on, reason, check)


@pytest.mark.parametrize(
    ("block", "code", "lines"),
    [
        (ON, 0, ("fusion  on", "fusion self-check  passed: rotation 1e-07")),
        (FAILED, 1, ("fusion  OFF: self-check failed: x", "fusion self-check  failed: x")),
        (REFUSED, 0, ("fusion  OFF: DeepseekV3 is not tested", "fusion self-check  not run")),
    ],
)
def test_doctor_shows_the_self_check_and_fails_with_it(
    block, code, lines, monkeypatch, capsys, smollm2_path
):
    answer = activation_of(engine(block)).to_json()
    monkeypatch.setattr(doctor, "_ask_engine", lambda model, folder: answer)
    assert main(["doctor", "--model", str(smollm2_path)]) == code
    captured = capsys.readouterr()
    shown = [" ".join(line.split()) for line in captured.out.splitlines()]
    assert all(" ".join(line.split()) in shown for line in lines)
    errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == code
    if code:
        assert "self-check failed: x" in errors[0]
    assert main(["doctor", "--model", str(smollm2_path), "--json"]) == code
    assert json.loads(capsys.readouterr().out)["engine"]["self_check"] == block["self_check"]
