"""Conversation memories by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rag_kernels import Registry

if TYPE_CHECKING:
    from rag_pipeline.sglang_plugin.fusion.conversations.base import ConversationMemory

CONVERSATION_MEMORIES: Registry[type[ConversationMemory]] = Registry(
    "conversation memory",
    "rag_pipeline.conversation_memories",
    {
        "turns": "rag_pipeline.sglang_plugin.fusion.conversations.turns:TurnMemory",
        "cached_attention": "rag_pipeline.sglang_plugin.fusion.conversations.cached_attention:CachedAttentionMemory",
    },
)
"""Classes of :class:`~.conversations.base.ConversationMemory`; the setting ``fusion.conversation_memory`` names one."""
