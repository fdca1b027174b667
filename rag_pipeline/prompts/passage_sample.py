"""A passage in the manner of a corpus: pieces of texts that lie far apart in it.

Chunk KV for use away from its own place is computed behind a passage
(:mod:`rag_pipeline.sglang_plugin.fusion.runtime.passage`). Text like the corpus serves better than any other:
in a prompt a chunk stands behind other chunks of the same corpus.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from retrievers import Index

PASSAGE_NAME = "passage.txt"
"""File in an index's folder. It is part of the identity of chunk KV, so it is written once and stays."""

LEAST_TEXTS = 64
"""In a smaller corpus too many chunks would be computed behind a piece of themselves."""

_PIECES = (12, 24, 48)
_PIECE_CHARS = 420
_LENGTH = 4500
"""Characters that are enough; of short texts more pieces are taken."""
_MOST_READ = 4096


def sample_passage(texts: Sequence[str]) -> str:
    """Whole sentences from the middle of texts spread evenly over a corpus, about 5,000 characters.

    Parameters
    ----------
    texts : sequence of str
        Chunks or documents, in a fixed order.

    Returns
    -------
    str
        Empty with fewer than :data:`LEAST_TEXTS` texts, or where no text has a whole sentence.
    """
    if len(texts) < LEAST_TEXTS:
        return ""
    passage = ""
    for count in _PIECES:
        step = len(texts) / count
        pieces = [_middle(texts[int((place + 0.5) * step)]) for place in range(count)]
        passage = "\n\n".join(piece for piece in pieces if piece)
        if len(passage) >= _LENGTH:
            break
    return passage


def index_passage(index: Index) -> Path | None:
    """File with a sample of an index's first 4,096 chunks, made at the first call.

    Parameters
    ----------
    index : Index
        Open.

    Returns
    -------
    Path or None
        None where the index is too small, or its folder cannot be written.
    """
    file = index.folder / PASSAGE_NAME
    if file.exists():
        return file
    texts = [chunk.text for chunk in islice(index.chunks(), _MOST_READ)]
    passage = sample_passage(texts)
    if not passage:
        return None
    new = file.with_name(f".{PASSAGE_NAME}.{os.getpid()}")
    try:
        new.write_text(passage, encoding="utf-8")
        # A link, not a rename: who came first has stored KV behind his sample already.
        with suppress(FileExistsError):
            file.hardlink_to(new)
    except OSError:
        return None
    finally:
        with suppress(OSError):
            new.unlink()
    return file


def _middle(text: str) -> str:
    """Sentences around the middle, the first and the last of the text left out where possible."""
    sentences = re.split(r"(?<=[.!?])\s+", " ".join(text.split()))
    sentences = sentences[1:-1] or sentences
    start = len(sentences) // 3
    piece = ""
    for sentence in sentences[start:]:
        if piece and len(piece) + len(sentence) > _PIECE_CHARS:
            break
        piece += (" " if piece else "") + sentence
    return piece[: 2 * _PIECE_CHARS]
