"""Uploads on the disk until they are ingested: what was accepted survives a kill.

A server has a folder of its own below the spool, locked while it lives. An upload is a folder in it with
the files and, written last, ``job.json``; without that it was never accepted. At its start a server takes
over what dead ones left, as far as it is about indexes that it serves.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

from chunk_cache import make_private, sync_folder

_JOB = "job.json"
_LOCK = ".lock"
_LOCK_WAIT_S = 30
ORPHAN_SECONDS = 7 * 24 * 3600
"""How long uploads wait for a server that serves their index."""


class Spool:
    """The folder of one server.

    Parameters
    ----------
    root : Path
        Folder shared by all servers of a user; made where missing, closed to others.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        make_private(root)
        self.folder = root / uuid.uuid4().hex
        with FileLock(root / _LOCK, timeout=_LOCK_WAIT_S, mode=0o600):
            self.folder.mkdir(mode=0o700)
            self._lock = FileLock(self.folder / _LOCK, thread_local=False, mode=0o600)
            self._lock.acquire()

    def new_folder(self) -> Path:
        """Empty folder for the files of one upload."""
        folder = self.folder / uuid.uuid4().hex
        folder.mkdir(mode=0o700)
        return folder

    def add_file(self, folder: Path, name: str, pieces: Iterable[bytes]) -> None:
        """Write one file of an upload, synced; a folder of its own keeps names from meeting."""
        home = folder / f"{sum(1 for _ in folder.iterdir()):04d}"
        home.mkdir(mode=0o700)
        with _create(home / name) as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        sync_folder(home)

    @staticmethod
    def files(folder: Path) -> dict[str, Path]:
        """Files of an upload by name, in the order they were added."""
        homes = sorted(path for path in folder.iterdir() if path.is_dir() and path.name.isdigit())
        return {file.name: file for home in homes for file in home.iterdir()}

    def write(self, folder: Path, job: dict[str, Any]) -> None:
        """Write the record of an upload in one step, synced with all that is in its folder."""
        temporary = folder / f"{_JOB}.new"
        temporary.unlink(missing_ok=True)
        with _create(temporary) as file:
            file.write(json.dumps(job).encode())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(folder / _JOB)
        sync_folder(folder)
        sync_folder(folder.parent)

    def remove_files(self, folder: Path) -> None:
        """Remove everything of an upload but its record."""
        for path in folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)

    def remove(self, folder: Path) -> None:
        """Remove an upload and its record."""
        (folder / _JOB).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)

    def take_over(
        self, mine: Callable[[dict[str, Any]], bool]
    ) -> list[tuple[Path, dict[str, Any]]]:
        """Move here what dead servers left and this one can go on with, oldest first."""
        taken: list[tuple[Path, dict[str, Any]]] = []
        with FileLock(self._root / _LOCK, timeout=_LOCK_WAIT_S, mode=0o600):
            for other in sorted(self._root.iterdir()):
                if not other.is_dir() or other == self.folder:
                    continue
                lock = FileLock(other / _LOCK, timeout=0, mode=0o600)
                try:
                    lock.acquire()
                except Timeout:
                    continue
                try:
                    left = self._take_from(other, mine, taken)
                finally:
                    lock.release()
                if not left:
                    shutil.rmtree(other, ignore_errors=True)
        sync_folder(self.folder)
        return sorted(taken, key=lambda pair: pair[1]["order"])

    def close(self) -> None:
        """Let another server take over what is left."""
        self._lock.release()

    def _take_from(
        self,
        other: Path,
        mine: Callable[[dict[str, Any]], bool],
        taken: list[tuple[Path, dict[str, Any]]],
    ) -> int:
        left = 0
        for folder in sorted(path for path in other.iterdir() if path.is_dir()):
            job = _read(folder / _JOB)
            # What was accepted for an index of this server is owed to its client, however old it is.
            if job is not None and mine(job):
                target = self.folder / folder.name
                folder.rename(target)
                taken.append((target, job))
            elif job is None or time.time() - job["created"] > ORPHAN_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)  # never accepted, or nobody serves it
            else:
                left += 1
        return left


def _read(path: Path) -> dict[str, Any] | None:
    try:
        job = json.loads(path.read_bytes())
        return job if isinstance(job, dict) and {"order", "created"} <= set(job) else None
    except (OSError, ValueError):
        return None


def _create(path: Path) -> IO[bytes]:
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")
