"""Measure a model's latents for TPLA: ``rag-pipeline tpla calibrate --model M [--out FILE] [--json]``.

Writes what the bases ``pca`` and ``output`` are made of, layer by layer. Engines find it by the weights it was measured
with, if it lies in the project's own folder, which is the default.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rag_eval.arguments import OneLineParser
from rag_eval.command import no_progress, print_report, refusals_in_one_line, say_progress
from rag_eval.errors import EvalError


@refusals_in_one_line
def main(words: Sequence[str] | None = None) -> int:
    """Measure; print where the file is, or one JSON object."""
    parser = OneLineParser(
        prog="rag-pipeline tpla calibrate", description=(__doc__ or "").splitlines()[0]
    )
    add = parser.add_argument
    add("--model", required=True, help="an MLA model in the form of DeepSeek-V2: folder or hub id")
    add("--text", type=Path, help="data set or plain text; Python's language reference if none")
    add("--tokens", type=int, default=16384, help="of the text at most")
    add("--window", type=int, default=512, help="tokens that are prefilled together")
    add("--batch", type=int, default=8, help="windows at a time")
    add("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the model")
    add("--out", type=Path, help="file; by default one in the project's own folder")
    add("--json", action="store_true", help="one JSON object on stdout")
    given = parser.parse_args(words)
    for name, least in (("window", 3), ("batch", 1), ("tokens", given.window)):
        if getattr(given, name) < least:
            parser.error(f"--{name} is {getattr(given, name)}; it must be at least {least}")

    from rag_eval.tpla.model import LatentModel
    from rag_eval.tpla.run import measured_statistics
    from rag_eval.tpla.texts import text_tokens
    from rag_kernels.latent import create_basis, energy_shares
    from rag_pipeline.config import tpla_dir
    from rag_pipeline.models import resolve_llm
    from rag_pipeline.prompts.tokenizer import ModelTokenizer
    from rag_pipeline.whole_file import write_whole_bytes

    if given.out is not None:
        _check_place(given.out)
    folder = resolve_llm(given.model).path
    ids = text_tokens(given.text, ModelTokenizer.load(folder).encode, given.tokens)
    measured = measured_statistics(
        LatentModel.load(folder, given.dtype),
        given.model,
        folder,
        ids,
        window=given.window,
        batch=given.batch,
        progress=no_progress if given.json else say_progress,
    )
    out = given.out or tpla_dir() / f"{measured.fingerprint}.safetensors"
    try:
        write_whole_bytes(out, measured.to_bytes())
    except OSError as error:
        raise EvalError(f"{out} cannot be written: {error}") from error
    firsts = [
        energy_shares(layer.latent_DD, create_basis("pca", layer.dim, layer), 2)[0]
        for layer in measured.layers
        if layer.dim % 2 == 0
    ]
    report = {
        "file": str(out),
        "model": measured.model,
        "fingerprint": measured.fingerprint,
        "tokens": measured.tokens,
        "layers": len(measured.layers),
        "dim": measured.layers[0].dim,
        "first_half_energy": sum(firsts) / len(firsts) if firsts else None,
    }
    return print_report(report, _table, as_json=given.json)


def _check_place(out: Path) -> None:
    """Refuse a place where nothing can be written, before minutes are spent on measuring."""
    found = next(place for place in (out, *out.absolute().parents) if place.exists())
    if out.is_dir():
        raise EvalError(f"--out {out} is a folder; name a file in it")
    if found != out and not found.is_dir():
        raise EvalError(f"--out {out} cannot be written: {found} is a file; name another place")
    if not os.access(found, os.W_OK):
        raise EvalError(f"--out {out} cannot be written: {found} is read-only; name another place")


def _table(report: dict[str, Any]) -> str:
    share = report["first_half_energy"]
    more = "" if share is None else f"; the first half holds {share:.1%} of the energy by PCA"
    return f"{report['layers']} layers, latents of {report['dim']}{more}\n{report['file']}"


if __name__ == "__main__":
    raise SystemExit(main())
