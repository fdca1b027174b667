"""The setting ``fusion.eviction``: from the settings to the store of an engine."""

from __future__ import annotations

import pytest

from chunk_cache.eviction.lookahead import LookAheadPolicy
from chunk_cache.eviction.lru import LRUPolicy
from rag_pipeline.errors import EngineError
from rag_pipeline.sglang_plugin.fusion.config import FusionConfig
from rag_pipeline.sglang_plugin.fusion.runtime.runtime import FusionRuntime


def test_the_default_is_the_least_recently_used() -> None:
    store = FusionRuntime(FusionConfig(), None).store
    assert isinstance(store._ledger.policy, LRUPolicy)
    assert not store.uses_queue


def test_the_setting_reaches_the_store_with_the_budgets_of_the_tiers() -> None:
    config = FusionConfig.from_env(
        {
            "RAG_PIPELINE_FUSION": '{"eviction": "lookahead:ttl", "store_bytes": 1000, "store_dir_bytes": 5000}'
        }
    )
    policy = FusionRuntime(config, None).store._ledger.policy
    assert isinstance(policy, LookAheadPolicy)
    assert (policy.variant, policy.memory_bytes, policy.disk_bytes) == ("ttl", 1000, 0)
    with_folder = FusionConfig(eviction="lookahead", store_dir="folder", store_dir_bytes=5000)
    assert with_folder.make_eviction().disk_bytes == 5000


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("belady", "must know what will be asked for"),
        ("mru", "choose one of lru, lfu, fifo, lookahead"),
        ("lookahead:never", "allowed: lru, lfu, fifo-birth, ttl"),
    ],
)
def test_an_engine_refuses_in_one_line(name: str, told: str) -> None:
    with pytest.raises(EngineError, match=told) as caught:
        FusionConfig(eviction=name)
    assert str(caught.value).startswith("RAG_PIPELINE_FUSION: eviction policy")
    assert "\n" not in str(caught.value)
