"""Calls that change a folder, seen one by one, and made to fail one at a time."""

from __future__ import annotations

import builtins
import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

CHANGES = ("write", "fsync", "rename", "create", "mkdir", "allocate", "chmod")
"""Kinds of call that a disk may refuse while it still lets files be removed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """One call, before it is made."""

    kind: str
    """One of :data:`CHANGES`, ``unlink`` or ``rmdir``."""
    path: str
    target: str = ""
    """New name, of a ``rename``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """Which call fails, and how.

    Parameters
    ----------
    kinds : tuple of str
        Kinds of call that are counted and may fail.
    nth : int
        The first that fails, from 0 on.
    errno : int
        Number of the error, such as ``errno.ENOSPC``.
    lasting : bool
        All that follow fail too, as on a disk that stays full.
    """

    kinds: tuple[str, ...]
    nth: int
    errno: int
    lasting: bool = False


class DiskCalls:
    """Stands between Python and the disk for everything below one folder. Use as a context manager.

    Parameters
    ----------
    root : Path
        The folder; calls elsewhere pass unseen.
    fault : Fault, optional
        The call that fails; none by default.
    before : callable, optional
        Called before every call is made.

    Attributes
    ----------
    calls : list of Call
        What was seen.
    failed : list of Call
        Calls that were made to fail.
    """

    def __init__(
        self,
        root: Path,
        *,
        fault: Fault | None = None,
        before: Callable[[Call], None] | None = None,
    ) -> None:
        self._root = root.resolve()
        self._fault = fault
        self._before = before
        self._counted = 0
        self._undo: list[tuple[Any, str, Any]] = []
        self.calls: list[Call] = []
        self.failed: list[Call] = []

    def __enter__(self) -> Self:
        for name, kind in (
            ("fsync", "fsync"),
            ("fdatasync", "fsync"),
            ("rename", "rename"),
            ("replace", "rename"),
            ("link", "rename"),
            ("unlink", "unlink"),
            ("remove", "unlink"),
            ("rmdir", "rmdir"),
            ("mkdir", "mkdir"),
            ("posix_fallocate", "allocate"),
            ("truncate", "write"),
            ("ftruncate", "write"),
            ("write", "write"),
            ("pwrite", "write"),
            ("writev", "write"),
            ("chmod", "chmod"),
            ("fchmod", "chmod"),
        ):
            self._wrap(os, name, kind)
        self._swap(os, "open", self._os_open)
        self._swap(io, "open", self._open)
        self._swap(builtins, "open", self._open)
        return self

    def __exit__(self, *exc_info: object) -> None:
        for owner, name, original in reversed(self._undo):
            setattr(owner, name, original)
        self._undo.clear()

    def step(self, kind: str, path: str, target: str = "") -> None:
        """See a call, and raise where it is to fail."""
        call = Call(kind=kind, path=path, target=target)
        if self._before is not None:
            self._before(call)
        self.calls.append(call)
        fault = self._fault
        if fault is None or kind not in fault.kinds:
            return
        number, self._counted = self._counted, self._counted + 1
        if number == fault.nth or (fault.lasting and number > fault.nth):
            self.failed.append(call)
            raise OSError(fault.errno, os.strerror(fault.errno), path)

    def inside(self, target: Any, dir_fd: int | None = None) -> str | None:
        """Full path of a name or descriptor where it is below the folder."""
        try:
            if isinstance(target, int):
                path = _of_descriptor(target)
            else:
                path = Path(os.fsdecode(target))
                if dir_fd is not None:
                    path = _of_descriptor(dir_fd) / path
                path = path.parent.resolve() / path.name
        except (OSError, TypeError, ValueError):
            return None
        return str(path) if path == self._root or self._root in path.parents else None

    def _swap(self, owner: Any, name: str, replacement: Any) -> None:
        self._undo.append((owner, name, getattr(owner, name)))
        setattr(owner, name, replacement)

    def _wrap(self, owner: Any, name: str, kind: str) -> None:
        original = getattr(owner, name)

        def call(target: Any, *args: Any, **kwargs: Any) -> Any:
            path = self.inside(target, kwargs.get("dir_fd"))
            if path is not None:
                renamed = self.inside(args[0]) if kind == "rename" and args else None
                self.step(kind, path, renamed or "")
            return original(target, *args, **kwargs)

        # `shutil.rmtree` asks whether `os.unlink` takes a folder's descriptor, by its identity.
        self._swap(owner, name, call)

    def _os_open(self, path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        original = self._original(os, "open")
        where = self.inside(path, kwargs.get("dir_fd"))
        if where is not None and flags & os.O_CREAT and not _exists(path, kwargs.get("dir_fd")):
            self.step("create", where)
        return int(original(path, flags, *args, **kwargs))

    def _open(self, file: Any, mode: str = "r", buffering: int = -1, *args: Any, **kw: Any) -> Any:
        original = self._original(io, "open")
        where = self.inside(file)
        if where is None or not set(mode) & set("wxa+"):
            return original(file, mode, buffering, *args, **kw)
        if not isinstance(file, int) and not _exists(file, None):
            self.step("create", where)
        raw = _File(file, mode.replace("b", "").replace("t", ""), seen=self)
        if "b" in mode and buffering == 0:
            return raw
        buffered: Any = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        if "b" in mode:
            return buffered
        return io.TextIOWrapper(buffered, *args, **kw)

    def _original(self, owner: Any, name: str) -> Any:
        return next(
            found for where, called, found in self._undo if (where, called) == (owner, name)
        )


class _File(io.FileIO):
    def __init__(self, file: Any, mode: str, *, seen: DiskCalls) -> None:
        super().__init__(file, mode)
        self._seen = seen

    def write(self, data: Any, /) -> int:
        where = self._seen.inside(self.fileno())
        if where is not None:
            self._seen.step("write", where)
        return super().write(data)


def _of_descriptor(number: int) -> Path:
    return Path(f"/proc/self/fd/{number}").readlink()


def _exists(path: Any, dir_fd: int | None) -> bool:
    try:
        os.stat(path, dir_fd=dir_fd, follow_symlinks=False)
    except OSError:
        return False
    return True
