"""How much a store's folder may weigh, kept at every write: whoever holds most loses its longest unused records."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from chunk_cache.keys import ChunkKey
from chunk_cache.tiers.disk.index import Describe, FolderIndex
from chunk_cache.tiers.disk.layout import chunk_path, pin_path, usage_path
from chunk_cache.tiers.disk.listing import Listing, StoredFile, list_folder
from chunk_cache.tiers.disk.pins import is_over, read_pin, remove_pin
from chunk_cache.tiers.disk.private_files import Draft, make_private
from chunk_cache.tiers.disk.usage import Usage, changes_of, locked_usage

DISK_BYTES = 16 << 30
"""Budget of a folder where nobody says another, bytes."""

_SLACK = 50
"""Where other processes write too, an eviction frees this share of the budget, one part in so many: the folder is listed
again for it."""


class FolderBudget:
    """Book-keeping of one process about one folder that others may write to.

    All processes count in one file (:mod:`~chunk_cache.tiers.disk.usage`), so the budget holds whoever writes. Its
    number of changes tells whether the index is complete. The folder is listed for the first write of a process, and
    for an eviction after others changed it; every other call costs the same however many records there are.

    Two locks: one orders the writers of this process, for as long as the disk takes; nobody who asks what is there
    waits for it. The index has another, held for a moment.

    Parameters
    ----------
    folder : Path
        The store's folder.
    byte_budget : int
        Most bytes of all chunk files and temporary files.
    describe : callable
        Fields that the folder tells of a namespace.
    """

    def __init__(self, folder: Path, byte_budget: int, describe: Describe) -> None:
        self._folder = folder
        self.byte_budget = byte_budget
        self._describe = describe
        self.awaited: Callable[[], Sequence[ChunkKey]] = tuple
        """Keys that waiting requests of this process will read, the next first; asked at each eviction."""
        self._index = FolderIndex(describe)
        self._changes: int | None = None
        """Number of changes that the index knows of."""
        self._is_doubtful = False
        """Whether something went that nobody could count; the folder is listed before the next write."""
        self._writing = threading.RLock()
        self._indexing = threading.Lock()

    # -- what is there --------------------------------------------------------------------------

    def find(self, key: ChunkKey) -> StoredFile | None:
        """What is known of a record; the disk is asked for one that another process may have written."""
        return self._index.get(key) or self.look(key)

    def look(self, key: ChunkKey) -> StoredFile | None:
        """Ask the disk for a record."""
        try:
            status = os.stat(chunk_path(self._folder, key))  # noqa: PTH116 - as fast as can be
        except FileNotFoundError:
            self.forget(key)
            return None
        except OSError:
            return None
        found = StoredFile(status.st_mtime_ns, key, status.st_size)
        with self._indexing:
            if key not in self._index:
                self._index.put(found)
        return found

    def index(self) -> FolderIndex:
        """The index, complete: the folder is listed if another process changed it."""
        is_complete = self._changes is not None and not self._is_doubtful
        if not is_complete or changes_of(usage_path(self._folder)) != self._changes:
            with self._writing:
                try:
                    with locked_usage(usage_path(self._folder)) as usage:
                        self._list(usage, tidy=False)
                except OSError:
                    # Read-only, say: then nothing is counted, and the next call lists again.
                    self._replace(list_folder(self._folder))
                    self._is_doubtful = True
        return self._index

    def used(self, key: ChunkKey) -> None:
        """Note on a file that it was used just now; never raises."""
        stamp = self._stamp()
        try:
            os.utime(chunk_path(self._folder, key), ns=(stamp, stamp))
        except FileNotFoundError:
            self.forget(key)
        except OSError:
            return
        else:
            with self._indexing:
                self._index.used(key, stamp)

    def forget(self, key: ChunkKey) -> None:
        """Know that a file is gone."""
        if key in self._index:
            with self._indexing:
                self._index.drop(key)

    # -- changes ------------------------------------------------------------------------------

    def begin(self, key: ChunkKey, num_bytes: int) -> Draft | None:
        """Make room for a record's file, count it, and open it.

        Returns
        -------
        Draft or None
            To be written, then given to :meth:`publish` or :meth:`discard`; ``None`` where the file does not fit,
            because of its size or of pins.

        Raises
        ------
        OSError
            Where the disk refuses.
        """
        if num_bytes > self.byte_budget:
            return None
        make_private(self._folder)
        with self._writing, locked_usage(usage_path(self._folder)) as usage:
            if self._changes is None or self._is_doubtful or not usage.is_known:
                self._list(usage)
            over = usage.num_bytes + num_bytes - self.byte_budget
            if over > 0:
                slack = 0
                if usage.changes != self._changes:
                    self._list(usage)
                    over = usage.num_bytes + num_bytes - self.byte_budget
                    slack = self.byte_budget // _SLACK
                if over > 0:
                    self._evict(usage, over, slack=slack, claim=(key.namespace, num_bytes))
                if usage.num_bytes + num_bytes > self.byte_budget:
                    return None
            self._change(usage, num_bytes)
            try:
                return Draft(chunk_path(self._folder, key), num_bytes)
            except BaseException:
                self._count(usage, -num_bytes)
                raise

    def publish(self, key: ChunkKey, draft: Draft) -> None:
        """Give a written file its name; it counts as used now.

        Raises
        ------
        OSError
            Where the disk refuses; the file is then to be discarded.
        """
        with self._writing, locked_usage(usage_path(self._folder)) as usage:
            stamp = self._stamp()
            replaced = _size(draft.path)
            until = read_pin(pin_path(self._folder, key))
            draft.publish(stamp)
            with self._indexing:
                self._index.put(StoredFile(stamp, key, draft.num_bytes, until))
            self._count(usage, -replaced)

    def discard(self, draft: Draft) -> None:
        """Remove a file that was begun; never raises."""
        if draft.discard():
            self._count_gone(draft.num_bytes)

    def remove(self, key: ChunkKey) -> bool:
        """Delete a record's file; ``False`` if there was none.

        Raises
        ------
        OSError
            Where the disk refuses.
        """
        with contextlib.ExitStack() as locks:
            locks.enter_context(self._writing)
            usage: Usage | None = None
            try:
                usage = locks.enter_context(locked_usage(usage_path(self._folder)))
            except OSError:
                self._is_doubtful = True  # it goes though nobody can count it
            path = chunk_path(self._folder, key)
            num_bytes = _size(path)
            self.forget(key)
            try:
                path.unlink()
            except FileNotFoundError:
                return False
            if usage is not None:
                self._count(usage, -num_bytes)
        return True

    def remove_damaged(self, key: ChunkKey, number: int) -> None:
        """Delete a record's file and pin, if it still is the one of this inode; never raises, waits for nobody."""
        path = chunk_path(self._folder, key)
        with contextlib.suppress(OSError):
            if os.stat(path).st_ino == number:  # noqa: PTH116
                self.forget(key)
                path.unlink()
                self._is_doubtful = True
                remove_pin(pin_path(self._folder, key))

    def note_pin(self, key: ChunkKey, until: float) -> None:
        """Know, and let other processes know, until when a record is pinned (seconds since the epoch; 0 for not)."""
        with self._indexing:
            self._index.set_pinned(key, until)
        self._count_gone(0)

    def regroup(self, namespace: str) -> None:
        """Know that the folder tells something new of a namespace."""
        with self._indexing:
            self._index.regroup(namespace)

    def trim(self, byte_budget: int) -> list[ChunkKey]:
        """List the folder, remove what crashes left, and evict until everything fits; pinned records stay.

        Raises
        ------
        OSError
            Where the disk refuses.
        """
        with self._writing, locked_usage(usage_path(self._folder)) as usage:
            self._list(usage)
            return self._evict(usage, usage.num_bytes - byte_budget)

    # -- under the locks ----------------------------------------------------------------------

    def _list(self, usage: Usage, *, tidy: bool = True) -> None:
        self._is_doubtful = False
        found = list_folder(self._folder, tidy=tidy)
        self._replace(found)
        usage.change(found.num_bytes - usage.num_bytes)
        usage.is_known = True
        self._changes = usage.changes

    def _replace(self, found: Listing) -> None:
        fresh = FolderIndex(self._describe)
        for file in found.files:
            fresh.put(file)
        with self._indexing:
            # Whoever asks without the lock sees the old index or the new one.
            fresh.newest_ns = max(fresh.newest_ns, self._index.newest_ns)
            self._index = fresh

    def _change(self, usage: Usage, num_bytes: int) -> None:
        is_complete = usage.changes == self._changes
        usage.change(num_bytes)
        if is_complete:
            self._changes = usage.changes

    def _count(self, usage: Usage, num_bytes: int) -> None:
        """Count what is done already; where that cannot be written, the figure is too high until the next listing."""
        if not usage.is_known:
            self._is_doubtful = (
                True  # a figure that begins with this would leave out all that is there
            )
            return
        try:
            self._change(usage, num_bytes)
        except OSError:
            self._is_doubtful = True

    def _count_gone(self, num_bytes: int) -> None:
        try:
            with self._writing, locked_usage(usage_path(self._folder)) as usage:
                self._count(usage, -num_bytes)
        except OSError:
            self._is_doubtful = True

    def _evict(
        self, usage: Usage, num_bytes: int, *, slack: int = 0, claim: tuple[str, int] | None = None
    ) -> list[ChunkKey]:
        """Free so many bytes, and some slack; where room is claimed and it cannot be had, free nothing."""
        stay: list[StoredFile] = []

        def may_go(file: StoredFile) -> bool:
            """Ask the disk: another process may have used the record, pinned it, or removed it."""
            used_ns = _used_ns(chunk_path(self._folder, file.key))
            until = read_pin(pin_path(self._folder, file.key))
            if until or used_ns > file.used_ns:
                stay.append(file._replace(used_ns=used_ns, pinned_until=until))
                return False
            return True

        awaited = {key: turn for turn, key in enumerate(self.awaited())}
        with self._indexing:
            self._index.end_pins(time.time(), lambda key: is_over(pin_path(self._folder, key)))
            chosen = self._index.victims(
                num_bytes + slack, may_go, claim=claim, now_ns=time.time_ns(), awaited=awaited
            )
            for file in sorted(stay):
                self._index.put(file)
        if claim is not None and sum(file.num_bytes for file in chosen) < num_bytes:
            return []
        gone: list[ChunkKey] = []
        freed = 0
        try:
            for file in chosen:
                chunk_path(self._folder, file.key).unlink(missing_ok=True)
                self.forget(file.key)
                gone.append(file.key)
                freed += file.num_bytes
        finally:
            if gone:
                self._count(usage, -freed)
        return gone

    def _stamp(self) -> int:
        """A time of use that is later than every other, though the clock went back."""
        return max(time.time_ns(), self._index.newest_ns + 1)


def _size(path: Path) -> int:
    try:
        return os.stat(path).st_size  # noqa: PTH116
    except OSError:
        return 0


def _used_ns(path: Path) -> int:
    try:
        return os.stat(path).st_mtime_ns  # noqa: PTH116
    except OSError:
        return 0
