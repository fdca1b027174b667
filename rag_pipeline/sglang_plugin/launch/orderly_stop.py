"""The orderly end of an engine in this process: its schedulers write what waits for their tiers before SGLang kills them.

A server that gets SIGTERM asks its schedulers to end (``ShutdownReq``) and waits for them. ``Engine.shutdown`` kills
them at once instead; so it is asked for here, before that.
"""

from __future__ import annotations

import logging
from typing import Any

__all__ = ["end_schedulers"]

END_S = 10.0
"""Longest wait for schedulers that were asked to end, seconds: they write for at most 5, and then tear down."""

logger = logging.getLogger(__name__)


def end_schedulers(engine: Any) -> None:
    """Ask the schedulers of an engine to end, and wait for them, for a bounded time. Never raises.

    Parameters
    ----------
    engine : sglang.Engine
        About to be shut down. One whose schedulers are gone, or are not its children (data parallelism), is left as it
        is.
    """
    try:
        _end(engine)
    except Exception as error:
        logger.warning("The schedulers were not asked to end, and are killed: %r", error)


def _end(engine: Any) -> None:
    import psutil
    from sglang.srt.managers.io_struct import ShutdownReq
    from sglang.srt.utils.cudacore_pyspy_dump_utils import collect_scheduler_processes

    own = set(engine.get_all_child_pids())
    schedulers = [one for one in collect_scheduler_processes() if one.pid in own]
    if not schedulers:
        return  # nobody reads the socket: sending would wait for ever
    manager = engine.tokenizer_manager
    watchdog = manager._subprocess_watchdog
    if watchdog is not None:
        watchdog.stop()  # it would call their end a crash
    manager._dispatch_to_scheduler(ShutdownReq())
    _, late = psutil.wait_procs(schedulers, timeout=END_S)
    if late:
        logger.warning("%d schedulers did not end in %g s, and are killed", len(late), END_S)
