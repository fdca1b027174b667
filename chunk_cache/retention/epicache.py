"""EpiCache (arXiv 2509.17396): what a text about the episode attends to stays."""

from __future__ import annotations

from torch import Tensor

from chunk_cache.retention.attention import largest_weight
from chunk_cache.retention.base import Candidates, RetentionRule


class EpiCacheRule(RetentionRule):
    """Keep the tokens that the patched prompt of an episode looks at.

    The score of a key is the largest softmax weight that any token of the patched prompt gives it in any query head
    of its group; the softmax runs over the past keys alone, without those of the patched prompt.

    Deviations: fp32 where the released code has the model's dtype; each head keeps the same number of tokens (the
    level ``pair-uniform`` of the code), since a paged pool has one slot for all heads.

    https://arxiv.org/abs/2509.17396
    """

    name = "epicache"
    probe = "patched"

    def _scores(self, candidates: Candidates) -> Tensor:
        assert candidates.queries is not None
        return largest_weight(candidates.keys, candidates.queries)
