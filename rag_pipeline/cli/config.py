"""``rag-pipeline config``, and the way from settings to the defaults of every command."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rag_pipeline.cli.console import emit_json, say, write
from rag_pipeline.config import FILE_NAME, HOME_VARIABLE, anything_set, load_settings
from rag_pipeline.errors import RagPipelineError
from rag_pipeline.whole_file import write_whole

MEASURING = frozenset({"eval", "bench"})
"""Commands whose settings are all on their command line; a file only says where the project's folder is."""

MEMORY_OPTIONS = {
    "memory": "memory.method",
    "memory_budget": "memory.budget_tokens",
    "memory_episodes": "memory.episodes",
    "memory_block": "memory.block_tokens",
}
"""Settings of the options by which several commands choose a memory."""


def command_defaults(commands: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as click's ``default_map``: what a command takes where no flag is given.

    Parameters
    ----------
    commands : mapping
        Commands of a click group by name; groups inside are followed.
    given : mapping
        Given settings by dotted key. An option takes ``COMMAND.option`` of its own command's
        section, else the shared ``option``; those of a memory stand in :data:`MEMORY_OPTIONS`.

    Returns
    -------
    dict
        ``{command: {option: value}}``, nested where groups are.
    """
    defaults: dict[str, Any] = {}
    for name, command in commands.items():
        if inner := getattr(command, "commands", None):
            defaults[name] = command_defaults(inner, given)
            continue
        found = {
            option.name: given[key]
            for option in command.params
            for key in (f"{name}.{option.name}", MEMORY_OPTIONS.get(option.name, option.name))
            if key in given
        }
        if "index" in given and any(option.name == "indexes" for option in command.params):
            found.setdefault("indexes", [given["index"]])
        if found:
            defaults[name] = found
    return defaults


@contextlib.contextmanager
def settings_in_force(
    file: Path | None, command: str | None, commands: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """Read settings for one run of the command line.

    Yields the commands' defaults; inside, the environment carries what the engine's processes read.
    """
    if command == "config" or not anything_set(file):
        yield {}
        return
    resolved = load_settings(file)
    only = frozenset({HOME_VARIABLE}) if command in MEASURING else None
    with resolved.exported(only=only):
        yield {} if command in MEASURING else command_defaults(commands, resolved.given())


def run_show(*, file: Path | None, json_output: bool) -> None:
    """Print every value and where it came from."""
    resolved = load_settings(file)
    report = resolved.to_json()
    if json_output:
        emit_json(report)
        return
    read = ", ".join(report["files"]) or "none"
    write(f"files read: {read}\n\n")
    shown = [
        (key, _shown(entry["value"]), f"{entry['origin']} {entry['where']}".strip())
        for key, entry in report["settings"].items()
    ]
    widths = [max(len(row[column]) for row in shown) for column in (0, 1)]
    for key, value, origin in shown:
        write(f"{key:{widths[0]}}  {value:{widths[1]}}  {origin}\n")


def run_env(*, file: Path | None) -> None:
    """Print shell lines that give a server started by hand the settings of the files."""
    for name, value in sorted(load_settings(file).environment().items()):
        write(f"export {name}={shlex.quote(value)}\n")


def run_init(path: Path) -> None:
    """Write a file with every key commented out; an existing file is left alone."""
    from rag_pipeline.config import template

    target = path / FILE_NAME if path.is_dir() else path
    if target.exists():
        raise RagPipelineError(f"{target} exists already; edit it, or name another file")
    if not target.parent.is_dir():
        raise RagPipelineError(f"{target.parent} is not a folder; make it first")
    write_whole(target, template())
    say(f"wrote {target}")


def _shown(value: Any) -> str:
    if value is None or value == "":
        return "-"
    if isinstance(value, list):
        return ", ".join(value) or "-"
    return str(value).lower() if isinstance(value, bool) else str(value)
