"""What fusion promises exactly, measured on one model in one engine.

Every comparison is between the next-token distributions of two requests that follow the same answer:
the greedy answer of plain prefill. Where at every step the most likely token is the answer's next
token, a free greedy run gives that answer too, so one request shows both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from rag_eval.errors import ModeUnavailableError
from rag_eval.metrics import kl_divergence, log_softmax
from rag_eval.metrics.distributions import Float64
from rag_eval.runner.modes import FULL, PREFIX, Mode
from rag_eval.runner.prompts import EvalPrompt
from rag_eval.runner.session import EngineSession

LIKELY = 10
"""Log-probabilities are compared on so many of the reference's most likely tokens."""

OWN_PLACE = Mode(name="own place", policy="reuse")


@dataclass(frozen=True, kw_only=True, slots=True)
class Distance:
    """How far one request is from plain prefill, over the tokens of an answer.

    Parameters
    ----------
    kl, kl_max : float
        Mean and largest KL of a token, nats.
    log_prob : float
        Largest difference of a log-probability among the likeliest tokens.
    lead : float
        By how much plain prefill preferred its token where the other request prefers another one;
        0 when all greedy tokens are the same.
    fault : str
        Why the comparison proves nothing, for example that the fused path was not taken.
    """

    kl: float
    kl_max: float
    log_prob: float
    lead: float
    fault: str = ""


@dataclass(kw_only=True, slots=True)
class Exactness:
    """Distances by check; a check of one policy is named ``CHECK MODE``.

    Parameters
    ----------
    floor : list of Distance
        Plain prefill against itself in other batchings.
    checks : dict of (str, str) to list of Distance
        Distances of one check, one per prompt.
    unavailable : dict of str to str
        Reason by mode, where the engine does not serve it.
    fp32 : bool
        Whether the engine computes in fp32, where far less counts as noise.
    """

    floor: list[Distance] = field(default_factory=list)
    checks: dict[tuple[str, str], list[Distance]] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)
    fp32: bool = False

    def add(self, check: str, mode: str, distance: Distance) -> None:
        """Note one distance."""
        self.checks.setdefault((check, mode), []).append(distance)


def measure_exactness(
    session: EngineSession,
    prompts: Sequence[EvalPrompt],
    modes: Sequence[Mode],
    *,
    answer_tokens: int,
    progress: Callable[[str], None] = lambda line: None,
) -> Exactness:
    """Serve each prompt in every way that must not differ from plain prefill.

    Parameters
    ----------
    session : EngineSession
        Engine under test; its chunk store must not hold text of these prompts yet.
    prompts : sequence of EvalPrompt
        Prompts with at least two chunks; their gold answers are not used.
    modes : sequence of Mode
        Fused modes.
    answer_tokens : int
        Length of the greedy answer that is followed.
    progress : callable
        Called with one line of progress at a time.

    Returns
    -------
    Exactness
        ``no spans``: a request without fusion fields. ``off``: a request that opts out, with chunks
        stored. ``own place``: a stored chunk where it was computed, so without rotation. ``ratio 1``:
        everything recomputed through the fused path. ``isolation``: an exact request that follows a
        fused one.
    """
    found = Exactness(fp32=session.is_fp32)
    plain: list[tuple[EvalPrompt, Float64]] = []
    # Requests without spans are looked at first: once chunks are stored, finding them is a feature.
    for number, prompt in enumerate(prompts, start=1):
        session.flush()
        answer = session.serve(prompt, Mode(name=FULL), max_new_tokens=answer_tokens).output_ids
        prompt = replace(prompt, gold_ids=answer)
        reference = _plain(session, prompt)
        plain.append((prompt, reference))
        session.flush()
        logits, usage = session.follow_gold(prompt, Mode(name=FULL), without_hints=True)
        found.add("no spans", "", _distance(reference, logits, _cached(usage, 0)))
        for cuts in _batchings(prompt):
            session.flush()
            for cut in cuts:
                session.prefill(prompt.input_ids[:cut])
            logits, _ = session.follow_gold(prompt, Mode(name=PREFIX))
            found.floor.append(_distance(reference, logits))
        progress(f"noise floor: prompt {number} of {len(prompts)}")
    for number, (prompt, reference) in enumerate(plain, start=1):
        session.flush()
        session.build_chunks(prompt, store=True)
        found.add("off", "", _distance(reference, *_off(session, prompt)))
        _own_place(session, prompt, reference, found)
        for mode in modes:
            if mode.name not in found.unavailable:
                _of_policy(session, prompt, reference, mode, found)
        progress(f"exactness: prompt {number} of {len(prompts)}")
    return found


def _plain(session: EngineSession, prompt: EvalPrompt) -> Float64:
    session.flush()
    logits, _ = session.follow_gold(prompt, Mode(name=FULL))
    return log_softmax(logits)


def _batchings(prompt: EvalPrompt) -> list[list[int]]:
    """Cuts at which the same prompt is prefilled in pieces: the same sums in other shapes."""
    size = len(prompt.input_ids)
    return [[size // 2], [size // 3, 2 * size // 3], [end for _, end in prompt.spans]]


def _off(session: EngineSession, prompt: EvalPrompt) -> tuple[Any, str]:
    session.flush()
    logits, usage = session.follow_gold(prompt, Mode(name=FULL))
    return logits, _cached(usage, 0)


def _own_place(
    session: EngineSession, prompt: EvalPrompt, reference: Float64, found: Exactness
) -> None:
    first, *others = prompt.chunks
    rest = tuple(token for chunk in others for token in chunk.ids)
    # Only the first chunk is named a chunk: it follows the prefix that it was computed behind.
    alone = replace(prompt, chunks=(first,), suffix_ids=(*rest, *prompt.suffix_ids))
    session.flush()
    try:
        logits, usage = session.follow_gold(alone, OWN_PLACE)
    except ModeUnavailableError as error:
        found.unavailable[""] = str(error)
        return
    fault = "" if usage["reused_tokens"] else "no stored key was loaded"
    found.add("own place", "", _distance(reference, logits, fault))


def _of_policy(
    session: EngineSession, prompt: EvalPrompt, reference: Float64, mode: Mode, found: Exactness
) -> None:
    try:
        whole = _at_ratio_1(mode)
        if whole is not None:
            session.flush()
            logits, usage = session.follow_gold(prompt, whole)
            fault = (
                "" if usage["recomputed_tokens"] else "nothing was recomputed: not the fused path"
            )
            found.add("ratio 1", mode.name, _distance(reference, logits, fault))
        session.flush()
        _, used = session.follow_gold(prompt, mode)
        logits, usage = session.follow_gold(prompt, Mode(name=PREFIX))
    except ModeUnavailableError as error:
        found.unavailable[mode.name] = str(error)
        return
    # Exact are the shared prefix and a chunk right behind it; past those, fused KV was published.
    exact = prompt.spans[0][1]
    fault = _cached(usage, exact) or ("" if _adds_up(used, prompt) else f"usage {used}")
    found.add("isolation", mode.name, _distance(reference, logits, fault))


def _at_ratio_1(mode: Mode) -> Mode | None:
    """The same policy told to recompute everything; ``None`` where it recomputes nothing at all."""
    from chunk_cache.policies import create_policy

    # A policy that may raise its own ratio has an upper limit as well.
    for options in (mode.options, {**mode.options, "max_ratio": 1.0}):
        try:
            create_policy(mode.policy, 1.0, **options)
        except ValueError:
            continue
        return replace(mode, name=f"{mode.name} at ratio 1", ratio=1.0, options=options)
    return None


def _cached(usage: dict[str, Any], most: int) -> str:
    cached = usage["exact_prefix_tokens"]
    return "" if cached <= most else f"{cached} tokens came from the cache; at most {most} may"


def _adds_up(usage: dict[str, Any], prompt: EvalPrompt) -> bool:
    parts = ("exact_prefix_tokens", "reused_tokens", "recomputed_tokens", "fresh_tokens")
    return bool(sum(usage[part] for part in parts) == len(prompt.input_ids))


def _distance(reference: Float64, logits: Any, fault: str = "") -> Distance:
    """Compare ``(tokens, vocabulary)`` logits with the reference's log-probabilities."""
    other = log_softmax(logits)
    rows = np.arange(len(reference))
    likely = np.argsort(reference, axis=-1)[:, -LIKELY:]
    gaps = np.abs(np.take_along_axis(reference - other, likely, axis=-1))
    lead = reference.max(-1) - reference[rows, other.argmax(-1)]
    divergence = kl_divergence(reference, other)
    return Distance(
        kl=float(divergence.mean()),
        kl_max=float(divergence.max()),
        log_prob=float(gaps.max()),
        lead=float(lead.max()),
        fault=fault,
    )
