"""Token-exact prompts: shared prefix, chunks tokenised alone, question, and the gold answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rag_eval.datasets import DatasetOptions, Example, Passage, PromptChunk, arrange

if TYPE_CHECKING:
    from rag_pipeline import PromptBuilder

_NO_LIMIT = 1 << 30
"""The chunks are added here, so the engine is what checks the length of a prompt."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalPrompt:
    """One prompt of a run.

    Parameters
    ----------
    example : Example
        What it was made from.
    prefix_ids : tuple of int
        Chat header and instruction; the shared prefix that chunk KV is computed behind.
    chunks : tuple of PromptChunk
        The retrieved part.
    suffix_ids : tuple of int
        Question, chat tail, and the lead of the answer.
    gold_ids : tuple of int
        Teacher-forced gold answer, at most the run's limit of tokens.
    """

    example: Example
    prefix_ids: tuple[int, ...]
    chunks: tuple[PromptChunk, ...]
    suffix_ids: tuple[int, ...]
    gold_ids: tuple[int, ...]

    @property
    def input_ids(self) -> list[int]:
        """The whole prompt."""
        chunk_ids = (token for chunk in self.chunks for token in chunk.ids)
        return [*self.prefix_ids, *chunk_ids, *self.suffix_ids]

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """Half-open token ranges of the chunks in :attr:`input_ids`."""
        spans = []
        start = len(self.prefix_ids)
        for chunk in self.chunks:
            spans.append((start, start + len(chunk.ids)))
            start += len(chunk.ids)
        return tuple(spans)

    def rotated(self) -> EvalPrompt:
        """Return the same prompt with the last chunk first: every chunk in another place."""
        return replace(self, chunks=(*self.chunks[-1:], *self.chunks[:-1]))


def titles_of(chunks: Sequence[PromptChunk]) -> list[list[str]]:
    """Titles of the passages in each chunk, for the record of a run."""
    return [list(chunk.titles) for chunk in chunks]


class PromptMaker:
    """Makes token-exact prompts for one model, laid out as the pipeline lays them out.

    Parameters
    ----------
    model : Path
        Folder in Hugging Face format.
    gold_tokens : int
        Most tokens of the gold answer that are teacher-forced.
    """

    def __init__(self, model: Path, *, gold_tokens: int) -> None:
        from rag_pipeline import ModelTokenizer

        self.model = model
        self._tokenizer = ModelTokenizer.load(model)
        self._gold_tokens = gold_tokens
        self._builders: dict[str, PromptBuilder] = {}

    def encode(self, text: str) -> list[int]:
        """Token ids of a text alone, without special tokens."""
        return self._tokenizer.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of generated tokens, control tokens left out."""
        control = set(self._tokenizer.special_tokens.values())
        return self._tokenizer.decode([token for token in ids if token not in control])

    def make(
        self, example: Example, options: DatasetOptions, corpus: Sequence[Passage] = ()
    ) -> EvalPrompt:
        """Build the prompt of an example from its own passages (and `corpus` as distractors)."""
        chunks = arrange(example, options, self.encode, corpus)
        return self.join(example, chunks)

    def join(self, example: Example, chunks: Sequence[PromptChunk]) -> EvalPrompt:
        """Put system part, given chunks, question and lead together."""
        layout = self._builder(example.instruction).build(example.question, [], max_new_tokens=1)
        question = layout.question_span
        # Behind a lead the answer goes on in the sentence; a chat turn begins with the word itself.
        gold = f" {example.answers[0]}" if example.lead else example.answers[0]
        return EvalPrompt(
            example=example,
            prefix_ids=layout.input_ids[: layout.system_span.end],
            chunks=tuple(chunks),
            suffix_ids=(
                *layout.input_ids[question.start : question.end],
                *self.encode(example.lead),
            ),
            gold_ids=tuple(self.encode(gold)[: self._gold_tokens]),
        )

    def _builder(self, instruction: str) -> PromptBuilder:
        from rag_pipeline import PromptBuilder

        if instruction not in self._builders:
            self._builders[instruction] = PromptBuilder(
                self._tokenizer, system_prompt=instruction, context_length=_NO_LIMIT
            )
        return self._builders[instruction]
