"""Timing of work that a device does later than it is asked for."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_calls(call: Callable[[], object], device: torch.device, repeats: int) -> dict[str, Any]:
    """Time a call, after one that is not counted.

    Returns
    -------
    dict
        ``ms`` (median), ``ms_min``, ``ms_max``, ``n``; each from the start of the call to the end of its work.
    """
    call()
    taken = []
    for _ in range(repeats):
        synchronize(device)
        began = time.perf_counter()
        call()
        synchronize(device)
        taken.append(1e3 * (time.perf_counter() - began))
    return {
        "ms": round(statistics.median(taken), 4),
        "ms_min": round(min(taken), 4),
        "ms_max": round(max(taken), 4),
        "n": len(taken),
    }
