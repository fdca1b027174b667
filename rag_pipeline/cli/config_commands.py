"""The commands ``rag-pipeline config ...`` and their options; :mod:`.config` does the work.

As in :mod:`.app`, what a command needs is imported when it runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rag_pipeline.cli.options import JsonOption

config_app = typer.Typer(
    help="Settings by file and environment: show, env, init.", rich_markup_mode=None
)


@config_app.command("show")
def config_show(context: typer.Context, json_output: JsonOption = False) -> None:
    """Print every setting's value, and the file or variable it came from."""
    from rag_pipeline.cli.config import run_show

    run_show(file=context.find_root().params["config"], json_output=json_output)


@config_app.command("env")
def config_env(context: typer.Context) -> None:
    """Print shell lines that give an SGLang server started by hand the same settings."""
    from rag_pipeline.cli.config import run_env

    run_env(file=context.find_root().params["config"])


@config_app.command("init")
def config_init(
    path: Annotated[Path, typer.Argument(help="File to write, or its folder.")] = Path(),
) -> None:
    """Write a rag-pipeline.toml in which every key stands with its default, commented out."""
    from rag_pipeline.cli.config import run_init

    run_init(path)
