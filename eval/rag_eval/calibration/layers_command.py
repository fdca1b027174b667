"""Measure the sensitivity of a model's layers: ``rag-pipeline memory calibrate --model M [--out FILE] [--json]``.

Writes how far each layer's keys change when the context is cut, and prints the budgets that follow. The study of
retention reads the file; engines keep equal budgets in all layers, which was measured to be as good.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from rag_eval.arguments import OneLineParser
from rag_eval.calibration.out_file import write_calibration
from rag_eval.command import no_progress, print_report, refusals_in_one_line, say_progress


@refusals_in_one_line
def main(words: Sequence[str] | None = None) -> int:
    """Measure; print where the file is, or one JSON object."""
    parser = OneLineParser(
        prog="rag-pipeline memory calibrate", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--model", required=True, help="packaged name, folder, GGUF file or hub id")
    parser.add_argument(
        "--samples", type=Path, help="JSON lines of long texts; Python's language reference if none"
    )
    parser.add_argument("--tokens", type=int, default=4096, help="longest sample")
    parser.add_argument("--budget", type=int, default=2048, help="mean tokens per layer, to show")
    parser.add_argument("--alpha", type=float, default=1.1, help="exponent of the weights, to show")
    parser.add_argument("--out", type=Path, help="file; by default one in the project's own folder")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    given = parser.parse_args(words)

    from chunk_cache.retention import layer_budgets
    from rag_eval.calibration.samples import long_text, read_prompts
    from rag_eval.retention.model import ShownModel
    from rag_eval.retention.sensitivity import SINKS, key_sensitivity, least_tokens, window_of
    from rag_eval.retention.sensitivity_file import LayerSensitivity
    from rag_pipeline.config import layers_dir
    from rag_pipeline.models import fingerprint_checkpoint, resolve_llm
    from rag_pipeline.prompts.tokenizer import ModelTokenizer

    if given.tokens < least_tokens():
        parser.error(f"--tokens is {given.tokens}; it must be at least {least_tokens()}")
    try:
        layer_budgets([0.0, 1.0], given.budget, alpha=given.alpha)
    except ValueError as error:
        parser.error(str(error))
    found = resolve_llm(given.model)
    encode = ModelTokenizer.load(found.path).encode
    samples = (
        [long_text(given.tokens, encode)]
        if given.samples is None
        else read_prompts(given.samples, given.tokens, encode)
    )
    progress = no_progress if given.json else say_progress
    model = ShownModel.load(found.path, "auto")
    each = [key_sensitivity(model, ids, progress=progress) for ids in samples]
    measured = LayerSensitivity(
        model=given.model,
        fingerprint=fingerprint_checkpoint(found.path),
        tokens=tuple(len(ids) for ids in samples),
        sinks=SINKS,
        window=window_of(max(len(ids) for ids in samples)),
        cosines=tuple(round(fmean(layer), 6) for layer in zip(*each, strict=True)),
    )
    out = given.out or layers_dir() / f"{measured.fingerprint}.json"
    write_calibration(out, measured.to_json())
    budgets = layer_budgets(measured.cosines, given.budget, alpha=given.alpha)
    report = {
        "file": str(out),
        "model": measured.model,
        "fingerprint": measured.fingerprint,
        "tokens": list(measured.tokens),
        "window": measured.window,
        "cosines": list(measured.cosines),
        "budget": given.budget,
        "alpha": given.alpha,
        "budgets": list(budgets),
    }
    return print_report(report, _table, as_json=given.json)


def _table(report: dict[str, Any]) -> str:
    cosines, budgets = report["cosines"], report["budgets"]
    return (
        f"{len(budgets)} layers, cosines {min(cosines):.3f} to {max(cosines):.3f}; "
        f"{report['budget']} tokens per layer become {min(budgets)} to {max(budgets)}\n{report['file']}"
    )


if __name__ == "__main__":
    raise SystemExit(main())
