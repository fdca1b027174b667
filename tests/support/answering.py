"""An HTTP server on this machine that gives fixed answers."""

from __future__ import annotations

import contextlib
import http.server
import json
import threading
from collections.abc import Iterator, Mapping
from typing import Any


@contextlib.contextmanager
def answering(answers: Mapping[str, tuple[int, Any]], *, with_key: bool = True) -> Iterator[str]:
    """Serve statuses and bodies by path; yields the URL.

    Parameters
    ----------
    answers : mapping of str to tuple
        Answers to GET: a text as it is, another body as JSON. 404 elsewhere.
    with_key : bool
        Whether a request without a key gets 401.
    """

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = answers.get(self.path, (404, {"detail": "Not Found"}))
            if with_key and "Authorization" not in self.headers:
                status, body = 401, {"error": "Unauthorized"}
            content = (body if isinstance(body, str) else json.dumps(body)).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
