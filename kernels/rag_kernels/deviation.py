"""How far recomputed keys and values moved from the cached ones (CacheBlend's KV deviation)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

DeviationMetric = Literal["k", "v", "kv"]


def kv_deviation(
    k_new: Tensor, k_old: Tensor, v_new: Tensor, v_old: Tensor, metric: DeviationMetric = "v"
) -> Tensor:
    """Squared difference per token, summed over heads and dimensions.

    Parameters
    ----------
    k_new, k_old, v_new, v_old : Tensor
        ``[T, N, H]``, new and old at the same positions (keys rotated alike).
    metric : {"v", "k", "kv"}
        Values, keys, or the sum of both. Rotation keeps lengths, so rotated keys give the same number.

    Returns
    -------
    Tensor
        fp32 ``[T]``. Under tensor parallelism sum it over the ranks before anything is selected.
    """
    if metric not in ("k", "v", "kv"):
        raise ValueError(f"metric {metric!r} is not known; choose k, v or kv.")
    total = torch.zeros(k_new.shape[0], dtype=torch.float32, device=k_new.device)
    if "k" in metric:
        total += _squared(k_new, k_old)
    if "v" in metric:
        total += _squared(v_new, v_old)
    return total


def _squared(new: Tensor, old: Tensor) -> Tensor:
    if new.shape != old.shape:
        raise ValueError(f"new {tuple(new.shape)} and old {tuple(old.shape)} must have one shape.")
    diff = (new.float() - old.float()).flatten(1)
    return torch.linalg.vecdot(diff, diff)
