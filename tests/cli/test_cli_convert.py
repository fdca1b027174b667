"""``rag-pipeline convert``: what it refuses, in one line each."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from rag_pipeline.cli import main


def refused(words: list[str], capsys: pytest.CaptureFixture[str], code: int = 1) -> str:
    assert main(["convert", *words]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.fixture
def words(smollm2_path: Path, tmp_path: Path) -> list[str]:
    return ["mla", "--model", str(smollm2_path), "--out", str(tmp_path / "out")]


@pytest.mark.parametrize(
    ("sizes", "named"),
    [
        (
            "--rope 50 --latent 256",
            "rope is 50; it must be a multiple of the model's head dimension 64",
        ),
        (
            "--rope 64 --latent 100",
            "latent is 100; it must be a multiple of the model's head dimension 64: give 64, 128, ... 320",
        ),
        ("--rope 256 --latent 64", "rope is 256; the model's keys have 192 numbers"),
        ("--rope 128 --latent 64", "each of RoPE's frequencies once, so give 64"),
        ("--rope 64 --latent 384", "give at most 320"),
        ("--rope 0 --latent 64", "rope is 0"),
        ("--rope 64 --latent 64 --pad-heads-to 8", "taken away: give pad_heads_to of 9, 12, 16"),
        ("--rope 64 --latent 64 --pad-heads-to 10", "10 heads do not divide the hidden size 576"),
        ("--rope 64 --latent 64 --dtype float16", "allowed: auto, float32, bfloat16"),
        ("--rope 64 --latent 64 --calibration /nowhere", "text /nowhere cannot be read"),
        ("--rope 64 --latent 64 --calibration-tokens 1024", "needs at least 2304"),
    ],
)
def test_sizes_and_texts_that_do_not_fit_are_refused(
    words: list[str], sizes: str, named: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert named in refused([*words, *sizes.split()], capsys)
    assert list(tmp_path.iterdir()) == []


def test_a_family_without_a_form_is_refused_by_name(
    words: list[str], smollm2_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "qwen"
    shutil.copytree(smollm2_path, folder, symlinks=True)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "qwen2"}), "utf-8")
    words[2] = str(folder)
    line = refused([*words, "--rope", "64", "--latent", "64"], capsys)
    assert "family qwen2" in line
    assert "biases" in line


def test_a_folder_that_is_there_is_never_written_into(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    line = refused([*words, "--rope", "64", "--latent", "64"], capsys)
    assert "exists already" in line


def test_a_missing_size_is_a_mistake_in_the_options(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert "--latent" in refused([*words, "--rope", "64"], capsys, code=2)


def test_what_needs_no_weights_is_refused_before_they_are_unpacked(
    words: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from gguf import GGUFWriter

    home, file = tmp_path / "home", tmp_path / "qwen.gguf"
    monkeypatch.setenv("RAG_PIPELINE_HOME", str(home))
    writer = GGUFWriter(file, "qwen2")
    writer.add_tensor("x", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    words[2] = str(file)
    line = refused([*words, "--rope", "64", "--latent", "64"], capsys)
    assert "qwen.gguf is of family qwen2" in line
    words[2] = "smollm2-135m"
    (tmp_path / "out").symlink_to("nowhere")
    assert "exists already" in refused([*words, "--rope", "64", "--latent", "64"], capsys)
    assert not home.exists()
