"""``rag-pipeline cache ... --url``: the chunk cache of a running server, over its ``/v1/rag/cache`` routes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rag_pipeline.errors import EngineError, RagPipelineError

_CONNECT_S = 10.0
_ANSWER_S = 330.0
"""The server gives an order 300 s: a check reads every record of a disk."""
_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
_PAGE = 10_000


def parse_ttl(text: str | None) -> float | None:
    """Read how long a pin holds: a number and ``s`` (or nothing), ``m``, ``h``, ``d`` or ``w``; None for good.

    Raises
    ------
    RagPipelineError
        For anything else, zero, or more than ten years.
    """
    if text is None:
        return None
    from rag_pipeline.protocol.cache_order import MAX_TTL_S

    found = re.fullmatch(r"([0-9]{1,12}(?:\.[0-9]{1,6})?)([smhdw]?)", text.strip().lower())
    seconds = float(found[1]) * _UNITS[found[2]] if found else 0.0
    if not 0 < seconds <= MAX_TTL_S:
        raise RagPipelineError(
            f"--ttl is {text[:40]!r}; give a time above 0 and below ten years, like 90s, 30m, 2h, 7d or 1w"
        )
    return seconds


def admin_key(file: Path | None) -> str | None:
    """Key for the server: of a file or ``RAG_PIPELINE_ADMIN_API_KEY``, else ``RAG_PIPELINE_API_KEY``.

    Raises
    ------
    RagPipelineError
        Two sources, or what is no key.
    """
    from rag_pipeline.server.keys import ADMIN_API_KEY_VARIABLE, read_key

    admin = read_key(flag="--admin-api-key", given=None, file=file, variable=ADMIN_API_KEY_VARIABLE)
    return operator_key() if admin is None else admin


def operator_key() -> str | None:
    """Key of the operator, whose the chunks of the command line are: ``RAG_PIPELINE_API_KEY``."""
    from rag_pipeline.server.keys import API_KEY_VARIABLE, read_key

    return read_key(flag="--api-key", given=None, file=None, variable=API_KEY_VARIABLE)


def order_server(url: str, key: str | None, action: str, fields: Mapping[str, Any]) -> Any:
    """Have a server carry out an action, and return what it says.

    Parameters
    ----------
    url : str
        Base URL.
    key : str or None
        The administrator's.
    action : str
        Name of the command.
    fields : mapping
        Of the order; what is None is left out.

    Raises
    ------
    EngineError
        One line: nobody answers, the key does not open the route, the server refuses.
    """
    import httpx

    if "://" not in url:
        url = f"http://{url}"
    base = f"{url.rstrip('/')}/v1/rag/cache"
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    given = {name: value for name, value in fields.items() if value is not None}
    timeout = httpx.Timeout(_ANSWER_S, connect=_CONNECT_S)
    try:
        # trust_env would send requests for localhost through a proxy named in the environment.
        with httpx.Client(timeout=timeout, headers=headers, trust_env=False) as client:
            if action == "stats":
                response = client.get(base)
            elif action == "ls":
                response = client.get(f"{base}/entries", params=given | {"limit": _PAGE})
            else:
                response = client.post(f"{base}/{action}", json=given)
        answer = response.json()
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise EngineError(
            f"no server answers at {url} ({type(error).__name__}); check --url, and that it runs"
        ) from None
    except ValueError:
        raise EngineError(
            f"{base} answered {response.status_code} and no JSON; is it a rag-pipeline server?"
        ) from None
    if response.status_code != 200:
        message = (answer.get("error") or {}).get("message") if isinstance(answer, dict) else None
        raise EngineError(
            f"the server refused {action} ({response.status_code}): {message or 'no reason given'}"
        )
    return answer
