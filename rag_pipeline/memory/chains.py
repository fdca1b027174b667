"""The steps that make a record, block by block; ids first, prompts when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, overload

from rag_pipeline.errors import RagPipelineError
from rag_pipeline.memory.plan import Chain, Range, Step
from rag_pipeline.protocol import memory_id

if TYPE_CHECKING:
    from rag_pipeline.memory.conversation import View

FILLING_RULE = "streaming"
"""Rule of steps after which everything is still there. They need no probe and are the same for every episode, version and
method, so they are made once; the first step that evicts scores all keys anew."""

ProbeOf = Callable[[Sequence[int]], tuple[int, ...]]
"""From a block's tokens to the probe behind it."""


@lru_cache(maxsize=256)
def rule_identity(text: str) -> str:
    """Name and all parameters of a retention rule, as they go into memory ids.

    Raises
    ------
    RagPipelineError
        An unknown rule or option.
    """
    from chunk_cache.retention import create_rule

    try:
        return create_rule(text).identity
    except ValueError as error:
        raise RagPipelineError(f"memory: {error}") from None


OwnOf = Callable[[int], tuple[Range, ...]]
"""From a block's number to the spans whose tokens stay before others behind it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What a step asks of the engine beside its tokens.

    Attributes
    ----------
    rule : str
        Identity of the retention rule.
    probe : tuple of int
        Its probe.
    own, own_share : tuple of (int, int), float
        As of :class:`~rag_pipeline.protocol.MemoryStore`.
    """

    rule: str
    probe: tuple[int, ...] = ()
    own: tuple[Range, ...] = ()
    own_share: float = 1.0


def _nothing_own(block: int) -> tuple[Range, ...]:
    return ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """How the record of one episode is made.

    Attributes
    ----------
    key : hashable
        Tells recipes of one conversation apart.
    rule : str
        Identity of the retention rule.
    probe : callable
        From a block's tokens to the probe.
    episode : int
        Which episode it is of.
    parent : Recipe or None
        Makes the blocks in front of `branch`, if given.
    branch : int
        First block that this recipe makes itself.
    own : callable
        From a block's number to what stays before others.
    """

    key: Hashable
    rule: str
    probe: ProbeOf
    episode: int = 0
    parent: Recipe | None = None
    branch: int = 0
    own: OwnOf = _nothing_own

    def maker(self, block: int) -> Recipe:
        """Return the recipe by which a block is made."""
        recipe = self
        while recipe.parent is not None and block < recipe.branch:
            recipe = recipe.parent
        return recipe


class BlockChain(Chain):
    """Steps of one block each.

    Parameters
    ----------
    view : View
        The history.
    recipe : Recipe
        How the record is made.
    blocks : int
        Steps: whole blocks from the history's start.
    """

    def __init__(self, view: View, recipe: Recipe, blocks: int) -> None:
        self._view = view
        self._recipe = recipe
        self._blocks = blocks
        self.episode = recipe.episode
        self.ids = chain_ids(view, recipe, blocks)

    def __len__(self) -> int:
        return self._blocks

    @overload
    def __getitem__(self, index: int) -> Step: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Step]: ...

    def __getitem__(self, index: int | slice) -> Step | Sequence[Step]:
        if isinstance(index, slice):
            return [self[block] for block in range(*index.indices(len(self)))]
        block = range(len(self))[index]
        view, config = self._view, self._view.config
        start = block * config.block_tokens
        block_ids = view.ids(start, start + config.block_tokens)
        step = asked(view, self._recipe, block, block_ids)
        return Step(
            id=self.ids[block],
            previous=self.ids[block - 1] if block else "",
            prefix_ids=view.prefix_ids,
            slot_ids=view.ids(start - config.slots(start), start),
            block_ids=block_ids,
            probe_ids=step.probe,
            budget=config.step_budget(start + config.block_tokens),
            rule=step.rule,
            block=block,
            episode=self.episode,
            own=step.own,
            own_share=step.own_share,
        )


def chain_ids(view: View, recipe: Recipe, blocks: int) -> tuple[str, ...]:
    """Memory ids of a chain; those of a shorter history are kept from before."""
    size = view.config.block_tokens
    with view.log.lock:
        ids = view.log.chain_ids.setdefault(recipe.key, [])
        if len(ids) < blocks and recipe.parent is not None:
            inherited = chain_ids(view, recipe.parent, min(recipe.branch, blocks))
            ids += inherited[len(ids) :]
        for block in range(len(ids), blocks):
            block_ids = view.ids(block * size, (block + 1) * size)
            step = asked(view, recipe, block, block_ids)
            ids.append(step_id(view, ids[-1] if ids else "", block_ids, step, (block + 1) * size))
        return tuple(ids[:blocks])


def asked(view: View, recipe: Recipe, block: int, block_ids: Sequence[int]) -> Asked:
    """What a step asks for; where nothing is evicted, the same for every recipe."""
    if (block + 1) * view.config.block_tokens <= view.config.budget_tokens:
        return Asked(rule=rule_identity(FILLING_RULE))
    maker = recipe.maker(block)
    own = maker.own(block)
    share = view.config.own_share if own else 1.0
    return Asked(rule=maker.rule, probe=maker.probe(block_ids), own=own, own_share=share)


def step_id(view: View, previous: str, block_ids: Sequence[int], step: Asked, tokens: int) -> str:
    """Memory id of a step behind which so many tokens of the history were seen."""
    return memory_id(
        previous,
        view.prefix_ids,
        block_ids,
        step.probe,
        step.rule,
        view.config.step_budget(tokens),
        step.own,
        step.own_share,
    )


class WholeChain(Chain):
    """One step that computes the whole history at once, behind what the radix tree has of it.

    Parameters
    ----------
    view : View
        The history.
    recipe : Recipe
        How the record is made.
    blocks : int
        Whole blocks that it has seen.
    """

    def __init__(self, view: View, recipe: Recipe, blocks: int) -> None:
        config = view.config
        history = view.ids(0, blocks * config.block_tokens)
        step = asked(view, recipe, blocks - 1, history)
        with view.log.lock:
            ids = view.log.chain_ids.setdefault((recipe.key, blocks), [])
            if not ids:
                ids.append(step_id(view, "", history, step, len(history)))
        self.ids = tuple(ids)
        self.episode = recipe.episode
        self._step = Step(
            id=ids[0],
            previous="",
            prefix_ids=view.prefix_ids,
            slot_ids=(),
            block_ids=history,
            probe_ids=step.probe,
            budget=config.step_budget(len(history)),
            rule=step.rule,
            block=blocks - 1,
            episode=recipe.episode,
            own=step.own,
            own_share=step.own_share,
        )

    def __len__(self) -> int:
        return 1

    @overload
    def __getitem__(self, index: int) -> Step: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Step]: ...

    def __getitem__(self, index: int | slice) -> Step | Sequence[Step]:
        return (self._step,)[index]
