"""One JSON file per run, for ``eval/results``: the numbers, what made them, and the command."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from rag_pipeline.whole_file import write_whole

if TYPE_CHECKING:
    from rag_eval.result import EvalResult


def published(result: EvalResult, run: Path) -> dict[str, Any]:
    """Gather a run into one JSON-ready object.

    Folders of the machine are left out: files are named alone, and a data set file is told apart
    by its SHA-256.

    Parameters
    ----------
    result : EvalResult
        Numbers of the run.
    run : Path
        Its folder, with ``config.yaml``.

    Returns
    -------
    dict
        ``command`` and ``environment`` of the first call, ``calls`` (start and command of each, as
        a run may have been continued), ``settings``, ``dataset_sha256`` (``None`` for generators),
        ``result``.
    """
    stored = yaml.safe_load((run / "config.yaml").read_text("utf-8"))
    settings, notes = dict(stored["identity"]), dict(stored["notes"])
    dataset = Path(settings["dataset"])
    digest = hashlib.sha256(dataset.read_bytes()).hexdigest() if dataset.is_file() else None
    settings["dataset"] = dataset.name
    settings["model"] = Path(settings["model"]).name
    command = _without_folders(notes.pop("command"))
    calls = [
        {
            name: _without_folders(value) if name == "command" else value
            for name, value in call.items()
            if name in ("command", "started", "versions", "limit")
        }
        for call in stored.get("calls", [])
    ]
    numbers = result.to_json() | {"dataset": dataset.name, "model": settings["model"]}
    return {
        "command": command,
        "settings": settings,
        "environment": notes,
        "calls": calls,
        "dataset_sha256": digest,
        "result": numbers,
    }


def publish(result: EvalResult, run: Path, file: Path) -> None:
    """Write :func:`published` to `file`, under a temporary name first."""
    text = json.dumps(published(result, run), indent=1, ensure_ascii=False, allow_nan=False)
    write_whole(file, text + "\n")


def _without_folders(command: Sequence[str]) -> str:
    """Command line with every absolute path cut down to its last part."""
    words = [Path(word).name if str(word).startswith("/") else str(word) for word in command]
    return " ".join(words)
