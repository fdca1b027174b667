"""How long work on the device took, without waiting for it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

_MOST = 256
"""Measurements that wait for the device; what comes on top is not measured."""


class DeviceTimer:
    """Seconds from :meth:`begin` to :meth:`end`: by the clock on the host, by events where kernels run later.

    Used by one thread. With events the seconds are told at a later :meth:`begin`, when the device is past them.

    Parameters
    ----------
    uses_events : bool
        Whether work is queued on a CUDA stream.
    """

    def __init__(self, uses_events: bool) -> None:
        self._uses_events = uses_events
        self._open: deque[tuple[Any, Any, Callable[[float], None]]] = deque()

    def begin(self) -> Any:
        """Return the moment from which on it is measured; ``None`` where it is not."""
        if not self._uses_events:
            return time.perf_counter()
        while self._open and self._open[0][1].query():
            began, ended, note = self._open.popleft()
            note(began.elapsed_time(ended) / 1e3)
        if len(self._open) >= _MOST or torch.cuda.is_current_stream_capturing():
            return None
        return self._event()

    def end(self, began: Any, note: Callable[[float], None]) -> None:
        """Call `note` with the seconds since `began`, now or later."""
        if began is None:
            return
        if self._uses_events:
            self._open.append((began, self._event(), note))
        else:
            note(time.perf_counter() - began)

    @staticmethod
    def _event() -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
