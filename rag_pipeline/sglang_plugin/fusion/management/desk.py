"""Where orders come in: taken between two batches, carried out by a thread, answered by ticket.

A listing or a check of a folder takes seconds, a remote store may hang; neither may hold a batch up. So the scheduler
only notes an order, and whoever sent it asks for the answer.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any

from rag_pipeline.protocol.cache_order import CacheOrder, CacheOrderError
from rag_pipeline.sglang_plugin.fusion.management.actions import carry_out
from rag_pipeline.sglang_plugin.fusion.management.names import Names

if TYPE_CHECKING:
    from chunk_cache import ChunkKey
    from rag_pipeline.sglang_plugin.fusion.runtime.runtime import FusionRuntime

logger = logging.getLogger(__name__)

_MAX_TICKETS = 64
"""Answers that are kept; the oldest goes first, asked for or not."""
_MAX_WAITING = 16
"""Orders that wait; each may read a whole disk."""
_GLANCE_S = 0.01
"""How long the scheduler waits for an answer at once: most take less, and save a second question."""


class CacheDesk:
    """Orders of one scheduler process.

    With tensor parallelism every rank has a desk. A key names the shard of one rank, so rank 0 looks up what an order's
    keys mean, and each rank then finds its own shard of the same chunks.

    Parameters
    ----------
    runtime : FusionRuntime
        Of this process.
    """

    def __init__(self, runtime: FusionRuntime) -> None:
        self._runtime = runtime
        self._names = Names(runtime)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="chunk-kv-orders")
        self._tickets: OrderedDict[str, Future[dict[str, Any]]] = OrderedDict()

    def take(self, order: CacheOrder) -> dict[str, Any]:
        """Take an order, or look at what has become of it; the same calls on every rank, in the same order.

        Returns
        -------
        dict
            ``ticket``, ``done``, and ``result``, or ``error`` and ``status``.
        """
        future = self._tickets.get(order.ticket)
        if future is None:
            # Those that wait are the newest, so only answers are ever dropped.
            while len(self._tickets) >= _MAX_TICKETS:
                self._tickets.popitem(last=False)
            future = self._tickets[order.ticket] = self._begin(order)
            wait([future], timeout=_GLANCE_S)
        return {"ticket": order.ticket, "done": future.done(), **_told(order, future)}

    def _begin(self, order: CacheOrder) -> Future[dict[str, Any]]:
        runtime = self._runtime
        keys: list[ChunkKey] | None = None
        try:
            # The same on every rank only where it is put to the vote: their threads are not equally fast.
            waiting = sum(not ticket.done() for ticket in self._tickets.values())
            if not runtime.group.all_true(waiting < _MAX_WAITING):
                raise CacheOrderError(
                    f"{waiting} orders to the chunk cache wait already; send it again later", 503
                )
            if order.action == "memories":
                keys = []  # its words are no keys
            elif runtime.group.size > 1 and order.keys:
                keys = self._names.shared(order)
        except Exception as error:
            failed: Future[dict[str, Any]] = Future()
            failed.set_exception(error)
            return failed
        return self._thread.submit(self._run, order, keys)

    def _run(self, order: CacheOrder, keys: list[ChunkKey] | None) -> dict[str, Any]:
        if keys is None:
            keys = self._names.find(order)
        return carry_out(self._runtime, order, keys)


def _told(order: CacheOrder, future: Future[dict[str, Any]]) -> dict[str, Any]:
    if not future.done():
        return {}
    error = future.exception()
    if error is None:
        return {"result": future.result()}
    if isinstance(error, CacheOrderError):
        return {"error": str(error), "status": error.status}
    logger.error("The order %s to the chunk cache failed", order.action, exc_info=error)
    if isinstance(error, OSError):
        return {"error": f"a tier refused: {error.strerror or type(error).__name__}", "status": 503}
    return {"error": f"a fault of the engine ({type(error).__name__}); see its log", "status": 500}
