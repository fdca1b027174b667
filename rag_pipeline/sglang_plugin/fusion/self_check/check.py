"""Proof at start, on the loaded model and in the real scheduler, before any client's request is fused.

1. ``rotation``: turning keys forth and back gives them back, and two turns equal one.
2. ``own_place``: a stored chunk loaded where it was computed gives the log-probabilities of plain prefill: capture,
   store and load are sound.
3. ``ratio_1``: so does a moved chunk of which every row is computed again: rows, positions and masks are right.
4. ``moved``: policy ``query``, with its probing passes, draft and mean shift, over a moved chunk. In layer 0 the
   moved KV is that of plain prefill; in every layer it is what rotation and shift are defined to make of it.
5. ``probed``: the same passes over KV that is exact, which they are not told: it was computed behind the very tokens
   that stand before it. Whatever rows they choose, the answer is that of plain prefill.

The prompts are a hundred tokens long and have a salt of their own. A draft chooses rows, no more: a poor choice is
not found here, one that damages KV is.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from rag_kernels import RotarySpec, rerotate_keys
from rag_pipeline.protocol import FusionRequest
from rag_pipeline.sglang_plugin.fusion.request import internal as internal_requests
from rag_pipeline.sglang_plugin.fusion.request.state import state_of
from rag_pipeline.sglang_plugin.fusion.runtime.runtime import FusionRuntime
from rag_pipeline.sglang_plugin.fusion.self_check.kv import (
    LayerPairs,
    LoadPlan,
    first_layer_error,
    look_at,
    moved_error,
    take_from_pool,
)

logger = logging.getLogger(__name__)

_SALT = "rag-self-check"
_PREFIX, _CHUNK, _QUESTION = 8, 96, 8
_RATIO = 0.75
"""Of the probing policy: what its passes leave of the budget is enough for a draft, and for rows to shift."""
_TOP = 5
_FEWEST_COMMON = 3
_MAX_STEPS = 50
_TOLERANCE = {torch.float32: 0.01, torch.float16: 0.1, torch.bfloat16: 0.3}
"""Largest difference of a log-probability among the first five tokens. Re-batching plain prefill alone
moves them by up to about 0.2 in bf16 on a 135M model; a wrong mask or position moves them by more than 1."""
_KV_TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 4e-2}
"""Largest difference of a key or value, relative to the largest of its layer: a few roundings."""


class SelfCheckError(RuntimeError):
    """The fused path does not do what it promises on this model."""


def check_rotation(spec: RotarySpec, heads: int, head_dim: int) -> float:
    """Largest error of rotating forth and back, and of two rotations against one, relative to the keys.

    Raises
    ------
    SelfCheckError
        The error exceeds 1e-4: more than fp32 rounding of the angles explains.
    """
    keys = torch.randn(32, heads, head_dim, generator=torch.Generator().manual_seed(0))
    there = rerotate_keys(keys, 1234, spec)
    back = rerotate_keys(there, -1234, spec)
    twice = rerotate_keys(rerotate_keys(keys, 700, spec), 534, spec)
    error = float(max((back - keys).abs().max(), (twice - there).abs().max()) / keys.abs().max())
    if not error <= 1e-4:
        raise SelfCheckError(f"re-rotation round trip is off by {error:.2e} (relative)")
    return error


def run_self_check(runtime: FusionRuntime, scheduler: Any) -> dict[str, float]:
    """Run the five checks; the scheduler must be idle and its caches may be flushed.

    Every tensor-parallel rank computes all answers before any is judged, so that none leaves the others waiting.

    Returns
    -------
    dict
        The errors found, by name.

    Raises
    ------
    SelfCheckError
        With the check that failed and by how much.
    """
    facts = runtime.facts
    assert facts is not None
    drafts_before = _drafts(runtime)
    answers = _answers(runtime, scheduler)
    errors = {
        "rotation": max(
            check_rotation(spec, facts.num_kv_heads, facts.head_dim) for spec in facts.rotaries
        )
    }
    for name, against in (
        ("own_place", "plain"),
        ("ratio_1", "plain_moved"),
        ("probed", "plain_moved"),
    ):
        errors[name] = _difference(answers[against].log_probs, answers[name].log_probs)
    moved = answers["moved"]
    errors["moved"] = max(
        first_layer_error(moved.kv, answers["plain_moved"].kv),
        moved_error(moved.kv, moved.plan, moved.recomputed, facts.rotary_of),
    )
    dtype = scheduler.tp_worker.model_runner.dtype
    for name in ("own_place", "ratio_1", "moved", "probed"):
        _expect_fused(name, answers[name])
        table, what = (
            (_KV_TOLERANCE, "keys and values")
            if name == "moved"
            else (_TOLERANCE, "log-probabilities")
        )
        limit = table.get(dtype, table[torch.bfloat16])
        if not errors[name] <= limit:
            raise SelfCheckError(
                f"{name}: {what} are {errors[name]:.3f} away from plain prefill; allowed is {limit}"
            )
    asked = sum(answers[name].plan.draft_tokens > 0 for name in ("moved", "probed"))
    if _drafts(runtime) - drafts_before < asked:
        raise SelfCheckError("the draft of the answer was never computed")
    return errors


def _drafts(runtime: FusionRuntime) -> int:
    """Drafts that were computed, or left out for want of room."""
    counts = runtime.metrics.counts
    return counts["drafts.scored"] + counts["drafts.left_out"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Answer:
    """Log-probabilities of the likeliest first tokens by token id, and what the prompt left in the pool."""

    log_probs: dict[int, float]
    plan: LoadPlan
    recomputed: tuple[int, ...]
    kv: LayerPairs
    fallback: str


def _answers(runtime: FusionRuntime, scheduler: Any) -> dict[str, _Answer]:
    """Run every prompt of the check."""
    chunk_len = max(_CHUNK, runtime.config.min_reused_tokens)
    ids = torch.randint(
        0,
        int(scheduler.model_config.vocab_size),
        (_PREFIX + 2 * _QUESTION + chunk_len,),
        generator=torch.Generator().manual_seed(0),
    ).tolist()
    prefix, lead = ids[:_PREFIX], ids[_PREFIX : _PREFIX + _QUESTION]
    chunk, question = ids[_PREFIX + _QUESTION : -_QUESTION], ids[-_QUESTION:]
    own, moved = prefix + chunk + question, prefix + lead + chunk + question

    def ask(prompt: list[int], start: int = 0, **fields: Any) -> _Answer:
        # Flushed each time: what the radix tree still holds would not be computed, so not be checked. The allocator's
        # cache may stay: emptying it takes half a second on a CPU, where SGLang collects garbage for it.
        if not scheduler.flush_cache(empty_cache=False):
            raise SelfCheckError("the scheduler is not idle")
        spans = ((start, start + chunk_len),) if start else ()
        request = FusionRequest(spans=spans, prefix_len=_PREFIX if start else 0, **fields)
        return _answer(runtime, scheduler, prompt, request)

    behind, passage = _PREFIX + _QUESTION, runtime.passage
    try:
        ask(prefix + chunk, _PREFIX, mode="build", passage=False)
        answers = {
            "plain": ask(own, mode="off"),
            "own_place": ask(own, _PREFIX, policy="reuse", passage=False),
            "plain_moved": ask(moved, mode="off"),
            "ratio_1": ask(moved, behind, policy="full", passage=False),
            "moved": ask(moved, behind, policy="query", ratio=_RATIO, passage=False),
        }
        # With `lead` as the neutral passage, KV that saw it is exact where it stands; policies take it for approximate.
        runtime.passage = np.asarray(lead, dtype=np.int64)
        ask(prefix + chunk, _PREFIX, mode="build", passage=True)
        answers["probed"] = ask(moved, behind, policy="query", ratio=_RATIO)
        return answers
    finally:
        runtime.passage = passage
        scheduler.flush_cache(empty_cache=False)
        runtime.store.clear()


def _answer(
    runtime: FusionRuntime, scheduler: Any, prompt: list[int], request: FusionRequest
) -> _Answer:
    facts = runtime.facts
    assert facts is not None
    req = internal_requests.submit(scheduler, prompt, request, cache_salt=_SALT, top_logprobs=_TOP)
    if req is None:
        raise SelfCheckError(f"the scheduler declined a request of {len(prompt)} tokens")
    runner = scheduler.tp_worker.model_runner
    seen: list[LoadPlan] = []

    def look(schedule_batch: Any) -> None:
        if req in schedule_batch.reqs and req.extend_end >= len(req.origin_input_ids) and not seen:
            seen.append(look_at(req, runner, facts))

    for _ in range(_MAX_STEPS):
        if req.finished():
            break
        _step(scheduler, look)
    else:
        raise SelfCheckError(f"a request of {len(prompt)} tokens did not finish")
    while not scheduler.is_fully_idle():
        _step(scheduler)
    # Nothing else runs: the freed slots still hold what the request left there.
    values = req.logprob.output_top_logprobs_val[0]
    tokens = req.logprob.output_top_logprobs_idx[0]
    state = state_of(req)
    return _Answer(
        log_probs=dict(zip([int(t) for t in tokens], [float(v) for v in values], strict=True)),
        plan=seen[0],
        recomputed=() if state is None else tuple(state.recomputed),
        kv=take_from_pool(runner, seen[0].slots, facts.num_layers),
        fallback="" if state is None else state.report.fallback,
    )


def _expect_fused(name: str, answer: _Answer) -> None:
    if answer.fallback or not answer.plan.runs:
        raise SelfCheckError(f"{name}: not fused, {answer.fallback or 'nothing was loaded'}")
    if name in ("moved", "probed") and not answer.recomputed:
        raise SelfCheckError(f"{name}: the policy chose no token")


def _step(scheduler: Any, look: Callable[[Any], None] | None = None) -> None:
    """One turn of the scheduler's loop without overlap and without reading its sockets."""
    with torch.inference_mode():
        plan = scheduler.get_next_batch_to_run(
            running_batch=scheduler.running_batch, last_batch=scheduler.last_batch
        )
        scheduler.running_batch = plan.running_batch
        batch = plan.batch_to_run
        if batch:
            if look is not None:
                look(batch)
            result = scheduler.run_batch(batch)
            if scheduler.enable_overlap:
                scheduler.launch_batch_sample_if_needed(result, batch)
            scheduler.process_batch_result(batch, result)
        scheduler.last_batch = batch


def _difference(one: dict[int, float], two: dict[int, float]) -> float:
    """Largest difference over the tokens that both name; infinite where they name too few alike."""
    both = one.keys() & two.keys()
    if len(both) < _FEWEST_COMMON:
        return float("inf")
    return max(abs(one[token] - two[token]) for token in both)
