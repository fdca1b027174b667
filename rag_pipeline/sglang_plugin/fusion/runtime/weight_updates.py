"""Every way in which SGLang changes the weights begins another epoch of chunk KV.

``update_weights_from_disk`` and ``_ipc`` are complete in one call. ``_distributed`` and ``_tensor`` come many times between
``begin_weight_update`` and ``end_weight_update``, and there others may write the weights without any call (RDMA).
Released memory comes back with whatever it then holds. An adapter that is loaded or unloaded leaves the base model's
weights alone, and requests with an adapter are not fused. A call that raises may have written half, so it counts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from rag_pipeline.sglang_plugin.fusion.runtime.runtime import get_runtime

logger = logging.getLogger(__name__)


def around_update(original: Callable[..., Any], manager: Any, *args: Any, **kwargs: Any) -> Any:
    """Wrap the calls of ``SchedulerWeightUpdaterManager`` that write weights, or begin or end the writing."""
    try:
        return original(manager, *args, **kwargs)
    finally:
        runtime = get_runtime()
        if runtime is not None:
            scheduler, tree = manager.scheduler, manager.scheduler.tree_cache
            # What runs still enters the tree when it ends; what waits has no KV.
            is_empty = scheduler.is_fully_idle(ignore_waiting=True) and not (
                tree.evictable_size() or tree.protected_size()
            )
            runtime.new_weights(
                in_update=manager._session is not None or bool(manager.offload_tags),
                tree_is_old=not is_empty,
            )
            logger.info("The weights may have changed: stored chunks are dropped")


def after_flush(result: bool, scheduler: Any, *args: Any, **kwargs: Any) -> None:
    """Run after ``Scheduler.flush_cache``: an empty tree holds nothing of older weights."""
    runtime = get_runtime()
    if runtime is not None and result:
        runtime.tree_is_old = False
