"""Matching and planning of one request: what fusion costs before the first layer runs.

``python -m rag_eval.benchmarks.planning --json``

The prompt is system + chunks + question; the store holds its chunks among many others. No model runs: the
functions are the ones that the scheduler process calls, the KV of the stored chunks is tiny. Timed by itself,
call by call, wall clock and CPU time of the process:

``match_spans``
    The client named its chunks: keys hashed, looked up and leased, and the prompt scanned for others.
``match_scan``
    A plain prompt: scanned for stored chunks, matches leased.
``plan_POLICY``
    Rows of the request, choice of the policy (its scores are drawn at random: a probing pass is no planning),
    attention plan and slots of the final pass, mean shift where the policy has one.
``shift``, ``shift_one_of_many``, ``shift_many``
    The plan of the mean shift alone, 15% of the reused rows drawn at random: of this prompt, of one request of
    ``batch_chunks`` chunks of the same size, and of a batch of ``batch`` such requests, per request.
``total_spans``, ``total_scan``
    Sum of one match and one plan of the default policy, pair by pair.

Not in it: the copy of SGLang's ``ForwardBatch`` with fewer rows; ``rag_fusion:plan_seconds`` of a running
engine holds it.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from chunk_cache import ChunkKey, ChunkKV, Match, as_token_ids, layout_named
from chunk_cache.policies import DEFAULT_POLICY, Policy, ScoredPolicy, create_policy
from rag_eval.arguments import require_at_least
from rag_eval.benchmarks.call_timer import CallTimer, timer_line
from rag_eval.benchmarks.frame import benchmark_parser, keep_measured, run_benchmark, versions_of
from rag_eval.command import Progress, no_progress
from rag_eval.errors import EvalError
from rag_kernels import RotarySpec, plan_mean_shift
from rag_pipeline.protocol import FusionRequest
from rag_pipeline.sglang_plugin.fusion.admission.admit import lease_matches
from rag_pipeline.sglang_plugin.fusion.config import FusionConfig
from rag_pipeline.sglang_plugin.fusion.forward import plan as planning
from rag_pipeline.sglang_plugin.fusion.forward.batch_view import RequestRows, plan_rows
from rag_pipeline.sglang_plugin.fusion.forward.fused_item import plan_item
from rag_pipeline.sglang_plugin.fusion.request.namespace import RadixNamespace
from rag_pipeline.sglang_plugin.fusion.request.state import RequestState
from rag_pipeline.sglang_plugin.fusion.runtime.model_facts import ModelFacts
from rag_pipeline.sglang_plugin.fusion.runtime.runtime import FusionRuntime, KnownPrefix

_VOCABULARY = (
    49_152  # of SmolLM2, as are layers and heads below; what matters is that windows differ
)
_LAYERS, _HEADS, _KV_HEADS, _HEAD_DIM = 30, 9, 3, 64
_TENANT = RadixNamespace(None, None)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PlanningConfig:
    """Sizes of a run; by default a prompt of 2,400 tokens."""

    stored: str = "1,10000"
    """Chunks in the store, one run each; those of the prompt are among them as far as they go."""
    chunks: int = 6
    """Chunks of the prompt."""
    chunk_tokens: int = 390
    """Tokens a chunk."""
    system_tokens: int = 36
    """Tokens of the shared prefix."""
    question_tokens: int = 24
    """Tokens behind the last chunk."""
    policies: str = "query,query:0.05,epic:0.15,cacheblend:0.15,reuse,full"
    """Policies whose planning is timed."""
    batch: int = 17
    """Requests of the batch whose mean shifts are planned together."""
    batch_chunks: int = 16
    """Chunks of each of them."""
    repeats: int = 200
    """Timed calls of every kind, after ten that are not counted."""
    seed: int = 0
    """Seed of all random text."""

    def __post_init__(self) -> None:
        sizes = ("chunks", "chunk_tokens", "system_tokens", "question_tokens", "repeats")
        require_at_least(self, 1, "batch", "batch_chunks")
        require_at_least(self, 1, *sizes)
        require_at_least(self, 0, "seed")
        try:
            counts = [int(word) for word in self.stored.split(",")]
        except ValueError:
            counts = []
        if not counts or min(counts) < 1:
            raise EvalError(f"stored is {self.stored!r}; give whole numbers from 1 on, a,b,c")
        try:
            _ = [create_policy(name) for name in self.policies.split(",")]
        except ValueError as error:
            raise EvalError(str(error)) from None

    @property
    def store_sizes(self) -> list[int]:
        """:attr:`stored` as numbers."""
        return [int(word) for word in self.stored.split(",")]


def run(config: PlanningConfig, progress: Progress = no_progress) -> dict[str, Any]:
    """Run the benchmark.

    Returns
    -------
    dict
        ``stores{N{KIND}}`` with what :meth:`CallTimer.report` gives and the number of matched chunks
        beside it, the three kinds of ``shift`` alike, ``prompt_tokens``, ``config``, ``threads``, ``load_average``
        (processes that wanted to run on ``cpus`` cores: with more than those, wall times hold waiting),
        ``versions``.
    """
    stores: dict[str, Any] = {}
    shifts: dict[str, Any] = {}
    with keep_measured(lambda: stores) as end:
        for size in config.store_sizes:
            progress(f"{size} chunks in the store")
            stores[str(size)] = _Bench(config, size).measure()
        shifts = measure_shifts(config)
    prompt = config.system_tokens + config.chunks * config.chunk_tokens + config.question_tokens
    return {
        "benchmark": "planning",
        "prompt_tokens": prompt,
        "stores": stores,
        **shifts,
        "config": dataclasses.asdict(config),
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 1),
        "versions": versions_of("python", "numpy", "torch"),
    } | end.report()


def measure_shifts(config: PlanningConfig) -> dict[str, Any]:
    """Time the plans of mean shifts, those of a batch beside those of one of its requests."""
    rng = np.random.default_rng(config.seed)
    spec = _rotation()

    def request(chunks: int) -> tuple[list[tuple[int, int]], torch.Tensor, torch.Tensor]:
        reused = chunks * config.chunk_tokens
        end = config.system_tokens + reused + config.question_tokens
        edges = range(config.system_tokens, end - config.question_tokens, config.chunk_tokens)
        chosen = np.sort(rng.permutation(reused)[: max(1, round(0.15 * reused))])
        rows = [chosen + config.system_tokens, np.arange(end - config.question_tokens, end)]
        return (
            [(start, start + config.chunk_tokens) for start in edges],
            torch.from_numpy(np.concatenate(rows)),
            torch.from_numpy(rng.permutation(4 * end)[:end]),
        )

    own = request(config.chunks)
    batch = [request(config.batch_chunks) for _ in range(config.batch)]

    def plan(requests: Sequence[Any]) -> None:
        first = 0
        for spans, rows, slots in requests:
            plan_mean_shift(spans, rows, slots, spec, first_row=first)
            first += len(rows)

    calls = {"shift": [own], "shift_one_of_many": batch[:1], "shift_many": batch}
    found = {}
    timers = {name: CallTimer() for name in calls}
    for turn in range(config.repeats + 10):
        for name, requests in calls.items():
            timer = CallTimer()
            timer(plan, requests)
            if turn >= 10:
                timers[name].note(timer.wall[0] / len(requests), timer.cpu[0] / len(requests))
    for name, timer in timers.items():
        found[name] = timer.report()
    return found


def _rotation() -> RotarySpec:
    inv_freq = 1e4 ** -(torch.arange(0, _HEAD_DIM, 2, dtype=torch.float64) / _HEAD_DIM)
    return RotarySpec.from_inv_freq(inv_freq)


class _Bench:
    """One store and one prompt."""

    def __init__(self, config: PlanningConfig, size: int) -> None:
        self._config = config
        rng = np.random.default_rng(config.seed)

        def text(length: int) -> list[int]:
            drawn: list[int] = rng.integers(0, _VOCABULARY, length).tolist()
            return drawn

        self._facts = ModelFacts(
            layers=(None,) * _LAYERS,
            num_q_heads=_HEADS,
            num_kv_heads=_KV_HEADS,
            head_dim=_HEAD_DIM,
            scaling=_HEAD_DIM**-0.5,
            rotary=_rotation(),
            layout=layout_named("heads"),
            fingerprint="benchmark",
            context_fields={
                "model_fingerprint": "benchmark",
                "dtype": "bfloat16",
                "kv_dtype": "bfloat16",
                "rope": "{}",
            },
            qkv_share=0.16,
        )
        self._runtime = FusionRuntime(FusionConfig(), self._facts)
        system = text(config.system_tokens)
        chunks = [text(config.chunk_tokens) for _ in range(config.chunks)]
        # Last to first: where chunks stand is not where their KV was computed.
        self._spans, ids = [], list(system)
        for chunk in reversed(chunks):
            self._spans.append((len(ids), len(ids) + len(chunk)))
            ids += chunk
        self._prompt = array("q", ids + text(config.question_tokens))
        prefix = self._runtime.prefix(np.asarray(self._prompt), config.system_tokens, _TENANT)
        for number in range(size):
            content = chunks[number] if number < len(chunks) else text(config.chunk_tokens)
            self._store(prefix.context.namespace, content)
        self._found = min(size, len(chunks))
        # Slots as a pool hands them out after a while: in no order.
        self._slots = torch.from_numpy(rng.permutation(4 * len(self._prompt))[: len(self._prompt)])
        self._scores = torch.from_numpy(rng.random(len(self._prompt))).float()

    def _store(self, namespace: str, content: list[int]) -> None:
        ids = as_token_ids(content)
        kv = torch.zeros(1, len(ids), 1, 2)
        base = self._config.system_tokens
        key = ChunkKey.of(namespace, ids)
        record = ChunkKV(key=key, token_ids=ids, base_position=base, k=kv, v=kv)
        if not self._runtime.store.put(record):
            raise AssertionError("the store refused a record")

    def measure(self) -> dict[str, Any]:
        """Time every kind of call, interleaved."""
        policies = {name: create_policy(name) for name in self._config.policies.split(",")}
        policies.setdefault(DEFAULT_POLICY, create_policy(DEFAULT_POLICY))
        timers: dict[str, CallTimer] = {}
        for turn in range(self._config.repeats + 10):
            for way in ("spans", "scan"):
                matching = CallTimer()
                state = matching(self._match_spans if way == "spans" else self._match_scan)
                if len(state.spans) != self._found:
                    raise AssertionError(f"matched {len(state.spans)} of {self._found} chunks")
                taken = matching.wall[0], matching.cpu[0]
                noted = {f"match_{way}": taken}
                for name, policy in policies.items():
                    making = CallTimer()
                    rows = making(self._plan, state, policy)
                    planned = making.wall[0], making.cpu[0]
                    if way == "spans":
                        noted[f"plan_{name}"] = planned
                    if name == DEFAULT_POLICY:
                        noted[f"total_{way}"] = (taken[0] + planned[0], taken[1] + planned[1])
                        if rows < self._config.question_tokens:
                            raise AssertionError("the plan lost the question")
                state.drop()
                if turn >= 10:
                    for kind, pair in noted.items():
                        timers.setdefault(kind, CallTimer()).note(*pair)
        self._runtime.store.check_integrity(expect_idle=True)
        return {
            "matched_chunks": self._found,
            **{kind: timers[kind].report() for kind in sorted(timers)},
        }

    def _lease(
        self, state: RequestState, prefix: KnownPrefix, matches: list[Match]
    ) -> RequestState:
        state.begin_attempt(self._config.system_tokens, self._runtime.epoch)
        state.lease(lease_matches(self._runtime, state.prompt, prefix, matches))
        return state

    def _match_spans(self) -> RequestState:
        request = FusionRequest(spans=tuple(self._spans), prefix_len=self._config.system_tokens)
        state = RequestState(request, request.make_policy(DEFAULT_POLICY), self._prompt)
        prefix = self._runtime.prefix(state.prompt, request.prefix_len, _TENANT)
        found = self._runtime.store.resolve(
            state.prompt,
            prefix.context,
            spans=request.spans,
            min_piece=self._runtime.config.min_reused_tokens,
        )
        return self._lease(state, prefix, found.matches)

    def _match_scan(self) -> RequestState:
        request = FusionRequest()
        state = RequestState(request, request.make_policy(DEFAULT_POLICY), self._prompt)
        (known,) = self._runtime.prefixes_of(state.prompt, _TENANT)
        return self._lease(state, known, self._runtime.store.match(state.prompt, known.context))

    def _plan(self, state: RequestState, policy: Policy) -> int:
        """Plan as the fused forward does; returns the number of rows."""
        size, radix = int(state.prompt.size), self._config.system_tokens
        piece = planning.Piece(start=radix, end=size, is_last=True)
        prompt = torch.from_numpy(state.prompt)
        layout, fresh = plan_item(
            state,
            piece,
            num_layers=self._facts.num_layers,
            prompt_len=size,
            qkv_share=self._facts.qkv_share,
        )
        chosen = planning.early_rows(policy, layout, piece)
        if chosen is None:
            assert isinstance(policy, ScoredPolicy)
            chosen = layout.reused_positions()
            for stage in range(len(policy.num_selected(layout))):
                chosen = policy.choose(layout, self._scores[chosen], chosen, stage)
        positions = planning.union_rows(fresh, chosen)
        rows = RequestRows(
            index=0, positions=positions, ids=prompt[positions], kv_slots=self._slots
        )
        strength = policy.shift_strength(layout)
        if strength > 0.0 and chosen.numel():
            plan_mean_shift(
                layout.spans, positions, self._slots, self._facts.rotary, strength=strength
            )
        _, slots = plan_rows([rows], self._facts, "auto")
        return int(slots.numel())


def table(report: dict[str, Any]) -> str:
    """The report as text, a line per store and per kind of call."""
    lines = []
    for size, kinds in report["stores"].items():
        lines.append(f"{size} stored, {kinds['matched_chunks']} of them in the prompt")
        lines += [
            f"  {kind:22} {timer_line(row)}" for kind, row in kinds.items() if isinstance(row, dict)
        ]
    lines.append("mean shift, per request")
    lines += [
        f"  {kind:22} {timer_line(report[kind])}"
        for kind in ("shift", "shift_one_of_many", "shift_many")
        if kind in report
    ]
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> int:
    """Run from a shell."""
    parser = benchmark_parser("python -m rag_eval.benchmarks.planning", __doc__)
    return run_benchmark(parser, PlanningConfig, run, table, words)


if __name__ == "__main__":
    sys.exit(main())
