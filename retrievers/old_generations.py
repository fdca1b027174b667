"""The folders of generations: the name of the next, and the end of those that are not current."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from retrievers.durable import remove_tree
from retrievers.generation import Generation
from retrievers.manifest import Manifest
from retrievers.removal import Erase, Removal


def next_folder(folder: Path, manifest: Manifest | None) -> Path:
    """Folder of the generation behind the current one; it is not made."""
    number = 1 if manifest is None else _number(manifest.generation) + 1
    return folder / f"gen-{number:06d}"


def remove_old(
    folder: Path,
    manifest: Manifest | None,
    dropped: Mapping[str, NDArray[np.int64]],
    erase: Erase | None,
) -> bool:
    """Remove every generation but the current one, and first what was made of its texts elsewhere.

    Parameters
    ----------
    folder : Path
        Index folder.
    manifest : Manifest or None
        Of the current generation; None where there is none.
    dropped : mapping of str to ndarray
        Rows that are gone, by generation; where a process was killed they have to be found.
    erase : Erase or None
        Erases what was made of those rows.

    Returns
    -------
    bool
        Whether any was there.

    Raises
    ------
    OSError
        Where the disk refuses.
    """
    current = None if manifest is None else manifest.generation
    gone = False
    for old in sorted(folder.glob("gen-*")):
        if old.name == current:
            continue
        gone = True
        if manifest is not None and _number(old.name) < _number(manifest.generation):
            rows = dropped.get(old.name)
            if erase is not None and (rows is None or len(rows)):
                with closing(Generation(folder / manifest.generation, manifest)) as live:
                    erase(Removal(old=old, rows=rows, live=live))
        # Readers that have the old files open or mapped keep them until they close.
        remove_tree(old)
    return gone


def _number(generation: str) -> int:
    return int(generation.rsplit("-", 1)[1])
