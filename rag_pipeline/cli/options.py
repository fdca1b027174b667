"""Options that several commands share, each with its flag, bounds and help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rag_pipeline.cli.common import DEFAULT_EMBEDDER

DEFAULT_MODEL = "smollm2-135m"

IndexOption = Annotated[Path, typer.Option("--index", help="Index folder.")]
ModelOption = Annotated[
    str, typer.Option("--model", help="Hub id, model folder, GGUF file, or packaged name.")
]
EmbedderOption = Annotated[
    str | None,
    typer.Option(
        "--embedder",
        help=f"Hub id, folder or packaged name; default {DEFAULT_EMBEDDER}, "
        "or the one the index was built with.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
TopKOption = Annotated[int, typer.Option("--top-k", min=1, max=64, help="Chunks to retrieve.")]
SearchOption = Annotated[str, typer.Option(help="dense, bm25 or hybrid.")]
DocumentOrderOption = Annotated[
    str,
    typer.Option(
        help="Where documents stand: retrieved, best_last, both_ends, or power[:OPTIONS]: the best where "
        "attention power reads them."
    ),
]
OverlapOption = Annotated[int, typer.Option(min=0, help="Tokens shared by neighbours.")]
StoreOption = Annotated[
    Path | None,
    typer.Option("--store", help="Folder of chunk KV; default below RAG_PIPELINE_HOME."),
]
MemoryOption = Annotated[
    str,
    typer.Option(
        "--memory",
        help="What long conversations are answered from: off (all of it), epicache (a cache of fixed size), or "
        "another method.",
    ),
]
MemoryBudgetOption = Annotated[
    int, typer.Option("--memory-budget", "--budget", min=1, help="Tokens that a memory keeps.")
]
MemoryEpisodesOption = Annotated[
    int, typer.Option("--memory-episodes", "--episodes", min=1, help="Topics, each with a memory.")
]
MemoryBlockOption = Annotated[
    int, typer.Option("--memory-block", min=1, help="Tokens that join a memory at once.")
]
