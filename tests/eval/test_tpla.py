"""TPLA's evaluation: slices that are exact give the model's own perplexity, and its commands say what they measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rag_eval.benchmarks.tiny_model import write_tiny_model
from rag_eval.errors import EvalError
from rag_eval.tpla.calibrate import calibrate
from rag_eval.tpla.calibrate_command import main as calibrate_command
from rag_eval.tpla.command import main
from rag_eval.tpla.model import LatentModel, SlicedLayer
from rag_eval.tpla.texts import Windows, check_apart, marks_of
from rag_kernels.latent import BASES, ModelStatistics, create_basis
from rag_pipeline.cli import main as rag_pipeline
from rag_pipeline.config import HOME_VARIABLE
from rag_pipeline.models import fingerprint_checkpoint

CUT = Windows(prompt=10, window=40)
WORDS = ["--window", "64", "--prompt", "16", "--max-tokens", "100", "--batch", "2"]


@pytest.fixture(scope="module")
def folder(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights whose latents are normed by uneven weights."""
    from safetensors.torch import load_file, save_file

    made = tmp_path_factory.mktemp("models") / "latent"
    write_tiny_model(made, smollm2_path, family="deepseek_v2", layers=2, peaked=True)
    file = made / "model.safetensors"
    tensors = load_file(file)
    torch.manual_seed(3)
    for name, tensor in tensors.items():
        if name.endswith("kv_a_layernorm.weight"):
            tensor.copy_(torch.randn_like(tensor).exp())
    save_file(tensors, file, metadata={"format": "pt"})
    return made


@pytest.fixture(scope="module")
def model(folder: Path) -> LatentModel:
    return LatentModel.load(folder)


def ids(seed: int = 0, rows: int = 3) -> torch.Tensor:
    return torch.randint(1000, 20000, (rows, CUT.window), generator=torch.manual_seed(seed))


def layers(model: LatentModel, name: str, **more: Any) -> list[SlicedLayer]:
    seen = calibrate(model, list(ids(7)))
    return [
        SlicedLayer(weights=weights.rotated(create_basis(name, weights.dim, own)), **more)
        for weights, own in zip(model.weights, seen, strict=True)
    ]


def losses(model: LatentModel, given: list[SlicedLayer] | None, prompt: int = 0) -> torch.Tensor:
    if given is not None:
        model.slice_layers(given, prompt)
    found = model.losses(ids(), CUT.window - CUT.prompt)
    model.as_it_is()
    return found


@pytest.mark.parametrize("name", BASES)
def test_a_rotated_model_is_the_model_until_it_is_sliced(model: LatentModel, name: str) -> None:
    own = losses(model, None)
    torch.testing.assert_close(
        losses(model, layers(model, name, ranks=1)), own, rtol=1e-4, atol=1e-4
    )
    sliced = losses(model, layers(model, name, ranks=2))
    assert float((sliced - own).abs().max()) > 1e-2


@pytest.mark.parametrize("grouped", [False, True])
def test_an_unsliced_prefill_predicts_the_next_token_as_the_model_does(
    model: LatentModel, grouped: bool
) -> None:
    own = losses(model, None)
    given = layers(model, "pca", ranks=2, grouped=grouped)
    apart = losses(model, given, CUT.prompt)
    torch.testing.assert_close(apart[:, 0], own[:, 0], rtol=1e-4, atol=1e-4)
    assert float((apart[:, 1:] - own[:, 1:]).abs().max()) > 1e-2
    assert not torch.allclose(losses(model, given)[:, 0], own[:, 0], atol=1e-2)


def test_windows_score_each_decoded_token_once() -> None:
    text = list(range(1000))
    windows = CUT.cut(text)
    scored = torch.cat([window[-CUT.scored :] for window in windows])
    assert scored.tolist() == text[CUT.prompt + 1 :][: len(scored)]
    assert len(text) - len(scored) < CUT.window + CUT.scored
    assert len(CUT.cut(text, 30)) == 2
    with pytest.raises(
        EvalError, match=r"enough to score 986 in windows .*; 2000 are to be scored"
    ):
        CUT.cut(text, 2000)
    with pytest.raises(EvalError, match="prompt 39 and window 40"):
        Windows(prompt=39, window=40)


def test_a_text_that_was_calibrated_with_is_known_wherever_it_stands() -> None:
    text = list(range(5000, 5400))
    marks = marks_of(text)
    check_apart(list(range(9000, 9400)), marks)
    check_apart(text[:23], marks)
    for start in range(24):
        with pytest.raises(EvalError, match="shares 1 runs"):
            check_apart([1, 2, 3, *text[start : start + 47], 4], marks)


def test_the_command_compares_all_variants_on_one_text(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", "tpla", "--model", str(folder), *WORDS, "--calibration-tokens", "2048"]
    # Scored and calibrated text are both Python's reference unless given: refused.
    assert rag_pipeline([*words, "--json"]) == 1
    assert "shares" in capsys.readouterr().err
    text = folder / "scored.txt"
    text.write_text("One two three, a piece of prose of its own.\n\n" * 60)
    words += ["--text", str(text), "--variants", "unsliced,gla,identity,hadamard,pca,output"]
    assert rag_pipeline([*words, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["n_tokens"] == 3 * 47
    assert report["calibration_tokens"] == 2048
    assert list(report["ppl"]) == ["unsliced", "gla", "identity", "hadamard", "pca", "output"]
    assert report["excess"]["unsliced"] == [0, 0, 0]
    per_layer = {name: size / 4 / 2 for name, size in report["kv_bytes_per_token_per_rank"].items()}
    assert per_layer == dict.fromkeys(report["ppl"], 16 + 8) | {"unsliced": 32 + 8}
    assert rag_pipeline([*words, "--ranks", "4", "--norm", "sliced", "--logits", "literal"]) == 0
    assert "4 ranks" in capsys.readouterr().out
    assert rag_pipeline([*words, "--prefill", "sliced", "--dtype", "bfloat16", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kv_bytes_per_token_per_rank"]["pca"] == 2 * 2 * 24


def test_statistics_are_written_whole_and_found_by_the_weights(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    refusal: Callable[..., str],
) -> None:
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path))
    words = ["tpla", "calibrate", "--model", str(folder), "--tokens", "600", "--window", "128"]
    assert rag_pipeline([*words, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    file = Path(report["file"])
    assert file == tmp_path / "tpla" / f"{fingerprint_checkpoint(folder)}.safetensors"
    assert [one.name for one in file.parent.iterdir()] == [file.name]
    assert (report["tokens"], report["layers"], report["dim"]) == (512, 2, 32)
    assert 0.5 < report["first_half_energy"] <= 1
    read = ModelStatistics.read(file)
    assert (read.tokens, len(read.layers)) == (512, 2)
    text = tmp_path / "scored.txt"
    text.write_text("A text that nobody calibrated with, over and over again. " * 50)
    given = ["--model", str(folder), "--text", str(text), *WORDS, "--statistics"]
    assert main([*given, str(file), "--variants", "pca", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["calibration_tokens"] == 512
    other = tmp_path / "other.safetensors"
    kept = ModelStatistics(
        model=read.model,
        fingerprint="0" * 32,
        tokens=read.tokens,
        layers=read.layers,
        text_marks=read.text_marks,
    )
    other.write_bytes(kept.to_bytes())
    assert "not of these weights" in refusal(main, [*given, str(other)], 1)
    other.write_bytes(file.read_bytes()[:-8])
    assert "cannot be read" in refusal(main, [*given, str(other)], 1)
    assert "cannot be read" in refusal(main, [*given, str(tmp_path / "none")], 1)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--variants", "pca,svd"], 2, "variant 'svd' is not known"),
        (["--ranks", "3"], 1, "ranks is 3; allowed: 2, 4"),
        (["--prefill", "none"], 1, "prefill is 'none'; allowed: unsliced, sliced"),
        (["--batch", "0"], 2, "--batch is 0"),
        (["--window", "8", "--prompt", "8"], 1, "prompt 8 and window 8"),
        (["--text", "/none.txt"], 1, "text /none.txt cannot be read"),
    ],
)
def test_a_bad_option_is_one_line(
    words: list[str], code: int, message: str, folder: Path, refusal: Callable[..., str]
) -> None:
    assert message in refusal(main, ["--model", str(folder), *words], code)


def test_other_models_are_refused_in_one_line(tiny_path: Path, refusal: Callable[..., str]) -> None:
    assert "the model is a 'llama'" in refusal(main, ["--model", str(tiny_path)], 1)
    words = ["--model", str(tiny_path), "--window", "2"]
    assert "--window is 2; it must be at least 3" in refusal(calibrate_command, words)


def test_a_place_for_statistics_is_refused_before_anything_is_measured(
    tmp_path: Path, refusal: Callable[..., str]
) -> None:
    # The model does not exist: the place is refused first.
    given = ["--model", str(tmp_path / "nowhere"), "--out"]
    assert "is a folder; name a file" in refusal(calibrate_command, [*given, str(tmp_path)], 1)
    (tmp_path / "file").write_text("", "utf-8")
    line = refusal(calibrate_command, [*given, str(tmp_path / "file" / "x")], 1)
    assert "file is a file; name another place" in line
