"""A conversion from beginning to end; killed and started again it goes on where it was."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from rag_pipeline.conversion.checkpoint import write_checkpoint
from rag_pipeline.conversion.config import ConversionConfig, ConversionError
from rag_pipeline.conversion.layers import LatentLayer
from rag_pipeline.conversion.perplexity import perplexities, predicted
from rag_pipeline.conversion.report import ConversionReport, TextPerplexity
from rag_pipeline.conversion.source import SourceShape, SourceWeights, check_gguf, read_shape
from rag_pipeline.conversion.streams import Streams, convert_layer, embed
from rag_pipeline.conversion.texts import CORPUS, Windows, read_windows
from rag_pipeline.conversion.work import WorkFolder, digest, work_folder
from rag_pipeline.models import fingerprint_checkpoint
from rag_pipeline.prompts.tokenizer import ModelTokenizer
from rag_pipeline.whole_file import write_whole
from retrievers.durable import sync_folder

REPORT = "mla_conversion.json"
"""In the result's folder: how it was made, and its perplexity."""
_STREAMS = "streams"
_BYTES = {"float32": 4, "bfloat16": 2}

Progress = Callable[[str], None]


def refuse_early(model: str, out: Path) -> None:
    """Refuse what is wrong without the weights, which may take minutes to unpack or fetch.

    Parameters
    ----------
    model : str
        Name of the model, as a user gives it.
    out : Path
        Folder to make.

    Raises
    ------
    ConversionError
        The folder is there, or the model is a GGUF file of a family that cannot be converted.
    """
    if os.path.lexists(out):
        raise ConversionError(f"{out} exists already; remove it, or name another folder")
    file = Path(model).expanduser()
    if file.suffix == ".gguf" and file.is_file():
        check_gguf(file)


def convert_to_mla(
    model: Path,
    out: Path,
    config: ConversionConfig,
    *,
    calibration: Sequence[str] = (CORPUS,),
    held_out: Sequence[str] = (CORPUS,),
    progress: Progress = lambda line: None,
) -> ConversionReport:
    """Turn a grouped-query model into a stock DeepSeek-V2 checkpoint.

    Parameters
    ----------
    model : Path
        Folder of a Llama-like model in Hugging Face format.
    out : Path
        Folder to make; it appears whole. Stages are kept beside it until then.
    config : ConversionConfig
        Sizes, and how they are reached.
    calibration, held_out : sequence of str
        Texts to calibrate on and to measure perplexity on: files, or ``pydoc-topics``, of which each takes its part.
    progress : callable
        Told a line per layer and text.

    Returns
    -------
    ConversionReport
        Perplexity before and after, and bytes per token.

    Raises
    ------
    ConversionError
        One line: a model, size, text or folder that cannot be used.
    """
    refuse_early(str(model), out)
    shape = read_shape(model)
    config.check(shape)
    weights = SourceWeights(model)
    found, measured = _windows(model, shape, config, calibration, held_out)
    job: dict[str, Any] = {
        "model": fingerprint_checkpoint(model),
        "calibration": digest(found.rows),
        **{name: asdict(config)[name] for name in ("rope", "latent", "window", "ridge", "refit")},
    }
    with work_folder(out, job) as work, torch.inference_mode():
        if work.resumed:
            progress(f"going on with what {work.path} holds")
        before = _original_perplexity(work, model, measured, progress)
        losses = _convert_layers(work, weights, shape, config, found, progress)
        made = work.path / "checkpoint"
        shutil.rmtree(made, ignore_errors=True)
        progress("writing the checkpoint")
        write_checkpoint(made, weights, shape, config, lambda index: _layer(work, index))
        after = perplexities(made, measured, lambda line: progress(f"converted, {line}"))
        report = ConversionReport(
            model=str(model),
            out=str(out),
            rope=config.rope,
            latent=config.latent,
            heads=config.heads(shape),
            dtype=config.written_dtype(shape),
            calibration_tokens=found.tokens,
            original_bytes_per_token=_bytes(shape, config, 2 * shape.kv_width),
            converted_bytes_per_token=_bytes(shape, config, config.rope + config.latent),
            latent_loss=sum(losses) / len(losses),
            perplexity=tuple(
                TextPerplexity(
                    text=text.name,
                    n_tokens=predicted(text),
                    original=before[text.name],
                    converted=after[text.name],
                )
                for text in measured
            ),
        )
        write_whole(made / REPORT, json.dumps(report.to_json(), indent=2) + "\n")
        if out.exists():
            raise ConversionError(f"{out} was made by another; the result is in {made}")
        made.rename(out)
        sync_folder(out.parent)
        shutil.rmtree(work.path)
    return report


def _windows(
    model: Path,
    shape: SourceShape,
    config: ConversionConfig,
    calibration: Sequence[str],
    held_out: Sequence[str],
) -> tuple[Windows, list[Windows]]:
    from rag_pipeline.models.stock_tokenizer import load_stock_tokenizer

    tokenizer = ModelTokenizer.load(model)
    return read_windows(
        calibration,
        held_out,
        tokenizer.encode,
        start=load_stock_tokenizer(model)("")["input_ids"],
        length=config.window,
        tokens=config.calibration_tokens,
        held_out_tokens=config.held_out_tokens,
        # Each output projection has so many unknowns per row.
        least=4 * shape.heads * shape.head_dim,
    )


def _original_perplexity(
    work: WorkFolder, model: Path, texts: Sequence[Windows], progress: Progress
) -> dict[str, float]:
    stage = f"perplexity-{digest([text.rows for text in texts])[:16]}"
    known = work.load_json(stage)
    if known is None:
        known = perplexities(model, texts, lambda line: progress(f"original, {line}"))
        work.save_json(stage, known)
    return dict(known)


def _convert_layers(
    work: WorkFolder,
    weights: SourceWeights,
    shape: SourceShape,
    config: ConversionConfig,
    calibration: Windows,
    progress: Progress,
) -> list[float]:
    """Bring all layers into latent form, from the first that is missing; the energy that each lost."""
    done = 0
    if (saved := work.load(_STREAMS)) is not None:
        tensors, facts = saved
        streams, done = Streams(**tensors), int(facts["layers"])
    else:
        streams = embed(torch.tensor(calibration.rows), weights.embedding())
    for index in range(done, shape.layers):
        layer, lost = convert_layer(weights.layer(index), streams, shape, config)
        work.save(_stage(index), layer.tensors(), {"lost": repr(lost)})
        # Behind the layer: what lies before it must never be met without it.
        held = {"original": streams.original, "converted": streams.converted}
        work.save(_STREAMS, held, {"layers": str(index + 1)})
        progress(
            f"layer {index + 1} of {shape.layers}: latent lost {lost:.4f}, streams {streams.error:.4f} apart"
        )
    return [float(_loaded(work, index)[1]["lost"]) for index in range(shape.layers)]


def _stage(index: int) -> str:
    return f"layer-{index:04}"


def _loaded(work: WorkFolder, index: int) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    saved = work.load(_stage(index))
    if saved is None:
        raise ConversionError(
            f"{work.path} is damaged: layer {index} is missing; remove the folder and start again"
        )
    return saved


def _layer(work: WorkFolder, index: int) -> LatentLayer:
    return LatentLayer.of(_loaded(work, index)[0])


def _bytes(shape: SourceShape, config: ConversionConfig, numbers: int) -> int:
    return numbers * shape.layers * _BYTES[config.written_dtype(shape)]
