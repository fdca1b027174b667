"""The benchmark of attention kernels runs and reports every call; nothing here judges a time."""

from __future__ import annotations

import json

import pytest
import torch

from rag_eval.benchmarks import attention_kernels
from rag_eval.errors import EvalError

TINY = ["--lengths", "90,150", "--threads", "1", "--block", "16", "--repeats", "2"]


def test_report_holds_every_call(capsys):
    assert attention_kernels.main([*TINY, "--kernel", "cpu", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [case["tokens"] for case in report["cases"]] == [90, 150]
    calls = report["cases"][1]["calls"]
    assert set(calls) == {
        *("torch causal", "rows 0.05", "rows 0.15", "rows 0.3", "rows 1"),
        *("blocks 0.1", "blocks 0.25", "blocks 0.5", "blocks 1"),
    }
    assert calls["blocks 1"]["density"] == 1.0
    assert 0.1 < calls["blocks 0.1"]["density"] < calls["blocks 0.5"]["density"] < 0.8
    assert all(call["n"] == 2 for call in calls.values())
    assert calls["torch causal"]["vs_torch"] == {"wall": 1.0, "cpu": 1.0}
    assert "kernel cpu" in attention_kernels.table(report)


def test_methods_are_timed_in_prompt_and_decode_step(capsys):
    name = "power:block=8+window=2"
    words = [*TINY, "--rows", "", "--densities", "", "--methods", name, "--json"]
    assert attention_kernels.main(words) == 0
    calls = json.loads(capsys.readouterr().out)["cases"][1]["calls"]
    assert set(calls) == {"torch causal", "rows 1", name, "decode", f"decode {name}"}
    row, key = torch.arange(150)[:, None], torch.arange(150)[None]
    far = row // 8 - key // 8
    is_power = torch.zeros_like(far, dtype=torch.bool)
    for power in range(8):
        is_power |= far == 2**power
    reads = ((far < 2) | is_power | (key < 8)) & (key <= row)
    assert calls[name]["density"] == pytest.approx(float(reads.sum()) / (150 * 151 / 2))
    assert calls[f"decode {name}"]["density"] == pytest.approx(int(reads[-1].sum()) / 150)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": "large"}, "choose one of smollm2-135m, qwen2.5-coder-0.5b, llama-8b"),
        ({"lengths": "0"}, "--lengths is '0'; give whole numbers"),
        ({"threads": "1.5"}, "--threads is '1.5'"),
        ({"rows": "15"}, "--rows is '15'; give shares up to 1"),
        ({"densities": "half"}, "give numbers with commas"),
        ({"repeats": 0}, "must be 1 or more"),
        ({"methods": "power,nothing"}, "nothing"),
        ({"methods": "sale"}, "chooses by the prompt"),
    ],
)
def test_impossible_options_are_named(options, message):
    with pytest.raises(EvalError, match=message):
        attention_kernels.AttentionKernelsConfig(**options)
