"""Which kernel computes a call: by name, or the best that there is for the device."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from rag_kernels.attention.base import AttentionCall, AttentionKernel
from rag_kernels.registry import Registry

ATTENTION_KERNELS: Registry[type[AttentionKernel]] = Registry(
    "attention kernel",
    "rag_pipeline.attention_kernels",
    {
        "amx": "rag_kernels.attention.amx:AmxKernel",
        "cpp": "rag_kernels.attention.cpp:CppKernel",
        "cpu": "rag_kernels.attention.cpu:CpuKernel",
        "flashinfer": "rag_kernels.attention.flashinfer:FlashInferKernel",
        "triton": "rag_kernels.attention.triton:TritonKernel",
        "reference": "rag_kernels.attention.reference:ReferenceKernel",
    },
    base=AttentionKernel,
    reserved=("auto",),
)
"""Kernels by name. One of another distribution is asked for by its name; ``auto`` never takes it."""

_DEFAULTS = {"cpu": ("amx", "cpp", "cpu"), "cuda": ("flashinfer", "triton")}
"""What ``auto`` chooses from by type of device, the best first. What does not stand here is not even imported there."""


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
        return next(_defaults(device))
    kernel = kernel_named(name)
    reason = kernel.refuse_device(device)
    if reason is not None:
        raise ValueError(f"attention kernel {name!r} {reason}; use 'auto'.")
    return kernel


def kernel_of_call(call: AttentionCall) -> AttentionKernel:
    """Return the plan's kernel, or the next best one where that refuses the call."""
    kernel = kernel_named(call.plan.kernel)
    if kernel.refuse(call) is None:
        return kernel
    return next(other for other in _defaults(call.plan.device) if other.refuse(call) is None)


def _defaults(device: torch.device) -> Iterator[AttentionKernel]:
    """Kernels for a device, the best first, each imported when it is its turn; the last one takes every call."""
    for name in _DEFAULTS.get(device.type, ()):
        kernel = kernel_named(name)
        if kernel.is_default_on(device):
            yield kernel
    yield kernel_named("reference")
