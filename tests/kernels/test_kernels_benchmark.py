"""The kernel benchmark runs and reports every operation; nothing here judges a time."""

from __future__ import annotations

import json

import pytest

from rag_eval.benchmarks import kernels
from rag_eval.errors import EvalError

TINY = [
    "--chunks",
    "2",
    "--chunk-tokens",
    "20",
    "--question-tokens",
    "3",
    "--recomputed",
    "6",
    "--repeats",
    "2",
]


def test_report_holds_every_operation(capsys):
    assert kernels.main([*TINY, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["prompt_tokens"] == 83
    assert report["rows_share"] == pytest.approx(9 / 83)
    assert {"attention full", "attention rows", "load", "shift", "mass", "deviation"} <= set(
        report["timings"]
    )
    assert all(timing["n"] == 2 for timing in report["timings"].values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "choose one of bf16"),
        ({"q_heads": 4, "kv_heads": 3}, "multiple of --kv-heads 3"),
        ({"recomputed": 9999}, "exceeds the reused tokens"),
        ({"repeats": 0}, "must be 1 or more"),
    ],
)
def test_impossible_sizes_are_named(options, message):
    with pytest.raises(EvalError, match=message):
        kernels.KernelBenchConfig(**options)
