"""Sizes of the store benchmark, and whose KV it pretends to hold."""

from __future__ import annotations

import dataclasses

from chunk_cache import KVContext, hash_token_ids
from rag_eval.arguments import require_at_least
from rag_eval.errors import EvalError

VOCABULARY = 49_152  # of SmolLM2; what matters is only that random windows differ
SYSTEM_TOKENS = 32
CONTEXT = KVContext(
    model_fingerprint="benchmark",
    dtype="bfloat16",
    kv_dtype="bfloat16",
    rope="{}",
    prefix_digest=hash_token_ids(range(SYSTEM_TOKENS)),
)
_SHORTEST = 64


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StoreBenchConfig:
    """Sizes of a run; the defaults are those of the stated goal (match under 5 ms)."""

    chunks: int = 100_000
    """Chunks in the index."""
    chunk_tokens: int = 400
    """Tokens a chunk."""
    prompt_tokens: int = 4_000
    """Tokens a prompt."""
    repeats: int = 300
    """Timed calls of every kind."""
    layers: int = 30
    """Layers of the KV records."""
    kv_heads: int = 3
    """KV heads of the KV records."""
    head_dim: int = 64
    """Head size of the KV records."""
    records: int = 16
    """KV records that fit in the store of the save/load/evict part."""
    seed: int = 0
    """Seed of all random text."""

    def __post_init__(self) -> None:
        require_at_least(self, 0, "seed")
        require_at_least(self, 1, *(f.name for f in dataclasses.fields(self) if f.name != "seed"))
        if not 2 * _SHORTEST <= self.chunk_tokens <= self.prompt_tokens:
            raise EvalError(
                f"--chunk-tokens {self.chunk_tokens}: allowed is {2 * _SHORTEST} to "
                f"--prompt-tokens {self.prompt_tokens}"
            )
