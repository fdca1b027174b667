"""The page at ``/rag``: static files, no build step, nothing from outside."""

from __future__ import annotations

from functools import cache
from hashlib import sha256
from importlib.resources import files

from fastapi import APIRouter, Request
from fastapi.responses import Response

_SCRIPTS = ("api", "ask", "cache", "documents", "dom", "rag", "strip")

FILES = {
    "/rag": ("index.html", "text/html; charset=utf-8"),
    "/rag/rag.css": ("rag.css", "text/css; charset=utf-8"),
} | {f"/rag/{name}.js": (f"{name}.js", "text/javascript; charset=utf-8") for name in _SCRIPTS}

HEADERS = {
    # Nothing runs and nothing loads that is not one of the files above; answers are shown as text only.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


@cache
def _content(name: str) -> tuple[bytes, str]:
    data = (files("rag_pipeline.server") / "static" / name).read_bytes()
    return data, f'"{sha256(data).hexdigest()[:32]}"'


def make_page_router() -> APIRouter:
    """Serve the page's files, each with a tag of its content; not part of the schema."""
    router = APIRouter(include_in_schema=False)

    def add(path: str, name: str, media_type: str) -> None:
        async def send(request: Request) -> Response:
            data, tag = _content(name)
            if request.headers.get("if-none-match") == tag:
                return Response(status_code=304, headers={**HEADERS, "ETag": tag})
            return Response(data, media_type=media_type, headers={**HEADERS, "ETag": tag})

        router.add_api_route(path, send, methods=["GET", "HEAD"])

    for path, (name, media_type) in FILES.items():
        add(path, name, media_type)
    return router
