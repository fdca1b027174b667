"""``POST /v1/rag/chat/completions``: retrieve, lay out, generate in the engine, answer as OpenAI does."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rag_pipeline.errors import RagPipelineError
from rag_pipeline.memory import Utterance
from rag_pipeline.opened_memory import Asked, told_tokens
from rag_pipeline.prompts.chunk_message import ChunkMessage, lay_out_message, write_message
from rag_pipeline.prompts.document_order import check_document_order
from rag_pipeline.protocol import (
    DENSE_ATTENTION,
    PREFIX_POLICY,
    FusionChoice,
    FusionRequest,
    GenerationRequest,
    SamplingOptions,
    fusion_report,
)
from rag_pipeline.question_run import AnswerRun
from rag_pipeline.server.attribution import attribute
from rag_pipeline.server.errors import error_body, refusal_of
from rag_pipeline.server.memories import Remembered
from rag_pipeline.server.question_part import Conversation, read_conversation
from rag_pipeline.server.token_strip import segments_of
from retrievers.distinct import FETCHED, distinct

if TYPE_CHECKING:
    from starlette.requests import Request

    from rag_pipeline.memory import MemoryConfig
    from rag_pipeline.server.schemas import ChatRequest
    from rag_pipeline.server.service import RagService
    from rag_pipeline.server.tenants import Tenant
    from rag_pipeline.types import PromptLayout
    from retrievers import SearchHit

DEFAULT_ANSWER_TOKENS = 256


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """A checked request with what was retrieved for it."""

    body: ChatRequest
    index_name: str
    talk: Conversation
    hits: list[SearchHit]
    fusion: FusionChoice
    sampling: SamplingOptions
    started: float
    retrieved: float


async def start(service: RagService, tenant: Tenant, body: ChatRequest) -> ChatRun:
    """Do everything before the engine, in worker threads.

    Raises
    ------
    ApiError, RagPipelineError, RetrievalError
        Whatever the request has wrong.
    """
    memory = memory_of(service, body)
    if memory is None:
        return await service.for_question(tenant, prepare, service, tenant, body)
    found = await service.for_question(tenant, search, service, tenant, body)
    run = await remember(service, tenant, found, memory)
    if run is not None:
        return run
    return await service.for_question(tenant, lay_out, service, found)


def prepare(service: RagService, tenant: Tenant, body: ChatRequest) -> ChatRun:
    """Search and lay out, without a memory; runs in a worker thread.

    Raises
    ------
    ApiError, RagPipelineError, RetrievalError
        Whatever the request has wrong.
    """
    return lay_out(service, search(service, tenant, body))


def memory_of(service: RagService, body: ChatRequest) -> MemoryConfig | None:
    """Memory that a request is answered from; None for all of its conversation."""
    options = body.rag
    wish = options.memory
    given = wish if wish is None or isinstance(wish, str) else wish.model_dump(exclude_none=True)
    memory = service.memories.config(given)
    # Of these a request may have one; what it says of them wins over the server's default memory.
    others = [name for name in ("conversation", "attention") if getattr(options, name)]
    if options.policy == PREFIX_POLICY:
        others.append("policy")
    if memory is None or not others:
        return memory
    if wish is None:
        service.memories.left_alone(others[0])
        return None
    raise RagPipelineError(
        f"rag.memory beside rag.{others[0]} {getattr(options, others[0])!r:.80}; leave one out"
    )


def search(service: RagService, tenant: Tenant, body: ChatRequest) -> Found:
    """Check a request, and retrieve for it.

    Raises
    ------
    ApiError, RagPipelineError, RetrievalError
        Whatever it has wrong.
    """
    started = time.perf_counter()
    options = body.rag
    fusion = FusionChoice.of(options, policy=service.settings.policy)
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    sampling = SamplingOptions(
        max_new_tokens=body.answer_tokens or DEFAULT_ANSWER_TOKENS,
        temperature=body.temperature or 0.0,
        top_p=1.0 if body.top_p is None else body.top_p,
        stop=stop,
    )
    if options.conversation and fusion.is_exact:
        raise RagPipelineError(
            f"rag.conversation is {options.conversation!r:.80} with policy {PREFIX_POLICY!r}, which keeps no turns; "
            "name another policy, or leave the conversation out"
        )
    # What does not exist is refused before anything is searched; a method too: the engine's packages are ours.
    fusion.request(()).make_attention()
    if options.document_order is not None:
        check_document_order(options.document_order)
    index = service.indexes.get(tenant, options.index)
    talk = read_conversation(body.messages)
    wanted = options.k or service.settings.top_k
    hits = index.search(
        options.query or talk.query,
        k=FETCHED * wanted,
        mode=options.search or service.settings.search,
        where=options.where,
    )
    return Found(
        body=body,
        index_name=index.name,
        talk=talk,
        hits=distinct(hits, wanted),
        fusion=fusion,
        sampling=sampling.filled(
            repetition_penalty=service.builder.repetition_penalty, stop=talk.echo
        ),
        started=started,
        retrieved=time.perf_counter(),
    )


def lay_out(service: RagService, found: Found) -> ChatRun:
    """Lay out a prompt with all of its conversation that fits.

    Raises
    ------
    RagPipelineError
        A question that does not fit.
    """
    options, talk = found.body.rag, found.talk
    layout = service.builder.build(
        talk.asked,
        found.hits,
        max_new_tokens=found.sampling.max_new_tokens,
        context_length=service.engine.context_length,
        history=talk.turns,
        rules=talk.rules,
        truncation=options.truncation,
        document_order=options.document_order,
    )
    fusion = found.fusion.request(layout.chunk_spans, conversation=options.conversation or "")
    return _run(found, layout, fusion)


async def remember(
    service: RagService, tenant: Tenant, found: Found, memory: MemoryConfig
) -> ChatRun | None:
    """Lay out a prompt whose conversation is a memory; None for one that is short enough as it is.

    Raises
    ------
    RagPipelineError
        A question that does not fit.
    """
    builder, talk = service.builder, found.talk
    history = tuple(
        Utterance(message.role, message.text) for turn in talk.turns for message in turn
    )

    def write() -> ChunkMessage:
        return write_message(
            builder,
            talk.asked,
            found.hits,
            max_new_tokens=found.sampling.max_new_tokens,
            context_length=service.engine.context_length,
            told_tokens=told_tokens(memory),
            rules=talk.rules,
            document_order=found.body.rag.document_order,
        )

    message = await service.for_question(tenant, write)
    asked = Asked(
        system=builder.system_prompt, history=history, question=message.text, asked=talk.said
    )
    remembered = await service.memories.prepare(memory, tenant, asked, found.sampling)
    if remembered is None:
        return None
    layout = await service.for_question(
        tenant, lay_out_message, builder, message, remembered.input_ids
    )
    return _run(found, layout, remembered.fusion, remembered)


def _run(
    found: Found, layout: PromptLayout, fusion: FusionRequest, remembered: Remembered | None = None
) -> ChatRun:
    params = found.sampling.to_params()
    for name in ("presence_penalty", "frequency_penalty"):
        value = getattr(found.body, name)
        if value is not None:
            params[name] = value
    return ChatRun(
        body=found.body,
        index_name=found.index_name,
        layout=layout,
        request=GenerationRequest(
            input_ids=layout.input_ids, fusion=fusion, sampling=found.sampling
        ),
        fusion=found.fusion if remembered is None else FusionChoice(),
        params=params,
        remembered=remembered,
        started=found.started,
        retrieved=found.retrieved,
    )


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
