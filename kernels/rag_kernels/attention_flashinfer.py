"""Position-causal attention through FlashInfer's paged prefill. Not run on a GPU here: unmeasured."""

from __future__ import annotations

import importlib.util


def flashinfer_available() -> bool:
    """Whether the package is installed; it is not imported here."""
    return importlib.util.find_spec("flashinfer") is not None
