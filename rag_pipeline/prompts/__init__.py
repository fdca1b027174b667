"""Prompts as token ids: chunks tokenised alone, between texts that only a template may put control tokens into."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rag_pipeline.lazy import lazy_names

if TYPE_CHECKING:
    from rag_pipeline.prompts.builder import PromptBuilder
    from rag_pipeline.prompts.chat_template import ChatTurn
    from rag_pipeline.prompts.segments import Segment, SegmentEncoder
    from rag_pipeline.prompts.tokenizer import ModelTokenizer

_HOMES = {
    "ChatTurn": "chat_template",
    "ModelTokenizer": "tokenizer",
    "PromptBuilder": "builder",
    "Segment": "segments",
    "SegmentEncoder": "segments",
}

__all__ = ["ChatTurn", "ModelTokenizer", "PromptBuilder", "Segment", "SegmentEncoder"]

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
