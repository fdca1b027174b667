"""Requests that have a chunk computed ahead of the questions about it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rag_pipeline.protocol import GenerationRequest, SamplingOptions, build_requests

if TYPE_CHECKING:
    from rag_pipeline.prompts.builder import PromptBuilder
    from retrievers.types import Chunk


def warm_requests(builder: PromptBuilder, chunk: Chunk) -> list[GenerationRequest]:
    """Return the requests that leave a chunk's KV in the engine's store, behind the shared prefix.

    Parameters
    ----------
    builder : PromptBuilder
        Lays out the prompts of the questions.
    chunk : Chunk
        As the retriever returns it.
    """
    prefix, ids = builder.system_ids, builder.chunk_ids(chunk)
    return [
        GenerationRequest(
            input_ids=(*prefix, *ids), fusion=fusion, sampling=SamplingOptions(max_new_tokens=1)
        )
        for fusion in build_requests(len(prefix), len(ids))
    ]
