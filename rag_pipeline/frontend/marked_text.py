"""A text that remembers where chunks and templates stand in it, whatever is added or cut off.

SGLang's interpreter keeps a program's state as one string: it adds to it, copies it for a fork and
cuts pieces out of it for a join. A string that carries its marks through these operations needs no
change in the interpreter and no separators in the text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, SupportsIndex

from rag_pipeline.prompts.segments import Kind, Segment


@dataclass(frozen=True, kw_only=True, slots=True)
class Mark:
    """A marked range of a text.

    Parameters
    ----------
    start, end : int
        Characters, half-open.
    kind : Kind
        ``chunk`` or ``template``; see :class:`rag_pipeline.prompts.segments.Segment`.
    chunk_id : str or None
        Name of a chunk.
    role : str
        Of a template that opens a message: whose message. Empty for all else.
    """

    start: int
    end: int
    kind: Kind
    chunk_id: str | None = None
    role: str = ""

    def moved(self, by: int) -> Mark:
        """Return the same mark `by` characters further on."""
        return dataclasses.replace(self, start=self.start + by, end=self.end + by)


class MarkedText(str):
    """A string with marks; adding and slicing keep them, every other method gives a plain string.

    Parameters
    ----------
    text : str
        The characters.
    marks : tuple of Mark
        Rising and disjoint.
    """

    marks: tuple[Mark, ...]

    def __new__(cls, text: str = "", marks: Iterable[Mark] = ()) -> MarkedText:  # noqa: D102
        made = super().__new__(cls, str.__str__(text))
        made.marks = tuple(marks)
        return made

    @classmethod
    def of(
        cls, text: str, kind: Kind, chunk_id: str | None = None, *, role: str = ""
    ) -> MarkedText:
        """Mark a whole text; an empty one has nothing to mark."""
        mark = Mark(start=0, end=len(text), kind=kind, chunk_id=chunk_id, role=role)
        return cls(text, (mark,) if text else ())

    def __str__(self) -> str:
        # The interpreter calls str() on what it adds and on what it forks.
        return self

    def __add__(self, other: str) -> MarkedText:
        if not isinstance(other, str):
            return NotImplemented
        behind = (mark.moved(len(self)) for mark in marks_of(other))
        return MarkedText(str.__add__(self, other), (*self.marks, *behind))

    def __radd__(self, other: str) -> MarkedText:
        # Reached for plain + marked: Python asks the right side first when it is the subclass.
        if not isinstance(other, str):
            return NotImplemented
        moved = (mark.moved(len(other)) for mark in self.marks)
        return MarkedText(str.__add__(other, self), (*marks_of(other), *moved))

    def __getitem__(self, key: SupportsIndex | slice[Any, Any, Any]) -> str:
        found = str.__getitem__(self, key)
        if not isinstance(key, slice):
            return found
        start, stop, step = key.indices(len(self))
        if step != 1:
            return found
        return MarkedText(found, self._cut(start, stop))

    def _cut(self, start: int, stop: int) -> Iterator[Mark]:
        for mark in self.marks:
            low, high = max(mark.start, start), min(mark.end, stop)
            # Half a chunk is another text than the chunk, and stays as plain text.
            whole = (low, high) == (mark.start, mark.end)
            if low < high and (whole or mark.kind == "template"):
                role = mark.role if low == mark.start else ""
                yield dataclasses.replace(mark, start=low - start, end=high - start, role=role)


def marks_of(text: str) -> tuple[Mark, ...]:
    """Marks of any string."""
    return text.marks if isinstance(text, MarkedText) else ()


def segments_of(text: str) -> list[Segment]:
    """Cut a text at its marks."""
    plain = str.__str__(text)
    segments: list[Segment] = []
    done = 0
    for mark in marks_of(text):
        if done < mark.start:
            segments.append(Segment(text=plain[done : mark.start]))
        segments.append(
            Segment(text=plain[mark.start : mark.end], kind=mark.kind, chunk_id=mark.chunk_id)
        )
        done = mark.end
    if done < len(plain):
        segments.append(Segment(text=plain[done:]))
    return segments
