"""GGUF files turned into folders in Hugging Face format: once, atomically, with checksums.

SGLang reads safetensors on every platform but GGUF only with CUDA kernels, so quantised files are
dequantised to bf16 the first time they are used and the folder is kept.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rag_pipeline.config import HOME_VARIABLE, models_dir
from rag_pipeline.errors import ModelError, one_line
from rag_pipeline.models.gguf_file import GgufSummary, check_convertible, check_magic, read_gguf
from rag_pipeline.models.stock_tokenizer import load_stock_tokenizer

MANIFEST = "rag_pipeline_manifest.json"
"""Sizes and checksums of a converted folder; written last, so a folder with one is complete."""

FORMAT = 1
"""Version of the conversion; a change makes new folders instead of re-using old ones."""

_SMALL_BYTES = 8 << 20
_HEADROOM_BYTES = 64 << 20  # tokenizer, manifest, and what others write meanwhile
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

Report = Callable[[str, float], None]


def convert_once(source: Path, name: str, report: Report) -> Path:
    """Folder in Hugging Face format of a GGUF file; converts it unless that was done before.

    Parameters
    ----------
    source : Path
        The GGUF file.
    name : str
        First part of the folder's name.
    report : Report
        Progress: step and share done, 0 to 1.

    Returns
    -------
    Path
        ``RAG_PIPELINE_HOME/models/<name>-<digest>``; equal file contents give the same folder.

    Raises
    ------
    ModelError
        Damaged file, unsupported architecture, no disk space.
    """
    from filelock import FileLock, Timeout

    check_magic(source)
    root = models_dir()
    try:
        root.mkdir(parents=True, exist_ok=True)
        digest = _sha256(source)
    except OSError as error:
        raise _os_error(source, root, error) from error
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "model"
    key = hashlib.sha256(f"{FORMAT}:{digest}".encode()).hexdigest()[:16]
    target = root / f"{slug}-{key}"
    if is_complete(target):
        return target
    lock = FileLock(root / f".{target.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        report(f"Waiting for another process that converts {name}", 0.0)
        lock.acquire()
    except OSError as error:
        raise _os_error(source, root, error) from error
    try:
        # The process we waited for may have made it.
        if not is_complete(target):
            _convert(source, digest, target, report)
    finally:
        lock.release()
    return target


def is_complete(folder: Path) -> bool:
    """Quick check of a converted folder: every size, and the checksums of small files.

    Parameters
    ----------
    folder : Path
        Folder made by :func:`convert_once`, or anything else.

    Returns
    -------
    bool
        False as well for a folder that does not exist or has no manifest.
    """
    return _first_fault(folder, full=False) is None


def verify_model(folder: Path) -> None:
    """Check every byte of a converted folder against its manifest.

    Parameters
    ----------
    folder : Path
        Folder made by :func:`convert_once`.

    Raises
    ------
    ModelError
        Names the first file that differs and what to do.
    """
    fault = _first_fault(folder, full=True)
    if fault is not None:
        raise ModelError(f"{folder}: {fault}; delete the folder, it is made anew on the next use")


def _first_fault(folder: Path, *, full: bool) -> str | None:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files: dict[str, dict[str, Any]] = manifest["files"]
        for name, facts in files.items():
            path = folder / name
            size = path.stat().st_size
            if size != facts["bytes"]:
                return f"{name} has {size} bytes instead of {facts['bytes']}"
            if (full or size <= _SMALL_BYTES) and _sha256(path) != facts["sha256"]:
                return f"{name} does not match its checksum"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"the manifest cannot be read ({error})"
    return None if files else "the manifest names no files"


def _convert(source: Path, digest: str, target: Path, report: Report) -> None:
    """Convert into a temporary folder beside `target` and rename it; the caller holds the lock."""
    prefix = f".{target.name}.tmp-"
    for left_over in target.parent.glob(f"{prefix}*"):  # of a killed process: we hold its lock
        shutil.rmtree(left_over, ignore_errors=True)
    report(f"Reading {source.name}", 0.0)
    summary = read_gguf(source)
    _check_space(source, target.parent, summary)
    report("Loading transformers", 0.05)
    check_convertible(source, summary)
    temporary: Path | None = None
    try:
        temporary = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
        dequantize(source, temporary, report)
        report("Computing checksums", 0.95)
        _write_manifest(temporary, source, digest)
        if target.exists():  # a damaged one: is_complete() said no
            shutil.rmtree(target)
        temporary.chmod(0o755)  # mkdtemp gives 0o700; weights are no secret
        temporary.rename(target)
    except ModelError:
        raise
    except OSError as error:
        raise _os_error(source, target.parent, error) from error
    except Exception as error:
        if _is_full_disk(error):
            raise _no_space(source, target.parent) from error
        reason = one_line(error, 200)
        raise ModelError(
            f"{source} cannot be converted ({type(error).__name__}: {reason}); "
            "give a folder in Hugging Face format instead"
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    report("Model ready", 1.0)


def dequantize(source: Path, folder: Path, report: Report) -> None:
    """Write weights (bf16 safetensors), tokenizer, chat template and configs of a GGUF file.

    Parameters
    ----------
    source : Path
        The GGUF file.
    folder : Path
        Existing, empty folder.
    report : Report
        Progress.
    """
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig
    from transformers import modeling_gguf_pytorch_utils as hf_gguf
    from transformers.utils import logging as hf_logging

    verbosity = hf_logging.get_verbosity()
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    plain_tqdm = hf_gguf.tqdm
    try:
        report("Reading the tokenizer", 0.25)
        tokenizer = load_stock_tokenizer(source.parent, gguf_file=source.name)
        report("Dequantising to bf16", 0.4)
        # Its bar cannot be switched off otherwise, and knows how far the work is.
        hf_gguf.tqdm = lambda tensors, **_: _reported(list(tensors), report)
        model = AutoModelForCausalLM.from_pretrained(
            str(source.parent),
            gguf_file=source.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
        )
        report("Writing safetensors", 0.85)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    finally:
        hf_gguf.tqdm = plain_tqdm
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()
    # The weights are plain bf16 now; a loader that saw the GGUF settings would look for GGUF.
    config_path = folder / "config.json"
    config = json.loads(config_path.read_text(encoding="utf-8"))
    if config.pop("quantization_config", None) is not None:
        config_path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _reported(tensors: list[Any], report: Report) -> Iterator[Any]:
    for done, tensor in enumerate(tensors):
        report("Dequantising to bf16", 0.4 + 0.4 * done / len(tensors))
        yield tensor


def _write_manifest(folder: Path, source: Path, digest: str) -> None:
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.iterdir())
    }
    manifest = {
        "format": FORMAT,
        "source": {"file": source.name, "bytes": source.stat().st_size, "sha256": digest},
        "files": files,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _check_space(source: Path, root: Path, summary: GgufSummary) -> None:
    needed = summary.num_parameters * 2 + _HEADROOM_BYTES
    free = shutil.disk_usage(root).free
    if free < needed:
        raise ModelError(
            f"converting {source.name} needs {needed / 1e6:.0f} MB, {root} has {free / 1e6:.0f} MB "
            f"free; free some or set {HOME_VARIABLE} to a folder with space"
        )


def _os_error(source: Path, root: Path, error: OSError) -> ModelError:
    if _is_full_disk(error):
        return _no_space(source, root)
    return ModelError(
        f"{source.name} cannot be converted into {root} ({error.strerror or error}); "
        f"check its rights or set {HOME_VARIABLE}"
    )


def _is_full_disk(error: Exception) -> bool:
    if isinstance(error, OSError) and error.errno in _FULL_DISK:
        return True
    # safetensors writes in Rust and passes the number on only as text.
    return any(f"os error {number}" in str(error) for number in _FULL_DISK)


def _no_space(source: Path, root: Path) -> ModelError:
    return ModelError(
        f"no disk space left in {root} while converting {source.name} (nothing was kept); "
        f"free some or set {HOME_VARIABLE} to a folder with space"
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
