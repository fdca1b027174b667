"""Notices of erasure beside the catalog of a storage backend: SGLang's interface can neither list nor overwrite."""

from __future__ import annotations

import contextlib
import re
import time
from pathlib import Path

from chunk_cache import KEEP_S, NoticeBoard, Posted, make_private, write_private

_NAME = re.compile(r"[0-9a-z-]{1,64}")


class FolderNotices(NoticeBoard):
    """Notices as files in a folder that the servers of one store share.

    Parameters
    ----------
    folder : Path
        Made if it is not there.
    limits : str
        As of :class:`NoticeBoard`.
    """

    def __init__(self, folder: Path, *, limits: str = "") -> None:
        self._folder = folder
        self.limits = limits
        self._read: set[str] = set()
        make_private(folder)

    def post(self, name: str, body: bytes) -> None:
        """Write a file, and drop those that are too old."""
        write_private(self._folder / f"{name}.notice", body)
        for path in self._folder.glob("*.notice"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > KEEP_S:
                    path.unlink()

    def new(self) -> list[Posted]:
        """Read the files that were not read before, by name: machines' clocks differ, so there is no newest."""
        found = []
        # A folder that is gone is a store that does not answer: no notices and no answer are not the same.
        for name in sorted(
            path.stem for path in self._folder.iterdir() if path.suffix == ".notice"
        ):
            if name in self._read or not _NAME.fullmatch(name):
                continue
            with contextlib.suppress(FileNotFoundError):  # too old meanwhile
                found.append(Posted(name, (self._folder / f"{name}.notice").read_bytes()))
        self._read.update(posted.name for posted in found)
        return found
