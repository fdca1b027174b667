"""What one layer's attention does with its logits, as SGLang's module of the layer says it."""

from __future__ import annotations

from typing import Any

from rag_kernels import LogitRules


def rules_of(layer: Any) -> LogitRules:
    """Window and cap of a ``RadixAttention`` layer.

    SGLang counts the keys before a row's own, and says -1 for no window.
    """
    window = getattr(layer, "sliding_window_size", None)
    return LogitRules(
        sliding_window=None if window is None or window < 0 else int(window) + 1,
        logit_cap=float(getattr(layer, "logit_cap", 0.0) or 0.0) or None,
    )
