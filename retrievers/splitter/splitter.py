"""The splitter: documents to chunks that are measured in tokens and stay put under edits."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from importlib.metadata import version
from itertools import pairwise

from retrievers.errors import RetrievalError
from retrievers.splitter.anchors import border_keys, find_anchors
from retrievers.splitter.atoms import (
    Atom,
    Boundary,
    divide_sentence,
    divide_words,
    find_atoms,
)
from retrievers.splitter.packing import pack
from retrievers.tokenizer import count_tokens
from retrievers.types import Chunk, Document, Scalar, Tokenizer

MIN_CHUNK_TOKENS = 16
"""One character can be several tokens; below this a chunk could not be promised to fit."""

_ALGORITHM = 1
"""Raise it with every change that moves a chunk border: stored indexes are then re-split."""

_SURROGATE = re.compile("[\ud800-\udfff]")

_BATCH = 8192  # texts handed to the tokenizer at once, which bounds memory on a huge document


class TokenSplitter:
    """Split documents into chunks of whole sentences, measured in a language model's tokens.

    How: the text is cut into atoms (sentences; headings; list items; lines of code and tables),
    content-defined anchors part them into segments, and each segment is packed by itself into the
    fewest chunks with the best borders. A sentence longer than a chunk is cut between words.

    **What stays when a document is edited.** Let ``A`` be `anchor_tokens`. An anchor depends only
    on the text within ``A`` tokens and the one paragraph beyond. So after paragraphs were edited,
    inserted or deleted, every anchor further away than that is still an anchor, and every chunk
    that lies before the last such anchor in front of the edit or behind the first such anchor
    after it has the same text, the same tokens and the same id. Anchors lie more than ``A`` tokens
    apart, about ``2 A`` on average; on text that does not repeat itself gaps above ``8 A`` do not
    occur in practice (the chance falls faster than exponentially; the largest of 8,000 random
    gaps was ``6.2 A``), which bounds the change to ``9 A`` tokens on either side. Text that repeats
    with a period below ``A`` has no anchors; there the change may travel to the end of the
    repetition.

    Parameters
    ----------
    tokenizer : Tokenizer
        Tokenizer of the language model that will read the chunks.
    chunk_tokens : int
        Most tokens of a chunk, `overlap` included; at least 16.
    overlap : int
        Most tokens that a chunk repeats from the one before, in whole sentences; at most half of
        `chunk_tokens`. With 0 the chunks cover every non-blank character exactly once.
    anchor_tokens : int, optional
        Reach of an anchor, in tokens; ``None`` takes `chunk_tokens` less `overlap`. Smaller keeps
        more chunks after an edit, larger fills chunks better.

    Raises
    ------
    RetrievalError
        For a setting out of range.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        chunk_tokens: int = 256,
        overlap: int = 0,
        anchor_tokens: int | None = None,
    ) -> None:
        if chunk_tokens < MIN_CHUNK_TOKENS:
            raise RetrievalError(
                f"chunk_tokens is {chunk_tokens}; give at least {MIN_CHUNK_TOKENS}"
            )
        if not 0 <= overlap <= chunk_tokens // 2:
            raise RetrievalError(
                f"overlap is {overlap}; give 0 to {chunk_tokens // 2}, half of chunk_tokens"
            )
        self.tokenizer = tokenizer
        self.chunk_tokens = chunk_tokens
        self.overlap = overlap
        self._limit = chunk_tokens - overlap
        self.anchor_tokens = self._limit if anchor_tokens is None else anchor_tokens
        if self.anchor_tokens < 1:
            raise RetrievalError(f"anchor_tokens is {anchor_tokens}; give at least 1, or None")

    @cached_property
    def settings(self) -> dict[str, Scalar]:
        """All that decides where chunks begin and end, ready for a JSON manifest."""
        return {
            "splitter": "tokens",
            "algorithm": _ALGORITHM,
            "chunk_tokens": self.chunk_tokens,
            "overlap": self.overlap,
            "anchor_tokens": self.anchor_tokens,
            "tokenizer": self.tokenizer.fingerprint,
            "sentences": f"nupunkt {version('nupunkt')}",
        }

    def split(self, document: Document) -> list[Chunk]:
        """Split one document.

        Returns
        -------
        list of Chunk
            In document order; empty when the text is blank. ``num_tokens`` is the true count of
            the chunk's text alone and never exceeds `chunk_tokens`.

        Raises
        ------
        RetrievalError
            When the text holds lone surrogates, which no tokenizer can encode.
        """
        text = document.text
        if not text.isascii() and _SURROGATE.search(text):
            raise RetrievalError(
                f"document {document.id!r} holds lone surrogates; decode it with errors='replace'"
            )
        atoms, counts = self._measure(text, find_atoms(text))
        ranges: list[tuple[int, int]] = []
        anchors = find_anchors(border_keys(text, atoms), counts, self.anchor_tokens)
        for first, last in pairwise([*anchors, len(atoms)]):
            boundaries = [atom.boundary for atom in atoms[first:last]]
            packed = pack(counts[first:last], boundaries, self._limit)
            ranges.extend((first + start, first + end) for start, end in packed)
        spans = self._fit(text, atoms, counts, ranges)
        return self._chunks(document, spans)

    def split_all(self, documents: Iterable[Document]) -> Iterator[Chunk]:
        """Split a stream of documents; holds one document at a time."""
        for document in documents:
            yield from self.split(document)

    def _count(self, texts: Sequence[str]) -> list[int]:
        counts: list[int] = []
        for start in range(0, len(texts), _BATCH):
            counts.extend(count_tokens(self.tokenizer, texts[start : start + _BATCH]))
        return counts

    def _measure(self, text: str, atoms: list[Atom]) -> tuple[list[Atom], list[int]]:
        """Count every atom with the blank before it, dividing those above the limit."""
        counts = self._count_with_blank(text, atoms)
        if all(count <= self._limit for count in counts):
            return atoms, counts
        # Groups of words first; where even those are too long, words; then parts of words.
        for divide in (divide_sentence, divide_words, self._divide_word):
            parts: list[Atom] = []
            for atom, count in zip(atoms, counts, strict=True):
                parts.extend([atom] if count <= self._limit else divide(text, atom))
            atoms, counts = parts, self._count_with_blank(text, parts)
        return atoms, counts

    def _count_with_blank(self, text: str, atoms: list[Atom]) -> list[int]:
        ends = [0, *(atom.end for atom in atoms)]
        return self._count([text[a:b] for a, b in pairwise(ends)])

    def _divide_word(self, text: str, atom: Atom) -> list[Atom]:
        """Cut a run without blanks (or a group of huge words) at token borders."""
        size = max(1, self._limit // 4)
        offsets = self.tokenizer.encode_offsets(text[atom.start : atom.end])
        cuts = [atom.start]
        taken = 0
        for (_, before), (begin, _) in pairwise([(0, 0), *offsets]):
            # Tokens that share a character must stay together.
            if taken >= size and begin >= before and atom.start + begin > cuts[-1]:
                cuts.append(atom.start + begin)
                taken = 0
            taken += 1
        pieces = [
            Atom(a, b, Boundary.WORD)
            for a, b in pairwise([*cuts, atom.end])
            if not text[a:b].isspace()
        ]
        if pieces:
            pieces[0] = pieces[0]._replace(boundary=atom.boundary)
        return pieces

    def _fit(
        self,
        text: str,
        atoms: list[Atom],
        counts: list[int],
        ranges: list[tuple[int, int]],
    ) -> list[tuple[int, int, int]]:
        """Turn atom ranges into ``(start, end, tokens)`` whose true count fits.

        The sum of its atoms' counts is only nearly the count of a chunk. The rare range that
        comes out too long is halved, which looks at that range alone.
        """
        done: dict[tuple[int, int], tuple[int, int, int]] = {}
        floors = [0, *(first + 1 for first, _ in ranges)]
        todo = [
            (self._lead(atoms, counts, first, floor), first, last)
            for (first, last), floor in zip(ranges, floors, strict=False)
        ]
        while todo:
            texts = [text[atoms[lead].start : atoms[last - 1].end] for lead, _, last in todo]
            retry: list[tuple[int, int, int]] = []
            for (lead, first, last), tokens in zip(todo, self._count(texts), strict=True):
                start, end = atoms[lead].start, atoms[last - 1].end
                if tokens <= self.chunk_tokens:
                    done[first, last] = (start, end, tokens)
                elif lead < first:
                    retry.append((lead + 1, first, last))
                elif last - first > 1:
                    middle = (first + last) // 2
                    retry.extend([(first, first, middle), (middle, middle, last)])
                else:
                    for k, piece in enumerate(self._cut_exactly(text, start, end)):
                        done[first, last + k] = piece
            todo = retry
        return sorted(done.values())

    def _lead(self, atoms: list[Atom], counts: list[int], first: int, floor: int) -> int:
        """Find the first atom of the overlap before `first`, which begins a sentence.

        At `floor`, behind the start of the chunk before, it stops: a chunk must not swallow one
        that is no longer than the overlap.
        """
        lead, taken, candidate = first, 0, first
        while candidate > floor and taken + counts[candidate - 1] <= self.overlap:
            candidate -= 1
            taken += counts[candidate]
            if atoms[candidate].boundary is not Boundary.WORD:
                lead = candidate
        return lead

    def _cut_exactly(self, text: str, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """Halve a stretch by characters until each half truly fits; the last resort."""
        tokens = self._count([text[start:end]])[0]
        if tokens <= self.chunk_tokens or end - start == 1:
            yield start, end, tokens
            return
        middle = (start + end) // 2
        for a, b in ((start, middle), (middle, end)):
            if not text[a:b].isspace():
                yield from self._cut_exactly(text, a, b)

    def _chunks(self, document: Document, spans: list[tuple[int, int, int]]) -> list[Chunk]:
        seen: Counter[str] = Counter()
        chunks: list[Chunk] = []
        for start, end, tokens in spans:
            text = document.text[start:end]
            chunk_id = _chunk_id(document.id, text, seen[text])
            seen[text] += 1
            chunks.append(
                Chunk(
                    id=chunk_id,
                    document_id=document.id,
                    text=text,
                    title=document.title,
                    start=start,
                    end=end,
                    num_tokens=tokens,
                    path=document.path,
                    metadata=document.metadata,
                )
            )
        return chunks


def _chunk_id(document_id: str, text: str, occurrence: int) -> str:
    """Hash document, text and how often the text came before in this document."""
    payload = f"{document_id}\0{occurrence}\0{text}"
    return hashlib.sha256(payload.encode("utf-8", "surrogatepass")).hexdigest()[:32]
