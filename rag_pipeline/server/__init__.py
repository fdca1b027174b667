"""The ``/v1/rag`` routes and the page at ``/rag``, inside SGLang's own HTTP server."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rag_pipeline.server.guard import is_loopback
    from rag_pipeline.server.run import serve
    from rag_pipeline.server.settings import ServerSettings
    from rag_pipeline.server.tenants import Tenant, Tenants, parse_indexes

__all__ = ["ServerSettings", "Tenant", "Tenants", "is_loopback", "parse_indexes", "serve"]

_MODULES = {
    "ServerSettings": "settings",
    "Tenant": "tenants",
    "Tenants": "tenants",
    "is_loopback": "guard",
    "parse_indexes": "tenants",
    "serve": "run",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
