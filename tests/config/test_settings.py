"""Settings: where they come from, which one wins, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from rag_pipeline.cli import main
from rag_pipeline.config import FILE_NAME, HOME_VARIABLE, load_settings, settings_table
from rag_pipeline.config.schema import FUSION_POLICIES
from rag_pipeline.config.settings import all_keys, fields_by_key
from rag_pipeline.config.sources import _NOT_SETTINGS, _TEST_PREFIX, variable_of
from rag_pipeline.errors import RagPipelineError
from rag_pipeline.models.converted import HOME_VARIABLE as MODELS_HOME_VARIABLE

ROOT = Path(__file__).resolve().parents[2]
FUSION = "RAG_PIPELINE_FUSION"


def user_file(tmp_path: Path) -> Path:
    folder = tmp_path / "user" / "rag-pipeline"
    folder.mkdir(parents=True)
    return folder / FILE_NAME


def origin(key: str) -> tuple[Any, str, str]:
    resolved = load_settings()
    return resolved.values()[key], resolved.origins[key].kind, resolved.origins[key].where


def test_each_source_wins_over_the_ones_below_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert origin("ask.top_k") == (4, "default", "")
    users = user_file(tmp_path)
    users.write_text("[ask]\ntop_k = 5\nsearch = 'bm25'\n")
    assert origin("ask.top_k") == (5, "file", str(users))
    project = Path.cwd() / FILE_NAME
    project.write_text("[ask]\ntop_k = 6\n")
    assert origin("ask.top_k") == (6, "file", str(project))
    assert origin("ask.search") == ("bm25", "file", str(users))
    other = tmp_path / "other.toml"
    other.write_text("[ask]\ntop_k = 7\n")
    monkeypatch.setenv("RAG_PIPELINE_CONFIG", str(other))
    assert origin("ask.top_k") == (7, "file", str(other))
    monkeypatch.setenv("RAG_PIPELINE_ASK_TOP_K", "8")
    assert origin("ask.top_k") == (8, "environment", "RAG_PIPELINE_ASK_TOP_K")
    monkeypatch.setenv("RAG_PIPELINE_CONFIG", "off")
    assert load_settings().files == ()


def test_flags_win_over_environment_over_file(
    tmp_path: Path,
    smollm2_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Through a real command: the number of chunks shows which chunk size was in force."""
    (tmp_path / "text.txt").write_text("The lighthouse of Port Ellery was painted green. " * 60)
    Path(FILE_NAME).write_text(
        f'index = "from-file"\nmodel = "{smollm2_path}"\n[ingest]\nchunk_tokens = 16\n'
    )

    def chunks(*flags: str) -> int:
        assert main(["ingest", str(tmp_path / "text.txt"), *flags, "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        return int(report["chunks_total"])

    by_file = chunks()
    assert (Path("from-file") / "manifest.json").is_file()
    monkeypatch.setenv("RAG_PIPELINE_INGEST_CHUNK_TOKENS", "64")
    by_environment = chunks("--index", "second")
    by_flag = chunks("--index", "third", "--chunk-tokens", "256")
    assert by_file > by_environment > by_flag


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("top_k = 3", ["unknown key 'top_k'", "'ask.top_k'"]),
        ("[ask]\ntopk = 3", ["unknown key 'ask.topk'", "'ask.top_k'"]),
        ("[asks]\ntop_k = 3", ["unknown key 'asks'", "'ask"]),
        ("[fusion]\nstore_byte = 3", ["'fusion.store_bytes'"]),
        ("zzzz = 1", ["unknown key 'zzzz'", "model, embedder"]),
        ("[ask]\ntop_k = 0", ["ask.top_k is 0", "greater than or equal to 1"]),
        ("[ask]\ntop_k = '4'", ["ask.top_k is '4'", "integer"]),
        ("[ask]\ntop_k = true", ["ask.top_k is True"]),
        ("[ask]\nsearch = 'magic'", ["'dense', 'bm25' or 'hybrid'"]),
        ("[ask]\npolicy = 'magic'", ["prefix, full, reuse"]),
        ("[ask]\npolicy = 'query:2'", ["from 0 to 1"]),
        ("[fusion]\npolicy = 'prefix'", ["choose one of full"]),
        ("plugin = false", ["'on' or 'off'"]),
        ("ask = 3", ["ask is 3"]),
        ("[ask\n", ["not TOML", "line 1"]),
    ],
)
def test_a_fault_in_a_file_is_one_line(
    text: str, named: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    Path(FILE_NAME).write_text(text)
    assert main(["config", "show"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    for part in (*named, FILE_NAME):
        assert part in captured.err
    # The same file stops a command before it does anything, and never its help.
    assert main(["ask", "why?", "--index", "i"]) == 1
    assert FILE_NAME in capsys.readouterr().err
    assert main(["ask", "--help"]) == 0


@pytest.mark.parametrize(
    ("name", "value", "named"),
    [
        ("RAG_PIPELINE_ASK_TOPK", "3", "RAG_PIPELINE_ASK_TOP_K"),
        ("RAG_PIPELINE_ASK_TOP_K", "three", "ask.top_k is 'three'"),
        ("RAG_PIPELINE_FUSION_POLICY", "epic", "one variable with JSON"),
        (FUSION, "maybe", "on, off, or a JSON object"),
        (FUSION, '{"polcy": "epic"}', "'fusion.policy'"),
        (FUSION, '{"store_bytes": "much"}', "fusion.store_bytes"),
        ("RAG_PIPELINE_PLUGIN", "no", "'on' or 'off'"),
        ("RAG_PIPELINE_CONFIG", "gone.toml", "gone.toml"),
    ],
)
def test_a_fault_in_the_environment_is_one_line(
    name: str, value: str, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(RagPipelineError) as refused:
        load_settings()
    assert named in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_file_that_is_no_text(capsys: pytest.CaptureFixture[str]) -> None:
    Path(FILE_NAME).write_bytes(b"\xff\xfe\x00")
    assert main(["config", "show"]) == 1
    assert "UTF-8" in capsys.readouterr().err


def test_paths_in_a_file_are_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(HOME_VARIABLE, raising=False)
    file = tmp_path / "settings.toml"
    file.write_text(
        'index = "i"\nmodel = "./m"\nembedder = "org/name"\nhome = "~/h"\n'
        '[serve]\nindexes = ["law=l", "/n"]\n'
    )
    values = load_settings(file).values()
    assert values["index"] == str(tmp_path / "i")
    assert values["model"] == str(tmp_path / "m")
    assert values["embedder"] == "org/name"
    assert values["serve.indexes"] == [f"law={tmp_path / 'l'}", "/n"]
    assert values["home"] == str(Path("~/h").expanduser())


def test_settings_of_a_file_reach_the_environment_of_engines_and_leave_it_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from rag_pipeline.sglang_plugin.fusion.config import FusionConfig

    Path(FILE_NAME).write_text(
        'plugin = "off"\ncpu_decode = "fast"\n[fusion]\npolicy = "epic:0.2"\nbackground = false\n'
    )
    monkeypatch.setenv(FUSION, '{"policy": "reuse", "min_reused_tokens": 3}')
    before = dict(os.environ)
    with load_settings().exported():
        assert os.environ["RAG_PIPELINE_PLUGIN"] == "off"
        assert os.environ["RAG_PIPELINE_CPU_DECODE"] == "fast"
        assert "RAG_PIPELINE_FAST_START" not in os.environ
        assert FusionConfig.from_env() == FusionConfig(
            policy="reuse", min_reused_tokens=3, background=False
        )
    assert dict(os.environ) == before


@pytest.mark.parametrize("text", ["off", "on", "{}", '{"policy": "epic", "checksums": true}'])
def test_the_variable_of_fusion_means_what_it_meant(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rag_pipeline.sglang_plugin.fusion.config import FusionConfig

    monkeypatch.setenv(FUSION, text)
    alone = FusionConfig.from_env()
    with load_settings().exported():
        assert FusionConfig.from_env() == alone


def test_the_schema_agrees_with_the_plugin() -> None:
    from chunk_cache.policies import policy_names
    from rag_kernels.native.library import SWITCH
    from rag_pipeline.sglang_plugin import FUSION_VARIABLE, OFF_SWITCH
    from rag_pipeline.sglang_plugin.cpu.attention_backend import DECODE
    from rag_pipeline.sglang_plugin.fusion.config import FusionConfig
    from rag_pipeline.sglang_plugin.launch.fork_server import FAST_START

    assert policy_names() == FUSION_POLICIES
    schema = {
        key.removeprefix("fusion."): field.default
        for key, field in fields_by_key().items()
        if key.startswith("fusion.")
    }
    plugin = {field.name: field.default for field in dataclasses.fields(FusionConfig)}
    # TOML and JSON have lists where the plugin has tuples.
    assert schema == {k: list(v) if isinstance(v, tuple) else v for k, v in plugin.items()}
    assert FUSION_VARIABLE == variable_of("fusion.policy") == FUSION
    assert variable_of("plugin") == OFF_SWITCH
    assert variable_of("fast_start") == FAST_START
    assert variable_of("cpu_decode") == DECODE
    assert variable_of("cpu_kernels") == SWITCH
    assert HOME_VARIABLE == MODELS_HOME_VARIABLE == variable_of("home")


def test_every_variable_in_the_source_is_a_setting() -> None:
    """A variable that code reads and settings do not know would be refused by every command."""
    known = {variable_of(key) for key in all_keys()} | _NOT_SETTINGS
    found = set()
    for package in ("rag_pipeline", "chunk_cache", "retrievers", "kernels", "eval"):
        for path in (ROOT / package).rglob("*.py"):
            found |= set(re.findall(r"\bRAG_PIPELINE_[A-Z][A-Z_]*[A-Z]\b", path.read_text("utf-8")))
    # Named in an error message as what is not to be written.
    found -= {name for name in found if name.startswith(_TEST_PREFIX)}
    assert found <= known | {"RAG_PIPELINE_ASK_TOP_K"}


def test_the_documentation_lists_every_key() -> None:
    assert settings_table() in (ROOT / "docs" / "configuration.md").read_text("utf-8")


def test_an_address_with_a_password_is_shown_without_it(tmp_path: Path) -> None:
    from rag_pipeline.sglang_plugin import FusionConfig

    url = "valkey://me:hunter22@127.0.0.1:6379/1?ttl=5"
    config = FusionConfig(remote=url)
    assert FusionConfig.from_env({"RAG_PIPELINE_FUSION": config.to_env()}).remote == url
    assert config.shown()["remote"] == "valkey://127.0.0.1:6379/1"
    assert "hunter22" not in repr(config)
    file = tmp_path / "rag-pipeline.toml"
    file.write_text(f'[fusion]\nremote = "{url}"\n')
    resolved = load_settings(file, environ={})
    assert resolved.settings.fusion.remote == url
    assert "hunter22" not in json.dumps(resolved.to_json())


def test_a_bad_address_is_one_line_without_the_password() -> None:
    from rag_pipeline.errors import EngineError
    from rag_pipeline.sglang_plugin import FusionConfig

    for text in (
        '{"remote": "http://:hunter22@h"}',
        '{"remote": "valkey://:hunter22@h:port"}',
        '{"remote": "valkey://:hunter22@h"',
    ):
        with pytest.raises(EngineError, match="RAG_PIPELINE_FUSION") as caught:
            FusionConfig.from_env({"RAG_PIPELINE_FUSION": text})
        assert "\n" not in str(caught.value)
        assert "hunter22" not in str(caught.value)
