"""Settings of a conversation's memory, and reading them from what a user writes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from rag_pipeline.errors import RagPipelineError

DEFAULT_METHOD = "epicache"
OFF = ("off", "none", "")
"""What stands for no memory."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MemoryConfig:
    """How a long conversation is kept within a fixed number of tokens.

    Raises
    ------
    RagPipelineError
        One line: what was given, what is allowed.
    """

    method: str = DEFAULT_METHOD
    """Name of a method, with options of its retention rule where it has one: ``epicache``, ``snapkv:window=64``."""
    budget_tokens: int = 2048
    """Tokens of the history that are kept per layer and KV head."""
    episodes: int = 4
    """Topics that a conversation is divided into, each with a record of its own."""
    block_tokens: int = 512
    """Tokens of the history that one step adds to a record."""
    segment_utterances: int = 4
    """Consecutive utterances that are embedded together."""
    medoids: int = 4
    """Segments closest to the centre of an episode, whose text asks what to keep for it."""
    probe_tokens: int = 512
    """Most tokens of that text."""
    retrieved_share: float = 0.5
    """Share of the budget that messages nearest to the question take, word for word behind a record of the rest, with methods
    that have episodes; 0 is the published method."""
    merge_margin: float = 0.2
    """A question whose second-best episode has a share of the votes within this of the best's is answered from both; 0 from the best only."""
    own_share: float = 0.75
    """Share of a record that tokens of the episode's own segments fill before others, whatever they score; 0 is the published rule."""
    verbatim_tokens: int | None = None
    """Histories up to this length stand in the prompt as they are; None for as long as the budget."""
    cluster_segments: int = 4
    """Segments per episode at which a conversation is clustered first. In LoCoMo two put 54% of the evidence into the episode
    that its question is matched with, four 66%, as many as clustering the whole conversation at once."""
    recluster_growth: float = 1.5
    """How many times as long a history must be as at the last clustering before it is clustered again."""
    recluster_drift: float = 1.05
    """How many times as far from their episodes new segments must lie as those that were clustered."""
    switch_segments: int = 3
    """Consecutive segments far from every episode that open a new one; 0 for never."""

    def __post_init__(self) -> None:
        if not isinstance(self.method, str) or not self.method.strip():
            raise RagPipelineError(
                f"memory method is {self.method!r:.80}; give a name such as {DEFAULT_METHOD!r}"
            )
        self._check_whole("budget_tokens", 16, 1 << 20)
        self._check_whole("episodes", 1, 64)
        self._check_whole("block_tokens", 16, 1 << 16)
        self._check_whole("segment_utterances", 1, 64)
        self._check_whole("medoids", 1, 64)
        self._check_whole("probe_tokens", 16, 1 << 14)
        self._check_whole("cluster_segments", 1, 64)
        self._check_whole("switch_segments", 0, 64)
        if self.verbatim_tokens is not None:
            self._check_whole("verbatim_tokens", 0, 1 << 24)
        self._check_number("retrieved_share", 0.0, 0.9)
        self._check_number("merge_margin", 0.0, 2.0)
        self._check_number("own_share", 0.0, 1.0)
        self._check_number("recluster_growth", 1.01, 100.0)
        self._check_number("recluster_drift", 0.0, 100.0)

    @property
    def verbatim_limit(self) -> int:
        """Tokens of history up to which it stands in the prompt as it is."""
        return self.budget_tokens if self.verbatim_tokens is None else self.verbatim_tokens

    @property
    def retrieved_tokens(self) -> int:
        """Tokens of the budget that retrieved messages may take."""
        return int(self.budget_tokens * self.retrieved_share)

    @property
    def record_tokens(self) -> int:
        """Slots of a record, per layer and KV head."""
        return self.budget_tokens - self.retrieved_tokens

    @property
    def most_told_tokens(self) -> int:
        """Most tokens of a conversation in a prompt: the budget, and a tail of fewer than two blocks."""
        return self.budget_tokens + 2 * self.block_tokens

    @property
    def first_clustering(self) -> int:
        """Whole segments at which a conversation is clustered first."""
        return self.cluster_segments * self.episodes

    def _check_whole(self, name: str, least: int, most: int) -> None:
        value = getattr(self, name)
        if type(value) is not int or not least <= value <= most:
            raise RagPipelineError(
                f"memory {name} is {value!r:.80}; give a whole number from {least} to {most}"
            )

    def _check_number(self, name: str, least: float, most: float) -> None:
        value = getattr(self, name)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not least <= value <= most:
            raise RagPipelineError(
                f"memory {name} is {value!r:.80}; give a number from {least} to {most}"
            )


FIELDS = tuple(field.name for field in dataclasses.fields(MemoryConfig))


def parse_memory(
    given: MemoryConfig | Mapping[str, Any] | str | bool | None,
    defaults: MemoryConfig | None = None,
) -> MemoryConfig | None:
    """Read what a user writes for a memory.

    Parameters
    ----------
    given : MemoryConfig, mapping, str, bool or None
        A method's name (options of its rule allowed), or a mapping of :class:`MemoryConfig`'s fields; ``true`` for
        the defaults, ``off`` or ``false`` for no memory, None for what `defaults` says.
    defaults : MemoryConfig, optional
        For what is not given, such as a server's own settings.

    Returns
    -------
    MemoryConfig or None
        None for no memory.

    Raises
    ------
    RagPipelineError
        An unknown field or method, or a value that is not allowed.
    """
    from rag_pipeline.memory.methods import create_method

    if given is None:
        return defaults
    base = defaults or MemoryConfig()
    if isinstance(given, MemoryConfig):
        config = given
    elif isinstance(given, bool):
        if not given:
            return None
        config = base
    elif isinstance(given, str):
        if given.strip().lower() in OFF:
            return None
        config = dataclasses.replace(base, method=given.strip())
    elif isinstance(given, Mapping):
        fields = dict(given)
        for key in fields:
            if key not in FIELDS:
                raise RagPipelineError(
                    f"memory field {key!r:.80} is not known; allowed: {', '.join(FIELDS)}"
                )
        if isinstance(method := fields.get("method"), str) and method.strip().lower() in OFF:
            return None
        config = dataclasses.replace(base, **fields)
    else:
        raise RagPipelineError(
            f"memory is a {type(given).__name__}; give a method's name, or an object of {', '.join(FIELDS)}"
        )
    create_method(config)
    return config
