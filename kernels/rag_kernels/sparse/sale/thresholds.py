"""Thresholds of a model's heads: made by calibration, kept in a JSON file, found by the weights they belong to."""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass
from pathlib import Path

from rag_kernels.json_record import from_text, reason_of, to_text

FORMAT = 1
"""Version of the file; others are not read."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_LARGEST_FILE = 4 << 20

_FOLDERS: list[Path] = [Path(__file__).parent / "tables"]


def add_table_folder(folder: Path) -> None:
    """Look for tables in a folder, too, before those that are known; it need not exist.

    A request names a table, never a path: what lies elsewhere is not read.
    """
    if folder not in _FOLDERS:
        _FOLDERS.insert(0, folder)


@dataclass(frozen=True, kw_only=True, slots=True)
class ThresholdTable:
    """One threshold per layer and query head.

    Attributes
    ----------
    model : str
        As people call it.
    fingerprint : str
        Of the checkpoint that was calibrated.
    theta : float
        Error per token that calibration allowed each head.
    tokens : tuple of int
        Lengths of the samples.
    block_q, block_k, local_window, segment : int
        Options that the thresholds were found with.
    granularity : str
        The same.
    tau : tuple of tuple of float
        ``[layers][query heads of the whole model]``; 0 for a head that reads everything.
    """

    model: str
    fingerprint: str
    theta: float
    tokens: tuple[int, ...]
    block_q: int
    block_k: int
    local_window: int
    segment: int
    granularity: str
    tau: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        if not self.tau or len({len(heads) for heads in self.tau}) != 1 or not self.tau[0]:
            raise ValueError("tau is not a table of layers with as many heads each")
        if not all(math.isfinite(t) and t >= 0 for heads in self.tau for t in heads):
            raise ValueError("tau holds a value that is not a number from 0 on")

    @property
    def digest(self) -> str:
        """Sixteen hexadecimal digits: equal for equal tables only."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    def to_json(self) -> str:
        """Text of the file; :meth:`from_json` reads it."""
        return to_text(self, FORMAT)

    @classmethod
    def from_json(cls, text: str) -> ThresholdTable:
        """Read the text of a file.

        Raises
        ------
        ValueError
            One line: what is wrong with it.
        """
        read = {
            "tau": lambda rows: tuple(tuple(float(t) for t in heads) for heads in rows),
            "tokens": lambda counts: tuple(int(n) for n in counts),
        }
        return from_text(cls, text, FORMAT, "a table of thresholds", read)


def load_table(name: str) -> ThresholdTable:
    """Read the table of a name.

    Raises
    ------
    ValueError
        One line: no such name, or a file that cannot be read.
    """
    if _NAME.fullmatch(name):
        for folder in _FOLDERS:
            path = folder / f"{name}.json"
            if path.is_file():
                return _read(path)
    known = ", ".join(sorted({path.stem for path in _files()})) or "none is there"
    raise ValueError(
        f"thresholds {name!r:.80} are not known; give auto, a number, or one of: {known}."
    )


def find_table(fingerprint: str) -> ThresholdTable | None:
    """Return the first table that was made for these weights; a file that cannot be read is passed over."""
    for path in _files():
        try:
            table = _read(path)
        except ValueError:
            continue
        if table.fingerprint == fingerprint:
            return table
    return None


def _files() -> list[Path]:
    return [path for folder in _FOLDERS for path in sorted(folder.glob("*.json"))]


def _read(path: Path) -> ThresholdTable:
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise ValueError(f"larger than {_LARGEST_FILE} bytes")
        return ThresholdTable.from_json(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"thresholds {path}: {reason_of(error)}; calibrate the model again."
        ) from None
