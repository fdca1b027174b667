"""Settings by file and environment, and where the project keeps what it made.

The folders cost nothing to import; names of :mod:`.settings` bring pydantic in when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from rag_pipeline.config.folders import (
    HOME_VARIABLE,
    home_dir,
    indexes_dir,
    kv_store_dir,
    models_dir,
    uploads_dir,
)
from rag_pipeline.config.sources import (
    CONFIG_VARIABLE,
    FILE_NAME,
    VERBOSE_VARIABLE,
    Origin,
    anything_set,
)

if TYPE_CHECKING:
    from rag_pipeline.config.reference import settings_table, template
    from rag_pipeline.config.schema import Settings
    from rag_pipeline.config.settings import ResolvedSettings, load_settings

__all__ = [
    "CONFIG_VARIABLE",
    "FILE_NAME",
    "HOME_VARIABLE",
    "VERBOSE_VARIABLE",
    "Origin",
    "ResolvedSettings",
    "Settings",
    "anything_set",
    "home_dir",
    "indexes_dir",
    "kv_store_dir",
    "load_settings",
    "models_dir",
    "settings_table",
    "template",
    "uploads_dir",
]

_HOME = {
    "ResolvedSettings": "settings",
    "Settings": "schema",
    "load_settings": "settings",
    "settings_table": "reference",
    "template": "reference",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
