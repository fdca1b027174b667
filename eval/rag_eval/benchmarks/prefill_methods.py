"""Attention methods in prefill, side by side in one engine: speed, density and what is lost against dense attention.

``rag-pipeline bench attention --model smollm2-135m --methods dense,sale,power --lengths 4096,8192 --json``

Per length there are two kinds of prompt. *Texts* are prose that goes on for 64 tokens more: the negative
log-likelihood (NLL) of these tokens, each behind the true ones, is ``nll``. *Retrieval* prompts hide numbers under
keys and ask for one of them (RULER's multi-key task): ``retrieval`` is the share of right greedy answers. Speed is that
of the first text, all methods in turns, the cache emptied before each run. ``attention_vs_dense`` compares the time in
attention, finding the keys included, with that of the engine's own dense attention; ``prefill_vs_dense`` the
time to the first token. With ``--density D`` all methods are first brought to that share of the keys, on the model's
attention in torch over the first text and the first retrieval prompt (:mod:`rag_eval.benchmarks.attention_density`); ``options`` says
how, and ``recall`` is the share of dense attention's mass that they keep there. ``density`` is the share of the keys that rows could see which they read. Answers decode
with dense attention unless the method acts on decoding.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rag_eval.benchmarks.frame import Report, benchmark_parser, run_benchmark, versions_of
from rag_eval.benchmarks.prefill_methods_config import (
    DENSE,
    PrefillMethodsConfig,
    make_retrievals,
    make_texts,
)
from rag_eval.command import Progress, no_progress
from rag_eval.errors import EvalError
from rag_eval.metrics import answer_nll, interval, log_softmax
from rag_eval.runner.passage import fusion_settings
from rag_eval.runner.prompts import EvalPrompt, PromptMaker
from rag_eval.runner.run import model_folder
from rag_eval.runner.session import EngineSession
from rag_pipeline.protocol import FusionRequest


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Run:
    """One prefill."""

    wall_s: float
    cpu_s: float
    attention_s: float
    mask_s: float
    density: float


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
        ``engine`` and ``versions``.

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
    lengths: dict[str, Any] = {}
    engine: dict[str, Any] = {}
    interrupted = False
    try:
        for length in config.length_list:
            lengths[str(length)] = _measure(config, opened, maker, length, told[length], progress)
        engine = opened.facts()
    except KeyboardInterrupt:
        if not lengths:
            raise
        interrupted = True
    finally:
        if session is None:
            opened.close()
    return {
        "config": dataclasses.asdict(config),
        "lengths": lengths,
        "interrupted": interrupted,
        "engine": engine,
        "versions": versions_of("python", "sglang", "torch"),
    }


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


def _measure(
    config: PrefillMethodsConfig,
    session: EngineSession,
    maker: PromptMaker,
    length: int,
    told: dict[str, dict[str, Any]],
    progress: Progress,
) -> dict[str, Any]:
    """All methods at one length."""
    names = list(told)
    requests = {name: config.request(facts["options"]) for name, facts in told.items()}
    texts = make_texts(maker, config.texts, length, config.nll_tokens, config.seed)
    prompts = make_retrievals(maker, config.retrievals, length, config.seed)
    runs: dict[str, list[_Run]] = {name: [] for name in names}
    for turn in range(config.repeats + 1):
        for name in names[:: 1 if turn % 2 else -1]:
            taken = _prefill(session, texts[0][0], requests[name])
            if turn:
                runs[name].append(taken)
            progress(f"{length} tokens, {name}: {taken.wall_s:.2f} s")
    nll: dict[str, list[float]] = {name: [] for name in names}
    right: dict[str, list[bool]] = {name: [] for name in names}
    found: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        for prompt, following in texts:
            nll[name].append(_nll(session, prompt, following, requests[name]))
        for asked in prompts:
            answer = _answer(session, asked, requests[name])
            right[name].append(asked.example.answers[0] in answer)
            found[name].append(_nll(session, asked.input_ids, asked.gold_ids, requests[name]))
        progress(f"{length} tokens, {name}: NLL {statistics.mean(nll[name]):.3f}")
    return {
        name: told[name]
        | _summary(runs[name], runs[DENSE])
        | _losses(nll[name], nll[DENSE], right[name], right[DENSE], found[name], found[DENSE])
        for name in names
    }


def _prefill(session: EngineSession, prompt: Sequence[int], request: FusionRequest) -> _Run:
    """Prefill a prompt alone, its attention measured."""
    session.flush()
    before, cpu = session.fusion_state()["attention"], session.cpu_seconds()
    began = time.perf_counter()
    session.prefill(prompt, request)
    wall_s, cpu_s = time.perf_counter() - began, session.cpu_seconds() - cpu
    after = session.fusion_state()["attention"]
    spent = {kind: after["seconds"][kind] - before["seconds"][kind] for kind in after["seconds"]}
    seen = after["keys_seen"] - before["keys_seen"]
    return _Run(
        wall_s=wall_s,
        cpu_s=cpu_s,
        attention_s=sum(spent.values()),
        mask_s=spent["mask"],
        density=(after["keys_read"] - before["keys_read"]) / seen if seen else 1.0,
    )


def _nll(
    session: EngineSession, prompt: Sequence[int], following: Sequence[int], request: FusionRequest
) -> float:
    session.flush()
    logits, _ = session.force(prompt, following, request)
    return answer_nll(log_softmax(logits), following)


def _answer(session: EngineSession, asked: EvalPrompt, request: FusionRequest) -> str:
    session.flush()
    answer = session.prefill(asked.input_ids, request, max_new_tokens=len(asked.gold_ids) + 4)
    return session.decode(answer["output_ids"])


def _summary(runs: list[_Run], dense: list[_Run]) -> dict[str, Any]:
    """Medians, and ratios against dense from the same rounds."""
    attention = [
        own.attention_s / other.attention_s for own, other in zip(runs, dense, strict=True)
    ]
    prefill = [own.wall_s / other.wall_s for own, other in zip(runs, dense, strict=True)]
    cpu = [own.cpu_s / max(other.cpu_s, 0.01) for own, other in zip(runs, dense, strict=True)]
    return {
        "attention_vs_dense": _median(attention),
        "attention_vs_dense_range": [round(min(attention), 4), round(max(attention), 4)],
        "prefill_vs_dense": _median(prefill),
        "prefill_vs_dense_range": [round(min(prefill), 4), round(max(prefill), 4)],
        "prefill_cpu_vs_dense": _median(cpu),
        "attention_s": _median([own.attention_s for own in runs]),
        "estimation_vs_dense": _median(
            [own.mask_s / other.attention_s for own, other in zip(runs, dense, strict=True)]
        ),
        "prefill_s": _median([own.wall_s for own in runs]),
        "density": _median([own.density for own in runs]),
        "n": len(runs),
    }


def _losses(
    nll: list[float],
    dense: list[float],
    right: list[bool],
    right_dense: list[bool],
    found: list[float],
    found_dense: list[float],
) -> dict[str, Any]:
    """What a method costs in quality; differences are those of pairs."""
    base = statistics.mean(dense)
    made: dict[str, Any] = {
        "nll": round(statistics.mean(nll), 4),
        "nll_delta": round(statistics.mean(nll) / base - 1, 5),
        "nll_delta_each": [
            round(own / other - 1, 5) for own, other in zip(nll, dense, strict=True)
        ],
        "nll_delta_interval": interval(nll, dense, base),
        "nll_n": len(nll),
    }
    if right:
        made |= {
            "retrieval": round(sum(right) / len(right), 4),
            "retrieval_delta_interval": interval(right, right_dense),
            "retrieval_n": len(right),
            "retrieval_nll": round(statistics.mean(found), 4),
            "retrieval_nll_dense": round(statistics.mean(found_dense), 4),
        }
    return made


def _median(values: list[float]) -> float:
    return round(statistics.median(values), 4)


def table(report: Report) -> str:
    """One line per length and method."""
    head = (
        f"{'tokens':>7} {'method':<34} {'attention':>9} {'prefill':>8} {'density':>8} {'estimate':>8} "
        f"{'NLL':>8} {'retrieval':>9} {'recall':>7}"
    )
    lines = [head]
    for length, methods in report["lengths"].items():
        for name, row in methods.items():
            retrieval = f"{row['retrieval']:.0%}" if "retrieval" in row else "-"
            lines.append(
                f"{length:>7} {row.get('options', name):<34} {row['attention_vs_dense']:>9.3f} {row['prefill_vs_dense']:>8.3f} "
                f"{row['density']:>8.3f} {row['estimation_vs_dense']:>8.3f} {row['nll_delta']:>+8.2%} {retrieval:>9} {row.get('recall', 1.0):>7.3f}"
            )
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> int:
    """Run the benchmark from the command line."""
    parser = benchmark_parser("rag-pipeline bench attention", __doc__)
    return run_benchmark(parser, PrefillMethodsConfig, run, table, words)


if __name__ == "__main__":
    sys.exit(main())
