"""The ``/v1/rag`` routes and the page at ``/rag``, inside SGLang's own HTTP server."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rag_pipeline.lazy import lazy_names

if TYPE_CHECKING:
    from rag_pipeline.server.addresses import is_loopback
    from rag_pipeline.server.guard import OPEN_FLAG, refuse_exposure
    from rag_pipeline.server.keys import (
        ADMIN_API_KEY_VARIABLE,
        API_KEY_VARIABLE,
        MIN_KEY,
        read_key,
    )
    from rag_pipeline.server.run import serve
    from rag_pipeline.server.settings import ServerSettings
    from rag_pipeline.server.tenants import Tenant, Tenants, parse_indexes

__all__ = [
    "ADMIN_API_KEY_VARIABLE",
    "API_KEY_VARIABLE",
    "MIN_KEY",
    "OPEN_FLAG",
    "ServerSettings",
    "Tenant",
    "Tenants",
    "is_loopback",
    "parse_indexes",
    "read_key",
    "refuse_exposure",
    "serve",
]

_HOMES = {
    "ADMIN_API_KEY_VARIABLE": "keys",
    "API_KEY_VARIABLE": "keys",
    "MIN_KEY": "keys",
    "OPEN_FLAG": "guard",
    "ServerSettings": "settings",
    "Tenant": "tenants",
    "Tenants": "tenants",
    "is_loopback": "addresses",
    "parse_indexes": "tenants",
    "read_key": "keys",
    "refuse_exposure": "guard",
    "serve": "run",
}

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
