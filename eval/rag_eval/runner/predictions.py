"""The record of a run on disk: one line an example, written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from rag_eval.errors import EvalError

PREDICTIONS = "predictions.jsonl"
CONFIG = "config.yaml"
METRICS = "metrics.json"


def write_atomically(path: Path, text: str) -> None:
    """Write a file under a temporary name and rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


class RunFolder:
    """Output folder of a run; resumes when it holds an earlier part of the same run.

    Parameters
    ----------
    path
        Folder; made when missing.
    identity
        Everything that changes a result. A folder with another identity is refused.
    notes
        Facts for the reader (versions, threads, command), kept beside but not compared.

    Raises
    ------
    EvalError
        The folder holds another run, or files that are not of a run.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], notes: Mapping[str, Any]) -> None:
        self.path = path
        self.records: dict[str, dict[str, Any]] = {}
        config = path / CONFIG
        plain = json.loads(json.dumps(identity))
        if config.exists():
            self._check(config, plain)
            self._load()
        elif (path / PREDICTIONS).exists():
            raise EvalError(f"{path} has predictions but no {CONFIG}; give another --out")
        write_atomically(
            config, yaml.safe_dump({"identity": plain, "notes": dict(notes)}, sort_keys=True)
        )

    def _check(self, config: Path, identity: Mapping[str, Any]) -> None:
        try:
            stored = yaml.safe_load(config.read_text("utf-8"))["identity"]
            fields = set(stored) | set(identity)
        except (yaml.YAMLError, TypeError, KeyError, UnicodeDecodeError) as error:
            raise EvalError(
                f"{config} is not the configuration of a run; give another --out"
            ) from error
        for name in sorted(fields):
            if stored.get(name) != identity.get(name):
                raise EvalError(
                    f"{self.path} holds a run with {name} = {stored.get(name)!r}, asked is "
                    f"{identity.get(name)!r}; give another --out or the same settings"
                )

    def _load(self) -> None:
        path = self.path / PREDICTIONS
        if not path.exists():
            return
        raw = path.read_bytes()
        whole, newline, rest = raw.rpartition(b"\n")
        for number, line in enumerate(whole.split(b"\n") if newline else [], start=1):
            try:
                record = json.loads(line)
                self.records[record["id"]] = record
            except (ValueError, KeyError, TypeError) as error:
                raise EvalError(
                    f"{path}: line {number} is not a prediction; give another --out"
                ) from error
        if rest:
            # The process died while it wrote; the example is simply done again.
            with path.open("r+b") as file:
                file.truncate(len(whole) + len(newline))

    def append(self, record: dict[str, Any]) -> None:
        """Add the record of one example; it is on disk when this returns."""
        line = (json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n").encode()
        descriptor = os.open(self.path / PREDICTIONS, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(descriptor, line)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        self.records[record["id"]] = record
