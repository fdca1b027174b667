"""What the tests of the chat model and of the runnable share: documents, the model, its report."""

from __future__ import annotations

from collections.abc import Callable
from pydoc_data.topics import topics
from typing import Any

import pytest
from langchain_core.documents import Document

from rag_pipeline.langchain import ChatSGLangRag


@pytest.fixture(scope="session")
def documents() -> list[Document]:
    """Four pieces of the language reference, each about as long as a chunk."""
    return [
        Document(page_content=topics[name].strip()[:700], id=name, metadata={"title": name})
        for name in ("with", "lambda", "for", "import")
    ]


@pytest.fixture(scope="module")
def model(model_server: str) -> ChatSGLangRag:
    """The chat model on the session's server; its answers are short."""
    return ChatSGLangRag(base_url=f"{model_server}/v1", max_tokens=8)


@pytest.fixture(scope="session")
def sum_of_kinds() -> Callable[[dict[str, Any]], int]:
    """Tokens of a report, all four kinds together: the whole prompt."""

    def total(report: dict[str, Any]) -> int:
        kinds = ("exact_prefix", "reused", "recomputed", "fresh")
        return sum(report["usage"][f"{kind}_tokens"] for kind in kinds)

    return total
