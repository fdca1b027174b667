"""StreamingLLM (arXiv 2309.17453): the first tokens and the latest stay."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from chunk_cache.retention.base import Candidates, RetentionConfig, RetentionRule


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamingConfig(RetentionConfig):
    """``first`` are the attention sinks."""

    first: int = 4
    """Attention sinks: tokens at the start of the conversation that always stay."""


class StreamingRule(RetentionRule):
    """Keep attention sinks and a sliding window; no model is asked.

    Deviation: the paper counts positions within the cache; here kept tokens have their true positions.

    https://arxiv.org/abs/2309.17453
    """

    name = "streaming"
    probe = "none"
    config_type = StreamingConfig

    def _scores(self, candidates: Candidates) -> Tensor:
        # Falls with the distance, between 0 and 1, so that half precision still tells near tokens apart.
        return 1.0 / (candidates.next_position - candidates.positions).float()
