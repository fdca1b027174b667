"""SnapKV (arXiv 2404.14469) as a memory: what the end of each block attends to."""

from __future__ import annotations

from rag_pipeline.memory.methods.streaming import UnprobedMethod


class SnapKV(UnprobedMethod):
    """The last rows of each block are the probe; they are computed anyway. https://arxiv.org/abs/2404.14469."""

    name = "snapkv"
