"""Time to first token of one RAG prompt, every mode in one engine, interleaved.

The prompt is system + N chunks of real text + question. Each chunk's KV was computed once, alone, behind
the system part; then the chunks are asked about in another order, so prefix caching can serve the system
part only. Before every run the radix tree is emptied and the system part is prefilled again.

``rag-pipeline bench ttft --model smollm2-135m --repeats 5 --json``
"""

from __future__ import annotations

import json
import os
import random
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

from rag_eval.arguments import OneLineParser
from rag_eval.datasets import Example, PromptChunk
from rag_eval.datasets.filler import filler_chunks
from rag_eval.errors import EvalError

BASELINE = "prefix"
INSTRUCTION = "Answer the question from the passages."
QUESTION = "What do these passages say about names and how they are bound? Answer in one sentence."


@dataclass(frozen=True, kw_only=True, slots=True)
class TtftConfig:
    """What is measured.

    Parameters
    ----------
    model
        Hub id, folder, GGUF file or packaged name.
    chunks, chunk_tokens
        Chunks of the prompt, and their size in tokens (whole sentences, at most this).
    question_tokens
        Least length of the question in tokens; it is repeated up to there.
    modes
        As for the evaluation; ``prefix`` (RadixAttention alone) is always there.
    repeats
        Runs a mode; the first round is a warm-up that is not counted.
    seed
        Chooses text and order.
    """

    model: str = "smollm2-135m"
    chunks: int = 6
    chunk_tokens: int = 400
    question_tokens: int = 24
    modes: str = "prefix,reuse,query:0.05,query:0.15,epic:0.15,cacheblend:0.15"
    repeats: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("chunks", "chunk_tokens", "question_tokens", "repeats"):
            if getattr(self, name) < 1:
                raise EvalError(f"{name} is {getattr(self, name)}; it must be at least 1")


def run(
    config: TtftConfig,
    progress: Callable[[str], None] = lambda text: None,
    *,
    session: Any = None,
) -> dict[str, Any]:
    """Measure, and return the JSON of ``rag-pipeline bench ttft``.

    Parameters
    ----------
    config
        What to measure.
    progress
        Called with a line of text as the benchmark goes on.
    session
        A running engine to use (left open); one is started otherwise.

    Returns
    -------
    dict
        ``modes{NAME{ttft_p50_s, ttft_cpu_p50_s, speedup_vs_prefix, cpu_speedup_vs_prefix,
        computed_fraction, ...}}``, ``prompt_tokens``, ``engine``, ``threads``, ``versions``.
    """
    from rag_eval.runner.engine import start_session
    from rag_eval.runner.modes import parse_modes
    from rag_eval.runner.prompts import PromptMaker
    from rag_pipeline.models import resolve_llm

    modes = [mode for mode in parse_modes(f"full,{config.modes}") if mode.name != "full"]
    if all(mode.name != BASELINE for mode in modes):
        modes = [m for m in parse_modes(f"{BASELINE},{config.modes}") if m.name != "full"]
    folder = resolve_llm(config.model).path
    maker = PromptMaker(folder, gold_tokens=1)
    seen, asked = make_prompts(config, maker)
    vocabulary = json.loads((folder / "config.json").read_text("utf-8"))["vocab_size"]
    progress("starting the engine")
    opened = session or start_session(maker, vocabulary, {})
    try:
        opened.flush()
        opened.build_chunks(seen, store=True)
        runs: dict[str, list[Any]] = {mode.name: [] for mode in modes}
        for turn in range(config.repeats + 1):
            for mode in modes:
                opened.flush()
                opened.prefill(asked.prefix_ids)
                served = opened.serve(asked, mode, max_new_tokens=1)
                if turn:
                    runs[mode.name].append(served)
            progress(f"round {turn} of {config.repeats}")
    finally:
        if session is None:
            opened.close()
    return summary(config, runs, prompt_tokens=len(asked.input_ids))


def make_prompts(config: TtftConfig, maker: Any) -> tuple[Any, Any]:
    """Prompt whose chunks are seen, and the same chunks in another order with a question."""
    from rag_eval.runner.prompts import EvalPrompt

    rng = random.Random(config.seed)
    texts = filler_chunks(config.chunks, config.chunk_tokens, maker.encode, rng)
    chunks = tuple(
        PromptChunk(ids=tuple(maker.encode(" ".join(sentences) + "\n\n")), titles=(), is_gold=False)
        for sentences in texts
    )
    question = QUESTION
    while len(maker.encode(question)) < config.question_tokens:
        question = f"{question} {QUESTION}"
    example = Example(
        id="ttft", question=question, answers=("",), passages=(), instruction=INSTRUCTION
    )
    seen: EvalPrompt = maker.join(example, chunks)
    return seen, seen.rotated()


def summary(
    config: TtftConfig, runs: dict[str, list[Any]], *, prompt_tokens: int
) -> dict[str, Any]:
    """Medians a mode, and ratios against RadixAttention alone from the same rounds."""
    import torch

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
            "cpu_speedup_vs_prefix": median([b.ttft_cpu_s / s.ttft_cpu_s for b, s in pairs]),
            "computed_fraction": median([s.usage["computed_fraction"] for s in served]),
            "reused_tokens": served[0].usage["reused_tokens"],
            "n": len(served),
        }
    return {
        "config": asdict(config),
        "prompt_tokens": prompt_tokens,
        "modes": modes,
        "engine": "sglang",
        "threads": int(os.environ.get("OMP_NUM_THREADS") or torch.get_num_threads()),
        "cpus": os.cpu_count(),
        "versions": {name: version(name) for name in ("sglang", "torch", "rag-pipeline")},
    }


def table(report: dict[str, Any]) -> str:
    """The report as text, a line a mode."""
    lines = [
        f"prompt {report['prompt_tokens']} tokens, {report['threads']} threads, medians",
        f"{'mode':18} {'TTFT s':>8} {'CPU s':>8} {'wall x':>7} {'CPU x':>7} {'computed':>9}",
    ]
    lines += [
        f"{name:18} {row['ttft_p50_s']:8.3f} {row['ttft_cpu_p50_s']:8.3f} "
        f"{row['speedup_vs_prefix']:7.2f} {row['cpu_speedup_vs_prefix']:7.2f} "
        f"{row['computed_fraction']:9.3f}"
        for name, row in report["modes"].items()
    ]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Run from a shell."""
    defaults = TtftConfig()
    parser = OneLineParser(
        prog="rag-pipeline bench ttft",
        description="Time to first token of one RAG prompt, every mode in one engine.",
    )
    parser.add_argument("--model", default=defaults.model)
    parser.add_argument("--chunks", type=int, default=defaults.chunks)
    parser.add_argument("--chunk-tokens", type=int, default=defaults.chunk_tokens)
    parser.add_argument("--question-tokens", type=int, default=defaults.question_tokens)
    parser.add_argument("--modes", default=defaults.modes)
    parser.add_argument("--repeats", type=int, default=defaults.repeats)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--json", action="store_true")
    given = vars(parser.parse_args(arguments))
    as_json = given.pop("json")
    try:
        report = run(TtftConfig(**given), lambda text: print(text, file=sys.stderr))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(report) if as_json else table(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
