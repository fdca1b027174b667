"""A stream of RAG prompts in which chunks recur, and the requests made of it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rag_eval.arguments import require_at_least
from rag_eval.datasets import Example, PromptChunk
from rag_eval.datasets.filler import filler_chunks
from rag_eval.errors import EvalError
from rag_pipeline.protocol import FusionRequest, build_requests

if TYPE_CHECKING:
    from rag_eval.runner.prompts import EvalPrompt, PromptMaker

INSTRUCTION = "Answer the question from the passages."
QUESTION = "What do these passages say about names? This is question number {number}."


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkloadConfig:
    """Shape of the prompts."""

    requests: int = 40
    """Prompts of one run."""
    corpus: int = 40
    """Distinct chunks in all."""
    chunks: int = 6
    """Chunks of one prompt."""
    chunk_tokens: int = 280
    """Length of a chunk in tokens: whole sentences, at most this."""
    zipf: float = 1.0
    """Exponent of Zipf's law by which chunks are drawn: the i-th most popular one has a weight of
    ``1 / i**zipf``. 0 makes all alike."""
    seed: int = 0
    """Same seed, same prompts in the same order."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "requests", "corpus", "chunks", "chunk_tokens")
        if self.corpus < self.chunks:
            raise EvalError(
                f"corpus is {self.corpus}; a prompt of {self.chunks} chunks needs at least as many"
            )
        if not 0 <= self.zipf < 10:
            raise EvalError(f"zipf is {self.zipf}; allowed: 0 up to 10")


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """Prompts of a run.

    Parameters
    ----------
    corpus : EvalPrompt
        A prompt that holds every chunk once; chunk KV is built from it.
    prompts : tuple of EvalPrompt
        In order of arrival; the question differs in each, so no prompt is a prefix of another.
    """

    corpus: EvalPrompt
    prompts: tuple[EvalPrompt, ...]

    @property
    def mean_prompt_tokens(self) -> float:
        """Mean length of the prompts."""
        return sum(len(prompt.input_ids) for prompt in self.prompts) / len(self.prompts)


def make_workload(config: WorkloadConfig, maker: PromptMaker) -> Workload:
    """Draw the prompts of a run."""
    rng = random.Random(f"workload/{config.seed}")
    texts = filler_chunks(config.corpus, config.chunk_tokens, maker.encode, rng)
    chunks = tuple(
        PromptChunk(ids=tuple(maker.encode(" ".join(sentences) + "\n\n")), titles=(), is_gold=False)
        for sentences in texts
    )
    example = Example(id="corpus", question=QUESTION, answers=("",), instruction=INSTRUCTION)
    prompts = []
    for number in range(config.requests):
        asked = replace(
            example, id=f"request-{number}", question=QUESTION.format(number=1000 + number)
        )
        prompts.append(maker.join(asked, [chunks[i] for i in _draw(config, rng)]))
    return Workload(corpus=maker.join(example, chunks), prompts=tuple(prompts))


def _draw(config: WorkloadConfig, rng: random.Random) -> list[int]:
    """Distinct chunks by popularity, the most relevant first as a retriever would give them."""
    weights = [1 / (rank + 1) ** config.zipf for rank in range(config.corpus)]
    left = list(range(config.corpus))
    drawn = []
    for _ in range(config.chunks):
        (index,) = rng.choices(range(len(left)), weights=[weights[i] for i in left])
        drawn.append(left.pop(index))
    return drawn


def build_bodies(corpus: EvalPrompt) -> list[dict[str, Any]]:
    """Bodies for ``/generate`` that compute and keep the KV of every chunk, both variants."""
    return [
        _body([*corpus.prefix_ids, *chunk.ids], 1, fusion)
        for chunk in corpus.chunks
        for fusion in build_requests(len(corpus.prefix_ids), len(chunk.ids))
    ]


def single_request(prompt: EvalPrompt, mode: Any, output_tokens: int) -> dict[str, Any]:
    """Body for ``/generate`` that serves one prompt in a mode."""
    from rag_eval.runner.session import mode_request

    return _body(prompt.input_ids, output_tokens, mode_request(prompt, mode))


def _body(input_ids: Sequence[int], new_tokens: int, fusion: FusionRequest) -> dict[str, Any]:
    return {
        "input_ids": list(input_ids),
        "sampling_params": {"temperature": 0.0, "max_new_tokens": new_tokens, "ignore_eos": True},
        "kv_hints": fusion.to_kv_hints(),
    }
