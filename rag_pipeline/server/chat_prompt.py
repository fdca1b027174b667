"""From a chat request to the prompt that it is answered from: checked, retrieved for, laid out, with a memory or without."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rag_pipeline.errors import RagPipelineError
from rag_pipeline.opened_memory import Asked, utterances
from rag_pipeline.prompts.chunk_message import ChunkMessage, lay_out_message, write_message
from rag_pipeline.prompts.document_order import check_document_order
from rag_pipeline.protocol import (
    PREFIX_POLICY,
    FusionChoice,
    FusionRequest,
    GenerationRequest,
    SamplingOptions,
)
from rag_pipeline.server.chat import ChatRun
from rag_pipeline.server.question_part import Conversation, read_conversation
from retrievers.distinct import FETCHED, distinct

if TYPE_CHECKING:
    from rag_pipeline.memory import MemoryConfig
    from rag_pipeline.server.memories import Remembered
    from rag_pipeline.server.schemas import ChatRequest
    from rag_pipeline.server.service import RagService
    from rag_pipeline.server.tenants import Tenant
    from rag_pipeline.types import PromptLayout
    from retrievers import SearchHit

DEFAULT_ANSWER_TOKENS = 256


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

    def write() -> ChunkMessage:
        return write_message(
            builder,
            talk.asked,
            found.hits,
            max_new_tokens=found.sampling.max_new_tokens,
            context_length=service.engine.context_length,
            told_tokens=memory.most_told_tokens,
            rules=talk.rules,
            document_order=found.body.rag.document_order,
        )

    message = await service.for_question(tenant, write)
    asked = Asked(
        system=builder.system_prompt,
        history=utterances(talk.turns),
        question=message.text,
        asked=talk.said,
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
