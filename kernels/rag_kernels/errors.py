"""Errors of the kernels package."""

from __future__ import annotations


class RotaryUnsupportedError(ValueError):
    """The model's position encoding does not let a cached key be moved by a rotation.

    The message names the encoding and says why; the caller serves such a model by ordinary prefill.
    """
