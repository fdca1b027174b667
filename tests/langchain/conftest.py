"""What the tests of the chat model and of the runnable share: documents, the model, its report."""

from __future__ import annotations

import time
from collections.abc import Callable
from pydoc_data.topics import topics
from typing import Any

import httpx
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


@pytest.fixture(scope="session")
def builds_pending(model_server: str) -> Callable[[], int]:
    """Chunks that the server has yet to compute."""

    def count() -> int:
        info = httpx.get(f"{model_server}/server_info", timeout=30, trust_env=False).json()
        return sum(state["rag_fusion"]["pending"] for state in info["internal_states"])

    return count


@pytest.fixture(scope="session")
def empty_tree(model_server: str, builds_pending: Callable[[], int]) -> Callable[[], None]:
    """Empty the radix tree of a server at rest: the same request then meets the same state."""

    def empty() -> None:
        deadline = time.monotonic() + 120
        while (
            builds_pending()
            or httpx.post(f"{model_server}/flush_cache", timeout=30, trust_env=False).is_error
        ):
            assert time.monotonic() < deadline, "the server does not come to rest"
            time.sleep(0.2)

    return empty
