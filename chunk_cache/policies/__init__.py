"""Selection policies: which reused tokens are computed anew, and what that costs.

Pure torch on positions and scores; knows no engine. Start with :func:`create_policy`. A policy that is known before
layer 0 is a :class:`Policy`; one that asks the model first is a :class:`ScoredPolicy`, which names a :class:`Signal`.
"""

from __future__ import annotations

from chunk_cache.policies.adaptive import AdaptiveConfig, AdaptivePolicy, balance_ratio
from chunk_cache.policies.base import Policy, top_positions
from chunk_cache.policies.cacheblend import CacheBlendConfig, CacheBlendPolicy
from chunk_cache.policies.epic import EpicConfig, EpicPolicy
from chunk_cache.policies.full import FullPolicy
from chunk_cache.policies.layout import ReuseLayout, latent_qkv_share, qkv_share
from chunk_cache.policies.query import QueryConfig, QueryPolicy
from chunk_cache.policies.registry import DEFAULT_POLICY, POLICIES, create_policy, policy_names
from chunk_cache.policies.reuse import ReusePolicy
from chunk_cache.policies.scored import ScoredPolicy
from chunk_cache.policies.signals import (
    AttentionSignal,
    DeviationSignal,
    PassObserver,
    ProbedRequest,
    ProbePasses,
    Signal,
)

__all__ = [
    "DEFAULT_POLICY",
    "POLICIES",
    "AdaptiveConfig",
    "AdaptivePolicy",
    "AttentionSignal",
    "CacheBlendConfig",
    "CacheBlendPolicy",
    "DeviationSignal",
    "EpicConfig",
    "EpicPolicy",
    "FullPolicy",
    "PassObserver",
    "Policy",
    "ProbePasses",
    "ProbedRequest",
    "QueryConfig",
    "QueryPolicy",
    "ReuseLayout",
    "ReusePolicy",
    "ScoredPolicy",
    "Signal",
    "balance_ratio",
    "create_policy",
    "latent_qkv_share",
    "policy_names",
    "qkv_share",
    "top_positions",
]
