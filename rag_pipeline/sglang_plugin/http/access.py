"""What this project's guard has decided about a request, told to SGLang's own check and to its one way in.

SGLang knows one API key, checks it for HTTP only, and calls a key that is no ASCII a fault of its own. A
server here is guarded as a whole (:mod:`rag_pipeline.server.guard`); SGLang's check stays behind it and lets
through what the guard admitted, and every request gets the cache namespace of whoever sent it, whatever the
client says. Registered only in a process that serves (:mod:`.http_server`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from rag_pipeline.sglang_plugin.hook_table import HookTarget, add_hooks

__all__ = ["admitted", "closed_routes", "namespaced", "register"]

_DECIDE = "sglang.srt.utils.auth.decide_request_auth"
_GENERATE = "sglang.srt.managers.tokenizer_manager.TokenizerManager.generate_request"
_INFO = "sglang.srt.sampling.watermarking.core.redact_watermark_secrets"

_SECRETS = ("api_key", "admin_api_key", "ssl_keyfile_password")

_NEEDS = {
    "enable_memory_saver": "/release_memory_occupation /resume_memory_occupation",
    "expert_distribution_recorder_mode": (
        "/start_expert_distribution_record /stop_expert_distribution_record "
        "/dump_expert_distribution_record"
    ),
}
"""Routes whose requests SGLang's scheduler does not survive, by the argument that it must have been started with."""

admitted: ContextVar[str | None] = ContextVar("rag_admitted", default=None)
"""Cache namespace of the caller of the request being answered, empty for the operator; None where the guard
has admitted nobody. A context goes with a request into the tasks that it starts."""


def namespaced(salt: str, given: Any) -> Any:
    """Put a client's ``cache_salt`` (a string, a list of them, or None) inside a tenant's namespace."""
    if isinstance(given, list):
        return [namespaced(salt, item) for item in given]
    return f"{salt}/{given}" if given else salt


def closed_routes(server_args: Any) -> dict[str, str]:
    """Return the flag that a route needs, by path, for the routes that a server of these arguments must not open."""
    return {
        path: f"--{name.replace('_', '-')}"
        for name, paths in _NEEDS.items()
        if not getattr(server_args, name)
        for path in paths.split()
    }


def _decide(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    from sglang.srt.utils.auth import AuthDecision, AuthLevel

    if admitted.get() is not None and kwargs.get("auth_level") == AuthLevel.NORMAL:
        return AuthDecision(allowed=True)
    return original(*args, **kwargs)


def _set_namespace(manager: Any, obj: Any, *args: Any, **kwargs: Any) -> None:
    salt = admitted.get()
    if salt and hasattr(obj, "cache_salt"):
        obj.cache_salt = namespaced(salt, obj.cache_salt)
        _refuse_operators_fields(obj)


def _refuse_operators_fields(obj: Any) -> None:
    """A session is open to who knows its name, and a pattern is searched for in everybody's scheduler."""
    if getattr(obj, "session_params", None):
        raise ValueError(
            "session_params are the operator's; a tenant's key does not continue a session"
        )
    given = getattr(obj, "sampling_params", None) or {}
    for params in given if isinstance(given, list) else [given]:
        if isinstance(params, dict) and params.get("stop_regex"):
            raise ValueError("stop_regex is the operator's; use stop, which takes strings")


def _hide_secrets(info: Any, *args: Any, **kwargs: Any) -> Any:
    """SGLang hides its own secrets here, in what a server tells, and calls itself for what lies inside."""
    if not isinstance(info, dict):
        return info
    return info | {name: "(hidden)" for name in _SECRETS if info.get(name)}


def register() -> list[HookTarget]:
    """Hook SGLang's own decision, its one way in, and what it tells about itself; return the rows."""
    hooks: list[tuple[HookTarget, Callable[..., Any]]] = [
        (
            HookTarget(
                path=_DECIDE,
                kind="around",
                why="one key per tenant, and a page that can ask for the key",
                params=("auth_level",),
            ),
            _decide,
        ),
        (
            HookTarget(
                path=_GENERATE,
                kind="before",
                why="a tenant's requests share KV with nobody, whichever route they came by",
                params=("obj",),
            ),
            _set_namespace,
        ),
        (
            HookTarget(
                path=_INFO,
                kind="after",
                why="who holds the operator's key must not read the administrator's",
                params=("value",),
            ),
            _hide_secrets,
        ),
    ]
    add_hooks(hooks)
    return [row for row, _ in hooks]
