"""A settings file to start from, and the table of the documentation, both from the schema."""

from __future__ import annotations

import json
from typing import Any

from rag_pipeline.config.settings import fields_by_key
from rag_pipeline.config.sources import variable_of


def template() -> str:
    """Write a TOML file in which every key stands with its default, commented out."""
    lines = ["# Settings of rag-pipeline. Environment variables and flags win over this file."]
    section = ""
    for key, field in fields_by_key().items():
        head, _, name = key.rpartition(".")
        if head != section:
            section = head
            lines += ["", f"[{section}]"]
        example = _toml(field.default)
        lines += ["", f"# {field.description}", f"# {name} = {example}"]
    return "\n".join(lines) + "\n"


def settings_table() -> str:
    """Write the Markdown table of all keys, for ``docs/configuration.md``."""
    rows = ["| key | default | variable | meaning |", "|---|---|---|---|"]
    for key, field in fields_by_key().items():
        default = "unset" if field.default is None else f"`{_toml(field.default)}`"
        rows.append(f"| `{key}` | {default} | `{variable_of(key)}` | {field.description} |")
    return "\n".join(rows) + "\n"


def _toml(value: Any) -> str:
    # JSON writes strings, numbers, booleans and flat lists as TOML does.
    return '""' if value is None else json.dumps(value)
