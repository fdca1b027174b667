"""The switch that makes an engine stock SGLang again: ``RAG_PIPELINE_PLUGIN=off``."""

from __future__ import annotations

import os

__all__ = ["OFF_SWITCH", "plugin_is_off"]

OFF_SWITCH = "RAG_PIPELINE_PLUGIN"
"""Environment variable: ``on`` (default) or ``off``."""


def plugin_is_off() -> bool:
    """Whether ``RAG_PIPELINE_PLUGIN=off`` is set.

    Raises
    ------
    SystemExit
        For any value but ``on`` and ``off``. Not an ``Exception``: SGLang would only log that and
        keep serving in a state nobody asked for.
    """
    value = os.environ.get(OFF_SWITCH, "on")
    if value not in ("on", "off"):
        raise SystemExit(f"{OFF_SWITCH} is {value!r}; allowed are 'on' and 'off'.")
    return value == "off"
