"""Settings beside commands: what `config` prints and writes, and the options that settings stand for."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from rag_pipeline.cli import main
from rag_pipeline.cli.app import app
from rag_pipeline.cli.config import MEASURING, MEMORY_OPTIONS, command_defaults
from rag_pipeline.config import FILE_NAME, HOME_VARIABLE, load_settings, template
from rag_pipeline.config.schema import MEMORY_METHODS as MEMORY_SETTING_METHODS
from rag_pipeline.config.settings import ENGINE_KEYS, all_keys, fields_by_key

COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
FUSION = "RAG_PIPELINE_FUSION"
NOT_SETTINGS = {
    "json_output", "paths", "question", "help", "path",
    # NAME:RATIO in ask.policy says it; a ratio alone could not be taken back by `--policy prefix`.
    "ratio",
    # Of ask for the same reason: beside prefix it is refused. Of serve fusion.attention says it.
    "attention",
    # A settings file is shown and shared; a key is not, and the risk of none is taken on each start anew.
    "api_key", "admin_api_key", "unprotected",
    # fusion.automatic says it; it reaches the engine by the variable of fusion.
    "automatic",
    # The same of fusion.remote.
    "kv_remote",
    # Of one conversation.
    "system", "history",
}  # fmt: skip
"""Options that say what one run is about, and are no defaults of a user or a project."""


def test_show_lists_every_key_with_value_and_origin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(FUSION, '{"policy": "epic"}')
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path / "home"))
    (tmp_path / "s.toml").write_text("[ingest]\ninclude = ['*.md', '*.txt']\n")
    assert main(["--config", str(tmp_path / "s.toml"), "config", "show", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert list(shown["settings"]) == all_keys()
    assert shown["settings"]["fusion.policy"] == {
        "value": "epic", "origin": "environment", "where": FUSION, "variable": FUSION
    }  # fmt: skip
    assert shown["settings"]["home"]["value"] == str(tmp_path / "home")
    assert main(["--config", str(tmp_path / "s.toml"), "config", "show"]) == 0
    out = capsys.readouterr().out
    assert re.search(rf"^ingest.include +\*.md, \*.txt +file {tmp_path}/s.toml$", out, re.MULTILINE)
    assert re.search(r"^ask.top_k +4 +default$", out, re.MULTILINE)


def test_env_prints_what_a_shell_reads_back(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import shlex

    monkeypatch.delenv(HOME_VARIABLE, raising=False)
    Path(FILE_NAME).write_text('fast_start = "off"\n[fusion]\npolicy = "epic:0.2"\n')
    assert main(["config", "env"]) == 0
    words = shlex.split(capsys.readouterr().out)
    pairs = dict(word.split("=", 1) for word in words if word != "export")
    assert pairs.pop("RAG_PIPELINE_FAST_START") == "off"
    assert json.loads(pairs.pop(FUSION)) == {"policy": "epic:0.2"}
    assert not pairs


def test_init_writes_a_file_that_changes_nothing_until_edited(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["config", "init"]) == 0
    text = Path(FILE_NAME).read_text("utf-8")
    assert text == template()
    defaults = load_settings(Path("off")).values()
    assert load_settings().values() == defaults
    # Uncommented, every line is valid and says the default (unset ones become empty texts).
    Path(FILE_NAME).write_text(re.sub(r"^# (?=\w+ = )", "", text, flags=re.MULTILINE))
    values = load_settings().values()
    unset = {key for key, value in defaults.items() if value is None}
    assert {k: v for k, v in values.items() if k not in unset} == {
        k: v for k, v in defaults.items() if k not in unset
    }
    assert main(["config", "init"]) == 1
    assert "exists" in capsys.readouterr().err


def options_of(commands: dict[str, Any], place: str = "") -> Iterator[tuple[str, str, Any]]:
    """Command path, its own name, and each of its options."""
    for name, command in commands.items():
        if inner := getattr(command, "commands", None):
            yield from options_of(inner, f"{place}{name} ")
        else:
            yield from ((f"{place}{name}", name, option) for option in command.params)


def test_every_option_of_a_command_is_a_setting_with_the_same_default() -> None:
    fields = fields_by_key()
    seen = set()
    for place, name, option in options_of(COMMANDS):
        if name in MEASURING or option.name in NOT_SETTINGS or place.startswith("config"):
            continue
        key = f"{name}.{option.name}"
        if key not in fields:
            key = MEMORY_OPTIONS.get(option.name, option.name)
        if " " in place and key not in fields:
            continue  # inside a group: what one run of `cache pin` is about
        if " " in place and option.required:
            continue  # no run of `convert mla` is about the model that is served
        assert key in fields, f"{place}: {option.name} is in no section of the schema"
        seen.add(key)
        default = fields[key].default
        assert option.default == default or (default in (None, []) and not option.default), (
            f"{place}: {option.name}"
        )
    left = set(fields) - seen - set(ENGINE_KEYS)
    assert {key for key in left if not key.startswith("fusion.")} == set()


def test_the_settings_of_a_memory_are_those_of_its_own_configuration() -> None:
    from rag_pipeline.memory import MEMORY_METHODS, MemoryConfig

    settings = {key: field for key, field in fields_by_key().items() if key.startswith("memory.")}
    assert {key: field.default for key, field in settings.items()} == {
        f"memory.{name}": getattr(MemoryConfig(), name)
        for name in ("method", "budget_tokens", "episodes", "block_tokens")
    } | {"memory.method": "off"}
    assert {"off", *MEMORY_METHODS.names()} == {"full", *MEMORY_SETTING_METHODS}


def test_a_command_takes_its_memory_from_the_settings() -> None:
    given = {"memory.method": "epicache", "memory.episodes": 2}
    defaults = command_defaults(COMMANDS, given)
    assert {name: found for name, found in defaults.items() if found} == {
        name: {"memory": "epicache", "memory_episodes": 2} for name in ("chat", "serve")
    }


def test_defaults_of_commands_are_built_for_groups_too() -> None:
    given = {"model": "m", "store": "s", "ask.top_k": 9}
    defaults = command_defaults(COMMANDS, given)
    assert defaults["ask"] == {"model": "m", "store": "s", "top_k": 9}
    assert defaults["cache"]["warm"] == {"model": "m", "store": "s"}
    assert defaults["cache"]["ls"] == {"store": "s"}
    assert defaults["doctor"] == {"model": "m"}
    assert "eval" not in defaults
    assert command_defaults(COMMANDS, {"index": "i"})["serve"] == {"indexes": ["i"]}
    both = command_defaults(COMMANDS, {"index": "i", "serve.indexes": ["a=b"], "serve.port": 1})
    assert both["serve"] == {"indexes": ["a=b"], "port": 1}


def test_measurements_take_nothing_from_a_file_but_the_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rag_pipeline.cli.config import settings_in_force

    monkeypatch.delenv(HOME_VARIABLE, raising=False)
    Path(FILE_NAME).write_text('home = "h"\n[fusion]\nenabled = false\n')
    with settings_in_force(None, "eval", COMMANDS) as defaults:
        assert defaults == {}
        assert FUSION not in os.environ
        assert os.environ[HOME_VARIABLE] == str(tmp_path / "work" / "h")
    assert HOME_VARIABLE not in os.environ
