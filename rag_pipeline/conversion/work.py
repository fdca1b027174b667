"""The work folder beside the result: finished stages, each whole or absent, of one conversion."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from rag_pipeline.conversion.config import ConversionError
from rag_pipeline.whole_file import write_whole
from retrievers.durable import replace_file, sync_folder

FORMAT = 1
"""Version of what stages hold; a change begins anew."""
_JOB = "job.json"
_LOCK = "lock"


def digest(value: object) -> str:
    """Hash of anything that JSON can hold, 32 hexadecimal digits."""
    text = json.dumps(value, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@dataclass(frozen=True, slots=True)
class WorkFolder:
    """Stages of a conversion by name.

    Parameters
    ----------
    path : Path
        The folder; it exists.
    resumed : bool
        Whether stages of the same conversion were there.
    """

    path: Path
    resumed: bool

    def save(self, stage: str, tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> None:
        """Write a stage under a temporary name, sync and rename it.

        Parameters
        ----------
        stage : str
            Its name; an older one of that name is replaced.
        tensors : mapping
            What it holds.
        facts : mapping
            Strings that are kept with them.
        """
        from safetensors.torch import save

        path = self._file(stage)
        content = save({name: x.contiguous() for name, x in tensors.items()}, dict(facts))
        replace_file(path, path.with_suffix(f".{os.getpid()}.tmp"), content, private=False)
        sync_folder(self.path)

    def load(self, stage: str) -> tuple[dict[str, Tensor], dict[str, str]] | None:
        """Read a stage and its facts; None where it was not reached, or cannot be read."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self._file(stage), framework="pt") as file:
                names = list(file.keys())
                return {name: file.get_tensor(name) for name in names}, dict(file.metadata() or {})
        except (OSError, SafetensorError):
            return None

    def save_json(self, stage: str, value: object) -> None:
        """Write a small stage as JSON."""
        write_whole(self.path / f"{stage}.json", json.dumps(value) + "\n")

    def load_json(self, stage: str) -> Any:
        """Read a small stage; None where it was not reached, or cannot be read."""
        try:
            return json.loads((self.path / f"{stage}.json").read_text("utf-8"))
        except (OSError, ValueError):
            return None

    def _file(self, stage: str) -> Path:
        return self.path / f"{stage}.safetensors"


@contextmanager
def work_folder(out: Path, job: Mapping[str, object]) -> Iterator[WorkFolder]:
    """Open the work folder of a conversion, alone; it stays unless the caller removes it.

    Parameters
    ----------
    out : Path
        Where the result will be; the folder lies beside it, under its name with ``.work``.
    job : mapping
        All that decides what stages hold. Stages of another job are removed.

    Raises
    ------
    ConversionError
        Another process converts into the same folder or has made it, or the disk refuses.
    """
    from filelock import FileLock, Timeout

    path = work_path(out)
    mark = digest({"format": FORMAT, **job})
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path / _LOCK)
        lock.acquire(timeout=0)
    except Timeout:
        raise ConversionError(
            f"another process converts into {out}; wait for it, or name another folder"
        ) from None
    except OSError as error:
        raise ConversionError(
            f"{out} cannot be made: {path} is refused ({error.strerror}); name a place that you may write to"
        ) from error
    try:
        if os.path.lexists(out):
            # Another process finished it, and removed its stages, while this one was reading its text.
            shutil.rmtree(path, ignore_errors=True)
            raise ConversionError(f"{out} was made by another process; name another folder")
        folder = WorkFolder(path, resumed=False)
        resumed = folder.load_json(_JOB.removesuffix(".json")) == mark
        if not resumed:
            for other in path.iterdir():
                if other.is_dir():
                    shutil.rmtree(other)
                elif other.name != _LOCK:
                    other.unlink()
            folder.save_json(_JOB.removesuffix(".json"), mark)
        yield WorkFolder(path, resumed=resumed)
    finally:
        lock.release()


def work_path(out: Path) -> Path:
    """Where the work folder of a result lies."""
    return out.with_name(f".{out.name}.work")
