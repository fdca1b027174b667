"""Missing chunks, computed while the engine is busy: one at a time, within a share of the work.

An engine that is never idle would otherwise never turn a miss into a hit.
"""

from __future__ import annotations

from typing import Any

from rag_pipeline.sglang_plugin.fusion.builds import idle
from rag_pipeline.sglang_plugin.fusion.request import internal as internal_requests
from rag_pipeline.sglang_plugin.fusion.runtime.runtime import FusionRuntime


def start_build(runtime: FusionRuntime, scheduler: Any, running_batch: Any) -> None:
    """Put one build into the queue where the share allows it; asked before every batch.

    The build waits its turn behind the requests that came before it. Everything that is asked here is the same on
    all tensor-parallel ranks.
    """
    if not runtime.missing or not runtime.build_share.may_start:
        return
    if not runtime.is_on or not _is_busy(scheduler, running_batch) or running_batch.batch_is_full:
        return
    if internal_requests.running(scheduler):
        return
    idle.start_next(runtime, scheduler)


def _is_busy(scheduler: Any, running_batch: Any) -> bool:
    """Whether clients' requests are served; without any the idle engine builds at its own pace."""
    return bool(running_batch.reqs or scheduler.waiting_queue or scheduler.chunked_req)
