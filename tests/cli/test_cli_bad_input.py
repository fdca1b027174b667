"""Bad input through the command line: one line, exit code not 0, nothing left behind."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from rag_pipeline.cli import main

SENTENCE = "The lighthouse of Port Ellery was painted green in 1931 by its keeper. "


@pytest.fixture(scope="module")
def small_index(tmp_path_factory: pytest.TempPathFactory, smollm2_path: Path) -> Path:
    """An index of two short files, made through the command line."""
    folder = tmp_path_factory.mktemp("small")
    files = folder / "files"
    files.mkdir()
    (files / "lighthouse.txt").write_text(SENTENCE * 3, "utf-8")
    (files / "bridge.md").write_text("# Bridge\n\nThe bridge has seven arches of red stone.\n")
    index = folder / "index"
    assert main(["ingest", str(files), "--index", str(index), "--model", str(smollm2_path)]) == 0
    return index


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run, check that it is refused in one line, and return that line."""
    capsys.readouterr()
    code = main(words)
    captured = capsys.readouterr()
    assert code not in (0, None)
    assert captured.out == ""
    lines = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, captured.err
    assert "Traceback" not in captured.err
    return lines[0]


def test_missing_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(["ingest", str(tmp_path / "gone"), "--index", str(tmp_path / "i")], capsys)
    assert "gone" in line
    assert not (tmp_path / "i" / "manifest.json").exists()


def test_empty_folder(
    tmp_path: Path, smollm2_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    refused(
        [
            "ingest",
            str(tmp_path / "empty"),
            "--index",
            str(tmp_path / "i"),
            "--model",
            str(smollm2_path),
        ],
        capsys,
    )


def test_a_binary_file_alone_is_an_error_and_beside_others_is_skipped(
    tmp_path: Path, smollm2_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = tmp_path / "files"
    files.mkdir()
    (files / "noise.txt").write_bytes(bytes(range(256)) * 8)
    words = ["ingest", str(files), "--index", str(tmp_path / "i"), "--model", str(smollm2_path)]
    assert "noise.txt" in refused(words, capsys)
    (files / "good.txt").write_text(SENTENCE, "utf-8")
    assert main([*words, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["documents_added"] == 1
    assert report["files"]["skipped"] == 1


def test_corrupt_index(
    small_index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(small_index, copy)
    largest = max((p for p in copy.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-7])
    line = refused(["ask", "What colour?", "--index", str(copy)], capsys)
    assert str(copy) in line or largest.name in line


def test_no_index(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(["ask", "What colour?", "--index", str(tmp_path / "none")], capsys)
    assert "ingest" in line


def test_wrong_embedder(
    small_index: Path, minilm_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    other = tmp_path / "other-embedder"
    shutil.copytree(minilm_path, other)
    config = json.loads((other / "config_sentence_transformers.json").read_text())
    config["prompts"] = {"query": "query: ", "document": "passage: "}
    (other / "config_sentence_transformers.json").write_text(json.dumps(config))
    line = refused(
        ["ask", "What colour?", "--index", str(small_index), "--embedder", str(other)], capsys
    )
    assert "embedder" in line


def test_model_not_found(small_index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(
        ["ask", "What colour?", "--index", str(small_index), "--model", "./no-such-model"], capsys
    )
    assert "no-such-model" in line


def test_question_longer_than_the_context(
    small_index: Path, smollm2_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(
        ["ask", SENTENCE * 2000, "--index", str(small_index), "--model", str(smollm2_path)], capsys
    )
    assert "does not fit" in line


@pytest.mark.parametrize("question", ["", "   "])
def test_empty_question(
    question: str, small_index: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "empty" in refused(["ask", question, "--index", str(small_index)], capsys)


def test_unknown_search(small_index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(["ask", "q?", "--index", str(small_index), "--search", "magic"], capsys)
    assert "dense, bm25, hybrid" in line


def test_overlap_not_below_chunk_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["ingest", str(tmp_path), "--index", str(tmp_path / "i")]
    line = refused([*words, "--chunk-tokens", "64", "--overlap", "64"], capsys)
    assert "--overlap" in line


def test_server_that_is_not_there(
    small_index: Path, smollm2_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = probe.getsockname()[1]
    url = f"http://127.0.0.1:{free}"
    words = ["ask", "q?", "--index", str(small_index), "--model", str(smollm2_path)]
    assert url in refused([*words, "--server", url], capsys)
    assert url in refused(["doctor", "--server", url], capsys)


def test_ingesting_again_embeds_nothing(
    small_index: Path, smollm2_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = small_index.parent / "files"
    words = ["ingest", str(files), "--index", str(small_index), "--model", str(smollm2_path)]
    assert main([*words, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["chunks_embedded"] == 0
    assert report["documents_unchanged"] == 2
    assert not report["changed"]


def test_a_default_attention_that_does_not_exist(
    small_index: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["serve", "--index", str(small_index), "--attention"]
    assert "--attention: " in (line := refused([*words, "powre"], capsys))
    assert "'powre'" in line
    assert "power" in line
    assert "--attention: " in refused([*words, "power:window=0"], capsys)


def test_a_basis_that_does_not_exist(
    small_index: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAG_PIPELINE_TPLA", "off")
    line = refused(["serve", "--index", str(small_index), "--tpla", "svd"], capsys)
    assert "RAG_PIPELINE_TPLA is 'svd'; allowed are 'off', 'identity'" in line


def test_a_server_without_a_memory_refuses_flags_of_one(
    small_index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["serve", "--index", str(small_index), "--model", "no-such-model"]
    for given in ([], ["--memory", "off"]):
        said = refused([*words, *given, "--memory-budget", "1024"], capsys)
        assert "--memory-budget is 1024 and --memory is off; give --memory epicache" in said
    # What a file says of a memory waits for one that is asked for.
    file = tmp_path / "settings.toml"
    file.write_text("[memory]\nbudget_tokens = 1024\n")
    assert "no-such-model" in refused(["--config", str(file), *words], capsys)


@pytest.mark.parametrize("command", [["serve"], ["ask", "Why?"]])
def test_an_order_of_documents_that_does_not_exist(
    small_index: Path, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    words = [*command, "--index", str(small_index), "--document-order"]
    assert "document_order is 'best'" in refused([*words, "best"], capsys)
    assert "window" in refused([*words, "power:window=0"], capsys)


def test_a_default_attention_is_told_to_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    from rag_pipeline.cli.serve import _choose_attention
    from rag_pipeline.sglang_plugin import FUSION_VARIABLE, FusionConfig

    monkeypatch.setenv(FUSION_VARIABLE, '{"min_reused_tokens": 9, "attention": "streaming"}')
    _choose_attention(None)
    assert FusionConfig.from_env().attention == "streaming"
    _choose_attention("power:window=3")
    told = FusionConfig.from_env()
    assert (told.attention, told.min_reused_tokens) == ("power:window=3", 9)


def test_a_remote_tier_without_a_proper_address(
    small_index: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["serve", "--index", str(small_index), "--kv-remote", "valkey://:hunter22@h:port"]
    line = refused(words, capsys)
    assert "--kv-remote: remote tier 'valkey://h:port' is no address" in line
    assert "hunter22" not in line
