"""How long the attention of prompts takes, and how many keys it reads: what attention methods are compared by."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from rag_kernels import BlockMask, PositionCausalPlan
from rag_pipeline.sglang_plugin.fusion.runtime.device_timer import DeviceTimer

T = TypeVar("T")


def timed(clock: AttentionClock | None, kind: str, call: Callable[[], T]) -> T:
    """Call, and count what it took under a kind of :class:`AttentionClock`; without a clock just call."""
    if clock is None:
        return call()
    began = clock.begin()
    value = call()
    clock.end(began, kind)
    return value


class AttentionClock:
    """Adds up seconds by what they went into, and keys; used by the thread that runs the model.

    Parameters
    ----------
    timer : DeviceTimer
        Takes the seconds, those of the device where the work is queued on one.
    """

    def __init__(self, timer: DeviceTimer) -> None:
        self._timer = timer
        self._seconds = {"ordinary": 0.0, "rows": 0.0, "mask": 0.0}
        self._keys_read = 0
        self._keys_seen = 0

    def begin(self) -> Any:
        """Return the moment that :meth:`end` measures from."""
        return self._timer.begin()

    def end(self, began: Any, kind: str) -> None:
        """Count the time since ``began``.

        Parameters
        ----------
        began : object
            From :meth:`begin`; None where it could not be taken, then nothing is counted.
        kind : str
            ``ordinary`` for SGLang's own attention of a prompt, ``rows`` for the attention of chosen rows or of a
            method, ``mask`` for what the method did to find the keys.
        """
        if began is not None:
            self._timer.end(began, functools.partial(self._add, kind))

    def _add(self, kind: str, seconds: float) -> None:
        self._seconds[kind] += seconds

    def count(self, mask: BlockMask | None, plan: PositionCausalPlan) -> None:
        """Count the keys that one layer's call reads, and those that its rows may see at all, per query head."""
        for request in range(len(plan.slots)):
            positions = plan.positions[plan.row_starts[request] : plan.row_starts[request + 1]]
            seen = int(positions.sum()) + positions.numel()
            blocks = None if mask is None else mask.requests[request]
            read = float(seen) if blocks is None else blocks.keys_read(positions)
            self._keys_seen += seen * plan.num_q_heads
            self._keys_read += round(read * plan.num_q_heads)

    def to_json(self) -> dict[str, Any]:
        """Seconds by kind, keys read and seen, and their ratio: the density."""
        return {
            "seconds": {kind: round(value, 6) for kind, value in self._seconds.items()},
            "keys_read": self._keys_read,
            "keys_seen": self._keys_seen,
            "density": round(self._keys_read / self._keys_seen, 6) if self._keys_seen else None,
        }
