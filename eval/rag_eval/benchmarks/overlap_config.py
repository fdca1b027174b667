"""What ``overlap`` measures."""

from __future__ import annotations

from dataclasses import dataclass

from rag_eval.arguments import require_at_least
from rag_eval.errors import EvalError


@dataclass(frozen=True, kw_only=True, slots=True)
class OverlapConfig:
    """What is measured."""

    model: str = "smollm2-135m"
    """Hub id, folder, GGUF file or packaged name."""
    chunks: int = 6
    """Chunks of a prompt."""
    chunk_tokens: int = 400
    """Tokens of a chunk."""
    mode: str = "epic:0.15"
    """How prompts are served; a policy without a probing pass, which the timeline does not know."""
    load_share: float = 1.5
    """Seconds that a layer takes to come, in units of those that it takes to compute."""
    preloaded: str = "0,4,8"
    """Numbers k of layers that came ahead, comma between."""
    repeats: int = 8
    """Pairs behind each ratio."""
    seed: int = 0
    """Chooses the text."""
    plot: str = ""
    """File for the trace of one request, PNG; empty for none."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "chunks", "chunk_tokens", "repeats")
        words = [word.strip() for word in self.preloaded.split(",")]
        if not all(word.isdecimal() for word in words):
            raise EvalError(f"preloaded is {self.preloaded!r}; give whole numbers, comma between")
        if not 0 < self.load_share <= 10:
            raise EvalError(
                f"load_share is {self.load_share}; give more than 0, and 10 at most: an engine does not wait longer"
            )

    @property
    def layers_ahead(self) -> list[int]:
        """The numbers of :attr:`preloaded`."""
        return [int(word) for word in self.preloaded.split(",")]
