"""Retention rules: which tokens of a long conversation stay in a cache of fixed size. One file per rule."""

from __future__ import annotations

from chunk_cache.retention.base import Candidates, RetentionConfig, RetentionError, RetentionRule
from chunk_cache.retention.budgets import layer_budgets
from chunk_cache.retention.owned import keep_own, own_columns, own_free, own_order, own_ranks
from chunk_cache.retention.registry import RETENTION_RULES, create_rule
from chunk_cache.retention.selection import Kept, gather_slots, keep_top, merge_kept

__all__ = [
    "RETENTION_RULES",
    "Candidates",
    "Kept",
    "RetentionConfig",
    "RetentionError",
    "RetentionRule",
    "create_rule",
    "gather_slots",
    "keep_own",
    "keep_top",
    "layer_budgets",
    "merge_kept",
    "own_columns",
    "own_free",
    "own_order",
    "own_ranks",
]
