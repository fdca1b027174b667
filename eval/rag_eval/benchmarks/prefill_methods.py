"""Attention methods in prefill, side by side in one engine: speed, density and what is lost against dense attention.

``rag-pipeline bench attention --model smollm2-135m --methods dense,sale,power --lengths 4096,8192 --json``

Per length there are two kinds of prompt. *Texts* are prose that goes on for 64 tokens more: the negative
log-likelihood (NLL) of these tokens, each behind the true ones, is ``nll``. *Retrieval* prompts hide numbers under
keys and ask for one of them (RULER's multi-key task): ``retrieval`` is the share of right greedy answers. Speed is that
of the first text, all methods in turns, the cache emptied before each run and each method warmed up on the text's beginning. ``attention_vs_dense`` compares the time in
attention, finding the keys included, with that of the engine's own dense attention; ``prefill_vs_dense`` the
time to the first token. With ``--density D`` all methods are first brought to that share of the keys, on the model's
attention in torch over the first text and the first retrieval prompt (:mod:`rag_eval.benchmarks.attention_density`); ``options`` says
how, and ``recall`` is the share of dense attention's mass that they keep there. ``density`` is the share of the keys that rows could see which they read. Answers decode
with dense attention unless the method acts on decoding.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rag_eval.benchmarks.frame import (
    Report,
    benchmark_parser,
    keep_measured,
    run_benchmark,
    versions_of,
)
from rag_eval.benchmarks.prefill_methods_config import (
    PrefillMethodsConfig,
    make_retrievals,
    make_texts,
)
from rag_eval.benchmarks.prefill_methods_length import LengthRun
from rag_eval.command import Progress, no_progress
from rag_eval.errors import EvalError
from rag_eval.runner.passage import fusion_settings
from rag_eval.runner.prompts import PromptMaker
from rag_eval.runner.run import model_folder
from rag_eval.runner.session import EngineSession


def run(
    config: PrefillMethodsConfig,
    progress: Progress = no_progress,
    *,
    session: EngineSession | None = None,
) -> Report:
    """Measure, and return the JSON of ``rag-pipeline bench attention``.

    Parameters
    ----------
    config : PrefillMethodsConfig
        What to measure.
    progress : callable
        Called with a line of text as it goes on.
    session : EngineSession, optional
        A running engine that measures attention (left open); one is started otherwise.

    Returns
    -------
    dict
        ``lengths{N{METHOD{attention_vs_dense, prefill_vs_dense, density, nll_delta, retrieval, ...}}}`` beside
        ``engine`` and ``versions``. A run that is interrupted or fails behind the first round of a length has what was
        measured until then, and says so.

    Raises
    ------
    EvalError
        The longest prompt does not fit the model's context.
    """
    folder, vocabulary = model_folder(config.model, progress)
    facts = json.loads((folder / "config.json").read_text("utf-8"))
    maker = PromptMaker(folder, gold_tokens=16)
    longest = config.length_list[-1] + config.nll_tokens
    context = facts.get("max_position_embeddings", longest + 1)
    if longest >= context:
        raise EvalError(
            f"a text of {longest} tokens does not fit into {config.model}, whose context is {context}; "
            "ask for shorter ones"
        )
    told = _bring_to_density(config, folder, maker, progress)
    opened = session or _start(maker, vocabulary, longest)
    lengths: dict[int, LengthRun] = {}
    engine: dict[str, Any] = {}
    try:
        with keep_measured(lambda: any(one.rows() for one in lengths.values())) as end:
            engine = opened.facts()
            for length in config.length_list:
                requests = {
                    name: config.request(one["options"]) for name, one in told[length].items()
                }
                texts = make_texts(maker, config.texts, length, config.nll_tokens, config.seed)
                prompts = make_retrievals(maker, config.retrievals, length, config.seed)
                lengths[length] = LengthRun(told[length], requests, texts, prompts)
                lengths[length].measure(opened, config.repeats, progress)
    finally:
        if session is None:
            opened.close()
    return {
        "config": dataclasses.asdict(config),
        "lengths": {str(length): rows for length, one in lengths.items() if (rows := one.rows())},
        "engine": engine,
        "versions": versions_of("python", "sglang", "torch"),
    } | end.report()


def _bring_to_density(
    config: PrefillMethodsConfig, folder: Path, maker: PromptMaker, progress: Progress
) -> dict[int, dict[str, dict[str, Any]]]:
    """By length and method: its ``options``, and where a density was asked for, what it keeps with them."""
    told: dict[int, dict[str, dict[str, Any]]] = {
        length: {name: {"options": name} for name in config.method_names}
        for length in config.density_of_length
    }
    if not config.density:
        return told
    from rag_eval.benchmarks.attention_model import MethodModel
    from rag_eval.benchmarks.attention_seen import SeenAttention
    from rag_pipeline.models import fingerprint_checkpoint

    model = MethodModel(folder)
    for length, density in config.density_of_length.items():
        prompts = {"text": make_texts(maker, 1, length, 1, config.seed)[0][0]}
        for asked in make_retrievals(maker, min(1, config.retrievals), length, config.seed):
            prompts["retrieval"] = asked.input_ids
        seen = SeenAttention(model, fingerprint_checkpoint(folder), prompts, progress)
        told[length] |= seen.brought_to(density, config.method_names[1:], length, progress)
    return told


def _start(maker: PromptMaker, vocabulary: int, longest: int) -> EngineSession:
    from rag_eval.runner.engine import start_session

    pool = {"max_total_tokens": 2 * longest + 1024}
    with fusion_settings(time_attention=True, passage_tokens=0, background=False):
        return start_session(maker, vocabulary, pool)


def table(report: Report) -> str:
    """One line per length and method."""
    head = (
        f"{'tokens':>7} {'method':<34} {'attention':>9} {'prefill':>8} {'density':>8} {'estimate':>8} "
        f"{'NLL':>8} {'retrieval':>9} {'recall':>7}"
    )
    lines = [head]
    for length, methods in report["lengths"].items():
        for name, row in methods.items():
            nll = f"{row['nll_delta']:+.2%}" if "nll_delta" in row else "-"
            retrieval = f"{row['retrieval']:.0%}" if "retrieval" in row else "-"
            lines.append(
                f"{length:>7} {row.get('options', name):<34} {row['attention_vs_dense']:>9.3f} {row['prefill_vs_dense']:>8.3f} "
                f"{row['density']:>8.3f} {row['estimation_vs_dense']:>8.3f} {nll:>8} {retrieval:>9} {row.get('recall', 1.0):>7.3f}"
            )
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> int:
    """Run the benchmark from the command line."""
    parser = benchmark_parser("rag-pipeline bench attention", __doc__)
    return run_benchmark(parser, PrefillMethodsConfig, run, table, words)


if __name__ == "__main__":
    sys.exit(main())
