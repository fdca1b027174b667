"""KeyDiff (arXiv 2504.15364) as a memory: keys that differ from the others."""

from __future__ import annotations

from rag_pipeline.memory.methods.streaming import UnprobedMethod


class KeyDiff(UnprobedMethod):
    """Scores need no query at all. https://arxiv.org/abs/2504.15364."""

    name = "keydiff"
