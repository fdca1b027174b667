"""``POST /v1/rag/chat/completions``: generate in the engine, answer as OpenAI does; :mod:`.chat_prompt` is before it."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rag_pipeline.protocol import DENSE_ATTENTION, fusion_report
from rag_pipeline.question_run import AnswerRun
from rag_pipeline.server.attribution import attribute
from rag_pipeline.server.errors import error_body, refusal_of
from rag_pipeline.server.memories import Remembered
from rag_pipeline.server.token_strip import segments_of

if TYPE_CHECKING:
    from starlette.requests import Request

    from rag_pipeline.server.schemas import ChatRequest
    from rag_pipeline.server.service import RagService
    from retrievers import SearchHit


def citation(number: int, hit: SearchHit, *, with_text: bool) -> dict[str, Any]:
    """JSON of a retrieved chunk."""
    chunk = hit.chunk
    return {
        "number": number,
        "chunk_id": chunk.id,
        "document_id": chunk.document_id,
        "title": chunk.title,
        "path": chunk.path,
        "score": hit.score,
        **({"text": chunk.text} if with_text else {}),
    }


@dataclass(kw_only=True, slots=True)
class ChatRun(AnswerRun):
    """One chat request on its way."""

    body: ChatRequest
    index_name: str
    params: dict[str, Any]
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def openai_finish(self) -> str:
        """OpenAI's word for the end."""
        return "length" if self.finish == "length" else "stop"

    def citations(self) -> list[dict[str, Any]]:
        """Chunks in prompt order, numbered from 1, with the tokens that they fill."""
        with_text = self.body.rag.include_text
        return [
            citation(number, hit, with_text=with_text) | {"tokens": [span.start, span.end]}
            for number, (hit, span) in enumerate(
                zip(self.layout.chunks, self.layout.chunk_spans, strict=True), start=1
            )
        ]

    @property
    def rid(self) -> str | None:
        """Id of the engine's request, where the memory waits for its report."""
        return self.remembered.rid if isinstance(self.remembered, Remembered) else None

    def ended(self) -> None:
        """Tell the memory, if there is one, that the answer is there."""
        if self.remembered is not None:
            self.remembered.ended(self.text.strip() or None)

    def openai_usage(self) -> dict[str, Any]:
        """OpenAI's usage; the four kinds of prompt tokens stand in its details and add up."""
        usage = self.usage
        return {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            "prompt_tokens_details": {
                "cached_tokens": usage.exact_prefix_tokens + usage.reused_tokens,
                "exact_prefix_tokens": usage.exact_prefix_tokens,
                "reused_tokens": usage.reused_tokens,
                "recomputed_tokens": usage.recomputed_tokens,
                "fresh_tokens": usage.fresh_tokens,
            },
        }

    def summary(self) -> dict[str, Any]:
        """The ``rag`` object of a finished answer, without its citations."""
        timing = self.timing()
        report = fusion_report(self.meta) or {}
        sources = [hit.chunk.text for hit in self.layout.chunks]
        usage = self.usage
        behind = usage.prompt_tokens - usage.exact_prefix_tokens
        fraction = float(report.get("computed_fraction", 1.0))
        return {
            "index": self.index_name,
            "policy": report.get("policy") or self.fusion.policy,
            "ratio": report.get("ratio") if report.get("policy") else self.fusion.ratio,
            "attention": report.get("attention", DENSE_ATTENTION),
            "fused": bool(usage.reused_tokens or usage.recomputed_tokens),
            "fallback": report.get("fallback", ""),
            # Of the work behind the exact prefix, as the engine counts it; and of the whole prompt.
            "computed_fraction": fraction,
            # Of the reused tokens, those that earlier turns left.
            "conversation_tokens": report.get("conversation_tokens", 0),
            "computed_fraction_of_prompt": round(fraction * behind / usage.prompt_tokens, 6),
            "segments": segments_of(self.layout, usage, report),
            "attributions": [item._asdict() for item in attribute(self.text, sources)],
            "dropped": [
                citation(number, hit, with_text=False)
                for number, hit in enumerate(self.layout.dropped, start=1)
            ],
            # Oldest turns of the conversation that did not fit any more.
            "truncated": self.layout.truncated.to_json(),
            # What the conversation was answered from, where that is not all of it.
            **({"memory": self.remembered.facts(self.meta)} if self.remembered else {}),
            "timing": {
                "retrieve_s": round(timing.retrieve_s, 6),
                # An answer that comes as one piece shows no first token.
                "ttft_s": round(timing.ttft_s, 6) if self.body.stream else None,
                "total_s": round(timing.total_s, 6),
            },
        }


async def complete(service: RagService, run: ChatRun, http_request: Request) -> dict[str, Any]:
    """Generate the whole answer."""
    try:
        async for piece in service.engine.generate(
            run.request,
            params=run.params,
            http_request=http_request,
            stream=False,
            rid=run.rid,
        ):
            run.take(piece)
    finally:
        run.ended()
    message = {"role": "assistant", "content": run.text.rstrip()}
    run.text = run.text.rstrip()
    return {
        "id": run.id,
        "object": "chat.completion",
        "created": run.created,
        "model": service.model_name,
        "choices": [
            {"index": 0, "message": message, "finish_reason": run.openai_finish, "logprobs": None}
        ],
        "usage": run.openai_usage(),
        "rag": {"citations": run.citations(), **await service.after(run.summary)},
    }


async def stream(
    service: RagService, run: ChatRun, http_request: Request
) -> AsyncGenerator[bytes, None]:
    """Yield server-sent events: sources first, then the answer, then the account of it.

    The first piece of text is awaited before anything is sent, so that a refusal of the engine is an
    HTTP status and not an event: the caller takes one step before it starts the response.
    """
    pieces = service.engine.generate(
        run.request,
        params=run.params,
        http_request=http_request,
        stream=True,
        rid=run.rid,
    )
    try:
        begun = False
        async for piece in pieces:
            text = run.take(piece)
            if not begun:
                begun = True
                opening = {"role": "assistant", "content": ""}
                yield _event(service, run, opening, rag={"citations": run.citations()})
            if text:
                yield _event(service, run, {"content": text})
        yield _event(
            service, run, {}, finish=run.openai_finish, rag=await service.after(run.summary)
        )
        if run.body.stream_options is not None and run.body.stream_options.include_usage:
            yield _event(service, run, None, usage=run.openai_usage())
    except Exception as error:
        refusal = refusal_of(error)
        if run.first is None or refusal is None:
            raise
        yield _line(error_body(*refusal))
    finally:
        await pieces.aclose()
        run.ended()
    yield b"data: [DONE]\n\n"


def _event(
    service: RagService,
    run: ChatRun,
    change: dict[str, Any] | None,
    *,
    finish: str | None = None,
    **more: Any,
) -> bytes:
    choice = {"index": 0, "delta": change, "finish_reason": finish, "logprobs": None}
    return _line(
        {
            "id": run.id,
            "object": "chat.completion.chunk",
            "created": run.created,
            "model": service.model_name,
            "choices": [] if change is None else [choice],
            **more,
        }
    )


def _line(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"
