"""Paths of the ``/v1/rag`` routes, and the body that asks one question."""

from __future__ import annotations

from typing import Any

ASK, FIND = "/v1/rag/chat/completions", "/v1/rag/search"
QUESTION = "What does the with statement do?"


def chat(question: str = QUESTION, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}], "max_tokens": 8, **more}
