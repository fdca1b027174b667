"""Settings by file and environment, and where the project keeps what it made.

The folders cost nothing to import; names of :mod:`.settings` bring pydantic in when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rag_pipeline.config.folders import (
    HOME_VARIABLE,
    attention_dir,
    home_dir,
    indexes_dir,
    kv_store_dir,
    layers_dir,
    models_dir,
    tpla_dir,
    uploads_dir,
)
from rag_pipeline.config.sources import (
    CONFIG_VARIABLE,
    FILE_NAME,
    VERBOSE_VARIABLE,
    Origin,
    anything_set,
)
from rag_pipeline.lazy import lazy_names

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
    "attention_dir",
    "home_dir",
    "indexes_dir",
    "kv_store_dir",
    "layers_dir",
    "load_settings",
    "models_dir",
    "settings_table",
    "template",
    "tpla_dir",
    "uploads_dir",
]

_HOMES = {
    "ResolvedSettings": "settings",
    "Settings": "schema",
    "load_settings": "settings",
    "settings_table": "reference",
    "template": "reference",
}

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
