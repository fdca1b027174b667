"""Prompts of any shape as token ids: conversations and programs with chunks anywhere in them.

:mod:`rag_pipeline.prompts.builder` lays out one system part, chunks and one question. A conversation
has more turns and a program more branches, so here a prompt is a sequence of segments. The rules
are the same: a chunk is tokenised alone, everything between two chunks in one go, and only what a
template wrote may hold control tokens. A prompt of the first shape gets the same ids either way.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from rag_pipeline.prompts.token_cache import TokenCache
from rag_pipeline.prompts.tokenizer import ModelTokenizer
from rag_pipeline.types import Span

Kind = Literal["text", "template", "chunk"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """A run of a prompt.

    Parameters
    ----------
    text : str
        As it stands in the prompt.
    kind : Kind
        ``text``: special-token strings are ordinary characters. ``template``: they are control
        tokens. ``chunk``: as ``text``, tokenised alone, and its KV may be reused.
    chunk_id : str or None
        Name of a chunk, for reports.
    """

    text: str
    kind: Kind = "text"
    chunk_id: str | None = None


class SegmentEncoder:
    """Segments to token ids and chunk spans.

    Parameters
    ----------
    tokenizer : ModelTokenizer
        The model's tokenizer.
    cache_size : int
        Number of chunks whose ids are kept.
    """

    def __init__(self, tokenizer: ModelTokenizer, *, cache_size: int = 4096) -> None:
        self.tokenizer = tokenizer
        self._texts = TokenCache(tokenizer, cache_size)

    def chunk_ids(self, text: str) -> tuple[int, ...]:
        """Token ids of a chunk's text, alone."""
        return self._texts.ids(text)

    def encode(self, segments: Iterable[Segment]) -> tuple[tuple[int, ...], tuple[Span, ...]]:
        """Lay out a prompt.

        Parameters
        ----------
        segments : iterable of Segment
            In prompt order.

        Returns
        -------
        tuple
            Token ids, and one span for each chunk that has any.
        """
        ids: list[int] = []
        spans: list[Span] = []
        runs: list[tuple[str, bool]] = []
        for segment in segments:
            if segment.kind != "chunk":
                runs.append((segment.text, segment.kind == "template"))
                continue
            ids += self.tokenizer.encode_runs(runs)
            runs = []
            start = len(ids)
            ids += self.chunk_ids(segment.text)
            if len(ids) > start:
                spans.append(Span(start=start, end=len(ids), chunk_id=segment.chunk_id))
        ids += self.tokenizer.encode_runs(runs)
        return tuple(ids), tuple(spans)
