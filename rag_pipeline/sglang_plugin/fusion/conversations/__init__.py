"""What one turn of a conversation leaves for the next: memories by name."""

from __future__ import annotations

from rag_pipeline.sglang_plugin.fusion.conversations.registry import CONVERSATION_MEMORIES

__all__ = ["CONVERSATION_MEMORIES"]
