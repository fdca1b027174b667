"""Command ``rag-pipeline eval tpla``: perplexity of an MLA model whose latents are sliced over ranks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rag_eval.arguments import OneLineParser, build_config
from rag_eval.command import no_progress, print_report, refusals_in_one_line, say_progress
from rag_eval.errors import EvalError


@refusals_in_one_line
def main(words: Sequence[str] | None = None) -> int:
    """Measure; print a table, or one JSON object."""
    parser = OneLineParser(prog="rag-pipeline eval tpla", description=(__doc__ or "").strip())
    add = parser.add_argument
    add("--model", required=True, help="an MLA model in the form of DeepSeek-V2: folder or hub id")
    add("--variants", default="unsliced,gla,identity,hadamard,pca", help="also: output")
    add("--ranks", type=int, default=2, help="slices: 2 or 4")
    add("--prefill", default="unsliced", help="of prompts: unsliced or sliced")
    add("--norm", default="exact", help="of the latent: exact, or sliced as in the paper")
    add("--logits", default="plain", help="plain, or literal: divided by the slice's energy")
    add("--text", type=Path, help="scored text: data set or plain; Python's reference if none")
    add("--max-tokens", type=int, help="scored tokens at most; all of the text if not given")
    add("--window", type=int, default=512, help="tokens of a prompt and what follows it")
    add("--prompt", type=int, default=128, help="tokens of each prompt, which are not scored")
    add("--statistics", type=Path, help="file of `tpla calibrate`; measured at once if none")
    add("--calibration-text", type=Path, help="text for that; without it Python's reference")
    add("--calibration-tokens", type=int, default=16384, help="of that text at most")
    add("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the model")
    add("--batch", type=int, default=8, help="windows at a time")
    add("--json", action="store_true", help="one JSON object on stdout")
    given = parser.parse_args(words)

    from rag_eval.tpla.measure import VARIANTS, SliceOptions, measure
    from rag_eval.tpla.model import LatentModel, check_folder
    from rag_eval.tpla.run import measured_statistics, read_statistics
    from rag_eval.tpla.texts import Windows, check_apart, marks_of, text_tokens
    from rag_pipeline.models import resolve_llm
    from rag_pipeline.prompts.tokenizer import ModelTokenizer

    variants = given.variants.split(",")
    for name in variants:
        if name not in VARIANTS:
            parser.error(f"variant {name!r} is not known; choose of {', '.join(VARIANTS)}")
    for name in ("batch", "max_tokens", "calibration_tokens"):
        if (value := getattr(given, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
    options = build_config(SliceOptions, _only(SliceOptions, given))
    cut = Windows(prompt=given.prompt, window=given.window)
    folder = resolve_llm(given.model).path
    check_folder(folder)
    encode = ModelTokenizer.load(folder).encode
    ids = text_tokens(given.text, encode)
    windows = cut.cut(ids, given.max_tokens)
    progress = no_progress if given.json else say_progress
    known, seen = None, None
    if given.statistics is not None:
        known = read_statistics(given.statistics, folder)
        check_apart(ids, known.text_marks)
    elif {"pca", "output"} & set(variants) or (options.norm, options.logits) != ("exact", "plain"):
        seen = text_tokens(given.calibration_text, encode, given.calibration_tokens)
        check_apart(ids, marks_of(seen))
    model = LatentModel.load(folder, given.dtype)
    if seen is not None:
        known = measured_statistics(
            model,
            given.model,
            folder,
            seen,
            window=given.window,
            batch=given.batch,
            progress=progress,
        )
    try:
        report = measure(
            model,
            windows,
            cut,
            variants,
            None if known is None else known.layers,
            options,
            batch=given.batch,
            progress=progress,
        )
    except ValueError as error:
        raise EvalError(str(error)) from error
    report = {
        "model": given.model,
        "text": None if given.text is None else given.text.name,
        "ranks": options.ranks,
        "prefill": options.prefill,
        "norm": options.norm,
        "logits": options.logits,
        "dtype": given.dtype,
        "prompt": cut.prompt,
        "window": cut.window,
        "calibration_tokens": None if known is None else known.tokens,
    } | report
    return print_report(report, _table, as_json=given.json)


def _only(kind: type[Any], given: Any) -> dict[str, Any]:
    return {name: getattr(given, name) for name in kind.__dataclass_fields__}


def _table(report: dict[str, Any]) -> str:
    lines = [f"{report['n_tokens']} decoded tokens, {report['ranks']} ranks"]
    for name, ppl in report["ppl"].items():
        gap = report["excess"].get(name)
        more = "" if gap is None else f"  {gap[0]:+.2%} ({gap[1]:+.2%} to {gap[2]:+.2%})"
        size = report["kv_bytes_per_token_per_rank"][name]
        lines.append(f"{name:<10} perplexity {ppl:>10.3f}{more}  {size} bytes per token and rank")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
