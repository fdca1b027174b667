"""Every refusal is one line of JSON in OpenAI's shape, whoever refused: the schema, the index, the engine."""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from rag_pipeline.errors import EngineError, RagPipelineError
from retrievers.errors import RetrievalError

logger = logging.getLogger(__name__)

JSON_LIMIT_BYTES = 1 << 20
"""Largest body of a route that does not say otherwise."""

_SHOWN = 80
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class ApiError(Exception):
    """A refusal with its HTTP status; the message is the one line that the client reads."""

    def __init__(self, status: int, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.param = param


def error_body(status: int, message: str, param: str | None = None) -> dict[str, Any]:
    """Body of an error, as OpenAI's clients read it."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    line = " ".join(message.encode("utf-8", "replace").decode().split())
    return {"error": {"message": line, "type": kind, "param": param, "code": status}}


def error_response(status: int, message: str, param: str | None = None) -> JSONResponse:
    """Response of an error."""
    return JSONResponse(error_body(status, message, param), status_code=status)


def refusal_of(error: BaseException) -> tuple[int, str, str | None] | None:
    """Status, line and parameter of an exception that is the client's to mend; None for a fault of ours."""
    if isinstance(error, ApiError):
        return error.status, str(error), error.param
    if isinstance(error, RequestValidationError):
        return _invalid(error)
    if isinstance(error, HTTPException):
        return error.status_code, str(error.detail), None
    if isinstance(error, EngineError):
        return int(getattr(error, "status", 503)), str(error), None
    if isinstance(error, RagPipelineError | RetrievalError):
        return 400, str(error), None
    return None


def _invalid(error: RequestValidationError) -> tuple[int, str, str | None]:
    found = error.errors()
    if not found:
        return 400, "the request is not valid", None
    first = found[0]
    if first.get("type") == "json_invalid":
        reason = (first.get("ctx") or {}).get("error", "")
        return 400, f"the body is not JSON ({reason}); send one JSON object", None
    # Discriminators and union arms stand in `loc` beside the names that a client knows.
    names = [str(part) for part in first.get("loc", ())[1:]]
    where = ".".join(names)
    message = str(first.get("msg", "")).removeprefix("Value error, ")
    if first.get("type") == "value_error" and not where:
        return 400, message, None
    if not where:
        return 400, "the body must be one JSON object with content-type application/json", None
    given = ascii(first.get("input"))
    shown = given if len(given) <= _SHOWN else f"{given[:_SHOWN]}..."
    more = f"; and {len(found) - 1} more" if len(found) > 1 else ""
    if first.get("type") == "missing":
        return 400, f"{where} is missing{more}", where
    if first.get("type") == "extra_forbidden":
        return 400, f"{where} is not known here; leave it out{more}", where
    return 400, f"{where} is {shown}: {message}{more}", where


class RagRoute(APIRoute):
    """A route that bounds the body, refuses foreign origins, and answers every error in one line."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Wrap FastAPI's handler."""
        original = super().get_route_handler()
        # An upload's limit is known only when the server is configured.
        limit_of = getattr(self.endpoint, "body_limit", None)

        async def handler(request: Request) -> Response:
            limit = limit_of() if limit_of is not None else JSON_LIMIT_BYTES
            try:
                guard = getattr(request.app.state, "rag_guard", None)
                if guard is not None:
                    guard(request)
                bounded = Request(request.scope, _bounded(request, limit))
                return await original(bounded)
            except ClientDisconnect:
                return error_response(400, "the client closed the connection")
            except (RecursionError, UnicodeError):
                return error_response(
                    400, "the body cannot be read: nested too deeply or not UTF-8"
                )
            except Exception as error:
                refusal = _too_large(error) or refusal_of(error)
                if refusal is None:
                    logger.exception("A fault in %s %s", request.method, request.url.path)
                    return error_response(500, "a fault of this server; its log has the details")
                return error_response(*refusal)

        return handler


def _too_large(error: BaseException) -> tuple[int, str, str | None] | None:
    """Find our own 413 under the wrapping that a body parser put around it."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, ApiError):
            return seen.status, str(seen), seen.param
        seen = seen.__cause__ or seen.__context__
    return None


def _bounded(request: Request, limit: int) -> Callable[[], Coroutine[Any, Any, Any]]:
    """Receive at most `limit` bytes: the header may be missing or lie."""
    declared = request.headers.get("content-length", "")

    def refuse() -> None:
        raise ApiError(413, f"the body is larger than {limit} bytes; send less at once")

    if declared.isdigit() and int(declared) > limit:
        refuse()
    total = 0

    async def receive() -> Any:
        nonlocal total
        message = await request.receive()
        total += len(message.get("body", b""))
        if total > limit:
            refuse()
        return message

    return receive
