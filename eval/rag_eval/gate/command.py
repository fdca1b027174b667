"""Command ``rag-pipeline eval gate`` (``python -m rag_eval.gate.command``)."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rag_eval.arguments import (
    OneLineParser,
    add_engine_option,
    add_fields,
    add_json_option,
    build_config,
)
from rag_eval.command import json_line, refusals_in_one_line, say_progress
from rag_eval.gate.thresholds import Thresholds

DESCRIPTION = (
    "Prove on this model, with the installed versions, what fusion promises exactly, and measure "
    "each policy's distance to full prefill on planted facts. Ends with 0 only if every policy "
    "named has passed; the verdict is kept for `rag-pipeline doctor`."
)

LIMITS = {
    "noise_factor": "exact paths: KL at most so many times the noise floor",
    "max_kl_of_reuse": "KL to full prefill over that of plain reuse",
    "min_agreement": "share of answers whose first tokens are full prefill's",
    "max_f1_drop": "token F1 below full prefill's",
}
"""Thresholds that have an option, and its help text."""


def _parser() -> OneLineParser:
    parser = OneLineParser(prog="rag-pipeline eval gate", description=DESCRIPTION)
    add = parser.add_argument
    add("--model", default="smollm2-135m", help="hub id, folder, GGUF file or packaged name")
    add(
        "--policies",
        default="",
        help="policies that you serve, comma between, such as query:0.15,epic:0.1; empty for the "
        "engine's default policy",
    )
    add("--examples", type=int, default=8, help="prompts of the fidelity run")
    add("--exact-prompts", type=int, default=2, help="prompts of the exactness checks")
    add("--chunks", type=int, default=6, help="chunks per prompt")
    add("--chunk-tokens", type=int, default=280, help="length of a chunk")
    add("--max-new-tokens", type=int, default=16, help="length of the greedy answer")
    add("--seed", type=int, default=0, help="chooses facts and filler text")
    add_fields(parser, Thresholds, LIMITS, only=LIMITS)
    add_engine_option(parser)
    add("--out", type=Path, default=None, help="also write the verdict to this file")
    add_json_option(parser)
    return parser


@refusals_in_one_line
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns
    -------
    int
        0 when every policy passed, 1 when one did not or the input is bad; 2 for bad options.
    """
    given = _parser().parse_args(arguments)
    from rag_eval.gate.gate import GateConfig, run_gate
    from rag_eval.gate.record import save_gate
    from rag_pipeline.whole_file import write_whole

    result = run_gate(build_config(GateConfig, vars(given)), say_progress)
    stored = save_gate(result)
    text = json_line(result)
    if given.out:
        write_whole(given.out, text + "\n")
    print(text if given.json else table(result))
    say_progress(f"kept in {stored}")
    return 0 if result["passed"] else 1


def table(result: Mapping[str, Any]) -> str:
    """The verdict as text: one line per check, the scores, one line per policy."""
    floor, limits = result["noise_floor"], result["thresholds"]
    lines = [
        f"model gate of {result['model']}, sglang {result['versions']['sglang']}, "
        f"rag-pipeline {result['versions']['rag-pipeline']}, {result['engine'].get('attention_class')}",
        f"noise floor: KL {_number(floor['kl'])} (at most {_number(floor['kl_max'])}), "
        f"log-probability {_number(floor['log_prob_max'])}, over {floor['n']} re-batchings of plain "
        f"prefill; exact means KL <= {_number(limits['exact_kl'])} and the same greedy tokens",
        "",
        f"{'policy':22} {'check':12} {'value':>9} {'limit':>9}  verdict",
    ]
    for check in sorted(result["checks"], key=lambda check: check["policy"]):
        value, limit = (_number(check[key]) for key in ("value", "limit"))
        verdict = "pass" if check["passed"] else "FAIL"
        detail = f" ({check['detail']})" if check["detail"] else ""
        policy = check["policy"] or "every policy"
        lines.append(f"{policy:22} {check['name']:12} {value:>9} {limit:>9}  {verdict}{detail}")
    if result["fidelity"]:
        lines += ["", *_scores(result["fidelity"])]
    lines += ["", *(f"note: {note}" for note in result["notes"])]
    for name, verdict in result["policies"].items():
        why = f": {', '.join(verdict['failed'])}" if verdict["failed"] else ""
        lines.append(f"{name:22} {'PASS' if verdict['passed'] else 'FAIL'}{why}")
    return "\n".join(lines)


def _scores(fidelity: Mapping[str, Any]) -> list[str]:
    lines = [
        f"{fidelity['dataset']}, n = {fidelity['n']}: "
        "F1, KL to full over the answer (standard error), same answers, computed, TTFT",
    ]
    for name, row in fidelity["modes"].items():
        error = row["kl_answer_se"]
        spread = f" ({error:.4f})" if error is not None else ""
        lines.append(
            f"{name:22} {row['f1']:5.2f} {row['kl_answer']:9.4f}{spread} {row['agree_full']:5.2f} "
            f"{row['computed_fraction']:7.1%} {row['ttft_p50_s']:8.3f} s"
        )
    return lines


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


if __name__ == "__main__":
    sys.exit(main())
