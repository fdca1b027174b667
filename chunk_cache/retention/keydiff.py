"""KeyDiff (arXiv 2504.15364): keys that differ from the others stay."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from chunk_cache.retention.base import Candidates, RetentionRule


class KeyDiffRule(RetentionRule):
    """Keep the keys whose direction is farthest from the mean direction; no query is asked.

    The score is the negative cosine between a key and the mean of all normalised keys of its head.

    Deviation: none in the score. The paper also keeps a window of recent tokens in some experiments; here the block
    competes as a whole.

    https://arxiv.org/abs/2504.15364
    """

    name = "keydiff"
    probe = "none"

    def _scores(self, candidates: Candidates) -> Tensor:
        keys = candidates.keys.float()
        anchor = normalize(keys, dim=-1).mean(0, keepdim=True)
        return -cosine_similarity(keys, anchor, dim=-1).T.contiguous()
