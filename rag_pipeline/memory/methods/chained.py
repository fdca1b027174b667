"""What methods share that keep a record up to date block by block."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar

from rag_pipeline.memory.chains import BlockChain, Recipe, rule_identity
from rag_pipeline.memory.layout import memory_candidate
from rag_pipeline.memory.matching import recalled
from rag_pipeline.memory.methods.base import MemoryMethod

if TYPE_CHECKING:
    from rag_pipeline.memory.conversation import View
    from rag_pipeline.memory.layout import Question
    from rag_pipeline.memory.plan import Candidate, Chain, Range

BLOCKS_BEHIND = 1
"""How many whole blocks a record may be behind the history."""


class ChainedMethod(MemoryMethod):
    """Answers from a record of the newest block, or of the one before it.

    A subclass sets ``name``, which is that of its retention rule unless :attr:`rule_name` says otherwise, and writes
    :meth:`recipes` and :meth:`probe_tokens`.
    """

    rule_name: ClassVar[str] = ""
    rule: str

    def _read_options(self, options: str) -> None:
        name = self.rule_name or self.name
        self.rule = rule_identity(f"{name}:{options}" if options else name)

    @abstractmethod
    def recipes(self, view: View, question: Question | None) -> Sequence[Recipe]:
        """How each record of the conversation is made, the one that is wanted first in front."""

    @abstractmethod
    def probe_tokens(self) -> int:
        """Most tokens of a probe, about."""

    def step_tokens(self) -> int:
        """Slots, block and probe."""
        return self.config.budget_tokens + self.config.block_tokens + self.probe_tokens()

    def repeated(self, view: View, question: Question, end: int) -> Sequence[Range]:
        """Tokens of the history that stand behind a record of its first `end`, word for word."""
        # A record that all of them fit holds them already.
        room = self.config.retrieved_tokens if end > self.config.budget_tokens else 0
        return [view.message_range(one) for one in recalled(view, question, end, room)]

    def chain(self, view: View, recipe: Recipe, blocks: int) -> Chain:
        """The steps of a record."""
        return BlockChain(view, recipe, blocks)

    def choices(
        self, view: View, question: Question | None
    ) -> Iterator[Sequence[Sequence[Recipe]]]:
        """Per version of the conversation, the newest first: what may be loaded together, best first."""
        yield [self.recipes(view, question)]

    def candidates(self, view: View, question: Question) -> Sequence[Candidate]:
        """Newest version first, and within it the newest record."""
        newest, size = view.num_blocks, self.config.block_tokens
        behind = range(newest, max(0, newest - 1 - BLOCKS_BEHIND), -1)
        repeated = {blocks: self.repeated(view, question, blocks * size) for blocks in behind}
        found = []
        for choices in self.choices(view, question):
            for blocks in behind:
                for recipes in choices:
                    chains = [self.chain(view, recipe, blocks) for recipe in recipes]
                    one = memory_candidate(view, question, chains, blocks, repeated[blocks])
                    found.append(one)
        return found

    def ahead(self, view: View, question: Question | None) -> Sequence[Chain]:
        """Every record of the newest version."""
        if not view.num_blocks:
            return ()
        recipes = self.recipes(view, question)
        return [self.chain(view, recipe, view.num_blocks) for recipe in recipes]
