"""Verdicts kept on disk: one file for each model, SGLang version and plugin version.

Light: ``doctor`` reads it, and imports neither torch nor SGLang for that.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rag_pipeline.config import home_dir
from rag_pipeline.whole_file import write_whole

PACKAGES = ("sglang", "rag-pipeline", "torch")
"""Packages whose versions decide whether a verdict still holds; the first two name its file."""

_TEXT_FILES = ("config.json", "tokenizer.json", "tokenizer.model", "chat_template.jinja")
_WEIGHTS = ("*.safetensors", "*.bin")
_BLOCK = 4096
_BLOCKS = 64


def model_identity(folder: Path) -> str:
    """Name of a model by its contents, cheap enough for every ``doctor``.

    Configuration and tokenizer are read whole. Of each file of weights the size, the first block
    (the names and shapes of the tensors) and 64 blocks spread over it: another fine-tuning, another
    quantisation or a merged adapter changes nearly all of them. A change of single tensors that
    hides between the blocks would not be seen.

    Parameters
    ----------
    folder : Path
        Model in Hugging Face format.

    Returns
    -------
    str
        32 hex digits.
    """
    digest = hashlib.blake2b(digest_size=16, person=b"rag-gate-model")
    for name in _TEXT_FILES:
        path = folder / name
        if path.is_file():
            digest.update(f"{name}|".encode())
            digest.update(path.read_bytes())
    for path in sorted(found for pattern in _WEIGHTS for found in folder.glob(pattern)):
        size = path.stat().st_size
        digest.update(f"{path.name}|{size}|".encode())
        with path.open("rb") as file:
            for block in range(_BLOCKS + 1):
                file.seek(max(0, size - _BLOCK) * block // _BLOCKS)
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()


def installed_versions() -> dict[str, str | None]:
    """Versions of ``PACKAGES`` in this environment."""
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def gates_dir() -> Path:
    """Folder of all verdicts."""
    return home_dir() / "gates"


def save_gate(result: Mapping[str, Any]) -> Path:
    """Keep a verdict; the one before of the same model and versions is replaced.

    Parameters
    ----------
    result : mapping
        What :func:`rag_eval.gate.run_gate` returned.

    Returns
    -------
    Path
        The file, written under a temporary name first.
    """
    path = gates_dir() / str(result["identity"]) / _file_name(result["versions"])
    text = json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False)
    write_whole(path, text + "\n")
    return path


def last_gate(model: Path, attention: str = "") -> dict[str, Any] | None:
    """Verdict on a model: the one of the installed versions, else the newest of others.

    Parameters
    ----------
    model : Path
        Folder of the model.
    attention : str
        Attention class of the running engine; a verdict of another one is stale. Empty where it is
        not known.

    Returns
    -------
    dict or None
        ``date``, ``passed``, ``policies``, ``stale`` (reasons, empty when it holds), ``file``;
        ``None`` when no gate was run. Files that cannot be read count as none.
    """
    now = installed_versions()
    folder = gates_dir() / model_identity(model)
    found = [gate for path in sorted(folder.glob("*.json")) if (gate := _read(path)) is not None]
    if not found:
        return None
    same = [gate for gate in found if Path(gate["file"]).name == _file_name(now)]
    latest = max(same or found, key=lambda gate: str(gate["date"]))
    stale = [
        f"{name} {latest['versions'].get(name)}, now {now[name]}"
        for name in PACKAGES
        if latest["versions"].get(name) != now[name]
    ]
    measured = latest["engine"].get("attention_class", "")
    if attention and measured != attention:
        stale.append(f"attention {measured}, now {attention}")
    return {
        "date": latest["date"],
        "passed": latest["passed"],
        "policies": latest["policies"],
        "stale": stale,
        "file": latest["file"],
    }


def _file_name(versions: Mapping[str, str | None]) -> str:
    parts = [f"{name}-{versions.get(name) or 'none'}" for name in PACKAGES[:2]]
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", "_".join(parts)) + ".json"


def _read(path: Path) -> dict[str, Any] | None:
    try:
        gate = json.loads(path.read_text("utf-8"))
        whole = isinstance(gate["versions"], dict) and isinstance(gate["policies"], dict)
        whole = whole and isinstance(gate["engine"], dict) and isinstance(gate["passed"], bool)
        return {**gate, "file": str(path)} if whole and isinstance(gate["date"], str) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
