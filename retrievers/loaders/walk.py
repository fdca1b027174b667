"""Find the files of a folder: sorted, without hidden ones, safe against links that loop."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from retrievers.loaders.base import LoadReport, Source, readable_name


class Selection(NamedTuple):
    """Which files of a folder to take; both are tests on the path below the folder."""

    take: Callable[[str], bool]
    leave: Callable[[str], bool]


def label_folders(folders: Sequence[Path]) -> dict[Path, str]:
    """Name each folder by its last path part, or by as many as tell it from the others.

    Parameters
    ----------
    folders : sequence of Path
        Resolved paths, possibly repeated.
    """
    labels: dict[Path, str] = {}
    distinct = sorted(set(folders))
    for folder in distinct:
        parts = folder.parts[1:] or ("root",)
        for length in range(1, len(parts) + 1):
            label = "/".join(parts[-length:])
            if all(
                "/".join(other.parts[-length:]) != label for other in distinct if other != folder
            ):
                break
        labels[folder] = readable_name(label)
    return labels


def walk(
    folder: Path, label: str, selection: Selection, seen: set[tuple[int, int]], report: LoadReport
) -> Iterator[Source]:
    """Yield the files below `folder` in sorted order of their relative paths.

    Parameters
    ----------
    folder : Path
        Where to look.
    label : str
        First part of every source's id.
    selection : Selection
        Which files to take.
    seen : set of (int, int)
        Device and inode of what was already visited; extended. It ends loops of symbolic links
        and keeps a file with two names from being read twice.
    report : LoadReport
        Takes directories that cannot be listed and broken links.
    """

    def visit(directory: Path, prefix: str) -> Iterator[Source]:
        try:
            if not _first_time(directory, seen):
                return
            entries = sorted(os.scandir(directory), key=lambda entry: entry.name)
        except OSError as error:
            where = readable_name(prefix.rstrip("/") or str(directory))
            report.skip(where, f"cannot list it: {error.strerror}")
            return
        for entry in entries:
            relative = prefix + entry.name
            if entry.name.startswith(".") or selection.leave(relative):
                continue
            if entry.is_dir():
                yield from visit(Path(entry.path), relative + "/")
            elif selection.take(relative):
                # Sockets, pipes and devices would block or never end.
                if not entry.is_file():
                    report.skip(readable_name(relative), "not a regular file, or a broken link")
                elif _first_time(Path(entry.path), seen):
                    name = readable_name(relative)
                    yield Source(Path(entry.path), f"{label}/{name}", name)

    yield from visit(folder, "")


def _first_time(path: Path, seen: set[tuple[int, int]]) -> bool:
    status = path.stat()
    identity = (status.st_dev, status.st_ino)
    if identity in seen:
        return False
    seen.add(identity)
    return True
