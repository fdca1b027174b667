"""Before the scheduler makes its next batch: everybody here who wants a look at the queue."""

from __future__ import annotations

from typing import Any

from rag_pipeline.sglang_plugin.fusion.admission import queue_hints
from rag_pipeline.sglang_plugin.fusion.builds import under_load
from rag_pipeline.sglang_plugin.fusion.runtime.runtime import get_runtime


def before_next_batch(scheduler: Any, *args: Any, running_batch: Any, **kwargs: Any) -> None:
    """Run before ``Scheduler.get_next_batch_to_run``."""
    runtime = get_runtime()
    if runtime is None:
        return
    try:
        queue_hints.note_queue(runtime, scheduler.waiting_queue)
    except Exception as error:
        # A hint that is not given costs hits.
        runtime.say_fault("queue hints", error)
    under_load.start_build(runtime, scheduler, running_batch)
