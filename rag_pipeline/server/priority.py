"""Who gives way on the server's own cores: what parses and embeds uploads, to questions.

An engine that computes on them gives way too, by less (:data:`rag_pipeline.sglang_plugin.http.server.ENGINE_NICE`).
The thread that writes an index does not: it holds the interpreter most of the time, and whoever waits for that would
wait as long as the engine's passes keep the thread from its core.
"""

from __future__ import annotations

from chunk_cache import thread_priority

UPLOAD_NICE = 10
"""Added to the process's nice value."""


def give_way() -> None:
    """Let the other threads go before the calling one, where threads have a priority of their own."""
    thread_priority.give_way(UPLOAD_NICE)
