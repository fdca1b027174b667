"""What ``bench tiers`` measures, and the names of its figures."""

from __future__ import annotations

from dataclasses import dataclass

from rag_eval.arguments import require_at_least
from rag_eval.errors import EvalError

FIGURES = {
    "disk": ("disk_load_vs_full", "ttft_disk_vs_memory"),
    "remote": ("ttft_remote_vs_memory",),
    "saving": ("save_overhead",),
    "index": ("index_100k_s",),
    "lookahead": ("dram_hits_lookahead_vs_lru",),
    "chat": ("turn8_vs_full",),
}
"""Figures by the part of the benchmark that measures them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TiersConfig:
    """What is measured."""

    model: str = "smollm2-135m"
    """Hub id, folder, GGUF file or packaged name."""
    chunks: int = 6
    """Chunks of a prompt."""
    chunk_tokens: int = 400
    """Tokens of a chunk."""
    mode: str = "query:0.15"
    """How prompts are served: policy and ratio."""
    repeats: int = 6
    """Pairs behind each ratio."""
    records: int = 100_000
    """Records in the folder that is indexed."""
    trace: str = "zipf"
    """File of requests in Mooncake's format that look-ahead is measured on; zipf generates RAG requests."""
    parts: str = "disk,remote,saving,index,lookahead,chat"
    """What to measure, comma between; figures of other parts are null. Only index and lookahead start no engine and take
    half a minute each."""
    seed: int = 0
    """Chooses the text."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "chunks", "chunk_tokens", "repeats", "records")
        unknown = [name for name in self.wanted if name not in FIGURES]
        if unknown or not self.wanted:
            raise EvalError(f"parts is {self.parts!r}; allowed are {', '.join(FIGURES)}")

    @property
    def wanted(self) -> list[str]:
        """Parts that are asked for."""
        return [name.strip() for name in self.parts.split(",") if name.strip()]
