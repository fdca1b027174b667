"""The two variants of a chunk's KV: right behind the prefix for its own place, behind the passage for every other."""

from __future__ import annotations

import dataclasses
from array import array
from typing import Any

import numpy as np

from rag_pipeline.protocol import FusionRequest
from rag_pipeline.sglang_plugin.fusion.runtime.runtime import FusionRuntime, KnownPrefix


def variant_at(start: int, prefix: KnownPrefix, with_passage: KnownPrefix | None) -> KnownPrefix:
    """Choose what a chunk is computed behind so that it serves best at a place of a prompt.

    Parameters
    ----------
    start : int
        Prompt position of the chunk. Right behind the prefix, plain KV is exact.
    prefix : KnownPrefix
        That the prompt begins with.
    with_passage : KnownPrefix or None
        The same with the passage behind it; None where there is none, or the request wants no KV that saw it.

    Returns
    -------
    KnownPrefix
        One of the two.
    """
    return prefix if start == prefix.ids.size or with_passage is None else with_passage


def build_behind_passage(runtime: FusionRuntime, req: Any, request: FusionRequest) -> FusionRequest:
    """Put the passage between the shared prefix and the chunk of a ``build`` request.

    Parameters
    ----------
    runtime : FusionRuntime
        Of this process.
    req : Req
        SGLang's; its prompt is replaced.
    request : FusionRequest
        With ``passage``, as the client sent it.

    Returns
    -------
    FusionRequest
        For the new prompt; mode ``off`` when there is no passage, or no room for it.
    """
    passage, start = runtime.passage, request.prefix_len
    length = len(req.origin_input_ids) + passage.size
    if not passage.size or not runtime.is_on or length >= runtime.max_prompt:
        return FusionRequest(mode="off")
    ids = np.insert(np.asarray(req.origin_input_ids, dtype=np.int64), start, passage)
    longer = array("q", ids.tobytes())
    req.origin_input_ids = req.origin_input_ids_unpadded = longer
    offset = start + int(passage.size)
    spans = tuple((s - start + offset, e - start + offset) for s, e in request.spans)
    return dataclasses.replace(request, spans=spans, prefix_len=offset, passage=None)
