"""The nouns of retrieval, shared by every module of this package. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

Scalar = str | int | float | bool
"""What a metadata value may be: anything a JSON manifest and a filter can compare exactly."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """One loaded source text.

    Parameters
    ----------
    id : str
        Stable identifier: the same source gives the same id on every run.
    text : str
        The whole text as a reader sees it, with mark-up removed.
    title : str
        Human-readable title; the file's stem where the format carries none.
    path : str or None
        Path of the source relative to the folder that was ingested (or as given); ``None`` when
        the document did not come from a file.
    metadata : mapping of str to Scalar
        Scalars a filter may select on.
    """

    id: str
    text: str
    title: str
    path: str | None = None
    metadata: Mapping[str, Scalar] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """A run of whole sentences of one document, measured in tokens of the language model.

    Parameters
    ----------
    id : str
        Content-derived identifier, stable under edits elsewhere in the document.
    document_id, title, path, metadata : str, str, str or None, mapping of str to Scalar
        Taken over from the document.
    text : str
        The chunk's text, exactly ``document.text[start:end]``.
    start, end : int
        Character offsets into the document's text.
    num_tokens : int
        Tokens of ``text`` tokenised alone by the splitter's tokenizer, without special tokens.
    """

    id: str
    document_id: str
    text: str
    title: str
    start: int
    end: int
    num_tokens: int
    path: str | None = None
    metadata: Mapping[str, Scalar] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchHit:
    """One retrieved chunk with its score; higher is better in every retriever."""

    chunk: Chunk
    score: float


class Retriever(Protocol):
    """Anything that ranks chunks for a query."""

    def search(
        self, query: str, *, k: int, where: Mapping[str, object] | None = None
    ) -> list[SearchHit]:
        """Return at most `k` hits, best first; `where` filters on chunk metadata."""
        ...


class Tokenizer(Protocol):
    """The part of a tokenizer that retrieval needs: ids and character offsets of a text alone.

    Special-token strings inside `text` are ordinary text here, so a document can never smuggle a
    control token into a prompt.
    """

    @property
    def fingerprint(self) -> str:
        """Identify vocabulary and settings; equal fingerprints give equal ids."""
        ...

    def encode(self, text: str) -> list[int]:
        """Token ids of `text` alone, without special tokens."""
        ...

    def encode_offsets(self, text: str) -> Sequence[tuple[int, int]]:
        """Character span ``(start, end)`` of every token of :meth:`encode`."""
        ...
