"""The commands ``rag-pipeline convert ...`` and their options; :mod:`rag_pipeline.conversion` does the work.

As in :mod:`.app`, what a command needs is imported when it runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rag_pipeline.cli.options import JsonOption

convert_app = typer.Typer(
    help="Other forms of a model's weights: mla (latent attention, less KV per token).",
    rich_markup_mode=None,
)

_TEXT = "UTF-8 text, .jsonl, or the built-in pydoc-topics; may be repeated."


@convert_app.command("mla")
def convert_mla(
    model: Annotated[
        str, typer.Option("--model", help="Hub id, model folder, GGUF file, or packaged name.")
    ],
    rope: Annotated[int, typer.Option(help="Numbers per token that keep their position.")],
    latent: Annotated[int, typer.Option(help="Numbers per token of the latent.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to make.")],
    pad_heads_to: Annotated[
        int | None,
        typer.Option(min=1, help="Add heads of zeros up to so many, for tensor parallelism."),
    ] = None,
    calibration: Annotated[
        list[str] | None, typer.Option(help=f"Text to calibrate on: {_TEXT}")
    ] = None,
    held_out: Annotated[
        list[str] | None, typer.Option(help=f"Text to measure perplexity on: {_TEXT}")
    ] = None,
    calibration_tokens: Annotated[
        int, typer.Option(min=1, help="Most tokens to calibrate on.")
    ] = 64 * 512,
    held_out_tokens: Annotated[
        int, typer.Option(min=1, help="Most tokens of each text to measure on.")
    ] = 8 * 512,
    ridge: Annotated[
        float, typer.Option(min=0, help="How strongly refitted projections are held.")
    ] = 0.03,
    dtype: Annotated[
        str, typer.Option(help="Type of the weights: auto, float32 or bfloat16.")
    ] = "auto",
    json_output: JsonOption = False,
) -> None:
    """Turn a grouped-query model into a stock DeepSeek-V2 checkpoint with multi-head latent attention."""
    from rag_pipeline.cli.common import resolve_llm_shown
    from rag_pipeline.cli.console import emit_json, say, write
    from rag_pipeline.conversion import ConversionConfig, convert_to_mla, refuse_early
    from rag_pipeline.conversion.texts import CORPUS

    config = ConversionConfig(
        rope=rope,
        latent=latent,
        pad_heads_to=pad_heads_to,
        calibration_tokens=calibration_tokens,
        held_out_tokens=held_out_tokens,
        ridge=ridge,
        dtype=dtype,  # type: ignore[arg-type]  # checked by the config
    )
    refuse_early(model, out)
    report = convert_to_mla(
        resolve_llm_shown(model).path,
        out,
        config,
        calibration=calibration or (CORPUS,),
        held_out=held_out or (CORPUS,),
        progress=say,
    )
    if json_output:
        emit_json(report.to_json())
    else:
        write(report.table() + "\n")
