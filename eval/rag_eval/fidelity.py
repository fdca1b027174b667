"""Command ``rag-pipeline eval`` (``python -m rag_eval.fidelity``): how far each mode is from full prefill."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rag_eval.arguments import (
    OneLineParser,
    add_engine_option,
    add_json_option,
    build_config,
)
from rag_eval.command import json_line, refusals_in_one_line, say_progress


def _parser() -> OneLineParser:
    parser = OneLineParser(
        prog="rag-pipeline eval",
        description="Quality, distance to full prefill, and cost of every mode, in one engine. "
        "`rag-pipeline eval gate` checks one model before it serves, `rag-pipeline eval conversation` compares "
        "memories of long conversations, `rag-pipeline eval tpla` slices the latents of an MLA model over ranks.",
    )
    add = parser.add_argument
    add("--dataset", required=True, help="file, or planted-1hop, planted-2hop, ruler-multikey, ...")
    add("--model", default="smollm2-135m", help="hub id, folder, GGUF file or packaged name")
    add("--modes", default=None, help="modes, comma between; every policy when left out")
    add("--out", required=True, type=Path, help="folder of the run; an interrupted run goes on")
    add("--limit", type=int, default=None, help="first n examples")
    add("--seed", type=int, default=0, help="order, distractors, generators, bootstrap")
    add("--chunks", type=int, default=6, help="chunks per prompt")
    add("--chunk-tokens", type=int, default=280, help="target length of a chunk")
    add("--distractors", type=int, default=None, help="most passages without the answer")
    add("--order", default="shuffled", help="given, shuffled, gold_first or gold_last")
    add("--zipf", type=float, default=None, help="draw distractors by Zipf's law, so they recur")
    add("--max-new-tokens", type=int, default=16, help="length of the greedy answer")
    add("--gold-tokens", type=int, default=10, help="teacher-forced tokens at most")
    add("--noise-every", type=int, default=4, help="noise floor on every n-th example, 0 never")
    add("--seen-before", default="alone", help="alone, or permuted: earlier in another order")
    add("--retrieve", type=Path, default=None, help="index folder to take the chunks from")
    add("--passage", default="corpus", help="chunks behind text of the corpus, or builtin")
    add_engine_option(parser)
    add("--publish", type=Path, default=None, help="also write the run as one JSON file")
    add_json_option(parser)
    return parser


@refusals_in_one_line
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code. The words ``gate``, ``conversation`` and ``tpla`` run other ones."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["gate"]:
        from rag_eval.gate import main as gate

        return gate(words[1:])
    if words[:1] == ["conversation"]:
        from rag_eval.conversation.command import main as conversation

        return conversation(words[1:])
    if words[:1] == ["tpla"]:
        from rag_eval.tpla.command import main as tpla

        return tpla(words[1:])
    given = _parser().parse_args(words)
    from rag_eval.runner import EvalConfig, run_eval, table_text

    result = run_eval(build_config(EvalConfig, vars(given)), say_progress)
    if given.publish:
        from rag_eval.report import publish

        publish(result, given.out, given.publish)
    if given.json:
        print(json_line(result.to_json()))
    else:
        print(table_text(result), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
