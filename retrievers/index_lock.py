"""Who may change an index folder, and what one that was killed left in it."""

from __future__ import annotations

from pathlib import Path

from filelock import FileLock, Timeout

from retrievers.durable import remove_tree, storage_faults
from retrievers.errors import IndexBusyError
from retrievers.journal import JOURNAL_NAME, half_shards
from retrievers.manifest import MANIFEST_NAME, NEW_MANIFEST_NAME

LOCK_NAME = ".lock"
WORK_NAME = ".work"
STAGE_NAME = "stage"


def locked(folder: Path) -> FileLock:
    """Take the lock of an index folder, which one process at a time has.

    Raises
    ------
    IndexBusyError
        Where another has it.
    """
    lock = FileLock(folder / LOCK_NAME, timeout=0, mode=0o600)
    try:
        lock.acquire()
    except Timeout:
        raise IndexBusyError(
            f"another process is changing the index {folder}; wait for it to end"
        ) from None
    return lock


def leftovers(folder: Path, generation: str | None) -> list[Path]:
    """What a killed process left in an index folder, or one that runs has under way.

    Parameters
    ----------
    folder : Path
        Index folder.
    generation : str or None
        The current generation; ``None`` where there is no index yet. Then only a folder with the
        lock of an ingest is looked into: it may be anything that a user named by mistake.
    """
    if generation is None and not (folder / LOCK_NAME).exists():
        return []
    states = folder.glob("gen-" + "[0-9]" * 6 if generation is None else "gen-*")
    odd = (folder / NEW_MANIFEST_NAME, folder / WORK_NAME / STAGE_NAME)
    return [
        *(path for path in states if path.name != generation),
        *(path for path in odd if path.exists()),
        *half_shards(folder / WORK_NAME / JOURNAL_NAME),
    ]


def remove_unfinished(folder: Path) -> None:
    """Remove what a first ingest left that was killed before there was an index.

    Raises
    ------
    IndexBusyError
        Where another process ingests.
    StorageError
        Where the disk refuses.
    """
    with storage_faults(f"what an ingest left in {folder} cannot be removed"), locked(folder):
        if (folder / MANIFEST_NAME).exists():
            return  # the ingest was running, and has just committed
        for path in leftovers(folder, None):
            if path.is_dir():
                remove_tree(path)
            else:
                path.unlink()
