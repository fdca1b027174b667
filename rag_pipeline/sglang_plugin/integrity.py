"""For tests under load: a running scheduler's account of its KV pool and its chunk cache.

Only with ``RAG_PIPELINE_INTEGRITY=on``, since checking the chunk cache reads every record's token ids.
"""

from __future__ import annotations

import os
from typing import Any

from rag_pipeline.sglang_plugin.hook_table import HookTarget, add_hooks

__all__ = ["INTEGRITY", "INTEGRITY_KEY", "register"]

INTEGRITY = "RAG_PIPELINE_INTEGRITY"
"""Environment variable: ``on`` or ``off`` (default)."""
INTEGRITY_KEY = "rag_integrity"
"""Where the account stands in each of SGLang's ``internal_states``."""

_STATE = (
    "sglang.srt.managers.scheduler_components.internal_state."
    "SchedulerInternalStateController.get_internal_state"
)


def account(scheduler: Any) -> dict[str, Any]:
    """Count free KV slots and check the chunk cache of the calling scheduler process.

    Returns
    -------
    dict
        ``pool_free`` and ``pool_size`` in token slots (equal when the radix tree is empty and nothing
        runs), ``requests`` that run or wait, and ``store``: ``ok`` or the first contradiction.
    """
    from chunk_cache import IntegrityError
    from rag_pipeline.sglang_plugin.fusion.runtime.runtime import get_runtime

    allocator = scheduler.token_to_kv_pool_allocator
    idle, store, runtime = scheduler.is_fully_idle(), "ok", get_runtime()
    if runtime is not None:
        try:
            runtime.store.check_integrity(expect_idle=idle)
        except IntegrityError as error:
            store = str(error)
    return {
        "pool_free": int(allocator.available_size()),
        "pool_size": int(allocator.size),
        "requests": 0 if idle else len(scheduler.waiting_queue) + 1,
        "store": store,
    }


def _add(result: Any, controller: Any, *args: Any, **kwargs: Any) -> None:
    result.internal_state[INTEGRITY_KEY] = account(controller.scheduler)


def register() -> None:
    """Add the hook where the variable asks for it; called by the plugin's entry point."""
    if os.environ.get(INTEGRITY, "off") != "on":
        return
    add_hooks(
        [
            (
                HookTarget(
                    path=_STATE,
                    kind="after",
                    why="a load test asks whether pool and chunk cache are whole",
                    params=("recv_req",),
                ),
                _add,
            )
        ]
    )
