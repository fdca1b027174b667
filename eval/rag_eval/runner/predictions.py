"""The record of a run on disk: one line per example, written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from rag_eval.errors import EvalError
from rag_pipeline.whole_file import write_whole

PREDICTIONS = "predictions.jsonl"
CONFIG = "config.yaml"
METRICS = "metrics.json"


class _WithoutAnchors(yaml.SafeDumper):
    """Writes a value that occurs twice twice: a person reads the file."""

    def ignore_aliases(self, data: Any) -> bool:
        """Never refer back."""
        return True


class RunFolder:
    """Output folder of a run; resumes when it holds an earlier part of the same run.

    Parameters
    ----------
    path : Path
        Folder; made when missing.
    identity : mapping
        Everything that changes a result. A folder with another identity is refused.
    notes : mapping
        Facts for the reader (versions, threads, command), kept beside but not compared. Those of
        the first call stay; every call, the first among them, is listed under ``calls`` with
        what it changed.

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
        call = json.loads(json.dumps(notes))
        first, calls = call, [call]
        if config.exists():
            first, calls = self._check(config, plain)
            calls = [*calls, {name: call[name] for name in call if call[name] != first.get(name)}]
            self._load()
        elif (path / PREDICTIONS).exists():
            raise EvalError(f"{path} has predictions but no {CONFIG}; give another --out")
        content = {"identity": plain, "notes": first, "calls": calls}
        write_whole(config, yaml.dump(content, Dumper=_WithoutAnchors, sort_keys=True))

    def _check(
        self, config: Path, identity: Mapping[str, Any]
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Refuse another run; return the notes of the first call, and all calls so far."""
        try:
            whole = yaml.safe_load(config.read_text("utf-8"))
            stored, first = whole["identity"], dict(whole["notes"])
            calls = [dict(call) for call in whole.get("calls", [first])]
            fields = set(stored) | set(identity)
        except (yaml.YAMLError, TypeError, ValueError, KeyError) as error:
            raise EvalError(
                f"{config} is not the configuration of a run; give another --out"
            ) from error
        for name in sorted(fields):
            if stored.get(name) != identity.get(name):
                raise EvalError(
                    f"{self.path} holds a run with {name} = {stored.get(name)!r}, asked is "
                    f"{identity.get(name)!r}; give another --out or the same settings"
                )
        return first, calls

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
        with (self.path / PREDICTIONS).open("ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self.records[record["id"]] = record
