"""Token-exact prompts: shared prefix, chunks tokenised alone, question, and the gold answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rag_eval.datasets import DatasetOptions, Example, Passage, PromptChunk, arrange
from rag_eval.errors import EvalError

_MARKER = "\ue000chunks\ue000"
"""Stands for the chunks while the chat template is rendered; private-use characters."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalPrompt:
    """One prompt of a run.

    Parameters
    ----------
    example
        What it was made from.
    prefix_ids
        Chat header and instruction; the shared prefix that chunk KV is computed behind.
    chunks
        The retrieved part.
    suffix_ids
        Question, chat tail, and the lead of the answer.
    gold_ids
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


def titles_of(chunks: Sequence[PromptChunk]) -> list[list[str]]:
    """Titles of the passages in each chunk, for the record of a run."""
    return [list(chunk.titles) for chunk in chunks]


class PromptMaker:
    """Makes token-exact prompts for one model.

    The chat template is rendered once around a marker and cut there, so header, chunks and
    question are tokenised apart and a chunk's ids never depend on its neighbours.

    Parameters
    ----------
    tokenizer
        A ``transformers`` tokenizer with a chat template.
    gold_tokens
        Most tokens of the gold answer that are teacher-forced.
    """

    def __init__(self, tokenizer: Any, *, gold_tokens: int) -> None:
        self._tokenizer = tokenizer
        self._gold_tokens = gold_tokens
        if not getattr(tokenizer, "chat_template", None):
            raise EvalError("the model has no chat template; evaluate an instruction-tuned model")

    def encode(self, text: str) -> list[int]:
        """Token ids of a text alone, without special tokens."""
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def make(
        self, example: Example, options: DatasetOptions, corpus: Sequence[Passage] = ()
    ) -> EvalPrompt:
        """Build the prompt of an example from its own passages (and `corpus` as distractors)."""
        chunks = arrange(example, options, self.encode, corpus)
        return self.join(example, chunks)

    def join(self, example: Example, chunks: Sequence[PromptChunk]) -> EvalPrompt:
        """Put header, given chunks, question and lead together."""
        head, tail = self._halves(example)
        # Behind a lead the answer goes on in the sentence; a chat turn begins with the word itself.
        gold = f" {example.answers[0]}" if example.lead else example.answers[0]
        return EvalPrompt(
            example=example,
            prefix_ids=tuple(self.encode(head)),
            chunks=tuple(chunks),
            suffix_ids=tuple(self.encode(tail)),
            gold_ids=tuple(self.encode(gold)[: self._gold_tokens]),
        )

    def _halves(self, example: Example) -> tuple[str, str]:
        content = f"{example.instruction}\n\n{_MARKER}Question: {example.question}"
        text = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        head, marker, tail = text.partition(_MARKER)
        if not marker:
            raise EvalError("the model's chat template changes the user's text; it cannot be cut")
        return head, tail + example.lead
