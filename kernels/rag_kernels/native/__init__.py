"""Kernels in C++ for the CPU: built once per machine from the source beside this, with the compiler that is there."""

from __future__ import annotations

from rag_kernels.native.library import load_library

__all__ = ["load_library"]
