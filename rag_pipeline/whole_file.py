"""Files that appear whole or not at all, and survive a power cut."""

from __future__ import annotations

import os
from pathlib import Path

from retrievers.durable import replace_file, sync_folder


def write_whole(path: Path, text: str) -> None:
    """Write a UTF-8 file under a temporary name, sync and rename it, and sync its folder, which is made.

    Raises
    ------
    OSError
        Where the disk refuses; nothing is left behind, and an older file stays as it was. Only where the
        folder cannot be synced, the new file is there and may not survive a power cut.
    """
    write_whole_bytes(path, text.encode("utf-8"))


def write_whole_bytes(path: Path, content: bytes) -> None:
    """Write bytes as :func:`write_whole` writes text, and raise what it raises."""
    missing = [folder for folder in (path.parent, *path.parent.parents) if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    replace_file(path, temporary, content, private=False)
    for folder in (path.parent, *(made.parent for made in missing)):
        sync_folder(folder)
