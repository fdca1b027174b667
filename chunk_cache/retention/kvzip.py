"""KVzip (arXiv 2505.23416): what the model looks at when it repeats the context stays."""

from __future__ import annotations

from torch import Tensor

from chunk_cache.retention.attention import largest_weight
from chunk_cache.retention.base import Candidates, RetentionRule


class KVzipRule(RetentionRule):
    """Keep the tokens that reconstruct the text: the probe asks to repeat the block, and holds the block again.

    The score of a key is the largest softmax weight that any token of the probe gives it in any query head of its
    group.

    Deviations: the softmax runs over the past keys alone, as EpiCache does it; the paper's has the probe's own keys in
    it. The paper scores the whole context once, before anything is evicted; here each block is repeated when it comes,
    and what was kept before competes by what this repetition looks at. Each head keeps the same number of tokens.

    https://arxiv.org/abs/2505.23416
    """

    name = "kvzip"
    probe = "repeat"

    def _scores(self, candidates: Candidates) -> Tensor:
        assert candidates.queries is not None
        return largest_weight(candidates.keys, candidates.queries)
