"""Calibrate sparse attention: ``rag-pipeline attention calibrate --model M [--out FILE] [--json]``.

Finds the threshold of each head that SALE may use and writes them to a file. Engines find it by the weights it was
made for, if it lies in the project's own folder, which is the default.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rag_eval.arguments import OneLineParser
from rag_eval.calibration.out_file import write_calibration
from rag_eval.command import no_progress, print_report, refusals_in_one_line, say_progress
from rag_eval.errors import EvalError


@refusals_in_one_line
def main(words: Sequence[str] | None = None) -> int:
    """Calibrate; print where the file is, or one JSON object."""
    from rag_kernels.sparse.sale.calibration import FIRST_TAU, Calibration

    parser = OneLineParser(prog="rag-pipeline attention calibrate", description=__doc__)
    parser.add_argument("--model", required=True, help="packaged name, folder, GGUF file or hub id")
    parser.add_argument("--theta", type=float, default=0.4, help="error per row of each head")
    parser.add_argument(
        "--largest", type=float, default=FIRST_TAU, help="threshold that every head begins with"
    )
    parser.add_argument(
        "--samples", type=Path, help="JSON lines; random key-value prompts if not given"
    )
    parser.add_argument("--count", type=int, default=3, help="random prompts")
    parser.add_argument("--tokens", type=int, default=4096, help="longest prompt")
    parser.add_argument("--seed", type=int, default=0, help="of the random prompts")
    parser.add_argument("--out", type=Path, help="file; by default one in the project's own folder")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    given = parser.parse_args(words)
    if not 0 < given.theta < float("inf"):
        parser.error(f"--theta is {given.theta}; it must be positive")
    if given.count < 1:
        parser.error(f"--count is {given.count}; it must be at least 1")

    from rag_eval.calibration.run import calibrate
    from rag_eval.calibration.samples import read_prompts, retrieval_prompts
    from rag_pipeline.config import attention_dir
    from rag_pipeline.models import fingerprint_checkpoint, resolve_llm
    from rag_pipeline.prompts.tokenizer import ModelTokenizer

    try:
        calibration = Calibration(given.theta, largest_tau=given.largest)
    except ValueError as error:
        parser.error(str(error))
    if given.tokens <= calibration.config.min_tokens:
        raise EvalError(
            f"--tokens is {given.tokens}; only prompts of more than {calibration.config.min_tokens} are sparse"
        )
    found = resolve_llm(given.model)
    encode = ModelTokenizer.load(found.path).encode
    prompts = (
        retrieval_prompts(given.count, given.tokens, encode, given.seed)
        if given.samples is None
        else read_prompts(given.samples, given.tokens, encode)
    )
    progress = no_progress if given.json else say_progress
    report = calibrate(found.path, prompts, calibration, progress)
    table = calibration.table(
        given.model, fingerprint_checkpoint(found.path), [len(ids) for ids in prompts]
    )
    out = given.out or attention_dir() / f"{table.fingerprint}.json"
    write_calibration(out, table.to_json())
    flat = [tau for heads in table.tau for tau in heads]
    report |= {
        "file": str(out),
        "model": table.model,
        "fingerprint": table.fingerprint,
        "theta": table.theta,
        "prompts": len(prompts),
        "heads": len(flat),
        "dense_heads": sum(tau == 0 for tau in flat),
        "mean_tau": sum(flat) / len(flat),
    }
    return print_report(report, _table, as_json=given.json)


def _table(report: dict[str, Any]) -> str:
    return (
        f"{report['heads']} heads, {report['dense_heads']} of them dense; mean threshold "
        f"{report['mean_tau']:.5f}, largest error per row {report['largest_error']:.3f}\n{report['file']}"
    )


if __name__ == "__main__":
    raise SystemExit(main())
