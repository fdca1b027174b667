"""Sensitivity of layers by its command: a file of the model's weights, and one line for a mistake."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from rag_eval.calibration.layers_command import main
from rag_eval.retention.sensitivity_file import read_sensitivity
from rag_pipeline.cli import main as rag_pipeline
from rag_pipeline.config import HOME_VARIABLE
from rag_pipeline.models import fingerprint_checkpoint


def test_the_command_writes_a_file_of_the_models_weights(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path))
    words = ["memory", "calibrate", "--model", str(tiny_path), "--tokens", "700", "--budget", "100"]
    assert rag_pipeline([*words, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert Path(report["file"]).parent == tmp_path / "layers"
    read = read_sensitivity(Path(report["file"]), fingerprint_checkpoint(tiny_path))
    assert (read.tokens, read.window, len(read.cosines)) == ((700,), 175, 4)
    assert list(read.cosines) == report["cosines"]
    assert sum(report["budgets"]) == 400


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--tokens", "511"], 2, "--tokens is 511; it must be at least 512"),
        (["--budget", "0"], 2, "budget is 0"),
        (["--alpha", "-1"], 2, "alpha is -1.0"),
        (["--samples", "/none.jsonl"], 1, "samples /none.jsonl cannot be read"),
    ],
)
def test_a_bad_option_is_one_line(
    words: list[str], code: int, message: str, tiny_path: Path, refusal: Callable[..., str]
) -> None:
    assert message in refusal(main, ["--model", str(tiny_path), *words], code)
