"""``rag-pipeline ingest``: files to an index."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rag_pipeline.cli.common import (
    DEFAULT_CHUNK_TOKENS,
    DEFAULT_EMBEDDER,
    make_embedder,
    resolve_llm_shown,
)
from rag_pipeline.cli.console import emit_json, say, step
from rag_pipeline.errors import RagPipelineError

if TYPE_CHECKING:
    from retrievers import IngestProgress, IngestReport, LoadReport


@dataclass(frozen=True, kw_only=True, slots=True)
class IngestOptions:
    """Options of the command, as parsed."""

    paths: tuple[str, ...]
    index: Path
    model: str
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS
    overlap: int = 0
    embedder: str | None = None
    factory: str | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    sync: bool = False
    warm: bool = False
    store: Path | None = None


def run_ingest(options: IngestOptions, *, json_output: bool) -> None:
    """Run the command and print what was done."""
    report, loaded = ingest_paths(options)
    for line in () if json_output else report_lines(report, loaded):
        say(line)
    result = {"index": str(options.index), **asdict(report), "files": loaded_json(loaded)}
    if options.warm:
        from rag_pipeline.cli.cache import print_warm, run_warm

        result["warm"] = run_warm(
            index=options.index, model=options.model, store=options.store, limit=None
        )
        if not json_output:
            print_warm(result["warm"], json_output=False)
    if json_output:
        emit_json(result)


def ingest_paths(options: IngestOptions) -> tuple[IngestReport, LoadReport]:
    """Ingest with a progress bar; returns what the index and the loaders report."""
    from rag_pipeline.erasure import make_eraser
    from rag_pipeline.sglang_plugin import FusionConfig
    from retrievers import (
        HFTokenizer,
        LoadReport,
        Manifest,
        RetrievalError,
        TokenSplitter,
        ingest,
        load_corpus,
    )

    if options.overlap >= options.chunk_tokens:
        raise RagPipelineError(
            f"--overlap is {options.overlap}; it must be below --chunk-tokens "
            f"({options.chunk_tokens})"
        )
    fusion = FusionConfig.from_env()
    embedder_name = options.embedder
    if embedder_name is None:
        try:
            embedder_name = Manifest.read(options.index).embedder_name
        except RetrievalError:
            embedder_name = DEFAULT_EMBEDDER
    embedder = make_embedder(embedder_name)
    tokenizer = HFTokenizer(resolve_llm_shown(options.model).path)
    splitter = TokenSplitter(tokenizer, chunk_tokens=options.chunk_tokens, overlap=options.overlap)
    loaded = LoadReport()
    documents = load_corpus(
        options.paths,
        include=options.include,
        exclude=options.exclude,
        report=loaded,
    )
    with step(f"Ingesting {', '.join(options.paths)}") as advance:

        def show(progress: IngestProgress) -> None:
            if progress.stage == "write":
                advance(done=progress.written, total=progress.total, description="Writing index")
            else:
                advance(
                    description=f"{progress.documents} documents, {progress.chunks} new chunks, "
                    f"{progress.embedded} embedded"
                )

        report = ingest(
            documents,
            options.index,
            splitter=splitter,
            embedder=embedder,
            factory=options.factory,
            sync=options.sync,
            erase=make_eraser(*fusion.store_folders(options.store), remote=fusion.remote),
            progress=show,
        )
    return report, loaded


def report_lines(report: IngestReport, loaded: LoadReport) -> list[str]:
    """Write what a person reads after an ingest."""
    lines = []
    if report.changed:
        lines.append(
            f"{report.documents_added} documents added, {report.documents_changed} changed, "
            f"{report.documents_unchanged} unchanged, {report.documents_removed} removed; "
            f"{report.chunks_embedded} chunks embedded, {report.chunks_total} in the index "
            f"({report.factory})"
        )
    else:
        lines.append(
            f"index is up to date: {report.documents_unchanged} documents unchanged, "
            f"{report.chunks_total} chunks, nothing embedded"
        )
    if report.chunks_resumed:
        lines.append(f"{report.chunks_resumed} chunks were taken from an interrupted run")
    shown = loaded.skipped[:10]
    lines += [f"skipped {path}: {reason}" for path, reason in shown]
    if loaded.num_skipped > len(shown):
        lines.append(f"... and {loaded.num_skipped - len(shown)} more skipped")
    lines += [f"note {path}: {words}" for path, words in loaded.notes[:10]]
    if len(loaded.notes) > 10:
        lines.append(f"... and {len(loaded.notes) - 10} more notes; --json lists them")
    return lines


def loaded_json(loaded: LoadReport) -> dict[str, Any]:
    """JSON of what the loaders took and skipped."""
    return {
        "read": loaded.num_files,
        "documents": loaded.num_documents,
        "skipped": loaded.num_skipped,
        "skipped_first": [{"path": path, "reason": reason} for path, reason in loaded.skipped],
        "notes": [{"path": path, "note": words} for path, words in loaded.notes],
    }
