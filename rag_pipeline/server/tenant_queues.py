"""Work in one queue per tenant, each with a thread of its own while there is work."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable


class TenantQueues:
    """Runs what is put in, a tenant's work in order; nobody waits for the work of another.

    Work raises nothing: whoever puts it in sees to its faults.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._queues: dict[str, deque[Callable[[], None]]] = {}
        self._threads: set[threading.Thread] = set()

    @property
    def stopped(self) -> bool:
        """Whether :meth:`stop` was called; long work looks here."""
        return self._stop.is_set()

    def put(self, tenant: str, work: Callable[[], None]) -> None:
        """Run `work` behind all that the tenant has put in before."""
        with self._lock:
            queue = self._queues.get(tenant)
            if queue is not None:
                queue.append(work)
                return
            self._queues[tenant] = deque([work])
            thread = threading.Thread(
                target=self._drain, args=(tenant,), name=f"rag-ingest-{tenant}"
            )
            self._threads.add(thread)
            thread.start()

    def stop(self, limit_s: float) -> bool:
        """Start nothing more, and wait for what runs.

        Parameters
        ----------
        limit_s : float
            Longest wait, seconds.

        Returns
        -------
        bool
            Whether all of it has ended.
        """
        self._stop.set()
        with self._lock:
            threads = list(self._threads)
        end = time.monotonic() + limit_s
        for thread in threads:
            thread.join(max(0.0, end - time.monotonic()))
        return not any(thread.is_alive() for thread in threads)

    def _drain(self, tenant: str) -> None:
        while True:
            with self._lock:
                queue = self._queues[tenant]
                if not queue or self._stop.is_set():
                    del self._queues[tenant]
                    self._threads.discard(threading.current_thread())
                    return
                work = queue.popleft()
            work()
