"""Every refusal is one line of JSON in OpenAI's shape, whoever refused: the schema, the index, the engine."""

from __future__ import annotations

import errno
import logging
import re
import reprlib
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from rag_pipeline.errors import EngineError, ModelError, RagPipelineError
from retrievers.errors import (
    CorruptIndexError,
    EmbedderMismatchError,
    IndexBusyError,
    RetrievalError,
    StorageError,
)

logger = logging.getLogger(__name__)

_SHOWN = 80
_PATH = re.compile(r"(?<![\w.:/])(?:/[^\s/'\",;:()]+)+/([^\s/'\",;:()]+)/?")
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxdict, _SHORT.maxstring = 4, _SHOWN, _SHOWN, 2 * _SHOWN
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class ApiError(Exception):
    """A refusal with its HTTP status; the message is the one line that the client reads.

    Parameters
    ----------
    status : int
        HTTP status.
    message : str
        What was given, what is allowed, what to change.
    param : str, optional
        The field at fault, in OpenAI's errors.
    retry_s : int, optional
        Seconds after which it may be tried again, where that makes sense.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, retry_s: int | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.retry_s = retry_s


def error_body(status: int, message: str, param: str | None = None) -> dict[str, Any]:
    """Body of an error, as OpenAI's clients read it."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    line = " ".join(message.encode("utf-8", "replace").decode().split())
    return {"error": {"message": line, "type": kind, "param": param, "code": status}}


def error_response(
    status: int, message: str, param: str | None = None, *, retry_s: int | None = None
) -> JSONResponse:
    """One line in OpenAI's shape (:func:`error_body`); with `retry_s` it says when to try again."""
    headers = None if retry_s is None else {"Retry-After": str(retry_s)}
    return JSONResponse(error_body(status, message, param), status_code=status, headers=headers)


def answer_unknown_route(request: Request, error: Exception) -> Response:
    """Answer what no route took, stock routes included: a path that is not there, a method that it does not have."""
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path[:_SHOWN]!a}"
    lines = {404: f"no route {what} here", 405: f"no {what} here; the route takes other methods"}
    line = lines.get(error.status_code, str(error.detail))
    response = error_response(error.status_code, line)
    response.headers.update(error.headers or {})
    return response


def refusal_of(error: BaseException) -> tuple[int, str, str | None] | None:
    """Status, line and parameter to answer with; None for a fault that nobody foresaw.

    What the client can mend is 4xx. What is wrong with the server is 5xx, in a line without its paths.
    """
    if isinstance(error, ApiError):
        return error.status, str(error), error.param
    if isinstance(error, RequestValidationError):
        return _invalid(error)
    if isinstance(error, HTTPException):
        return error.status_code, str(error.detail), None
    if isinstance(error, EngineError):
        return int(getattr(error, "status", 503)), str(error), None
    if isinstance(error, IndexBusyError):
        return 503, "another process is changing the index; try again", None
    if isinstance(error, StorageError | OSError) and not isinstance(error, EngineError):
        return *_disk_fault(error.errno), None
    if isinstance(error, CorruptIndexError | EmbedderMismatchError | ModelError):
        return 503, "the index cannot be used on this server; its log has the details", None
    if isinstance(error, RagPipelineError | RetrievalError):
        return 400, without_paths(str(error)), None
    return None


def line_of(error: BaseException) -> str:
    """What a client reads of a fault that is told later: in a job, in health. As in an answer, no paths."""
    refusal = refusal_of(error)
    if refusal is None:
        return f"a fault of this server ({type(error).__name__}); its log has the details"
    return refusal[1]


def without_paths(line: str) -> str:
    """Line with the last name of each absolute path: where a server keeps its files is its own business."""
    return _PATH.sub(r"\1", line)


def _disk_fault(number: int | None) -> tuple[int, str]:
    """Status and line for a disk that refuses: 507 where it is full, else a fault of this server."""
    if number in (errno.ENOSPC, errno.EDQUOT):
        return 507, "the disk of this server is full; nothing was changed"
    return 500, "the disk of this server failed; its log has the details"


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
    given = _ascii_start(first.get("input"))
    shown = given if len(given) <= _SHOWN else f"{given[:_SHOWN]}..."
    more = f"; and {len(found) - 1} more" if len(found) > 1 else ""
    if first.get("type") == "missing":
        return 400, f"{where} is missing{more}", where
    if first.get("type") == "too_long" and (first.get("ctx") or {}).get("max_length") == 0:
        return 400, f"{where} is {shown}: it cannot be honoured here; leave it out{more}", where
    if first.get("type") == "string_pattern_mismatch" and not str(first.get("input")).strip():
        return 400, f"{where} is blank; give at least one word{more}", where
    if first.get("type") == "extra_forbidden":
        return 400, f"{where} is not known here; leave it out{more}", where
    return 400, f"{where} is {shown}: {message}{more}", where


def _ascii_start(value: Any) -> str:
    """As ``ascii(value)`` for the letters that are shown, whatever the size of the value."""
    if isinstance(value, str):
        return ascii(value[: _SHOWN + 1])
    return _SHORT.repr(value).encode("ascii", "backslashreplace").decode()


class RagRoute(APIRoute):
    """A route that answers every error in one line."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Wrap FastAPI's handler."""
        original = super().get_route_handler()

        async def handler(request: Request) -> Response:
            try:
                return await original(request)
            except ClientDisconnect:
                return error_response(400, "the client closed the connection")
            except (RecursionError, UnicodeError):
                return error_response(
                    400, "the body cannot be read: nested too deeply or not UTF-8"
                )
            except Exception as error:
                found = _under(error)
                refusal = refusal_of(found)
                # A full queue is refused by the hundred, and what opened an index has said why.
                foreseen = isinstance(found, ApiError | EngineError)
                if refusal is None or (refusal[0] >= 500 and not foreseen):
                    logger.error(
                        "A fault in %s %s", request.method, request.url.path, exc_info=error
                    )
                if refusal is None:
                    return error_response(500, "a fault of this server; its log has the details")
                return error_response(*refusal, retry_s=getattr(found, "retry_s", None))

        return handler


def _under(error: BaseException) -> BaseException:
    """Find our own refusal of a body under the wrapping that a body parser put around it."""
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, ApiError):
        seen = seen.__cause__ or seen.__context__
    return error if seen is None else seen
