"""One request on its way through: its id, its size, how it ended, and the line in the log that says so.

The line is one JSON object. It holds who, what and how long, never what was asked or answered, and no key.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
import uuid
from typing import Any

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from rag_pipeline.server.budget import RETRY_S, Held
from rag_pipeline.server.errors import ApiError, error_response

_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_OURS = ("/v1/rag", "/rag")

logger = logging.getLogger("rag_pipeline.requests")


def log_requests() -> None:
    """Write the lines to the standard error, whatever level SGLang's own log has."""
    if not logger.handlers:
        logger.addHandler(logging.StreamHandler(sys.stderr))
    logger.setLevel(logging.INFO)
    logger.propagate = False


class Exchange:
    """A request and its response, as the guard passes them through.

    Parameters
    ----------
    scope, receive, send : Scope, Receive, Send
        Of ASGI.
    template : str
        Path template of the route; empty for none.
    limit : int
        Largest body in bytes.
    """

    def __init__(
        self, scope: Scope, template: str, receive: Receive, send: Send, *, limit: int
    ) -> None:
        self.scope = scope
        self.tenant = ""
        self.held: Held | None = None
        """Room that its body takes up; none for what is answered however full the server is."""
        self.id = _request_id(scope)
        self._template = template
        self._receive = receive
        self._send = send
        self._limit = limit
        self._started = time.perf_counter()
        self._received = self._sent = self._status = 0
        self._refusal: ApiError | None = None
        self._replaced = self._gone = False
        declared = [value for name, value in scope["headers"] if name == b"content-length"]
        self._declared = int(declared[0]) if declared and declared[0].isdigit() else 0

    @property
    def announced(self) -> int:
        """Bytes of the body as its header has them; none of a body that will not be read."""
        return self._declared if self._declared <= self._limit else 0

    @property
    def begun(self) -> bool:
        """Whether a response has begun."""
        return bool(self._status)

    async def receive(self) -> Message:
        """Receive at most `limit` bytes, and while there is room: the header may be missing or lie."""
        self._check_body(self._declared)
        message = await self._receive()
        self._received += len(message.get("body", b""))
        self._gone = self._gone or message["type"] == "http.disconnect"
        is_whole = message["type"] == "http.request" and not message.get("more_body", False)
        self._check_body(self._received, is_whole=is_whole)
        return message

    def _check_body(self, size: int, *, is_whole: bool = False) -> None:
        if self._refusal is None and size > self._limit:
            self._refusal = ApiError(
                413, f"the body is larger than {self._limit} bytes; send less at once"
            )
        if self._refusal is None and self.held is not None:
            try:
                self.held.reserve(size)
                if is_whole:
                    self.held.body_came()
            except ApiError as refusal:
                self._refusal = refusal
        if self._refusal is not None:
            raise self._refusal

    async def send(self, message: Message) -> None:
        """Pass a response on, with the request's id; a body that was refused is always told so."""
        if message["type"] == "http.response.start":
            refusal = self._refusal
            if refusal is not None and message["status"] != refusal.status:
                # SGLang's routes call a body that could not be read a fault in its text.
                self._replaced = True
                response = error_response(refusal.status, str(refusal), retry_s=refusal.retry_s)
                await response(self.scope, self._receive, self._pass_on)
                return
            await self._pass_on(message)
        elif not self._replaced:
            await self._pass_on(message)

    async def _pass_on(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            headers = list(message.get("headers", []))
            names = {name.lower() for name, _ in headers}
            headers.append((b"x-request-id", self.id.encode()))
            if self._status in (429, 503) and b"retry-after" not in names:
                headers.append((b"retry-after", str(RETRY_S).encode()))
            message = {**message, "headers": headers}
        self._sent += len(message.get("body", b""))
        if self._sent and self.held is not None:
            # Not at the start of the response: SGLang's streams begin before the prompt is read.
            self.held.end_body()
        await self._send(message)

    async def refuse_websocket(self, response: Response) -> None:
        """Refuse before the handshake: with the status where the server can say it, else by closing."""
        self._status = response.status_code
        await self._receive()
        if "websocket.http.response" in self.scope.get("extensions", {}):
            kind = "websocket.http.response"
            headers = response.raw_headers
            await self._send(
                {"type": f"{kind}.start", "status": response.status_code, "headers": headers}
            )
            await self._send({"type": f"{kind}.body", "body": response.body})
        else:
            await self._send({"type": "websocket.close", "code": 1008})

    def end(self, *, refused: str = "") -> None:
        """Write the line: for this project's routes, and for whatever was refused at the door."""
        if not refused and not self._template.startswith(_OURS):
            return
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "request_id": self.id,
            "tenant": self.tenant,
            "method": self.scope.get("method", "WEBSOCKET"),
            "route": self._template,
            "status": self._status or (499 if self._gone else 500),
            "seconds": round(time.perf_counter() - self._started, 6),
            "bytes_in": self._received,
            "bytes_out": self._sent,
        }
        if self._gone:
            line["client_gone"] = True
        if refused:
            line["refused"] = refused
        logger.info(json.dumps(line, ensure_ascii=True))


def _request_id(scope: Scope) -> str:
    """Id that the client sent, where a log and a header can carry it; else a new one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            given = value.decode("latin-1").strip()
            return given if _ID.fullmatch(given) else uuid.uuid4().hex
    return uuid.uuid4().hex
