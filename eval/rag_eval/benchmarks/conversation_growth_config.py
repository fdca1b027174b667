"""What ``conversation_growth`` measures."""

from __future__ import annotations

from dataclasses import dataclass

from rag_eval.arguments import require_at_least
from rag_eval.errors import EvalError


@dataclass(frozen=True, kw_only=True, slots=True)
class GrowthConfig:
    """Sizes of a run."""

    model: str = "smollm2-135m"
    """Hub id, folder, GGUF file or packaged name."""
    dataset: str = ""
    """File of long conversations; its first one is measured. Text is made up without one."""
    lengths: str = "1000,2000,4000,7600"
    """Tokens of the history, comma between; each is the beginning of the next."""
    methods: str = "full,epicache,streaming"
    """Memory methods, comma between."""
    budget: int = 1024
    """Tokens of the history that a method may keep."""
    episodes: int = 4
    """Topics of a conversation."""
    block_tokens: int = 512
    """Tokens that one step adds to a record."""
    turns: int = 5
    """Questions at each length."""
    embedder: str = "all-minilm-l6-v2"
    """Sentence model."""
    pool: int = 16384
    """Tokens of the engine's KV pool; a small one proves that a method needs no more."""
    plot: str = ""
    """File for both curves, PNG; empty for none."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "turns", "episodes")
        require_at_least(self, 16, "budget", "block_tokens")
        require_at_least(self, 256, "pool")
        words = [word.strip() for word in self.lengths.split(",")]
        if not all(word.isdecimal() and int(word) >= 64 for word in words):
            raise EvalError(
                f"lengths is {self.lengths!r}; give numbers of tokens, 64 or more, comma between"
            )
        if not self.method_names:
            raise EvalError("methods is empty; name at least one")

    @property
    def token_lengths(self) -> list[int]:
        """The lengths, the shortest first."""
        return sorted({int(word) for word in self.lengths.split(",")})

    @property
    def method_names(self) -> list[str]:
        """The methods in the order asked for."""
        return [word.strip() for word in self.methods.split(",") if word.strip()]
