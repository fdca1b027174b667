"""What a folder may look like after a crash between any two calls.

The model is the strict one: the contents of a file are safe from its ``fsync`` on, a name in a folder
from the ``fsync`` of that folder on; of everything else any part may or may not have reached the disk.
A process that is killed loses nothing; a power cut loses what is not safe, or any part of it.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from rag_eval.io_faults.calls import Call, DiskCalls

Tree = dict[str, int]
"""Names of a folder, each with the number of its file or folder."""


@dataclass(frozen=True, slots=True)
class Image:
    """One folder as a crash may leave it: files by relative path, and folders."""

    files: tuple[tuple[str, bytes], ...]
    folders: tuple[str, ...]

    def without(self, part: str) -> Image:
        """The same image without what has `part` in its path."""
        return Image(
            tuple(file for file in self.files if part not in file[0]),
            tuple(folder for folder in self.folders if part not in folder),
        )

    def restore(self, target: Path) -> None:
        """Write the folder to `target`, which does not exist."""
        target.mkdir(parents=True)
        for folder in self.folders:
            (target / folder).mkdir(parents=True, exist_ok=True)
        for name, content in self.files:
            (target / name).write_bytes(content)


class CrashRecorder:
    """Watches one folder through :class:`DiskCalls` and keeps every image of a crash. A context manager.

    Parameters
    ----------
    root : Path
        The folder; as it is now it is taken to be safe.
    seed, mixes : int
        Of every moment, so many images in which each unsafe part is there or not by chance.
    """

    def __init__(self, root: Path, *, seed: int = 0, mixes: int = 2) -> None:
        self._root = root.resolve()
        self._random = random.Random(seed)
        self._mixes = mixes
        self._images: dict[Image, str] = {}
        self._safe_content: dict[int, bytes] = {}
        self._safe_names: dict[int, Tree] = {}
        self._calls = DiskCalls(self._root, before=self._before)
        now, content = self._look()
        self._safe_content.update(content)
        self._safe_names.update(now)

    def __enter__(self) -> Self:
        self._calls.__enter__()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._calls.__exit__()
        self._take("the end")

    @property
    def calls(self) -> list[Call]:
        """Every call that was seen."""
        return self._calls.calls

    def images(self) -> Iterator[tuple[str, Image]]:
        """Every distinct image, with the call before which the crash came."""
        return ((when, image) for image, when in self._images.items())

    def final(self) -> list[Image]:
        """Images of a crash right after the last call."""
        now, content = self._look()
        return list(self._possible(now, content))

    def _before(self, call: Call) -> None:
        self._take(f"{call.kind} {Path(call.path).relative_to(self._root)}")
        path = Path(call.path)
        if call.kind == "fsync" and path.exists():
            number = path.stat().st_ino
            if path.is_dir():
                self._safe_names[number] = _names(path)
            else:
                self._safe_content[number] = path.read_bytes()
        lost = Path(call.target) if call.target else path
        if call.kind in ("unlink", "rmdir", "rename") and lost.exists():
            found = lost.stat()
            # The disk keeps a removed file until the folder says so; the number may be used again.
            if found.st_nlink <= 1 or lost.is_dir():
                self._bury(found.st_ino, is_folder=lost.is_dir())

    def _bury(self, number: int, *, is_folder: bool) -> None:
        """Give what is being removed a number of its own, under which the safe names still find it."""
        grave = -1 - len(self._safe_content) - len(self._safe_names)
        while grave in self._safe_content or grave in self._safe_names:
            grave -= 1
        if is_folder:
            self._safe_names[grave] = self._safe_names.pop(number, {})
        else:
            self._safe_content[grave] = self._safe_content.pop(number, b"")
        for names in self._safe_names.values():
            for name, held in names.items():
                if held == number:
                    names[name] = grave

    def _take(self, when: str) -> None:
        now, content = self._look()
        for image in self._possible(now, content):
            self._images.setdefault(image, when)

    def _possible(self, now: dict[int, Tree], content: dict[int, bytes]) -> Iterator[Image]:
        """Killed; without power and only what is safe; names first; contents first; mixtures."""
        for names, data in ((1.0, 1.0), (0.0, 0.0), (1.0, 0.0), (0.0, 1.0)):
            yield self._image(now, content, names, data)
        for _ in range(self._mixes):
            yield self._image(now, content, 0.5, 0.5)

    def _image(
        self, now: dict[int, Tree], content: dict[int, bytes], names: float, data: float
    ) -> Image:
        """One image; `names` and `data` are the chances that an unsafe part reached the disk."""
        files: dict[str, bytes] = {}
        folders: list[str] = []

        def is_there(chance: float) -> bool:
            return self._random.random() < chance

        def walk(number: int, prefix: str) -> None:
            safe, current = self._safe_names.get(number, {}), now.get(number, {})
            for name in sorted({*safe, *current}):
                held = safe.get(name)
                if current.get(name) != held and is_there(names):
                    held = current.get(name)
                if held is None:
                    continue
                path = f"{prefix}{name}"
                if held in now or held in self._safe_names:
                    folders.append(path)
                    walk(held, f"{path}/")
                    continue
                old = self._safe_content.get(held, b"")
                new = content.get(held, old)
                files[path] = new if new != old and is_there(data) else old

        walk(self._root.stat().st_ino, "")
        return Image(tuple(sorted(files.items())), tuple(folders))

    def _look(self) -> tuple[dict[int, Tree], dict[int, bytes]]:
        """Read the folder as it is: names of every folder, contents of every file."""
        trees: dict[int, Tree] = {}
        content: dict[int, bytes] = {}
        for folder, _, files in os.walk(self._root):
            where = Path(folder)
            trees[where.stat().st_ino] = _names(where)
            for name in files:
                path = where / name
                content[path.stat().st_ino] = path.read_bytes()
        return trees, content


def _names(folder: Path) -> Tree:
    return {path.name: path.stat(follow_symlinks=False).st_ino for path in folder.iterdir()}
