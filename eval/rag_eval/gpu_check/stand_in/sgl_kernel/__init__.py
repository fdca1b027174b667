"""In the place of SGLang's compiled kernels where they cannot be loaded: what a Llama needs, in torch.

Only :mod:`rag_eval.gpu_check.engine` puts this folder on the path. Every other name is there, and says when it is
called that it is not: SGLang imports many more names than it calls.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def rmsnorm(x: Tensor, weight: Tensor, eps: float = 1e-6, out: Tensor | None = None) -> Tensor:
    """Root-mean-square norm of the last dimension."""
    made = torch.nn.functional.rms_norm(x.float(), x.shape[-1:], weight.float(), eps).to(x.dtype)
    return made if out is None else out.copy_(made)


def fused_add_rmsnorm(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6) -> None:
    """Add ``x`` to the residual, and write the norm of the sum to ``x``."""
    residual.add_(x)
    rmsnorm(residual, weight, eps, out=x)


def silu_and_mul(x: Tensor, out: Tensor | None = None) -> Tensor:
    """``silu(first half) * second half`` of the last dimension."""
    gate, up = x.chunk(2, dim=-1)
    made = torch.nn.functional.silu(gate) * up
    return made if out is None else out.copy_(made)


class _Absent:
    """A name that may be imported, and looked into for others, and not called."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, *args: object, **kwargs: object) -> Any:
        raise NotImplementedError(f"sgl_kernel.{self._name} is not among the stand-ins")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Absent(f"{self._name}.{name}")


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return _Absent(name)


class _Submodules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Makes every module below this one, empty but for names that cannot be called."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name.startswith("sgl_kernel."):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def exec_module(self, module: types.ModuleType) -> None:
        below = module.__name__.removeprefix("sgl_kernel.")

        def find(name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return _Absent(f"{below}.{name}")

        module.__getattr__ = find  # type: ignore[method-assign]


sys.meta_path.insert(0, _Submodules())
