"""The language reference by topic that every CPython carries: a real corpus without a download."""

from __future__ import annotations

from collections.abc import Iterator

from retrievers.loaders.base import clean_text
from retrievers.types import Document

TOPICS_NAME = "pydoc-topics"


def load_topics() -> Iterator[Document]:
    """Yield one document a topic of ``pydoc_data.topics``, sorted by topic; the title is its key."""
    from pydoc_data.topics import topics

    for key in sorted(topics):
        text = clean_text(topics[key])
        if text.strip():
            yield Document(
                id=f"{TOPICS_NAME}/{key}",
                text=text,
                title=key,
                metadata={"format": TOPICS_NAME},
            )
