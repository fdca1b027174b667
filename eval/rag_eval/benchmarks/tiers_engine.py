"""Parts of ``bench tiers`` in a real engine: memory against a lower tier, saving, and a chat after eviction."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from rag_eval.errors import EvalError
from rag_eval.runner.prompts import EvalPrompt
from rag_pipeline.protocol import LEFT_ALONE, FusionRequest, build_requests, fusion_report

_DRAIN_S = 60.0


class Timed(NamedTuple):
    """Wall and CPU seconds of one measurement."""

    wall_s: float
    cpu_s: float


class TierSession:
    """An engine whose memory holds the chunks of one prompt, and not those of two.

    Parameters
    ----------
    session : EngineSession
        The engine.
    tier : str
        Name of the tier below its memory, as in its counters; empty for none.
    beside : TierSession, optional
        Another engine of this process, which was started before.
    """

    def __init__(self, session: Any, tier: str = "", beside: TierSession | None = None) -> None:
        self.session = session
        self.tier = tier
        self._beside = beside

    def cpu_seconds(self) -> float:
        """CPU time of this engine's processes so far."""
        found: float = self.session.cpu_seconds()
        # A session counts the processes that were there when it was made, those of an older engine too.
        return found - (self._beside.cpu_seconds() if self._beside is not None else 0.0)

    def state(self) -> dict[str, Any]:
        """What the engine says of fusion."""
        found: dict[str, Any] = self.session.fusion_state()
        return found

    def count(self, kind: str) -> int:
        """Events of the tier so far."""
        return int(self.state()["counts"].get(f"{self.tier}.{kind}", 0))

    def drain(self) -> None:
        """Wait until what was stored is in the tier, too."""
        until = time.monotonic() + _DRAIN_S
        while self.state().get("pending", 0):
            if time.monotonic() > until:
                raise EvalError(f"the tier {self.tier!r} did not take what was stored")
            time.sleep(0.05)

    def ttft(self, prompt: EvalPrompt, mode: Any) -> tuple[Timed, dict[str, Any]]:
        """Serve a prompt whose shared prefix alone is in the radix tree."""
        self.session.flush()
        self.session.prefill(prompt.prefix_ids)
        served = self.session.serve(prompt, mode, max_new_tokens=1)
        return Timed(served.ttft_s, served.ttft_cpu_s), served.usage

    def full(self, prompt: EvalPrompt, mode: Any) -> Timed:
        """Prefill a prompt of which nothing is in the radix tree."""
        self.session.flush()
        served = self.session.serve(prompt, mode, max_new_tokens=1)
        return Timed(served.ttft_s, served.ttft_cpu_s)

    def build(self, prompt: EvalPrompt) -> Timed:
        """Compute all chunks of a prompt and store them as such behind its prefix, one after the other."""
        self.session.flush()
        self.session.prefill(prompt.prefix_ids)
        cpu, wall = self.cpu_seconds(), time.perf_counter()
        start = len(prompt.prefix_ids)
        for chunk in prompt.chunks:
            own, _ = build_requests(start, len(chunk.ids))
            self.session.prefill([*prompt.prefix_ids, *chunk.ids], own)
        return Timed(time.perf_counter() - wall, self.cpu_seconds() - cpu)


def memory_and_tier(
    engine: TierSession,
    prompts: Sequence[EvalPrompt],
    mode: Any,
    repeats: int,
    progress: Callable[[str], None],
    between: Callable[[EvalPrompt], None] = lambda prompt: None,
) -> tuple[list[tuple[Timed, Timed]], int]:
    """Serve two prompts in turns, each first from the tier, because the other has taken its room, then from memory.

    Parameters
    ----------
    engine : TierSession
        Its memory has room for the chunks of one of them.
    prompts : sequence of EvalPrompt
        Two, stored in the tier, without a common chunk.
    mode : Mode
        How they are served.
    repeats : int
        Pairs; one more goes first and is not counted.
    progress : callable
        Told of each pair.
    between : callable
        Called once per pair, with its prompt, while the engine rests.

    Returns
    -------
    list of (Timed, Timed)
        From the tier and from memory. Every second pair has the memory's run of the prompt before it: neither side
        always comes second.
    int
        Pairs that are left out: a header came too late on a busy machine, so that the request did without its chunk.

    Raises
    ------
    EvalError
        Hardly any pair was served from where it should have been.
    """
    pairs: list[tuple[Timed, Timed]] = []
    before: Timed | None = None
    turn = skipped = 0
    while len(pairs) < repeats:
        prompt = prompts[turn % 2]
        fetched = engine.count("fetched")
        below, usage = engine.ttft(prompt, mode)
        came = engine.count("fetched") - fetched
        memory, again = engine.ttft(prompt, mode)
        extra = engine.count("fetched") - fetched - came
        reused = (usage.get("reused_tokens"), again.get("reused_tokens"))
        if turn and (came != len(prompt.chunks) or extra or reused[0] != reused[1]):
            skipped += 1
            progress(f"{engine.tier}: left out; {came} and {extra} fetched, {reused} reused")
            if skipped > repeats + 2:
                raise EvalError(
                    f"of a prompt's {len(prompt.chunks)} chunks {came} were fetched, then {extra}, reused tokens were "
                    f"{reused[0]} and {reused[1]}, and so in most runs; run it on a machine that is less busy"
                )
        elif turn:
            pairs.append((below, memory if turn % 2 or before is None else before))
            progress(f"{engine.tier}: {below.wall_s:.2f} s, memory {memory.wall_s:.2f} s")
        between(prompt)
        before = memory
        turn += 1
    return pairs, skipped


def saving(
    with_tier: TierSession,
    without: TierSession,
    prompts: Sequence[EvalPrompt],
    progress: Callable[[str], None],
) -> list[tuple[Timed, Timed]]:
    """Have two engines compute and store the same new chunks; one of them writes each to a tier meanwhile.

    Returns
    -------
    list of (Timed, Timed)
        Of all chunks of a prompt, one behind the other, with and without the tier. The first prompt is not counted.
    """
    pairs = []
    for turn, prompt in enumerate(prompts):
        order = (with_tier, without) if turn % 2 else (without, with_tier)
        found = {}
        for engine in order:
            found[engine.tier] = engine.build(prompt)
            with_tier.drain()
        pairs.append((found[with_tier.tier], found[without.tier]))
        progress(
            f"saving: {pairs[-1][0].wall_s:.2f} s with a tier, {pairs[-1][1].wall_s:.2f} s without"
        )
    return pairs[1:]


def chat(
    engine: TierSession,
    prompt: EvalPrompt,
    name: str,
    policy: str,
    *,
    has_chunk: bool,
    full_first: bool,
    answer_tokens: int = 8,
) -> tuple[Timed, Timed, dict[str, Any]]:
    """Hold a chat whose turns are the chunks of a prompt, and time its last turn after the radix tree was emptied.

    Parameters
    ----------
    engine : TierSession
        With conversations kept in memory.
    prompt : EvalPrompt
        Its chunks are the user's texts, each followed by its question.
    name, policy : str
        Of the conversation, and how its turns are served.
    has_chunk : bool
        The first turn's text is a chunk that was stored before; else nothing but the conversation is known.
    full_first : bool
        Which side is timed first.
    answer_tokens : int
        Length of each answer.

    Returns
    -------
    Timed, Timed, dict
        The last turn with the conversation, the same prompt prefilled whole, and the report of the former.
    """
    session = engine.session
    ids = list(prompt.prefix_ids)
    start = len(ids)
    spans = ((start, start + len(prompt.chunks[0].ids)),) if has_chunk else ()
    asked = FusionRequest(
        spans=spans, prefix_len=start if spans else 0, policy=policy, conversation=name
    )
    session.flush()
    session.prefill(ids)
    for chunk in prompt.chunks[:-1]:
        ids += [*chunk.ids, *prompt.suffix_ids]
        answer = session.prefill(ids, asked, max_new_tokens=answer_tokens)
        ids += list(answer["output_ids"])
    last = replace(
        prompt, prefix_ids=tuple(ids), chunks=prompt.chunks[-1:], suffix_ids=prompt.suffix_ids
    ).input_ids

    def timed(fusion: FusionRequest) -> tuple[Timed, Any]:
        session.flush()
        cpu, wall = engine.cpu_seconds(), time.perf_counter()
        told = session.prefill(last, fusion)
        return Timed(time.perf_counter() - wall, engine.cpu_seconds() - cpu), told

    whole = timed(LEFT_ALONE) if full_first else None
    kept, told = timed(asked)
    whole = whole or timed(LEFT_ALONE)
    report = fusion_report(told["meta_info"]) or {}
    return kept, whole[0], {"prompt_tokens": len(last), **report}
