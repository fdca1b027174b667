"""Prompts as token ids: chunks tokenised alone, between texts that only a template may put control tokens into."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rag_pipeline.prompts.builder import PromptBuilder
    from rag_pipeline.prompts.chat_template import ChatTurn
    from rag_pipeline.prompts.segments import Segment, SegmentEncoder
    from rag_pipeline.prompts.tokenizer import ModelTokenizer

_MODULES = {
    "ChatTurn": "chat_template",
    "ModelTokenizer": "tokenizer",
    "PromptBuilder": "builder",
    "Segment": "segments",
    "SegmentEncoder": "segments",
}

__all__ = ["ChatTurn", "ModelTokenizer", "PromptBuilder", "Segment", "SegmentEncoder"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
