"""What callers hand to a vector store, read as LangChain's own code and its users mean it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any
from uuid import UUID

from rag_pipeline.langchain.document_folder import DEFAULT_BATCH
from retrievers import RetrievalError


def as_list(name: str, values: Iterable[Any]) -> list[Any]:
    """List of what may be any iterable, but is no single text."""
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise RetrievalError(f"{name} is {values!r:.60}; give a list")
    return list(values)


def per_text(name: str, values: Iterable[Any] | None, count: int) -> list[Any]:
    """One value for each of `count` texts; None for each where nothing is given."""
    listed = [None] * count if values is None else as_list(name, values)
    if len(listed) != count:
        raise RetrievalError(f"{name} holds {len(listed)} entries for {count} texts; give one each")
    return listed


def as_id(value: object) -> str:
    """Id as the index knows it; empty for None."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int | UUID):
        raise RetrievalError(f"an id is {value!r:.60}; give a text, a whole number or a UUID")
    return str(value)


def check_batch_size(value: int | None) -> int:
    """Texts embedded at a time."""
    if value is None:
        return DEFAULT_BATCH
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise RetrievalError(f"batch_size is {value!r}; it must be a whole number, at least 1")
    return value


def refuse_unknown(kwargs: Mapping[str, object]) -> None:
    """Refuse options that would be dropped."""
    if kwargs:
        raise RetrievalError(
            f"FaissVectorStore has no option {next(iter(kwargs))!r} here; search takes k and "
            "filter, adding takes ids and batch_size"
        )
