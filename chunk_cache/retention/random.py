"""Tokens at random: the floor that a rule must beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from chunk_cache.retention.base import Candidates, RetentionConfig, RetentionRule

_BITS = 24
"""Bits of a score: as many as fp32 holds exactly."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RandomConfig(RetentionConfig):
    """Which random choice."""

    seed: int = 0
    """Another seed keeps other tokens."""


class RandomRule(RetentionRule):
    """Keep tokens by a hash of their position and head: at any length a uniform sample of all tokens so far.

    A token has one score for good, so what is kept after many blocks is what would be kept after one. All layers
    keep the same positions. It stands for no paper.
    """

    name = "random"
    probe = "none"
    config_type = RandomConfig
    config: RandomConfig

    def _scores(self, candidates: Candidates) -> Tensor:
        positions = candidates.positions.to(torch.int64)
        heads = torch.arange(positions.shape[0], device=positions.device)[:, None]
        bits = _mixed(_mixed(_mixed(positions) + heads) + self.config.seed)
        return (bits & (2**_BITS - 1)).float() / 2**_BITS


def _mixed(bits: Tensor) -> Tensor:
    """Mix int64 bits by the finaliser of MurmurHash3 with 32-bit words: each bit of the result depends on all."""
    bits = bits & 0xFFFFFFFF
    bits = ((bits ^ (bits >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    bits = ((bits ^ (bits >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return bits ^ (bits >> 16)
