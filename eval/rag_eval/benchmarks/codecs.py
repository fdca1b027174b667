"""What each codec of stored chunk KV costs in fidelity, and what it saves.

``python -m rag_eval.benchmarks.codecs --json``

One engine computes the chunks of all prompts and the full-prefill references. Its folder is copied once for each
codec, every record encoded and decoded. Then one engine per codec starts from its copy, as after a restart, and
follows the gold answers in each mode. Distances are those between next-token distributions, KL in nats, the mean over
the answer's tokens of a prompt; a prompt is one sample. ``kl_to_plain`` is the codec alone, ``kl_to_full`` is what a user
sees. KV from a lossy codec is never exact, so a policy with a ratio also sees one more reused chunk: ``reuse``
recomputes nothing, and shows the codec at its worst.
"""

from __future__ import annotations

import dataclasses
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from chunk_cache import CODECS, LOSSLESS
from rag_eval.arguments import require_at_least
from rag_eval.benchmarks.codec_store import copy_with_codec, fill_folder
from rag_eval.benchmarks.frame import benchmark_parser, keep_measured, run_benchmark
from rag_eval.command import Progress, no_progress
from rag_eval.datasets import DatasetOptions, load_dataset
from rag_eval.errors import EvalError
from rag_eval.metrics import kl_divergence, log_softmax
from rag_eval.metrics.distributions import Float64
from rag_eval.runner.engine import start_session
from rag_eval.runner.modes import FULL, Mode, parse_modes
from rag_eval.runner.passage import fusion_settings, write_corpus_passage
from rag_eval.runner.prompts import EvalPrompt, PromptMaker
from rag_eval.runner.run import model_folder
from rag_eval.runner.session import EngineSession


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CodecBenchConfig:
    """Sizes of a run."""

    model: str = "smollm2-135m"
    """Hub id, folder, GGUF file or packaged name."""
    dataset: str = "planted-1hop"
    """File or generator."""
    limit: int = 8
    """Prompts."""
    chunks: int = 4
    """Chunks of each prompt."""
    chunk_tokens: int = 220
    """Target length of a chunk."""
    gold_tokens: int = 10
    """Teacher-forced tokens at most."""
    modes: str = "reuse,query:0.15"
    """Modes that reuse chunk KV, comma between."""
    codecs: str = "plain,fp8,kivi8,kivi4"
    """Codecs, comma between; plain first, all are compared with it."""
    seed: int = 0
    """Order of chunks, distractors, generators."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "limit", "chunks", "chunk_tokens", "gold_tokens")
        unknown = [name for name in self.codec_names if name not in CODECS.names()]
        if unknown or self.codec_names[0] != LOSSLESS:
            raise EvalError(
                f"--codecs {self.codecs}: give {LOSSLESS} first, then any of {', '.join(CODECS.names())}"
            )
        if not self.fused_modes:
            raise EvalError(f"--modes {self.modes}: give at least one that reuses chunk KV")

    @property
    def codec_names(self) -> list[str]:
        """Names of the codecs, plain first."""
        return [name.strip() for name in self.codecs.split(",")]

    @property
    def fused_modes(self) -> list[Mode]:
        """The modes that load chunk KV."""
        return [mode for mode in parse_modes(self.modes) if mode.fused]


def run(config: CodecBenchConfig, progress: Progress = no_progress) -> dict[str, Any]:
    """Run the benchmark; starts one engine more than there are codecs, one after another.

    Parameters
    ----------
    config : CodecBenchConfig
        Sizes.
    progress : callable
        Called with one line of progress at a time.

    Returns
    -------
    dict
        JSON-ready: ``codecs`` by name (sizes, speeds, and by mode the distances), ``config``, ``n``, ``date``,
        ``machine``, ``versions``.

    Raises
    ------
    EvalError
        An engine that stores or loads no chunk KV.
    """
    model, vocabulary = model_folder(config.model, progress)
    maker = PromptMaker(model, gold_tokens=config.gold_tokens)
    options = DatasetOptions(
        chunks=config.chunks, chunk_tokens=config.chunk_tokens, seed=config.seed
    )
    examples = load_dataset(
        config.dataset, encode=maker.encode, options=options, limit=config.limit
    )
    prompts = [maker.make(example, options) for example in examples]
    found: dict[str, dict[str, Any]] = {}
    logits: dict[str, dict[str, list[Float64]]] = {}
    with tempfile.TemporaryDirectory(prefix="rag-codecs-") as scratch:
        source = Path(scratch) / "source"
        passage = write_corpus_passage(config.dataset, Path(scratch))
        progress("an engine computes the chunks and the references")
        with fusion_settings(store_dir=str(source), passage_file=passage):
            session = start_session(maker, vocabulary, {})
        try:
            fill_folder(session, prompts, source)
            full, _ = _follow(session, prompts, Mode(name=FULL))
        finally:
            session.close()
        with keep_measured(lambda: found) as end:
            for codec in config.codec_names:
                target = Path(scratch) / codec
                row = copy_with_codec(source, target, codec)
                progress(f"{codec}: {row}")
                with fusion_settings(store_dir=str(target), passage_file=passage, background=False):
                    session = start_session(maker, vocabulary, {})
                try:
                    logits[codec] = {}
                    for mode in config.fused_modes:
                        rows, reused = _follow(session, prompts, mode)
                        logits[codec][mode.name] = rows
                        row[mode.name] = {
                            "reused_tokens": statistics.fmean(reused),
                            "kl_to_full": _spread(_distances(full, rows)),
                            "kl_to_plain": _spread(_distances(logits[LOSSLESS][mode.name], rows)),
                            "same_tokens_as_plain": _agreement(logits[LOSSLESS][mode.name], rows),
                        }
                        progress(f"{codec} {mode.name}: {row[mode.name]}")
                finally:
                    session.close()
                found[codec] = row
    return {
        "benchmark": "codecs",
        "codecs": found,
        "n": len(prompts),
        "prompt_tokens": statistics.fmean(len(prompt.input_ids) for prompt in prompts),
        "config": dataclasses.asdict(config),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": {"machine": platform.machine(), "threads": torch.get_num_threads()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    } | end.report()


def _follow(
    session: EngineSession, prompts: Sequence[EvalPrompt], mode: Mode
) -> tuple[list[Float64], list[int]]:
    """Log-probabilities of each prompt's answer, and how many tokens of each prompt were loaded."""
    rows, reused = [], []
    for prompt in prompts:
        session.flush()
        logits, usage = session.follow_gold(prompt, mode)
        if mode.fused and (usage["fallback"] or not usage["reused_tokens"]):
            raise EvalError(
                f"{mode.name} on {prompt.example.id} loaded nothing (fallback {usage['fallback']!r})"
            )
        rows.append(log_softmax(logits))
        reused.append(int(usage["reused_tokens"]))
    return rows, reused


def _distances(reference: Sequence[Float64], other: Sequence[Float64]) -> list[float]:
    return [
        float(kl_divergence(one, two).mean()) for one, two in zip(reference, other, strict=True)
    ]


def _agreement(reference: Sequence[Float64], other: Sequence[Float64]) -> float:
    """Share of the answers' tokens whose most likely one is the same."""
    return float(
        np.mean(
            np.concatenate(
                [
                    one.argmax(-1) == two.argmax(-1)
                    for one, two in zip(reference, other, strict=True)
                ]
            )
        )
    )


def _spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, its standard error, median and largest value over prompts."""
    n = len(values)
    return {
        "mean": statistics.fmean(values),
        "se": statistics.stdev(values) / n**0.5 if n > 1 else 0.0,
        "median": statistics.median(values),
        "max": max(values),
    }


def table(report: dict[str, Any]) -> str:
    """Format the report as text, a block per codec."""
    lines = []
    for codec, row in report["codecs"].items():
        lines.append(
            f"{codec:6} {row['bytes_per_token']:9.0f} bytes/token   encode {row['encode_mb_s']:7.0f} MB/s"
            f"   decode {row['decode_mb_s']:7.0f} MB/s"
        )
        for mode in parse_modes(report["config"]["modes"]):
            if mode.fused:
                plain, full = row[mode.name]["kl_to_plain"], row[mode.name]["kl_to_full"]
                lines.append(
                    f"       {mode.name:12} KL to plain {plain['mean']:.5f} (s.e. {plain['se']:.5f})"
                    f"   KL to full {full['mean']:.5f} (s.e. {full['se']:.5f})   n={report['n']}"
                )
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> int:
    """Command line of the benchmark; progress on stderr, one JSON object or a table on stdout."""
    parser = benchmark_parser("python -m rag_eval.benchmarks.codecs", __doc__)
    return run_benchmark(parser, CodecBenchConfig, run, table, words)


if __name__ == "__main__":
    sys.exit(main())
