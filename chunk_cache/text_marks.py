"""Marks of texts that were erased: hashes of all their runs of characters, to find them in other text.

White space does not count: a chunk is laid out with titles and line breaks around it. The marks do
not give the text back, so that they may lie on a disk for as long as others have to be told.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from typing import Self

import numpy as np
import numpy.typing as npt

from chunk_cache.matching import WindowHasher

_WINDOW = 32
"""Characters of a run. A text that is shorter is one run."""
_SEED = 0x5EED
_EVERYTHING = "everything"

Hashes = npt.NDArray[np.uint64]


class TextMarks:
    """Runs of characters of texts that are gone.

    Parameters
    ----------
    runs : mapping of int to Hashes
        Sorted hashes by the length of the run, characters.
    everything : bool
        All text counts as gone: there was too much of it to tell apart.
    """

    def __init__(self, runs: Mapping[int, Hashes], *, everything: bool = False) -> None:
        self._runs = {length: hashes for length, hashes in runs.items() if hashes.size}
        self.everything = everything

    @classmethod
    def of(
        cls, texts: Iterable[tuple[str, Iterable[str]]], *, step: int = 1, most: int | None = None
    ) -> Self:
        """Marks of texts that are gone, without the runs that live texts hold too.

        Parameters
        ----------
        texts : iterable of (str, iterable of str)
            Each text that is gone with the live ones that may share some of it.
        step : int
            Every so many runs of a text are marked, and its last one. A piece of it is then found that has
            ``31 + step`` characters; all of its runs are looked for.
        most : int, optional
            Texts beyond which all text counts as gone.
        """
        found: dict[int, list[Hashes]] = {}
        number = 0
        for text, live in texts:
            number += 1
            points = _points(text)
            if not points.size:
                continue
            length = min(_WINDOW, int(points.size))
            runs = _hashes(points, length)
            if step > 1:
                runs = np.append(runs[::step], runs[-1:])
            for other in live:
                runs = runs[~np.isin(runs, _hashes(_points(other), length))]
            found.setdefault(length, []).append(runs)
        return cls(
            {length: np.unique(np.concatenate(parts)) for length, parts in found.items()},
            everything=most is not None and number > most,
        )

    @classmethod
    def union(cls, parts: Iterable[TextMarks]) -> Self:
        """Marks of all that several are of: one look finds what any of them would."""
        found: dict[int, list[Hashes]] = {}
        everything = False
        for part in parts:
            everything |= part.everything
            for length, hashes in part._runs.items():
                found.setdefault(length, []).append(hashes)
        runs = {length: np.unique(np.concatenate(many)) for length, many in found.items()}
        return cls(runs, everything=everything)

    def __bool__(self) -> bool:
        """Whether any text can be found by them."""
        return self.everything or bool(self._runs)

    def are_in(self, text: str, *, strict: bool = False) -> bool:
        """Whether a text holds a run of what is gone.

        Parameters
        ----------
        text : str
            Where to look.
        strict : bool
            Nothing counts as gone only because everything does. And what was shorter than 32 characters is not
            looked for inside the text, since one letter is in every text: it has to be all of it, or all below its
            first line, as in a chunk that is laid out below its title.
        """
        if self.everything and not strict:
            return True
        points = _points(text)
        for length, gone in self._runs.items():
            runs = _hashes(points, length)
            if length < _WINDOW and strict:
                below_title = _points(text.partition("\n")[2])
                runs = runs[-1:] if length in (points.size, below_title.size) else runs[:0]
            places = np.searchsorted(gone, runs)
            if (gone[np.minimum(places, gone.size - 1)] == runs).any():
                return True
        return False

    def to_bytes(self) -> bytes:
        """Write them as NumPy's archive; no text is in it."""
        out = io.BytesIO()
        arrays = {str(length): hashes for length, hashes in self._runs.items()}
        if self.everything:
            arrays[_EVERYTHING] = np.zeros(0, dtype=np.uint64)
        np.savez(out, **arrays)  # type: ignore[arg-type]
        return out.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read what :meth:`to_bytes` wrote.

        Raises
        ------
        ValueError
            For anything else.
        """
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as archive:
                if sum(one.file_size for one in archive.zip.infolist()) > len(data):
                    raise ValueError("it is compressed")  # and may be of any size
                names = set(archive.files)
                runs = {int(name): archive[name] for name in names - {_EVERYTHING}}
        except Exception as error:
            raise ValueError(f"not marks of erased texts: {error!r}") from None
        for length, hashes in runs.items():
            # What nobody can be compared with would fail, or find nothing, only when it is used.
            is_sorted = hashes.ndim == 1 and bool((hashes[1:] >= hashes[:-1]).all())
            if not (1 <= length <= _WINDOW and hashes.dtype == np.uint64 and is_sorted):
                raise ValueError(
                    f"not marks of erased texts: {hashes.dtype} {list(hashes.shape)} for runs of {length}"
                )
        return cls(runs, everything=_EVERYTHING in names)


def _points(text: str) -> npt.NDArray[np.int32]:
    packed = "".join(text.split()).encode("utf-32-le", "surrogatepass")
    return np.frombuffer(packed, dtype="<i4")


_hashers: dict[int, WindowHasher] = {}


def _hashes(points: npt.NDArray[np.int32], length: int) -> Hashes:
    hasher = _hashers.setdefault(length, WindowHasher(length))
    return hasher(points, _SEED)
