"""Steps that several commands share: resolving models, opening an index."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from rag_pipeline.cli.console import Advance, step
from rag_pipeline.errors import RagPipelineError
from rag_pipeline.memory.config import MemoryConfig

if TYPE_CHECKING:
    import typer

    from rag_pipeline.models import ResolvedModel
    from retrievers import Embedder, Index

DEFAULT_EMBEDDER = "all-minilm-l6-v2"
DEFAULT_CHUNK_TOKENS = 192
"""The default embedder reads 256 of its own tokens; prose of 192 model tokens and a title fits."""
MEMORY_DEFAULTS = MemoryConfig()
_MEMORY_FLAGS = ("memory_budget", "memory_episodes", "memory_block")


def resolve_llm_shown(name: str) -> ResolvedModel:
    """Resolve a language model, with a bar while a GGUF file is converted or a hub is asked."""
    from rag_pipeline.models import resolve_llm

    with contextlib.ExitStack() as stack:
        shown: list[Advance] = []

        def progress(what: str, share: float) -> None:
            # The bar appears with the first report: most runs find the model ready.
            if not shown:
                shown.append(stack.enter_context(step(f"Preparing model {name}", total=100)))
            shown[0](done=round(share * 100), total=100, description=f"{name}: {what}")

        return resolve_llm(name, progress=progress)


def make_embedder(name: str) -> Embedder:
    """Embedder by name, folder or hub id; its weights are read on first use."""
    from rag_pipeline.models import resolve_embedder
    from retrievers import Embedder

    return Embedder(resolve_embedder(name).path, name=name)


def open_index(folder: Path, *, embedder: str | None, search: str) -> Index:
    """Open an index with the embedder it was built with, or the one given."""
    from retrievers import Index, Manifest

    if search == "bm25" and embedder is None:
        return Index.open(folder)
    name = embedder or Manifest.read(folder).embedder_name
    return Index.open(folder, embedder=make_embedder(name))


class MemoryOptions(Protocol):
    """Options of a command by which a memory is chosen."""

    @property
    def memory(self) -> str:
        """``off``, or a method."""
        ...

    @property
    def memory_budget(self) -> int:
        """Tokens that it keeps."""
        ...

    @property
    def memory_episodes(self) -> int:
        """Topics."""
        ...

    @property
    def memory_block(self) -> int:
        """Tokens that join it at once."""
        ...


def chosen_memory(options: MemoryOptions) -> MemoryConfig | None:
    """Memory that a command's options choose; None for none."""
    if options.memory == "off":
        return None
    from rag_pipeline.memory import parse_memory

    return parse_memory(
        {
            "method": options.memory,
            "budget_tokens": options.memory_budget,
            "episodes": options.memory_episodes,
            "block_tokens": options.memory_block,
        }
    )


def refuse_unread_memory(context: typer.Context) -> None:
    """Refuse flags of a memory where there is none; what a settings file says of one may wait for it.

    Raises
    ------
    RagPipelineError
        A flag that nothing would read.
    """
    method = context.params["memory"]
    if method != "off":
        return
    for option in context.command.params:
        source = context.get_parameter_source(option.name or "")
        if option.name in _MEMORY_FLAGS and source is not None and source.name == "COMMANDLINE":
            raise RagPipelineError(
                f"{option.opts[0]} is {context.params[option.name]} and --memory is off; "
                f"give --memory {MEMORY_DEFAULTS.method}, or leave {option.opts[0]} out"
            )
