"""The contract of a memory method: how the prompt of an answer comes from a history within a budget."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from rag_pipeline.errors import RagPipelineError

if TYPE_CHECKING:
    from rag_pipeline.memory.config import MemoryConfig
    from rag_pipeline.memory.conversation import View
    from rag_pipeline.memory.layout import Question
    from rag_pipeline.memory.plan import Candidate, Chain


class MemoryMethod(ABC):
    """Lays out prompts for one configuration. Keeps nothing between calls; safe for several threads.

    A subclass sets ``name`` and writes :meth:`candidates`; one that makes records writes :meth:`ahead` and
    :meth:`step_tokens`, too. To add one, write its file and its line in
    :data:`~rag_pipeline.memory.methods.registry.MEMORY_METHODS`.

    Attributes
    ----------
    name : str
        Its name in the registry.
    config : MemoryConfig
        Budget, block and the rest, as the method uses them.
    """

    name: ClassVar[str]
    keeps_verbatim: ClassVar[bool] = True
    """Whether a history within :attr:`~.MemoryConfig.verbatim_limit` stands in the prompt as it is."""

    retrieves: ClassVar[bool] = False
    """Whether messages nearest to the question take their :attr:`~.MemoryConfig.retrieved_share` of the budget."""

    def __init__(self, config: MemoryConfig, options: str = "") -> None:
        """Make it; `options` is what stands behind the colon of the method's name.

        Raises
        ------
        RagPipelineError
            Options that it does not have.
        """
        self.config = config if self.retrieves else replace(config, retrieved_share=0.0)
        self._read_options(options)

    @abstractmethod
    def candidates(self, view: View, question: Question) -> Sequence[Candidate]:
        """Ways to lay out the prompt, best first; the planner leaves out those that do not fit the context."""

    def ahead(self, view: View, question: Question | None) -> Sequence[Chain]:
        """Chains that are worth building now, in order; `question` is the one that is being answered, if any."""
        return ()

    def step_tokens(self) -> int:
        """Most tokens that a step's prompt holds behind the prefix; 0 for a method without steps."""
        return 0

    def check_room(self, context_length: int) -> None:
        """Refuse a budget that a context of so many tokens has no room for.

        Raises
        ------
        RagPipelineError
            One line: what a step needs, what there is.
        """
        if (wanted := self.step_tokens()) >= context_length:
            budget, block = self.config.budget_tokens, self.config.block_tokens
            raise RagPipelineError(
                f"memory: a step of {budget} slots and a block of {block} needs {wanted} tokens, the context has "
                f"{context_length}; lower budget_tokens or block_tokens"
            )

    def _read_options(self, options: str) -> None:
        if options:
            raise RagPipelineError(
                f"memory method {self.name!r} has no options, got {options!r:.80}; leave them out"
            )
