"""Exceptions that SGLang's own routes do not catch: a client's mistake is 4xx, a fault of the server 5xx, in one line.

SGLang's routes are written for requests of the right shape: a body that is no object, or a profile that is
stopped before it was started, ends in an exception and a bare 500.
"""

from __future__ import annotations

import logging
from json import JSONDecodeError
from types import CodeType, TracebackType

from fastapi.dependencies.utils import solve_dependencies
from starlette.requests import Request
from starlette.responses import Response

from rag_pipeline.errors import one_line
from rag_pipeline.server.access import Access, find_route
from rag_pipeline.server.errors import error_response, without_paths

logger = logging.getLogger(__name__)

TOLD = "rag_fault_told"
"""Mark in a request's state: its exception was answered and logged, and needs no more of either."""

_UNREADABLE = (JSONDecodeError, UnicodeError, RecursionError)
_CHECKS = frozenset(
    {
        "normalize_batch_and_arguments",
        "_create_tokenized_object",
        "_init_req_state",
        "_validate_one_request",
    }
)
"""Functions of SGLang that read a request's arguments."""
_UNFIT = (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError)


def answer_stock_fault(request: Request, error: Exception) -> Response:
    """Answer an exception that nothing of the application has caught.

    It is the client's mistake if it came up while FastAPI or SGLang read the request's arguments; if the body
    could not be decoded; and on a control route (:class:`.Access` OPERATOR, ADMIN) if it is of a kind that a
    request of the wrong shape or at the wrong time brings up: then the log has it in full.

    Parameters
    ----------
    request : Request
        What was asked.
    error : Exception
        What came up.
    """
    request.scope.setdefault("state", {})[TOLD] = True
    route, access = find_route(request.scope)
    what = f"{request.method} {route or request.url.path}"
    is_mistake = _is_mistake(error)
    if not is_mistake and not _is_unfit(error, access):
        logger.error("A fault in %s", what, exc_info=error)
        return error_response(500, "a fault of this server; its log has the details")
    line = without_paths(one_line(error))[:200] or type(error).__name__
    logger.warning("%s was refused: %s", what, line, exc_info=None if is_mistake else error)
    return error_response(400, f"{what} cannot take this request ({line})")


def _is_mistake(error: Exception) -> bool:
    codes = _codes(error.__traceback__)
    names = {code.co_name for code in codes}
    if solve_dependencies.__code__ in codes or names & _CHECKS:
        return True
    # `Request.json`, SGLang's own included.
    return isinstance(error, _UNREADABLE) and "json" in names


def _is_unfit(error: Exception, access: Access) -> bool:
    # Of RuntimeError itself: torch's kinds of it, such as being out of memory, are the server's.
    if access is Access.ADMIN and type(error) is RuntimeError:
        return True
    return access in (Access.ADMIN, Access.OPERATOR) and isinstance(error, _UNFIT)


def _codes(traceback: TracebackType | None) -> list[CodeType]:
    """Functions that an exception came through."""
    codes = []
    while traceback is not None:
        codes.append(traceback.tb_frame.f_code)
        traceback = traceback.tb_next
    return codes
