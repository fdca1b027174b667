"""Headers of a request as the guard reads them: one Host, one key, and what is neither."""

from __future__ import annotations

from starlette.types import Scope

from rag_pipeline.server.addresses import HostName, parse_host
from rag_pipeline.server.errors import ApiError


class Headers:
    """Headers of a request: as text, and never one of several."""

    def __init__(self, scope: Scope) -> None:
        self._pairs: list[tuple[bytes, bytes]] = scope["headers"]

    def all(self, name: bytes) -> list[str]:
        """Every value of a name, in the order sent."""
        return [value.decode("latin-1").strip() for key, value in self._pairs if key == name]

    def one(self, name: bytes) -> str | None:
        """First value of a name; None where there is none."""
        found = self.all(name)
        return found[0] if found else None


def host_of(headers: Headers) -> HostName | None:
    """Host that a request is for; None where it does not say.

    Raises
    ------
    ApiError
        400 for two of them, and for one that is no name or address.
    """
    given = headers.all(b"host")
    if len(given) > 1:
        raise ApiError(400, f"the request has {len(given)} Host headers; send one")
    if not given or not given[0]:
        return None
    host = parse_host(given[0])
    if host is None:
        raise ApiError(400, f"the Host header {ascii(given[0])[:120]} is no name or address")
    return host


def is_preflight(scope: Scope, headers: Headers) -> bool:
    """Whether a browser asks if it may; SGLang's CORS layer answers, and nothing behind it is reached."""
    return (
        scope.get("method") == "OPTIONS"
        and bool(headers.all(b"origin"))
        and bool(headers.all(b"access-control-request-method"))
    )


def key_of(headers: Headers) -> str | None:
    """Key of the one ``Authorization: Bearer KEY`` header.

    Raises
    ------
    ApiError
        401 for a header that carries no key: two of them, another scheme, letters beyond ASCII.
    """
    given = headers.all(b"authorization")
    if not given:
        return None
    scheme, _, key = given[0].partition(" ")
    key = key.strip()
    if len(given) > 1 or scheme.lower() != "bearer" or not key or not key.isascii():
        raise no_key("the Authorization header is not `Bearer KEY` with one key in ASCII")
    return key


def no_key(message: str) -> ApiError:
    """Refusal of a request that shows no key."""
    return ApiError(401, message)
