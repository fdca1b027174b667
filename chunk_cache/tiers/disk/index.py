"""What one process knows of a folder: every record's size and turn, by share. No disk, no locks."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

from chunk_cache.keys import ChunkKey
from chunk_cache.tiers.disk.listing import StoredFile

Share = tuple[str, ...]
"""Whose room a record takes: tenant, model and rank of its namespace."""

Describe = Callable[[str], Mapping[str, Any] | None]
"""Fields that the folder tells of a namespace."""

_STALE_NS = 7 * 24 * 3600 * 10**9
"""A share that nobody used for a week has no claim to its room any more, nanoseconds."""


class FolderIndex:
    """Records of a folder; each change costs the same however many there are.

    Parameters
    ----------
    describe : callable
        Asked once per namespace, until :meth:`regroup`.
    """

    def __init__(self, describe: Describe) -> None:
        self._describe = describe
        self._files: dict[ChunkKey, StoredFile] = {}
        self._share_of: dict[str, Share] = {}
        self._turns: dict[Share, OrderedDict[ChunkKey, None]] = {}
        """Records that are not pinned, the longest unused first."""
        self._bytes_of: dict[Share, int] = {}
        self._pin_ends: dict[ChunkKey, float] = {}
        """Of pins that end, seconds since the epoch."""
        self.newest_ns = 0
        """Latest use of any record."""

    def __len__(self) -> int:
        return len(self._files)

    def __contains__(self, key: ChunkKey) -> bool:
        return key in self._files

    def get(self, key: ChunkKey) -> StoredFile | None:
        """What is known of a record."""
        return self._files.get(key)

    def put(self, file: StoredFile) -> None:
        """Know a file, as the one used last."""
        if file.key in self._files:
            self.drop(file.key)
        share = self.share_of(file.key.namespace)
        self._files[file.key] = file
        self._bytes_of[share] = self._bytes_of.get(share, 0) + file.num_bytes
        if file.is_pinned:
            if not math.isinf(file.pinned_until):
                self._pin_ends[file.key] = file.pinned_until
        else:
            self._turns.setdefault(share, OrderedDict())[file.key] = None
        self.newest_ns = max(self.newest_ns, file.used_ns)

    def drop(self, key: ChunkKey) -> None:
        """Forget a file."""
        file = self._files.pop(key, None)
        if file is None:
            return
        self._pin_ends.pop(key, None)
        share = self.share_of(key.namespace)
        self._bytes_of[share] -= file.num_bytes
        turns = self._turns.get(share)
        if turns is not None:
            turns.pop(key, None)
            if not turns:
                del self._turns[share]
        if not self._bytes_of[share]:
            del self._bytes_of[share]

    def used(self, key: ChunkKey, used_ns: int) -> None:
        """Know a record as the one used last."""
        file = self._files.get(key)
        if file is not None:
            self.put(file._replace(used_ns=used_ns))

    def set_pinned(self, key: ChunkKey, until: float) -> None:
        """Take a record out of the turns until then, or into them again (0)."""
        file = self._files.get(key)
        if file is not None and file.pinned_until != until:
            self.put(file._replace(pinned_until=until))

    def pins(self) -> dict[ChunkKey, float]:
        """Records that are pinned, and until when (seconds since the epoch)."""
        return {key: file.pinned_until for key, file in self._files.items() if file.is_pinned}

    def end_pins(self, now: float, is_over: Callable[[ChunkKey], bool]) -> None:
        """Take records whose pins ended into the turns again, as used last; those of others' turns stay before them."""
        for key in [k for k, until in self._pin_ends.items() if until <= now or is_over(k)]:
            self.set_pinned(key, 0.0)

    def regroup(self, namespace: str) -> None:
        """Ask again whose a namespace is."""
        if namespace not in self._share_of:
            return
        files = [file for key, file in self._files.items() if key.namespace == namespace]
        for file in files:
            self.drop(file.key)
        self._share_of.pop(namespace, None)
        for file in sorted(files):
            self.put(file)

    def share_of(self, namespace: str) -> Share:
        """Whose room the records of a namespace take; their own where the folder does not tell."""
        share = self._share_of.get(namespace)
        if share is None:
            told = self._describe(namespace) or {"namespace": namespace}
            names = ("tenant", "model_fingerprint", "tp_rank", "tp_size", "namespace")
            share = self._share_of[namespace] = tuple(str(told.get(name, "")) for name in names)
        return share

    def keys_by_use(self) -> list[ChunkKey]:
        """All keys, the longest unused first."""
        return [file.key for file in sorted(self._files.values(), key=lambda f: f.used_ns)]

    def keys(self) -> list[ChunkKey]:
        """All keys, by namespace and digest."""
        return sorted(self._files, key=lambda key: (key.namespace, key.digest))

    def victims(
        self,
        num_bytes: int,
        may_go: Callable[[StoredFile], bool],
        *,
        claim: tuple[str, int] | None = None,
        now_ns: int = 0,
        awaited: Mapping[ChunkKey, int] = MappingProxyType({}),
    ) -> list[StoredFile]:
        """Choose records to remove.

        A share that was not used for a week goes first. Then who holds most, the claim counted, loses its longest
        unused record; among equals the one that claims. So nobody is pushed out by a share that holds more.

        Parameters
        ----------
        num_bytes : int
            To free.
        may_go : callable
            Asked of each record in turn; nothing may be changed here meanwhile.
        claim : tuple, optional
            Namespace and bytes of the record that room is made for.
        now_ns : int
            The time, nanoseconds.
        awaited : mapping of ChunkKey to int
            Records that waiting requests will read, and in which turn. Within a share they go last, the last turn
            first.

        Returns
        -------
        list[StoredFile]
            As many as are needed, or as may go.
        """
        claiming, wanted = (self.share_of(claim[0]), claim[1]) if claim else (None, 0)
        held = {share: self._bytes_of[share] for share in self._turns}
        if claiming is not None:
            held[claiming] = self._bytes_of.get(claiming, 0) + wanted
        rows = {share: _in_order(turns, awaited) for share, turns in self._turns.items()}
        stale = [
            share
            for share, turns in self._turns.items()
            if share != claiming and self._files[next(reversed(turns))].used_ns < now_ns - _STALE_NS
        ]
        chosen: list[StoredFile] = []
        while num_bytes > 0 and held:
            most = (
                stale[-1] if stale else max(held, key=lambda name: (held[name], name == claiming))
            )
            file = next((f for k in rows.get(most, ()) if may_go(f := self._files[k])), None)
            if file is not None:
                chosen.append(file)
                held[most] -= file.num_bytes
                num_bytes -= file.num_bytes
            elif most == claiming:
                break  # all of its own is pinned
            else:
                del held[most]
                stale = [share for share in stale if share != most]
        return chosen


def _in_order(
    turns: Mapping[ChunkKey, None], awaited: Mapping[ChunkKey, int]
) -> Iterator[ChunkKey]:
    """Records of a share, the first to go first."""
    yield from (key for key in turns if key not in awaited)
    yield from sorted((key for key in awaited if key in turns), key=lambda key: -awaited[key])
