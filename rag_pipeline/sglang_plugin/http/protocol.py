"""HTTP/1.1 as uvicorn speaks it, with bounds that uvicorn has none for: connections, and time for a request.

A client that opens connections and sends nothing, or a byte now and then, costs nothing to run and would
otherwise hold a descriptor each for ever.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

__all__ = ["HttpLimits", "limited_protocol"]


@dataclass(frozen=True, kw_only=True, slots=True)
class HttpLimits:
    """Bounds of the HTTP server.

    Parameters
    ----------
    max_connections : int
        Open at once; a further one is answered 503 and closed.
    header_s : float
        Seconds from a connection, or the first byte of a further request, to the end of the header.
    body_s : float
        Seconds in which a body must end, or bring `body_step` more bytes.
    body_step : int
        See `body_s`.
    stop_s : float
        Seconds that requests have to end after SIGTERM.
    """

    max_connections: int = 1024
    header_s: float = 10.0
    body_s: float = 30.0
    body_step: int = 16 << 10
    stop_s: float = 15.0


def limited_protocol(limits: HttpLimits) -> type[asyncio.Protocol]:
    """Protocol class for ``uvicorn.Config(http=...)``."""

    class LimitedProtocol(H11Protocol):
        """uvicorn's protocol, which gives up on clients that do not get on."""

        _timer: asyncio.TimerHandle | None = None
        _in_body = _upgraded = False
        _body_bytes = 0

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > limits.max_connections:
                self._end(503, "too many connections; try again later", "retry-after: 1\r\n")
                return
            self._watch(limits.header_s)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            state, was_in_body = self.conn.their_state, self._in_body
            self._in_body = state is h11.SEND_BODY
            if self._upgraded or self.transport.is_closing():
                self._watch(None)
            elif self._in_body:
                self._body_bytes += len(data)
                if not was_in_body or self._body_bytes >= limits.body_step:
                    self._body_bytes = 0
                    self._watch(limits.body_s)
            elif state is not h11.IDLE or not self.conn.trailing_data[0]:
                # A whole request, or none.
                self._watch(None)
                self._keep_alive_again()
            elif was_in_body or self._timer is None:
                self._watch(limits.header_s)

        def _keep_alive_again(self) -> None:
            """Begin uvicorn's keep-alive time anew: it ends with every piece that comes.

            The rest of a body that was answered before it had come is such a piece, and no answer follows.
            """
            answered = self.cycle is not None and self.cycle.response_complete
            if answered and self.timeout_keep_alive_task is None:
                self.timeout_keep_alive_task = self.loop.call_later(
                    self.timeout_keep_alive, self.timeout_keep_alive_handler
                )

        def handle_websocket_upgrade(self, event: h11.Request) -> None:
            super().handle_websocket_upgrade(event)
            self._upgraded = True

        def connection_lost(self, exc: Exception | None) -> None:
            self._watch(None)
            super().connection_lost(exc)

        def _watch(self, seconds: float | None) -> None:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = None if seconds is None else self.loop.call_later(seconds, self._too_slow)

        def send_400_response(self, msg: str) -> None:
            """Refuse what is no HTTP; it may come in the body of a request that is being answered."""
            if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                self._end(400, "this is no valid HTTP/1.1 request")
            else:
                self.transport.close()
            if self.cycle is not None and not self.cycle.response_complete:
                # Whoever answers the request is told that its client went; uvicorn would let two answers collide.
                self.cycle.disconnected = True
                self.cycle.message_event.set()

        def _too_slow(self) -> None:
            self._timer = None
            if not self._in_body:
                self._end(408, "the header of the request did not come in time")
            elif self.flow.read_paused:
                self._watch(limits.body_s)  # it is this server that does not read on
            else:
                self.transport.close()  # whoever answers the request sees a client that went

        def _end(self, status: int, line: str, more: str = "") -> None:
            body = f'{{"error": {{"message": "{line}", "code": {status}}}}}'
            head = f"HTTP/1.1 {status} \r\nconnection: close\r\ncontent-type: application/json\r\n"
            size = f"content-length: {len(body)}\r\n"
            self.transport.write(f"{head}{more}{size}\r\n{body}".encode())
            self.transport.close()

    return LimitedProtocol
