"""What the benchmark of attention methods in prefill measures, and the prompts it measures with."""

from __future__ import annotations

import dataclasses
import random

from rag_eval.arguments import require_at_least
from rag_eval.benchmarks.attention_density import density_by_length, length_words
from rag_eval.datasets import DatasetOptions, load_dataset
from rag_eval.datasets.filler import filler_chunks
from rag_eval.errors import EvalError
from rag_eval.runner.prompts import EvalPrompt, PromptMaker
from rag_pipeline.protocol import LEFT_ALONE, FusionRequest

DENSE = "dense"
_SUFFIX_ROOM = 96
"""Tokens that system part, question and lead of a retrieval prompt take at most."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PrefillMethodsConfig:
    """What is measured."""

    model: str = "smollm2-135m"
    """Hub id, folder, GGUF file or packaged name."""
    methods: str = "dense,streaming,sale,power"
    """Attention methods, comma between, with options as ``NAME:OPTION=VALUE+OPTION=VALUE``; dense is always there."""
    lengths: str = "4096"
    """Tokens of the prompts, comma between."""
    repeats: int = 3
    """Runs per method and length; one warm-up goes before them."""
    texts: int = 4
    """Texts whose NLL is taken, per length."""
    nll_tokens: int = 64
    """Tokens of each text that are followed."""
    retrievals: int = 8
    """Retrieval prompts per length."""
    density: str = ""
    """Share of the keys to which all methods are brought first, in torch; one, or one per length; as they are if not given."""
    seed: int = 0
    """Chooses text and keys."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "repeats", "texts", "nll_tokens")
        require_at_least(self, 0, "retrievals")
        for name in self.method_names:
            self.request(name)
        _ = self.density_of_length

    @property
    def density_of_length(self) -> dict[int, float]:
        """Density by length; 0 where none was asked for."""
        if not self.density:
            return dict.fromkeys(self.length_list, 0.0)
        return density_by_length(self.lengths, self.density)

    @property
    def method_names(self) -> list[str]:
        """Methods as given, dense first."""
        named = [word.strip() for word in self.methods.split(",") if word.strip()]
        return [DENSE, *dict.fromkeys(name for name in named if name != DENSE)]

    @property
    def length_list(self) -> list[int]:
        """Lengths, short ones first."""
        words = length_words(self.lengths, shortest=256)
        return sorted({int(word) for word in words})

    @staticmethod
    def request(method: str) -> FusionRequest:
        """What a request of a method asks of fusion; dense asks for nothing."""
        if method == DENSE:
            return LEFT_ALONE
        request = FusionRequest(attention=method)
        request.make_attention()
        return request


def make_texts(
    maker: PromptMaker, count: int, length: int, following: int, seed: int
) -> list[tuple[list[int], list[int]]]:
    """Prose of so many tokens, and the tokens that follow."""
    made = []
    for number in range(count):
        rng = random.Random(f"text/{seed}/{number}")
        whole = length + following
        sentences = filler_chunks(1, whole + whole // 8 + 64, maker.encode, rng)[0]
        ids = maker.encode(" ".join(sentences))
        if len(ids) < whole:
            raise EvalError(f"there is not enough text for {whole} tokens; ask for shorter prompts")
        made.append((ids[:length], ids[length:whole]))
    return made


def make_retrievals(maker: PromptMaker, count: int, length: int, seed: int) -> list[EvalPrompt]:
    """Prompts of RULER's multi-key task, of about so many tokens and not more."""
    if not count:
        return []
    chunks = max(2, min(32, length // 512))
    options = DatasetOptions(
        chunks=chunks, chunk_tokens=max(16, (length - _SUFFIX_ROOM) // chunks), seed=seed
    )
    examples = load_dataset("ruler-multikey", encode=maker.encode, options=options, limit=count)
    return [maker.make(example, options) for example in examples]
