"""A whole run: data set in, record, numbers, table and plots out."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rag_eval.datasets import Example, Passage, check_dataset, load_dataset, shared_chunks
from rag_eval.errors import EvalError
from rag_eval.report import render_tables, write_plots
from rag_eval.result import EvalResult
from rag_eval.runner.config import EvalConfig
from rag_eval.runner.engine import start_session
from rag_eval.runner.measure import measure_example
from rag_eval.runner.passage import fusion_settings, run_passage
from rag_eval.runner.predictions import METRICS, RunFolder
from rag_eval.runner.prompts import PromptMaker
from rag_eval.runner.retrieval import IndexedChunks, score_retrieval
from rag_eval.runner.session import EngineSession
from rag_eval.runner.summary import summarise
from rag_pipeline.whole_file import write_whole

Progress = Callable[[str], None]
"""Takes one line about where a run stands."""

TABLE = "table.txt"
_VERSIONS = ("sglang", "torch", "transformers", "numpy", "rag-pipeline")


def run_eval(config: EvalConfig, progress: Progress | None = None) -> EvalResult:
    """Measure every mode on a data set, side by side in one engine.

    Parameters
    ----------
    config : EvalConfig
        Settings.
    progress : Progress, optional
        Called with one line of progress at a time; silent when missing.

    Returns
    -------
    EvalResult
        The numbers that were also written to ``config.out``.

    Raises
    ------
    EvalError
        A bad data set, mode or output folder; ``ModeUnavailableError`` for a mode that this
        engine does not serve.
    """
    report = progress or (lambda line: None)
    # A bad file is told at once, not after the model has been fetched and converted.
    check_dataset(config.dataset)
    model, vocabulary = model_folder(config.model, report)
    maker = PromptMaker(model, gold_tokens=config.gold_tokens)
    options = replace(config.options, seed=config.seed)
    examples = load_dataset(
        config.dataset, encode=maker.encode, options=options, limit=config.limit
    )
    folder = RunFolder(config.out, config.identity(), run_notes(limit=config.limit))
    missing = [example for example in examples if example.id not in folder.records]
    report(f"{len(examples)} examples, {len(examples) - len(missing)} done before")
    if missing:
        with fusion_settings(passage_file=run_passage(config)):
            session = start_session(maker, vocabulary, config.engine_args)
        try:
            _measure(config, session, maker, examples, missing, folder, report)
        finally:
            session.close()
    return finish(config, examples, [folder.records[example.id] for example in examples])


def finish(
    config: EvalConfig, examples: Sequence[Example], records: Sequence[dict[str, Any]]
) -> EvalResult:
    """Summarise records and write ``metrics.json``, the table and the plots."""
    result = summarise(
        records,
        [mode.name for mode in config.parsed_modes],
        dataset=config.dataset,
        model=config.model,
        seed=config.seed,
        retrieval=score_retrieval(examples, records, k=config.options.chunks)
        if config.retrieve
        else None,
    )
    text = json.dumps(result.to_json(), indent=2, ensure_ascii=False, allow_nan=False)
    write_whole(config.out / METRICS, text + "\n")
    write_whole(config.out / TABLE, table_text(result))
    write_plots(result, records, config.out)
    return result


def table_text(result: EvalResult, *, width: int = 170) -> str:
    """Render the tables of a run as plain text."""
    from io import StringIO

    from rich.console import Console

    console = Console(file=StringIO(), width=width)
    for table in render_tables(result):
        console.print(table)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return str(text)


def _measure(
    config: EvalConfig,
    session: EngineSession,
    maker: PromptMaker,
    examples: Sequence[Example],
    missing: Sequence[Example],
    folder: RunFolder,
    report: Progress,
) -> None:
    options = replace(config.options, seed=config.seed)
    corpus = _corpus(examples)
    if options.zipf is not None:
        corpus = shared_chunks(corpus, options, maker.encode)
    index = IndexedChunks(config.retrieve, maker.encode) if config.retrieve else None
    started = time.monotonic()
    turns = {example.id: turn for turn, example in enumerate(examples)}
    for done, example in enumerate(missing, start=1):
        turn = turns[example.id]
        record = measure_example(
            session,
            maker.join(example, index.chunks(example, options.chunks))
            if index
            else maker.make(example, options, corpus),
            config.parsed_modes,
            max_new_tokens=config.max_new_tokens,
            turn=turn,
            with_noise_floor=config.noise_every > 0 and turn % config.noise_every == 0,
            seen_before=config.seen_before,
        )
        folder.append(record)
        each = (time.monotonic() - started) / done
        left = each * (len(missing) - done)
        report(f"{done}/{len(missing)} {example.id}: {each:.1f} s each, {left / 60:.0f} min left")
    if index:
        index.close()


def _corpus(examples: Sequence[Example]) -> list[Passage]:
    """Distinct passages of all examples, in order: the shared pool of distractors."""
    pool: dict[str, Passage] = {}
    for example in examples:
        if not example.ready_chunks:
            for passage in example.passages:
                pool.setdefault(passage.text, replace(passage, is_gold=False))
    return list(pool.values())


def model_folder(name: str, report: Progress) -> tuple[Path, int]:
    """Find a model's folder and the number of tokens that its logits are about."""
    from rag_pipeline import resolve_llm

    resolved = resolve_llm(name, progress=lambda line, share: report(line))
    facts = json.loads((resolved.path / "config.json").read_text("utf-8"))
    # Models with a vision part keep the text model's facts in a section of their own.
    vocabulary = facts.get("vocab_size") or facts.get("text_config", {}).get("vocab_size")
    if not isinstance(vocabulary, int):
        raise EvalError(f"{resolved.path / 'config.json'} names no vocab_size; give a text model")
    return resolved.path, vocabulary


def _program() -> str:
    """Name the running command as a person would type it."""
    name = Path(sys.argv[0]).name
    return "python -m rag_eval.fidelity" if name == "fidelity.py" else name


def run_notes(**asked: Any) -> dict[str, Any]:
    """Facts of a call for the reader of a run's folder: command, versions, machine, and what was asked besides."""
    found: dict[str, str | None] = {}
    for package in _VERSIONS:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return {
        "command": [_program(), *sys.argv[1:]],
        **asked,
        "versions": found,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
