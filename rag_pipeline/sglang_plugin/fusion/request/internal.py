"""Requests that the scheduler process makes for itself: chunk builds and the self-check.

They pass through SGLang's own queue, batches and pools like any other request; only their output is kept back, since
no client waits for it.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Sequence
from typing import Any

from chunk_cache import as_prompt_ids
from rag_pipeline.protocol import FusionRequest

INTERNAL_RID = "rag-internal-"
"""Request ids that begin so belong to this process; clients' ids are refused this beginning."""

_NUMBERS = itertools.count(1)


def submit(
    scheduler: Any,
    token_ids: Sequence[int],
    request: FusionRequest,
    *,
    extra_key: str | None = None,
    cache_salt: str | None = None,
    top_logprobs: int = 0,
) -> Any:
    """Queue a request for one new token.

    Parameters
    ----------
    scheduler : Scheduler
        SGLang's.
    token_ids : sequence of int
        The prompt.
    request : FusionRequest
        What fusion is to do with it.
    extra_key, cache_salt : str, optional
        Namespace, as of the request that this one works for.
    top_logprobs : int
        Log-probabilities of this many first tokens are kept on the request.

    Returns
    -------
    Req or None
        SGLang's request; None if the scheduler declined it (its queue is full).
    """
    from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
    from sglang.srt.sampling.sampling_params import SamplingParams

    params = SamplingParams(
        temperature=0.0,
        max_new_tokens=1,
        ignore_eos=True,
        custom_params=request.to_custom_params(),
    )
    params.normalize(None)
    rid = f"{INTERNAL_RID}{next(_NUMBERS)}"
    before = len(scheduler.waiting_queue)
    scheduler.handle_generate_request(
        TokenizedGenerateReqInput(
            rid=rid,
            input_text="",
            input_ids=array("q", as_prompt_ids(token_ids).tobytes()),
            input_embeds=None,
            mm_inputs=None,
            token_type_ids=[],
            sampling_params=params,
            return_logprob=top_logprobs > 0,
            logprob_start_len=-1,
            top_logprobs_num=top_logprobs,
            token_ids_logprob=None,
            stream=False,
            extra_key=extra_key,
            cache_salt=cache_salt,
        )
    )
    if len(scheduler.waiting_queue) <= before:
        return None
    return scheduler.waiting_queue[-1]


def is_internal(req: Any) -> bool:
    """Whether this process made the request."""
    return str(req.rid).startswith(INTERNAL_RID)


def running(scheduler: Any) -> int:
    """Requests of this process that have not ended, wherever the scheduler has them."""
    reqs = {*scheduler.waiting_queue, *scheduler.collect_inflight_reqs(), scheduler.chunked_req}
    return sum(req is not None and is_internal(req) and not req.finished() for req in reqs)


def before_stream_output(
    streamer: Any, reqs: list[Any], *args: Any, **kwargs: Any
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Run before ``SchedulerOutputStreamer.stream_output``: keep the output of our own requests."""
    ours = [req for req in reqs if is_internal(req)]
    if not ours:
        return None
    for req in ours:
        if req.finished():
            req.finished_output = True
    others = [req for req in reqs if not is_internal(req)]
    return (streamer, others, *args), kwargs
