"""The ``/v1/rag`` routes, added to SGLang's own app."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any, BinaryIO

from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import ValidationError

from rag_pipeline.server import chat, chat_prompt
from rag_pipeline.server.errors import ApiError, RagRoute
from rag_pipeline.server.file_names import safe_name, shown
from rag_pipeline.server.indexes import ServedIndex
from rag_pipeline.server.schemas import (
    ChatAnswer,
    ChatRequest,
    DeletedAnswer,
    DocumentsAnswer,
    DocumentsRequest,
    ErrorAnswer,
    HealthAnswer,
    IndexName,
    JobAnswer,
    ModelEntry,
    ModelsAnswer,
    SearchAnswer,
    SearchRequest,
)
from rag_pipeline.server.service import RagService
from rag_pipeline.server.tenants import Tenant

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer, "description": "One line that says what to change."}
    for status in (400, 401, 403, 404, 405, 409, 413, 429, 500, 503)
}
_SSE: dict[str, dict[str, Any]] = {
    "text/event-stream": {}
}  # of a stream, tools read a schema as that of one event
_NDOCS = 1000
_TEXTS_LIMIT = 4 << 20
"""Texts in JSON are decoded in this process; files are not."""

IndexQuery = Annotated[IndexName | None, Query(description="Name of an index of this key.")]


def make_router(service: RagService) -> APIRouter:
    """Build the router for one server."""
    router = APIRouter(prefix="/v1/rag", route_class=RagRoute, responses=ERRORS, tags=["rag"])

    @router.post(
        "/chat/completions",
        response_model=ChatAnswer,
        responses={200: {"content": _SSE, "description": "The answer; events with `stream`."}},
    )
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answer from the indexed documents; OpenAI's schema with `rag` beside it."""
        tenant = service.tenant(request)
        run = await chat_prompt.start(service, tenant, body)
        if not body.stream:
            return JSONResponse(await chat.complete(service, run, request))
        events = chat.stream(service, run, request)
        first = await anext(events)
        return StreamingResponse(
            _after(first, events),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
        )

    @router.get("/models", response_model=ModelsAnswer)
    async def models() -> Response:
        """List the model that answers here; clients ask before they chat."""
        return JSONResponse({"object": "list", "data": [service.model_entry()]})

    @router.get("/models/{model:path}", response_model=ModelEntry)
    async def model(model: Annotated[str, Path(min_length=1, max_length=512)]) -> Response:
        """Look up the model that answers here."""
        entry = service.model_entry()
        if model not in (entry["id"], "default"):
            raise ApiError(404, f"no model {model[:200]!r} here; this server has {entry['id']!r}")
        return JSONResponse(entry)

    @router.post("/search", response_model=SearchAnswer)
    async def search(body: SearchRequest, request: Request) -> Response:
        """Search without an answer."""
        tenant = service.tenant(request)
        index = service.indexes.get(tenant, body.index)
        mode = body.search or service.settings.search

        def find() -> list[dict[str, Any]]:
            k = body.k or service.settings.top_k
            hits = index.search(body.query, k=k, mode=mode, where=body.where)
            return [chat.citation(n, hit, with_text=True) for n, hit in enumerate(hits, start=1)]

        data = await service.in_thread(tenant, find)
        return JSONResponse({"object": "list", "index": index.name, "data": data})

    @router.post(
        "/documents", response_model=JobAnswer, status_code=202, openapi_extra=_upload_body()
    )
    async def add_documents(request: Request) -> Response:
        """Upload files (multipart, field `file`) or texts (JSON); ingested in the background."""
        tenant = service.tenant(request)
        service.jobs.check_room(tenant.name)
        job = await _take_upload(service, tenant, request)
        return JSONResponse(job, status_code=202)

    @router.get("/documents", response_model=DocumentsAnswer)
    async def list_documents(
        request: Request,
        index: IndexQuery = None,
        offset: Annotated[int, Query(ge=0, le=1 << 40)] = 0,
        limit: Annotated[int, Query(ge=1, le=_NDOCS)] = 100,
    ) -> Response:
        """List the documents of an index, and this key's uploads to it."""
        tenant = service.tenant(request)
        served = service.indexes.get(tenant, index)
        total, page = await service.in_thread(
            tenant, lambda: served.documents(offset=offset, limit=limit)
        )
        jobs = [job.to_json() for job in service.jobs.of(tenant.name, served.name)]
        data = [{"id": name, "chunks": chunks} for name, chunks in page]
        return JSONResponse(
            {"object": "list", "index": served.name, "total": total, "data": data, "jobs": jobs}
        )

    @router.delete("/documents/{document_id:path}", response_model=DeletedAnswer)
    async def delete_document(
        request: Request,
        document_id: Annotated[str, Path(min_length=1, max_length=1024)],
        index: IndexQuery = None,
    ) -> Response:
        """Remove a document, or an uploaded file with all its records, behind the uploads before it."""
        tenant = service.tenant(request)
        served = service.indexes.get(tenant, index)
        chunks = await asyncio.wrap_future(service.jobs.delete(tenant.name, served, document_id))
        return JSONResponse(
            {
                "id": document_id,
                "object": "rag.document.deleted",
                "deleted": True,
                "chunks": chunks,
            }
        )

    @router.get("/jobs/{job_id}", response_model=JobAnswer)
    async def job_progress(
        request: Request, job_id: Annotated[str, Path(max_length=64)]
    ) -> Response:
        """Progress of one upload."""
        return JSONResponse(service.jobs.get(service.tenant(request).name, job_id).to_json())

    @router.delete("/jobs/{job_id}", response_model=JobAnswer)
    async def cancel_job(request: Request, job_id: Annotated[str, Path(max_length=64)]) -> Response:
        """End an upload that waits or runs; it is then `failed` with the error `cancelled`."""
        tenant = service.tenant(request).name
        job = await asyncio.to_thread(service.jobs.cancel, tenant, job_id)
        return JSONResponse(job.to_json())

    @router.get(
        "/health",
        response_model=HealthAnswer,
        responses={503: {"model": HealthAnswer, "description": "The plugin is not active."}},
    )
    async def health(request: Request) -> Response:
        """Whether the plugin is active and fusion on; what indexes and cache hold."""
        report = await service.health.report(service.tenant(request))
        return JSONResponse(report, status_code=200 if report["activation"]["active"] else 503)

    return router


async def _after(first: bytes, rest: Any) -> Any:
    try:
        yield first
        async for event in rest:
            yield event
    finally:
        await rest.aclose()


async def _take_upload(service: RagService, tenant: Tenant, request: Request) -> dict[str, Any]:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        return await _take_files(service, tenant, request)
    if kind == "application/json":
        return await _take_texts(service, tenant, request)
    raise ApiError(
        400,
        f"content-type is {kind[:60]!r}; send multipart/form-data with files, or application/json with "
        "texts",
    )


async def _take_texts(service: RagService, tenant: Tenant, request: Request) -> dict[str, Any]:
    content = await _read_body(request, _TEXTS_LIMIT)
    try:
        body = await asyncio.to_thread(
            lambda: DocumentsRequest.model_validate(json.loads(bytes(content)))
        )
    except ValidationError as error:
        from fastapi.exceptions import RequestValidationError

        found = [
            {**item, "loc": ("body", *item["loc"])} for item in error.errors(include_url=False)
        ]
        raise RequestValidationError(found) from None
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON ({str(error)[:120]}); send one object") from None
    index = service.indexes.get(tenant, body.index)
    named = [
        (
            document.name if "." in document.name else f"{document.name}.txt",
            [document.text.encode()],
        )
        for document in body.documents
    ]
    return await asyncio.to_thread(_submit, service, tenant, index, named)


async def _read_body(request: Request, limit: int) -> bytearray:
    """Read a body that is decoded here, in one piece."""
    content = bytearray()
    async for piece in request.stream():
        content += piece
        if len(content) > limit:
            raise ApiError(
                413,
                f"the JSON is larger than {limit >> 20} MiB; send the texts as files in "
                "multipart/form-data",
            )
    return content


async def _take_files(service: RagService, tenant: Tenant, request: Request) -> dict[str, Any]:
    limit = service.settings.max_upload_files
    async with request.form(max_files=limit, max_fields=8, max_part_size=1 << 16) as form:
        unknown = sorted(set(form) - {"file", "index"})
        if unknown:
            raise ApiError(
                400, f"form field {unknown[0][:80]!r} is not known; allowed: file, index"
            )
        uploads = [upload for upload in form.getlist("file") if not isinstance(upload, str)]
        if not uploads or len(uploads) != len(form.getlist("file")):
            raise ApiError(400, "form field 'file' must hold at least one file with a name")
        wanted = form.get("index")
        index = service.indexes.get(tenant, str(wanted) if wanted else None)
        named = [(upload.filename or "", _pieces(upload.file)) for upload in uploads]
        return await asyncio.to_thread(_submit, service, tenant, index, named)


def _pieces(file: BinaryIO) -> Iterator[bytes]:
    while piece := file.read(1 << 20):
        yield piece


def _submit(
    service: RagService,
    tenant: Tenant,
    index: ServedIndex,
    named: Sequence[tuple[str, Iterable[bytes]]],
) -> dict[str, Any]:
    """Write the files to the spool and queue them; a name that is refused costs its own file only."""
    jobs = service.jobs
    refused: list[dict[str, str]] = []
    try:
        folder = jobs.new_folder()
        try:
            for given, pieces in named:
                try:
                    name = safe_name(given)
                except ApiError as error:
                    if len(refused) + 1 == len(named):
                        raise
                    refused.append({"name": shown(given), "reason": str(error)})
                    continue
                jobs.add_file(folder, name, pieces)
            return jobs.submit(tenant.name, index, folder, refused=refused).to_json()
        except BaseException:
            jobs.drop(folder)
            raise
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ApiError(
            503, f"the upload cannot be kept on this server's disk ({reason}); try again later"
        ) from error


def _upload_body() -> dict[str, Any]:
    """Write the two bodies of an upload for the OpenAPI document; FastAPI sees only a raw request."""
    texts = DocumentsRequest.model_json_schema(ref_template="#/components/schemas/{model}")
    item = texts.pop("$defs")["JsonDocument"]
    texts["properties"]["documents"]["items"] = item
    files = {
        "type": "object",
        "required": ["file"],
        "additionalProperties": False,
        "properties": {
            "file": {
                "type": "array",
                "minItems": 1,
                "items": {"type": "string", "format": "binary"},
            },
            "index": {"type": "string"},
        },
    }
    content = {"application/json": {"schema": texts}, "multipart/form-data": {"schema": files}}
    return {"requestBody": {"required": True, "content": content}}
