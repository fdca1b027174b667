"""Calibration of SALE by its command: prompts, the checkpoint's fingerprint, and a file that engines find."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rag_eval.calibration.command import main
from rag_eval.calibration.run import load_model, run_prompt
from rag_eval.calibration.samples import read_prompts, retrieval_prompts
from rag_eval.errors import EvalError
from rag_kernels import create_attention_method
from rag_kernels.sparse.sale import ThresholdTable, thresholds
from rag_pipeline.cli import main as rag_pipeline
from rag_pipeline.config import HOME_VARIABLE
from rag_pipeline.errors import ModelError
from rag_pipeline.models import fingerprint_checkpoint


def letters(text: str) -> list[int]:
    """A tokenizer of bytes."""
    return list(text.encode())


def test_a_prompt_asks_for_a_key_that_it_holds() -> None:
    prompts = retrieval_prompts(3, 1500, letters, seed=4)
    assert [len(ids) for ids in prompts] == [1500] * 3
    for ids in prompts:
        text = bytes(ids).decode()
        asked = text.rpartition('Key: "')[2].partition('"')[0]
        assert text.count(f'"{asked}": "') == 1
        assert text.endswith('Corresponding value: "')
    assert len({tuple(ids) for ids in prompts}) == 3
    assert retrieval_prompts(3, 1500, letters, seed=4) == prompts


def test_prompts_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_text('{"text": "one"}\n\n{"input": "two", "k": 1}\n"three is cut"\n')
    found = read_prompts(path, 5, letters)
    assert [bytes(ids).decode() for ids in found] == ["one", "two", "three"]
    for text, message in (
        ("", "hold no prompt"),
        ("{", "line 1 of samples .* is no JSON"),
        ('{"answer": "x"}', "line 1 of samples .* has no text"),
    ):
        path.write_text(text)
        with pytest.raises(EvalError, match=message):
            read_prompts(path, 5, letters)
    with pytest.raises(EvalError, match="cannot be read"):
        read_prompts(tmp_path / "none", 5, letters)


def test_a_fingerprint_is_that_of_the_weights_and_not_of_the_files(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(300, 8), "b": torch.randn(9), "c": torch.tensor(1.0)}
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    save_file(tensors, one / "model.safetensors")
    save_file({"c": tensors["c"], "a": tensors["a"]}, two / "model-1.safetensors")
    save_file({"b": tensors["b"]}, two / "model-2.safetensors", metadata={"format": "pt"})
    assert fingerprint_checkpoint(one) == fingerprint_checkpoint(two)
    known = {fingerprint_checkpoint(one)}
    for change in ({"a": tensors["a"] * 2}, {"b": tensors["b"] + 1}, {"d": torch.ones(1)}):
        save_file(tensors | change, one / "model.safetensors")
        known.add(fingerprint_checkpoint(one))
    save_file(tensors | {"a": tensors["a"].bfloat16()}, one / "model.safetensors")
    known.add(fingerprint_checkpoint(one))
    assert len(known) == 5
    (one / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ModelError, match="cannot be read"):
        fingerprint_checkpoint(one)
    with pytest.raises(ModelError, match="holds no"):
        fingerprint_checkpoint(tmp_path)


def test_the_model_shows_what_its_attention_computes_from(tiny_path: Path) -> None:
    """Output of the layers rebuilt from what was seen is what the model's own next layer sees."""
    seen: dict[int, tuple[torch.Tensor, ...]] = {}
    model = load_model(tiny_path, lambda layer, q, k, v, scale: seen.update({layer: (q, k, v)}))
    run_prompt(model, range(50, 90))
    assert sorted(seen) == [0, 1, 2, 3]
    assert [tuple(x.shape) for x in seen[0]] == [(40, 4, 16), (40, 2, 16), (40, 2, 16)]
    whole = seen[3][1]
    run_prompt(model, range(50, 80))  # causal: keys do not depend on what follows
    torch.testing.assert_close(seen[3][1], whole[:30], atol=1e-4, rtol=1e-4)


def test_a_calibrated_model_is_found_by_its_weights(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path))
    words = ["attention", "calibrate", "--model", str(tiny_path), "--tokens", "1300"]
    assert rag_pipeline([*words, "--count", "1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["layers"], report["heads"], report["prompts"]) == (4, 16, 1)
    assert report["largest_error"] < report["theta"] == 0.4
    table = ThresholdTable.from_json(Path(report["file"]).read_text())
    assert table.fingerprint == fingerprint_checkpoint(tiny_path) == report["fingerprint"]
    assert table.tokens == (1300,)
    assert {len(heads) for heads in table.tau} == {4}

    monkeypatch.setattr(thresholds, "_FOLDERS", [Path(report["file"]).parent])
    method = create_attention_method("sale").for_model(report["fingerprint"])
    assert method.table == table  # type: ignore[attr-defined]
    other = tmp_path / "other"
    shutil.copytree(tiny_path, other)
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    assert create_attention_method("sale").for_model(fingerprint_checkpoint(other)).table is None  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--theta", "0"], 2, "--theta is 0.0; it must be positive"),
        (["--count", "0"], 2, "--count is 0"),
        (["--largest", "0.0001"], 2, "largest threshold is 0.0001; give a number above 0.0001"),
        (["--largest", "inf"], 2, "largest threshold is inf"),
        (["--tokens", "1024"], 1, "--tokens is 1024; only prompts of more than 1024"),
        (["--samples", "/none.jsonl"], 1, "samples /none.jsonl cannot be read"),
    ],
)
def test_a_bad_option_is_one_line(
    words: list[str], code: int, message: str, tiny_path: Path, refusal: Callable[..., str]
) -> None:
    assert message in refusal(main, ["--model", str(tiny_path), *words], code)


def test_the_packaged_model_has_its_thresholds(smollm2_path: Path) -> None:
    method = create_attention_method("sale").for_model(fingerprint_checkpoint(smollm2_path))
    table = method.table  # type: ignore[attr-defined]
    assert table is not None
    assert (len(table.tau), len(table.tau[0])) == (30, 9)


def test_a_table_that_comes_with_the_project_is_that_of_its_model() -> None:
    table = thresholds.load_table("qwen2.5-coder-0.5b-instruct-q4")
    assert (len(table.tau), len(table.tau[0])) == (24, 14)
    assert thresholds.find_table(table.fingerprint) == table
    config = create_attention_method("sale").config
    for option in ("block_q", "block_k", "local_window", "segment", "granularity"):
        assert getattr(config, option) == getattr(table, option)
