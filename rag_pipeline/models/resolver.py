"""One resolver for language models and embedders; every failure is one line."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rag_pipeline.errors import ModelError
from rag_pipeline.models.packaged import EMBEDDERS, LLMS, PackagedModel, packaged_file

Progress = Callable[[str, float], None]
"""``progress(step, share)``: what is being done and how much of it is done, 0 to 1."""

Kind = Literal["llm", "embedder"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin")


@dataclass(frozen=True, kw_only=True, slots=True)
class ResolvedModel:
    """A model that lies on this machine.

    Parameters
    ----------
    path : Path
        Folder in Hugging Face format.
    name : str
        As the user gave it.
    source : {'packaged', 'folder', 'gguf', 'hub'}
        Where it came from: ``packaged``, ``folder``, ``gguf`` or ``hub``.
    """

    path: Path
    name: str
    source: Literal["packaged", "folder", "gguf", "hub"]


def resolve_llm(name: str, *, progress: Progress | None = None) -> ResolvedModel:
    """Find or make the folder of a language model.

    Parameters
    ----------
    name : str
        Packaged name (``smollm2-135m``), folder in Hugging Face format, GGUF file, or hub id.
    progress : Progress, optional
        Called while a GGUF file is converted or a hub model is downloaded.

    Returns
    -------
    ResolvedModel
        The folder holds ``config.json``, weights and a tokenizer.

    Raises
    ------
    ModelError
        One line: what was given, what is wrong with it, what to change.
    """
    return _resolve(name, kind="llm", progress=progress)


def resolve_embedder(name: str, *, progress: Progress | None = None) -> ResolvedModel:
    """Find the folder of a sentence-transformers model.

    Parameters
    ----------
    name : str
        Packaged name (``all-minilm-l6-v2``), folder, or hub id.
    progress : Progress, optional
        Called while a hub model is downloaded.

    Returns
    -------
    ResolvedModel
        The folder holds ``config.json`` (or ``modules.json``) and weights.

    Raises
    ------
    ModelError
        One line: what was given, what is wrong with it, what to change.
    """
    return _resolve(name, kind="embedder", progress=progress)


def _resolve(name: str, *, kind: Kind, progress: Progress | None) -> ResolvedModel:
    if not name.strip():
        raise ModelError(f"the {_word(kind)} name is empty; {_allowed(kind)}")
    report = progress or (lambda step, share: None)
    packaged = (LLMS if kind == "llm" else EMBEDDERS).get(name)
    if packaged is not None:
        return ResolvedModel(path=_packaged_folder(packaged, report), name=name, source="packaged")
    other = (EMBEDDERS if kind == "llm" else LLMS).get(name)
    if other is not None:
        raise ModelError(f"{name!r} is not {_a_word(kind)}; {_allowed(kind)}")
    path = Path(name).expanduser()
    if path.is_dir():
        _check_folder(path, kind)
        return ResolvedModel(path=path.resolve(), name=name, source="folder")
    if path.is_file():
        if kind == "embedder":
            raise ModelError(f"embedder {name!r} is a file; {_allowed(kind)}")
        from rag_pipeline.models.converted import convert_once

        return ResolvedModel(path=convert_once(path, path.stem, report), name=name, source="gguf")
    if _looks_like_path(name):
        raise ModelError(_missing_line(name, path, kind))
    if _HUB_ID.fullmatch(name) is None:
        raise ModelError(_unknown_line(name, kind))
    if path.parent.is_dir():
        # `models/llm` is both a relative path and a hub id; a folder `models` says which is meant.
        near = difflib.get_close_matches(path.name, _siblings(path), n=1)
        if near:
            raise ModelError(_missing_line(name, path, kind))
    return ResolvedModel(path=_download(name, kind, report), name=name, source="hub")


def _packaged_folder(model: PackagedModel, report: Progress) -> Path:
    found = packaged_file(model)
    if found.suffix != ".gguf":
        return found
    from rag_pipeline.models.converted import convert_once

    return convert_once(found, model.name, report)


def _check_folder(path: Path, kind: Kind) -> None:
    """Refuse a folder that no loader can read, before anything heavy starts."""
    marker = "config.json" if kind == "llm" else "config.json or modules.json"
    config = path / "config.json"
    if not config.is_file() and not (kind == "embedder" and (path / "modules.json").is_file()):
        ggufs = sorted(path.glob("*.gguf"))
        if ggufs and kind == "llm":
            raise ModelError(
                f"folder {path} has no config.json but holds GGUF files; "
                f"name the file, for example {ggufs[0]}"
            )
        raise ModelError(
            f"folder {path} has no {marker}; give a folder in Hugging Face format or a GGUF file"
        )
    if config.is_file():
        try:
            json.loads(config.read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            raise ModelError(f"{config} cannot be read as JSON ({error}); restore it") from error
    if not any(next(path.glob(pattern), None) for pattern in _WEIGHTS):
        raise ModelError(
            f"folder {path} holds no weights (*.safetensors or *.bin); download them into it"
        )
    if kind == "llm" and not any(
        (path / file).is_file() for file in ("tokenizer.json", "tokenizer.model", "vocab.json")
    ):
        raise ModelError(f"folder {path} holds no tokenizer (tokenizer.json); copy it into it")


def _looks_like_path(name: str) -> bool:
    return (
        name.endswith((".gguf", "/", "\\"))
        or name.startswith(("/", "./", "../", "~", "\\"))
        or name.count("/") > 1
    )


def _siblings(path: Path) -> list[str]:
    try:
        return [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return []


def _missing_line(name: str, path: Path, kind: Kind) -> str:
    parent = path.parent
    if not parent.is_dir():
        return f"{_word(kind)} {name!r} does not exist (nor does the folder {parent}); {_allowed(kind)}"
    near = difflib.get_close_matches(path.name, _siblings(path), n=3)
    hint = f"did you mean {', '.join(str(parent / n) for n in near)}?" if near else _allowed(kind)
    return f"{_word(kind)} {name!r} does not exist; {hint}"


def _unknown_line(name: str, kind: Kind) -> str:
    names = list(LLMS if kind == "llm" else EMBEDDERS)
    near = difflib.get_close_matches(name.lower(), [*names, *_siblings(Path(name))], n=3)
    hint = f"did you mean {', '.join(near)}?" if near else _allowed(kind)
    return f"{name!r} is no packaged {_word(kind)}, no folder and no hub id; {hint}"


def _word(kind: Kind) -> str:
    return "model" if kind == "llm" else "embedder"


def _a_word(kind: Kind) -> str:
    return "a language model" if kind == "llm" else "an embedder"


def _allowed(kind: Kind) -> str:
    names = ", ".join(LLMS if kind == "llm" else EMBEDDERS)
    gguf = ", a GGUF file" if kind == "llm" else ""
    return f"allowed are a folder in Hugging Face format{gguf}, a hub id owner/name, or {names}"


def _download(name: str, kind: Kind, report: Progress) -> Path:
    """Folder of a hub model, from the local hub cache when it is there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    # Weights in one format only; a repository often carries the same model four times.
    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*/config.json"]
    report(f"Looking for {name}", 0.0)
    try:
        folder = Path(snapshot_download(name, allow_patterns=patterns, local_files_only=True))
        _check_folder(folder, kind)
        return folder
    except (LocalEntryNotFoundError, ModelError):
        pass  # not cached, or cached by someone who needed only part of it
    try:
        report(f"Downloading {name}", 0.0)
        folder = Path(snapshot_download(name, allow_patterns=patterns))
    except GatedRepoError as error:
        raise ModelError(
            f"hub model {name!r} is gated; accept its terms and log in with `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"hub model {name!r} does not exist or is private; {_allowed(kind)}"
        ) from error
    except Exception as error:
        raise ModelError(_download_line(name, error)) from error
    report(f"Downloading {name}", 1.0)
    _check_folder(folder, kind)
    return folder


def _download_line(name: str, error: Exception) -> str:
    import errno

    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"no disk space left while downloading hub model {name!r}; free some or set HF_HOME"
    return (
        f"hub model {name!r} cannot be downloaded ({type(error).__name__}: no network?); "
        "give a local folder instead"
    )
