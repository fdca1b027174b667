"""What a turn of a growing conversation takes of time and of the pool, with the whole history and with a memory.

Run with ``python -m rag_eval.benchmarks.conversation_growth --json``. One conversation grows to each length in turn; a
method builds what is new, then answers questions with one token each. With ``full`` the radix tree holds the history when
a question comes (``turn_s``), as on a server that serves nobody else; ``cold_turn_s`` is the same turn where it does not.
``peak_tokens`` is the longest prompt so far, of an answer or of a step that builds, with its answer: the tokens that the
pool has to hold at once. ``--pool`` sets the pool itself.
"""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rag_eval.benchmarks.conversation_growth_config import GrowthConfig
from rag_eval.benchmarks.conversation_growth_plot import bars, plot_growth
from rag_eval.benchmarks.frame import benchmark_parser, keep_measured, run_benchmark, versions_of
from rag_eval.command import Progress
from rag_eval.conversation.config import FULL
from rag_eval.conversation.methods import SYSTEM, MethodRun
from rag_eval.conversation.run import sentence_encoder
from rag_eval.conversation.talk import ROOM, SentenceEncoder, context_of
from rag_eval.datasets import read_conversations
from rag_eval.datasets.filler import paragraphs
from rag_eval.errors import EvalError
from rag_eval.runner.engine import start_session
from rag_eval.runner.passage import fusion_settings
from rag_eval.runner.prompts import PromptMaker
from rag_eval.runner.run import model_folder
from rag_eval.runner.session import EngineSession
from rag_pipeline import ModelTokenizer
from rag_pipeline.generation import EngineBackend
from rag_pipeline.memory import MemoryBuilder, Planner, Utterance, parse_memory


def history_of(config: GrowthConfig) -> list[Utterance]:
    """Utterances of the data set's first conversation, or neutral paragraphs said in turns."""
    if config.dataset:
        first = read_conversations(config.dataset)[0]
        return [Utterance(remark.role, remark.text) for remark in first.remarks]
    return [
        Utterance(("user", "assistant")[turn % 2], text) for turn, text in enumerate(paragraphs())
    ]


def cut_to(planner: Planner, history: Sequence[Utterance], tokens: int) -> list[Utterance]:
    """The first utterances that have so many tokens together, at most.

    Raises
    ------
    EvalError
        The conversation is shorter.
    """
    ranges = planner.utterance_ranges(SYSTEM, history)
    start = ranges[0][0]
    kept = [said for said, (_, end) in zip(history, ranges, strict=True) if end - start <= tokens]
    if len(kept) == len(history) and ranges[-1][1] - start < 0.95 * tokens:
        raise EvalError(
            f"the conversation has {ranges[-1][1] - start} tokens; give no --lengths above that"
        )
    if not kept:
        raise EvalError(f"no utterance fits into {tokens} tokens; give larger --lengths")
    return kept


class _Growing:
    """One engine, and methods whose conversation grows."""

    def __init__(
        self,
        config: GrowthConfig,
        session: EngineSession,
        encode: SentenceEncoder,
        progress: Progress,
    ) -> None:
        self._config, self._session, self._progress = config, session, progress
        self._backend = EngineBackend(session.engine)
        self._encode = encode
        self._questions = [f"What was said about this: {text[:80]}?" for text in paragraphs()]

    def points(self, name: str, tokenizer: ModelTokenizer, found: list[dict[str, Any]]) -> None:
        """Measure a method at each length; what is measured is added to `found` at once."""
        memory = parse_memory(
            {
                "method": name,
                "budget_tokens": self._config.budget,
                "episodes": self._config.episodes,
                "block_tokens": self._config.block_tokens,
            }
        )
        if memory is None:
            raise EvalError(f"method {name!r} is no memory; `full` stands for the whole history")
        planner = Planner(
            memory, tokenizer, self._encode, context_length=self._backend.context_length
        )
        whole = history_of(self._config)
        builder = MemoryBuilder(self._backend)
        peak = 0
        try:
            for length in self._config.token_lengths:
                history = cut_to(planner, whole, length)
                # Every turn finds what the turn before it left, and nothing of another method.
                self._session.flush()
                run = MethodRun(self._session, builder, planner, history)
                self._progress(f"{name} {length}: building")
                built = run.build(self._progress)
                rows = [self._turn(run, turn) for turn in range(self._config.turns)]
                peak = max(peak, built["peak_tokens"], *(row["peak_tokens"] for row in rows))
                found.append(self._point(name, length, peak, built, rows))
                last = found[-1]
                self._progress(
                    f"{name} {length}: {last['turn_s']:.3f} s per turn, {peak} tokens at most"
                )
        finally:
            builder.close()

    def _turn(self, run: MethodRun, turn: int) -> dict[str, Any]:
        laid = run.lay_out(self._questions[turn], max_new_tokens=1)
        request = laid.candidate.request()
        served = self._session.answer(request.input_ids, request.fusion, max_new_tokens=1)
        return {
            "turn_s": laid.plan_s + served.ttft_s,
            "turn_cpu_s": laid.plan_cpu_s + served.ttft_cpu_s,
            "plan_s": laid.plan_s,
            "tail_tokens": laid.candidate.tail_len,
            "peak_tokens": len(request.input_ids) + len(served.output_ids),
        }

    def _point(
        self,
        name: str,
        length: int,
        peak: int,
        built: Mapping[str, Any],
        rows: Sequence[Mapping[str, Any]],
    ) -> dict[str, Any]:
        def middle(key: str) -> float:
            return round(float(statistics.median(row[key] for row in rows)), 4)

        turns = sorted(row["turn_s"] for row in rows)
        point = {
            "method": name,
            "length": length,
            "history_tokens": built["history_tokens"],
            "peak_tokens": peak,
            "turn_s": middle("turn_s"),
            "turn_cpu_s": middle("turn_cpu_s"),
            "plan_s": middle("plan_s"),
            "range_s": [round(turns[0], 4), round(turns[-1], 4)],
            "tail_tokens": middle("tail_tokens"),
            "build_tokens": built["build_tokens"],
            "build_s": round(built["build_s"], 3),
            "record_tokens": built["record_tokens"],
            "n": len(rows),
        }
        if name == FULL:
            point["cold_turn_s"] = round(built["build_s"] + point["turn_s"], 4)
        return point


def targets(points: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What is claimed of a memory, from the curves.

    Returns
    -------
    dict
        By method: ``memory_2n`` (the high-water at the longest length whose half was measured, in units of that at the
        half), and for all but ``full``, at the longest length, ``full`` in units of it: ``memory``, ``turn`` and
        ``turn_cpu`` with the history in the radix tree, ``cold_turn`` without.
    """
    by_method: dict[str, dict[int, Mapping[str, Any]]] = {}
    for point in points:
        by_method.setdefault(point["method"], {})[point["length"]] = point
    found: dict[str, Any] = {}
    for name, own in by_method.items():
        doubled = [n for n in own if n % 2 == 0 and n // 2 in own]
        told: dict[str, Any] = {}
        if doubled:
            longest = max(doubled)
            told["memory_2n"] = own[longest]["peak_tokens"] / own[longest // 2]["peak_tokens"]
        full = by_method.get(FULL, {})
        both = [n for n in own if n in full and name != FULL]
        if both:
            mine, whole = own[max(both)], full[max(both)]
            told |= {
                "length": max(both),
                "memory": whole["peak_tokens"] / mine["peak_tokens"],
                "turn": whole["turn_s"] / mine["turn_s"],
                "turn_cpu": whole["turn_cpu_s"] / max(mine["turn_cpu_s"], 1e-3),
                "cold_turn": whole["cold_turn_s"] / mine["turn_s"],
            }
        found[name] = {
            key: round(value, 4) if isinstance(value, float) else value
            for key, value in told.items()
        }
    return found


def run(config: GrowthConfig, progress: Progress) -> dict[str, Any]:
    """Measure.

    Returns
    -------
    dict
        ``points``, one per method and length, and ``targets``.

    Raises
    ------
    EvalError
        A history that does not fit the model, or a conversation that is too short.
    """
    model, vocabulary = model_folder(config.model, progress)
    longest, context = config.token_lengths[-1], context_of(model)
    if FULL in config.method_names and longest > context - ROOM:
        raise EvalError(
            f"lengths go up to {longest}, but {config.model} has a context of {context} tokens; give at most "
            f"{context - ROOM}, or leave out the method full"
        )
    encode = sentence_encoder(config.embedder, progress)
    maker = PromptMaker(model, gold_tokens=1)
    points: list[dict[str, Any]] = []
    with fusion_settings():
        session = start_session(maker, vocabulary, {"max_total_tokens": config.pool})
        try:
            growing = _Growing(config, session, encode, progress)
            with keep_measured(lambda: points) as end:
                for name in config.method_names:
                    growing.points(name, ModelTokenizer.load(model), points)
        finally:
            session.close()
    if config.plot:
        plot_growth(points, Path(config.plot), f"{Path(config.model).name} · {config.budget} kept")
    return {
        "points": points,
        "targets": targets(points),
        "config": asdict(config),
        "threads": os.environ.get("OMP_NUM_THREADS", "default"),
        "cpus": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "versions": versions_of("sglang", "torch", "rag-pipeline"),
    } | end.report()


def table(report: Mapping[str, Any]) -> str:
    """The report as text: one line per method and length, bars, and what is claimed."""
    lines = [
        "method        history   peak tokens   turn s   CPU s   cold s   tail   build tokens   build s"
    ]
    for point in report["points"]:
        cold = point.get("cold_turn_s")
        lines.append(
            f"{point['method']:<12} {point['history_tokens']:>8,} {point['peak_tokens']:>13,} "
            f"{point['turn_s']:>8.3f} {point['turn_cpu_s']:>7.2f} {'-' if cold is None else f'{cold:.2f}':>8} "
            f"{point['tail_tokens']:>6.0f} {point['build_tokens']:>14,} {point['build_s']:>9.1f}"
        )
    lines += ["", *bars(report["points"], "turn_s", "seconds per turn")]
    lines += ["", *bars(report["points"], "peak_tokens", "tokens in the pool")]
    for name, told in report["targets"].items():
        parts = [f"{key} {value:g}" for key, value in told.items()]
        lines.append(f"{name}: {', '.join(parts) or 'nothing to compare'}")
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> int:
    """Run from a shell."""
    parser = benchmark_parser("python -m rag_eval.benchmarks.conversation_growth", __doc__)
    return run_benchmark(parser, GrowthConfig, run, table, words)


if __name__ == "__main__":
    sys.exit(main())
