"""Which kernel computes a call: by name, or the best that there is for the device."""

from __future__ import annotations

import functools

import torch

from rag_kernels.attention.base import AttentionCall, AttentionKernel
from rag_kernels.registry import Registry

ATTENTION_KERNELS: Registry[type[AttentionKernel]] = Registry(
    "attention kernel",
    "rag_pipeline.attention_kernels",
    {
        "cpu": "rag_kernels.attention.cpu:CpuKernel",
        "flashinfer": "rag_kernels.attention.flashinfer:FlashInferKernel",
        "triton": "rag_kernels.attention.triton:TritonKernel",
        "reference": "rag_kernels.attention.reference:ReferenceKernel",
    },
)
"""Kernels by name, the best first. ``reference`` runs everywhere, so one of another distribution is asked for by name."""

_DEFAULTS = ("cpu", "flashinfer", "triton", "reference")


def kernel_named(name: str) -> AttentionKernel:
    """Return a kernel; :class:`ValueError` for a name that is not known."""
    return _instance(ATTENTION_KERNELS.get(name))


@functools.cache
def _instance(kernel: type[AttentionKernel]) -> AttentionKernel:
    return kernel()


def choose_kernel(name: str, device: torch.device) -> AttentionKernel:
    """Return the kernel that a name, or ``auto``, stands for on a device.

    Raises
    ------
    ValueError
        A name that is not known, or a kernel that does not run there.
    """
    if name == "auto":
        return next(k for k in map(kernel_named, _DEFAULTS) if k.is_default_on(device))
    kernel = kernel_named(name)
    reason = kernel.refuse_device(device)
    if reason is not None:
        raise ValueError(f"attention kernel {name!r} {reason}; use 'auto'.")
    return kernel


def kernel_of_call(call: AttentionCall) -> AttentionKernel:
    """Return the plan's kernel, or the next best one where that refuses the call."""
    first = kernel_named(call.plan.kernel)
    others = (k for k in map(kernel_named, _DEFAULTS) if k.is_default_on(call.plan.device))
    for kernel in (first, *others):
        if kernel.refuse(call) is None:
            return kernel
    return kernel_named("reference")
