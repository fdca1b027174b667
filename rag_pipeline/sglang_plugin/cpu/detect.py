"""Accelerators that SGLang would pick by itself, and the cores of each rank."""

from __future__ import annotations

__all__ = ["accelerator_present", "core_groups"]


def accelerator_present() -> bool:
    """Whether torch sees any accelerator: CUDA, ROCm, XPU, MPS, NPU, MUSA, HPU.

    The same probes as SGLang's own platform discovery (``sglang.srt.platforms``, 0.5.23), because
    an activated out-of-tree platform wins over them all.
    """
    import torch

    if torch.cuda.is_available():  # ROCm builds answer here too
        return True
    for name in ("xpu", "npu", "musa", "hpu", "mps"):
        device = getattr(torch, name, None)
        probe = getattr(device, "is_available", None)
        if probe is not None and probe():
            return True
    return False


def core_groups(ranks: int) -> str:
    """Split the cores this process may use into one group a rank.

    Parameters
    ----------
    ranks : int
        Number of ranks, at least 1.

    Returns
    -------
    str
        As ``SGLANG_CPU_OMP_THREADS_BIND`` takes it: groups joined by ``|``, cores by ``,``. With
        fewer cores than ranks, cores are shared in turn.
    """
    import os

    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < ranks:
        return "|".join(str(cores[rank % len(cores)]) for rank in range(ranks))
    share, extra = divmod(len(cores), ranks)
    groups: list[str] = []
    start = 0
    for rank in range(ranks):
        stop = start + share + (1 if rank < extra else 0)
        groups.append(",".join(str(core) for core in cores[start:stop]))
        start = stop
    return "|".join(groups)
