"""Who may call SGLang's HTTP server: more than one key, one namespace a key, and the public page.

SGLang knows one API key. A server with tenants has one a tenant; each key opens the serving routes and
nothing else, and every request made with it gets the tenant's cache namespace, whatever the client
sends. Registered only in a process that serves (:mod:`.http_server`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rag_pipeline.sglang_plugin.hook_table import HookTarget, add_targets

__all__ = ["AccessRules", "bearer_token", "namespaced", "register"]

_DECIDE = "sglang.srt.utils.auth.decide_request_auth"
_GENERATE = "sglang.srt.managers.tokenizer_manager.TokenizerManager.generate_request"


@dataclass(frozen=True, kw_only=True, slots=True)
class AccessRules:
    """What the server's owner decides about requests.

    Parameters
    ----------
    is_public
        Whether a ``GET`` of this path needs no key (the page's own files).
    accepts
        Whether a key, which is not SGLang's own, opens this path.
    salt_of
        Cache namespace of the key; empty for SGLang's own key and for no key.
    """

    is_public: Callable[[str], bool]
    accepts: Callable[[str, str], bool]
    salt_of: Callable[[str | None], str]


_rules: AccessRules | None = None


def bearer_token(header: str | None) -> str | None:
    """Key of an ``Authorization: Bearer KEY`` header, or None."""
    scheme, _, token = (header or "").partition(" ")
    return token if scheme.lower() == "bearer" and token else None


def namespaced(salt: str, given: Any) -> Any:
    """Put a client's ``cache_salt`` (a string, a list of them, or None) inside a tenant's namespace."""
    if isinstance(given, list):
        return [namespaced(salt, item) for item in given]
    return f"{salt}/{given}" if given else salt


def _decide(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    from sglang.srt.utils.auth import AuthDecision, AuthLevel

    rules, path = _rules, kwargs.get("path", "")
    if rules is not None and kwargs.get("auth_level") == AuthLevel.NORMAL:
        if kwargs.get("method") in ("GET", "HEAD") and rules.is_public(path):
            return AuthDecision(allowed=True)
        token = bearer_token(kwargs.get("authorization_header"))
        if token is not None and rules.accepts(token, path):
            return AuthDecision(allowed=True)
    return original(*args, **kwargs)


def _set_namespace(manager: Any, obj: Any, request: Any = None, **kwargs: Any) -> None:
    if _rules is None or request is None or not hasattr(obj, "cache_salt"):
        return
    salt = _rules.salt_of(bearer_token(request.headers.get("authorization")))
    if salt:
        obj.cache_salt = namespaced(salt, obj.cache_salt)


def register(rules: AccessRules) -> None:
    """Set the rules of this process and hook SGLang's own decision and its one way in."""
    global _rules
    first, _rules = _rules is None, rules
    if not first:
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    add_targets(
        [
            HookTarget(
                path=_DECIDE,
                kind="around",
                why="one key a tenant, and a page that can ask for the key",
                params=("method", "path", "authorization_header", "auth_level"),
            ),
            HookTarget(
                path=_GENERATE,
                kind="before",
                why="a tenant's requests share KV with nobody, whichever route they came by",
                params=("obj", "request"),
            ),
        ]
    )
    HookRegistry.register(_DECIDE, _decide, HookType.AROUND)
    HookRegistry.register(_GENERATE, _set_namespace, HookType.BEFORE)
    HookRegistry.apply_hooks()
