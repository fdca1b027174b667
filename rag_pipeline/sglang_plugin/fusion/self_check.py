"""Proof at start, on the loaded model and in the real scheduler, before any client's request is fused.

1. Re-rotation forth and back gives the keys back, and two rotations equal one, within fp32 rounding.
2. A prompt with ratio 1 through the fused path gives the log-probabilities of plain prefill.
3. A stored chunk loaded at its own position gives them too: capture, store and load are sound.

The three prompts are a few dozen tokens long and have a salt of their own.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from rag_kernels import RotarySpec, rerotate_keys
from rag_pipeline.sglang_plugin.fusion import internal_requests
from rag_pipeline.sglang_plugin.fusion.request_spans import FusionRequest
from rag_pipeline.sglang_plugin.fusion.runtime import FusionRuntime

logger = logging.getLogger(__name__)

_SALT = "rag-self-check"
_PREFIX, _CHUNK, _QUESTION = 16, 48, 8
_TOP = 5
_FEWEST_COMMON = 3
_FUSED_REQUESTS = 2
_MAX_STEPS = 50
_TOLERANCE = {torch.float32: 0.01, torch.float16: 0.1, torch.bfloat16: 0.3}
"""Largest difference of a log-probability among the first five tokens. Re-batching plain prefill alone
moves them by up to about 0.2 in bf16 on a 135M model; a wrong mask or position moves them by more than 1."""


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
    """Run the three checks; the scheduler must be idle and its caches may be flushed.

    Returns
    -------
    dict
        ``rotation``, ``own_place`` and ``ratio_1``: the errors found.

    Raises
    ------
    SelfCheckError
        With the check that failed and by how much.
    """
    assert runtime.facts is not None
    errors = {
        "rotation": check_rotation(
            runtime.facts.rotary, runtime.facts.num_kv_heads, runtime.facts.head_dim
        )
    }
    runner = scheduler.tp_worker.model_runner
    limit = _TOLERANCE.get(runner.dtype, _TOLERANCE[torch.bfloat16])
    ids = torch.randint(
        0,
        int(scheduler.model_config.vocab_size),
        (_PREFIX + _CHUNK + 2 * _QUESTION,),
        generator=torch.Generator().manual_seed(0),
    ).tolist()
    prefix, chunk = ids[:_PREFIX], ids[_PREFIX : _PREFIX + _CHUNK]
    lead, question = ids[_PREFIX + _CHUNK : -_QUESTION], ids[-_QUESTION:]

    def ask(prompt: list[int], request: FusionRequest) -> dict[int, float]:
        # Flushed each time: what the radix tree still holds would not be computed, so not be checked.
        if not scheduler.flush_cache():
            raise SelfCheckError("the scheduler is not idle")
        return _first_token(scheduler, prompt, request)

    def chunk_at(start: int, **fields: Any) -> FusionRequest:
        return FusionRequest(spans=((start, start + _CHUNK),), prefix_len=_PREFIX, **fields)

    try:
        ask(prefix + chunk, chunk_at(_PREFIX, mode="build"))
        plain = ask(prefix + chunk + question, FusionRequest(mode="off"))
        own = ask(prefix + chunk + question, chunk_at(_PREFIX, policy="reuse"))
        errors["own_place"] = _difference(plain, own)
        moved = prefix + lead + chunk + question
        plain = ask(moved, FusionRequest(mode="off"))
        whole = ask(moved, chunk_at(_PREFIX + _QUESTION, policy="full"))
        errors["ratio_1"] = _difference(plain, whole)
    finally:
        scheduler.flush_cache()
        runtime.store.clear()
    if runtime.metrics.counts["requests.fused"] < _FUSED_REQUESTS:
        raise SelfCheckError("the fused path was not taken")
    for name in ("own_place", "ratio_1"):
        if not errors[name] <= limit:
            raise SelfCheckError(
                f"{name}: log-probabilities are {errors[name]:.3f} away from plain prefill; allowed is {limit}"
            )
    return errors


def _first_token(scheduler: Any, prompt: list[int], request: FusionRequest) -> dict[int, float]:
    """Log-probabilities of the most likely first tokens, by token id."""
    req = internal_requests.submit(scheduler, prompt, request, cache_salt=_SALT, top_logprobs=_TOP)
    if req is None:
        raise SelfCheckError("the scheduler declined a request of 80 tokens")
    for _ in range(_MAX_STEPS):
        if req.finished():
            break
        _step(scheduler)
    else:
        raise SelfCheckError("a request of 80 tokens did not finish")
    while not scheduler.is_fully_idle():
        _step(scheduler)
    values = req.logprob.output_top_logprobs_val[0]
    tokens = req.logprob.output_top_logprobs_idx[0]
    return dict(zip([int(t) for t in tokens], [float(v) for v in values], strict=True))


def _step(scheduler: Any) -> None:
    """One turn of the scheduler's loop without overlap and without reading its sockets."""
    with torch.inference_mode():
        plan = scheduler.get_next_batch_to_run(
            running_batch=scheduler.running_batch, last_batch=scheduler.last_batch
        )
        scheduler.running_batch = plan.running_batch
        batch = plan.batch_to_run
        if batch:
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
