"""Name of the CPU attention backend, and how SGLang's argument parser learns it."""

from __future__ import annotations

from sglang.srt.arg_groups import choices

__all__ = ["ATTENTION_BACKEND", "offer_attention_backend"]

ATTENTION_BACKEND = "rag_cpu"
"""Name of this project's attention backend, as ``--attention-backend`` takes it."""


def offer_attention_backend() -> None:
    """Make ``rag_cpu`` an allowed ``--attention-backend`` in this process. Idempotent."""
    if ATTENTION_BACKEND not in choices.ATTENTION_BACKEND_CHOICES:
        choices.add_attention_backend_choices([ATTENTION_BACKEND])
