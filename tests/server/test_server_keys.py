"""Tenants, keys and index names, as `serve` reads them before anything starts."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from rag_pipeline.cli import main
from rag_pipeline.errors import RagPipelineError
from rag_pipeline.server.keys import EVERYBODYS_DIGESTS, digest_of, read_key
from rag_pipeline.server.tenants import Tenants, parse_indexes

KEY = "a-key-of-enough-letters"


def load(tmp_path: Path, content: Any) -> Tenants:
    path = tmp_path / "tenants.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return Tenants.load({"main": tmp_path / "main"}, path, operator_key="operators-own-key")


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("{", "cannot be read as JSON"),
        ({}, "at least one tenant"),
        ({"Acme": {"api_key": KEY, "index": "x"}}, "'Acme' is not a name"),
        ({"../up": {"api_key": KEY, "index": "x"}}, "is not a name"),
        ({"operator": {"api_key": KEY, "index": "x"}}, "choose another"),
        ({"acme": {"api_key": "short", "index": "x"}}, "16 or more"),
        ({"acme": {"index": "x"}}, "needs one of api_key"),
        ({"acme": {"api_key": KEY, "api_key_sha256": "0" * 64, "index": "x"}}, "needs one of"),
        ({"acme": {"api_key_sha256": "zz", "index": "x"}}, "64 hexadecimal"),
        ({"acme": {"api_key": "", "index": "x"}}, "is empty"),
        ({"acme": {"api_key": " " * 20, "index": "x"}}, "is empty"),
        ({"acme": {"api_key": "é" * 20, "index": "x"}}, "beyond ASCII"),
        ({"acme": {"api_key_sha256": digest_of(""), "index": "x"}}, "everybody knows"),
        ({"acme": {"api_key_sha256": digest_of("test"), "index": "x"}}, "everybody knows"),
        ({"acme": {"api_key": "operators-own-key", "index": "x"}}, "is also the key of tenant acme"),
        ('{"acme": {}, "acme": {}}', "'acme' stands twice"),
        ({"acme": {"api_key": KEY}}, "index must be a folder"),
        ({"acme": {"api_key": KEY, "index": "x", "salt": "y"}}, "unknown fields salt"),
        ({"acme": {"api_key": KEY, "index": "x", "automatic": "yes"}}, "give true or false"),
        ({"a": {"api_key": KEY, "index": "x"}, "b": {"api_key": KEY, "index": "y"}}, "key of another"),
        ({"a": {"api_key": KEY, "index": "x"}, "b": {"api_key": KEY + "2", "index": "x"}}, "share the index"),
    ],
)  # fmt: skip
def test_faults_of_a_tenants_file_are_one_line(tmp_path: Path, content: Any, line: str) -> None:
    with pytest.raises(RagPipelineError, match=line) as error:
        load(tmp_path, content)
    assert "\n" not in str(error.value)


def test_a_tenant_shares_no_index_and_no_namespace_with_the_operator(tmp_path: Path) -> None:
    with pytest.raises(RagPipelineError, match="operator and acme share the index"):
        load(tmp_path, {"acme": {"api_key": KEY, "index": str(tmp_path / "main")}})
    tenants = load(tmp_path, {"acme": {"api_key": KEY, "index": "x"}})
    acme = tenants.of(KEY)
    assert acme is not None
    assert acme.name == "acme"
    assert acme.salt.startswith("tenant-")
    assert tenants.of("operators-own-key") is tenants.operator
    # Whoever brings no key, or another, is nobody: not the operator.
    assert tenants.of("another key") is tenants.of(None) is tenants.of("") is None
    assert Tenants({}).of(None).name == "operator"  # type: ignore[union-attr]


def test_a_digest_of_a_short_key_opens_nothing(tmp_path: Path) -> None:
    """How long the key behind a digest is, is only seen when somebody brings it."""
    hashed = {"a": {"api_key_sha256": digest_of("short"), "index": "x"},
              "b": {"api_key_sha256": digest_of(KEY), "index": "y"}}  # fmt: skip
    tenants = load(tmp_path, hashed)
    assert tenants.of("short") is None
    assert tenants.of(KEY).name == "b"  # type: ignore[union-attr]


def test_the_documented_digest_is_of_no_word() -> None:
    text = (Path(__file__).parents[2] / "docs" / "security.md").read_text("utf-8")
    shown = set(re.findall(r"[0-9a-f]{64}", text))
    assert shown
    assert not shown & EVERYBODYS_DIGESTS


@pytest.mark.parametrize("key", ["", " ", "\t", "é", "two words"])
def test_a_key_that_is_none_is_an_error_wherever_it_comes_from(
    tmp_path: Path, key: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "key"
    file.write_text(key)
    for name in ("api-key", "admin-api-key"):
        variable = f"RAG_PIPELINE_{name.upper().replace('-', '_')}"
        for words, environment in (
            ([f"--{name}", key], {}),
            ([f"--{name}={key}"], {}),
            ([f"--{name}-file", str(file)], {}),
            ([], {variable: key}),
        ):
            with monkeypatch.context() as patch:
                for given, value in environment.items():
                    patch.setenv(given, value)
                assert main(["serve", "--index", "/x", *words]) == 1
                said = capsys.readouterr().err.strip().splitlines()
                assert said[-1].startswith("error: ")
                assert f"--{name}" in said[-1] or variable in said[-1]


def test_an_empty_name_of_a_key_file_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "--index", "/x", "--api-key-file", ""]) == 1
    assert "cannot be read" in capsys.readouterr().err
    monkeypatch.setenv("RAG_PIPELINE_SERVE_API_KEY_FILE", "")
    assert main(["serve", "--index", "/x"]) == 1
    assert "RAG_PIPELINE_SERVE_API_KEY_FILE is empty" in capsys.readouterr().err


def test_keys_come_from_one_place_and_leave_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(**given: Any) -> str | None:
        return read_key(
            **{"flag": "--api-key", "given": None, "file": None, "variable": "SOME_KEY"} | given
        )

    (tmp_path / "key").write_text(f"{KEY}\n")
    assert read() is None
    assert read(given=KEY) == read(file=tmp_path / "key") == KEY
    monkeypatch.setenv("SOME_KEY", KEY)
    assert read() == KEY
    assert "SOME_KEY" not in os.environ
    with pytest.raises(RagPipelineError, match="both give a key"):
        read(given=KEY, file=tmp_path / "key")
    (tmp_path / "key").write_text(f"{KEY}\nsecond\n")
    with pytest.raises(RagPipelineError, match="one key"):
        read(file=tmp_path / "key")


@pytest.mark.parametrize(
    ("flag", "acme", "everybody", "single"),
    [
        (None, None, False, []),
        (None, True, False, ["acme"]),
        (True, None, True, []),
        (True, True, True, []),
        (True, False, False, ["operator", "other"]),
        (False, True, False, ["acme"]),
    ],
)
def test_each_tenant_says_whether_its_prompts_are_matched_unasked(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flag: bool | None,
    acme: bool | None,
    everybody: bool,
    single: list[str],
) -> None:
    from rag_pipeline.cli.serve import _choose_automatic
    from rag_pipeline.sglang_plugin import FUSION_VARIABLE, FusionConfig

    choice = {} if acme is None else {"automatic": acme}
    content = {
        "acme": {"api_key": KEY, "index": "x", **choice},
        "other": {"api_key": KEY[::-1], "index": "y"},
    }
    tenants = load(tmp_path, content)
    monkeypatch.setenv(FUSION_VARIABLE, '{"min_reused_tokens": 9}')
    _choose_automatic(tenants, flag)
    told = FusionConfig.from_env()
    assert (told.automatic, told.min_reused_tokens) == (everybody, 9)
    salts = {tenant.name: tenant.salt for tenant in tenants.all()}
    assert sorted(told.automatic_tenants) == sorted(salts[name] for name in single)


def test_index_options() -> None:
    found = parse_indexes(["/data/My Notes", "law=/data/l"])
    assert list(found) == ["my-notes", "law"]
    assert found["law"] == Path("/data/l")
    for wrong, line in (
        ([], "missing"),
        (["a=x", "a=y"], "given twice"),
        (["A B=x"], "not a name"),
    ):
        with pytest.raises(RagPipelineError, match=line):
            parse_indexes(wrong)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["serve"], "Missing option '--index'"),
        (["serve", "--index", "Bad Name=/x"], "is not a name"),
        (["serve", "--index", "/x", "--policy", "nonsense"], "policy 'nonsense' is unknown"),
        (["serve", "--index", "/x", "--search", "psychic"], "--search is 'psychic'"),
        (["serve", "--index", "/x", "--tenants", "/none.json"], "cannot be read"),
        (["serve", "--index", "/x", "--model-path", "/y"], "--model-path is not taken here; use --model"),
        (["serve", "--index", "/x", "--port", "0"], "Invalid value for '--port'"),
        (["serve", "--index", "/x", "stray"], "'stray' is not a flag"),
        (["serve", "--index", "/x", "--host", "0.0.0.0"], "accept it with --unprotected-without-key"),
        (["serve", "--index", "/x", "--host", "127.evil.example"], "--unprotected-without-key"),
    ],
)  # fmt: skip
def test_serve_refuses_in_one_line_before_anything_starts(
    words: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) in (1, 2)
    said = capsys.readouterr().err.strip().splitlines()
    assert line in said[-1]
    assert said[-1].startswith("error: ")


def test_tenants_need_an_operators_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.json").write_text(json.dumps({"acme": {"api_key": KEY, "index": "x"}}))
    assert main(["serve", "--index", "/x", "--tenants", str(tmp_path / "t.json")]) == 1
    assert "give --api-key-file too" in capsys.readouterr().err
