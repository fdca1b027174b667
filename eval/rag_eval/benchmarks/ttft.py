"""Time to first token of RAG prompts of one or several lengths, every mode in one engine, interleaved.

A prompt is system + N chunks of real text + question. Each chunk's KV was computed once, alone, behind
the system part; then the chunks are asked about in another order, so prefix caching can serve the system
part only. Before every run the radix tree is emptied and the system part is prefilled again.

``rag-pipeline bench ttft --model smollm2-135m --lengths 1000,2000,4000,8000 --plot ttft.png --json``
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rag_eval.arguments import parse_config, require_at_least
from rag_eval.benchmarks.frame import benchmark_parser, keep_measured, versions_of
from rag_eval.benchmarks.ttft_prompts import Point, make_prompts
from rag_eval.command import Progress, no_progress, print_report, refusals_in_one_line, say_progress
from rag_eval.errors import EvalError

if TYPE_CHECKING:
    from rag_eval.runner.prompts import EvalPrompt

BASELINE = "prefix"
DEFAULT_CHUNKS = 6


@dataclass(frozen=True, kw_only=True, slots=True)
class TtftConfig:
    """What is measured."""

    model: str = "smollm2-135m"
    """Hub id, folder, GGUF file or packaged name."""
    chunks: str = "auto"
    """Chunks of the prompt, or several numbers to compare, comma between. With `lengths`, ``auto``
    takes as many as fit."""
    chunk_tokens: int = 400
    """Size of a chunk in tokens: whole sentences, at most this. Not used where both `lengths` and
    `chunks` say it."""
    lengths: str = ""
    """Lengths of the whole prompt in tokens, comma between, reached to the token; empty for what
    `chunks` and `chunk_tokens` make."""
    question_tokens: int = 24
    """Least length of the question in tokens; it is repeated up to there."""
    modes: str = "prefix,reuse,query:0.05,query:0.15,epic:0.15,cacheblend:0.15"
    """As for the evaluation; ``prefix`` (RadixAttention alone) is always there."""
    repeats: int = 5
    """Runs per mode; the first round is a warm-up that is not counted."""
    seed: int = 0
    """Chooses text and order."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "chunk_tokens", "question_tokens", "repeats")
        self.points()

    def points(self) -> tuple[Point, ...]:
        """Prompts to measure, short ones first.

        Raises
        ------
        EvalError
            A length or a number of chunks that is not a positive number.
        """
        lengths: list[int | None] = [*_numbers("lengths", self.lengths)] or [None]
        auto = self.chunks == "auto"
        counts: list[int | None] = [None] if auto else [*_numbers("chunks", self.chunks)]
        found = []
        for length in lengths:
            for count in counts:
                if length is None:
                    point = Point(chunks=count or DEFAULT_CHUNKS, chunk_tokens=self.chunk_tokens)
                else:
                    chunks = count or max(1, round(length / self.chunk_tokens))
                    point = Point(chunks=chunks, chunk_tokens=length // chunks, length=length)
                found.append(point)
        return tuple(found)


def _numbers(name: str, text: str) -> list[int]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not all(word.isdigit() and int(word) > 0 for word in words) or (
        name == "chunks" and not words
    ):
        raise EvalError(f"{name} is {text!r}; give positive numbers such as 1000,2000")
    return sorted({int(word) for word in words})


def run(
    config: TtftConfig, progress: Progress = no_progress, *, session: Any = None
) -> dict[str, Any]:
    """Measure, and return the JSON of ``rag-pipeline bench ttft``.

    Parameters
    ----------
    config : TtftConfig
        What to measure.
    progress : callable
        Called with a line of text as the benchmark goes on.
    session : object
        A running engine to use (left open); one is started otherwise.

    Returns
    -------
    dict
        ``points`` (a list, one per prompt: ``prompt_tokens``, ``chunks``, ``modes{NAME{ttft_p50_s,
        ttft_cpu_p50_s, speedup_vs_prefix, cpu_speedup_vs_prefix, computed_fraction, ...}}``),
        ``engine``, ``threads``, ``versions``. With one prompt, its fields stand outside as well. A run
        that is interrupted or fails behind its first round returns what it has, and says so.
    """
    from rag_eval.runner.engine import start_session
    from rag_eval.runner.modes import parse_modes
    from rag_eval.runner.prompts import PromptMaker
    from rag_pipeline.models import resolve_llm

    modes = [mode for mode in parse_modes(f"full,{config.modes}") if mode.name != "full"]
    if all(mode.name != BASELINE for mode in modes):
        modes = [m for m in parse_modes(f"{BASELINE},{config.modes}") if m.name != "full"]
    folder = resolve_llm(config.model).path
    facts = json.loads((folder / "config.json").read_text("utf-8"))
    maker = PromptMaker(folder, gold_tokens=1)
    prompts = [
        (
            point,
            make_prompts(point, maker, question_tokens=config.question_tokens, seed=config.seed),
        )
        for point in config.points()
    ]
    longest = max(len(asked.input_ids) for _, (_, asked) in prompts)
    context = facts.get("max_position_embeddings", longest + 1)
    if longest >= context:
        raise EvalError(
            f"a prompt of {longest} tokens does not fit into {config.model}, whose context is "
            f"{context}; ask for shorter ones"
        )
    progress("starting the engine")
    # The pool holds the longest prompt beside the chunk that is being built.
    pool = {"max_total_tokens": max(16_384, 2 * longest)}
    opened = session or start_session(maker, facts["vocab_size"], pool)
    measured: list[tuple[Point, EvalPrompt, dict[str, list[Any]]]] = []
    try:
        with keep_measured(lambda: any(all(runs.values()) for _, _, runs in measured)) as end:
            for point, (seen, asked) in prompts:
                runs: dict[str, list[Any]] = {mode.name: [] for mode in modes}
                measured.append((point, asked, runs))
                _measure(opened, seen, asked, modes, config.repeats, runs)
                medians = {name: row["ttft_p50_s"] for name, row in summary(runs).items()}
                size = f"{len(asked.input_ids)} tokens in {point.chunks} chunks"
                progress(f"{size}: TTFT {medians}")
    finally:
        if session is None:
            opened.close()
    points = [_row(point, asked, runs) for point, asked, runs in measured if all(runs.values())]
    return report(config, points) | end.report()


def _row(point: Point, asked: EvalPrompt, runs: dict[str, list[Any]]) -> dict[str, Any]:
    """One prompt's part of the report: of the rounds that are whole."""
    rounds = min(map(len, runs.values()))
    return {
        "prompt_tokens": len(asked.input_ids),
        "chunks": point.chunks,
        "chunk_tokens": max(len(chunk.ids) for chunk in asked.chunks),
        "modes": summary({name: served[:rounds] for name, served in runs.items()}),
    }


def _measure(
    session: Any,
    seen: Any,
    asked: Any,
    modes: list[Any],
    repeats: int,
    runs: dict[str, list[Any]],
) -> None:
    """Serve one prompt in every mode, in turns, into lists by mode; the first round is the warm-up."""
    session.flush()
    session.build_chunks(seen, store=True)
    for turn in range(repeats + 1):
        for mode in modes:
            session.flush()
            session.prefill(asked.prefix_ids)
            served = session.serve(asked, mode, max_new_tokens=1)
            if turn:
                runs[mode.name].append(served)


def summary(runs: dict[str, list[Any]]) -> dict[str, dict[str, Any]]:
    """Medians a mode, and ratios against RadixAttention alone from the same rounds."""

    def median(values: list[float]) -> float:
        return round(statistics.median(values), 4)

    base = runs[BASELINE]
    modes = {}
    for name, served in runs.items():
        pairs = list(zip(base, served, strict=True))
        modes[name] = {
            "ttft_p50_s": median([s.ttft_s for s in served]),
            "ttft_min_s": round(min(s.ttft_s for s in served), 4),
            "ttft_max_s": round(max(s.ttft_s for s in served), 4),
            "ttft_cpu_p50_s": median([s.ttft_cpu_s for s in served]),
            "speedup_vs_prefix": median([b.ttft_s / s.ttft_s for b, s in pairs]),
            # CPU time comes in steps of 10 ms: a very short run may have taken none.
            "cpu_speedup_vs_prefix": median(
                [b.ttft_cpu_s / max(s.ttft_cpu_s, 0.01) for b, s in pairs]
            ),
            "computed_fraction": median([s.usage["computed_fraction"] for s in served]),
            "reused_tokens": served[0].usage["reused_tokens"],
            "n": len(served),
        }
    return modes


def report(config: TtftConfig, points: list[dict[str, Any]]) -> dict[str, Any]:
    """The JSON of a run: its points, and what they were measured on."""
    import torch

    return {
        "config": asdict(config),
        **(points[0] if len(points) == 1 else {}),
        "points": points,
        "engine": "sglang",
        "threads": int(os.environ.get("OMP_NUM_THREADS") or torch.get_num_threads()),
        "cpus": os.cpu_count(),
        "versions": versions_of("sglang", "torch", "rag-pipeline"),
    }


def table(report: dict[str, Any]) -> str:
    """The report as text, one line per prompt and mode."""
    lines = [
        f"{report['threads']} threads, medians",
        f"{'tokens':>7} {'chunks':>6} {'mode':18} {'TTFT s':>8} {'CPU s':>8} {'wall x':>7} "
        f"{'CPU x':>7} {'computed':>9}",
    ]
    lines += [
        f"{point['prompt_tokens']:7} {point['chunks']:6} {name:18} {row['ttft_p50_s']:8.3f} "
        f"{row['ttft_cpu_p50_s']:8.3f} {row['speedup_vs_prefix']:7.2f} "
        f"{row['cpu_speedup_vs_prefix']:7.2f} {row['computed_fraction']:9.3f}"
        for point in report["points"]
        for name, row in point["modes"].items()
    ]
    return "\n".join(lines)


@refusals_in_one_line
def main(words: Sequence[str] | None = None) -> int:
    """Run from a shell."""
    parser = benchmark_parser("rag-pipeline bench ttft", __doc__)
    parser.add_argument("--plot", type=Path, help="write TTFT over prompt length to this PNG")
    config, given = parse_config(parser, TtftConfig, words)
    found = run(config, say_progress)
    if given.plot:
        from rag_eval.benchmarks.ttft_plot import plot_ttft

        plot_ttft(found, given.plot)
    return print_report(found, table, as_json=given.json)


if __name__ == "__main__":
    sys.exit(main())
