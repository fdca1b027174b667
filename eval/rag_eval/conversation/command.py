"""Compare memories of long conversations: ``rag-pipeline eval conversation --dataset FILE --model M --budget TOKENS``."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rag_eval.arguments import (
    OneLineParser,
    add_engine_option,
    add_json_option,
    build_config,
    engine_arguments,
)
from rag_eval.command import print_report, refusals_in_one_line, say_progress
from rag_eval.conversation.config import DEFAULT_METHODS, ConversationConfig
from rag_eval.errors import EvalError


def _parser() -> OneLineParser:
    parser = OneLineParser(prog="rag-pipeline eval conversation", description=__doc__)
    add = parser.add_argument
    add("--dataset", required=True, help="LoCoMo or LongMemEval file, REALTALK file or folder")
    add("--model", default="smollm2-135m", help="hub id, folder, GGUF file or packaged name")
    add("--methods", default=DEFAULT_METHODS, help="memory methods, comma between")
    add("--budget", default="2048", help="tokens of the history that are kept, or 4x: a quarter")
    add(
        "--max-tokens",
        type=int,
        help="cut conversations to so many; by default what the model holds",
    )
    add("--cut", default="first", help="which end of a longer conversation stays: first or newest")
    add("--limit-conversations", type=int, help="the first so many")
    add("--limit-questions", type=int, help="the first so many of each conversation")
    add("--max-new-tokens", type=int, default=24, help="length of the greedy answer")
    add("--gold-tokens", type=int, default=32, help="teacher-forced tokens at most")
    add("--embedder", default="all-minilm-l6-v2", help="sentence model")
    add(
        "--memory-arg",
        action="append",
        default=[],
        metavar="NAME=JSON",
        help="another field of the memory, such as episodes=4, block_tokens=512, merge_margin=0",
    )
    add("--out", type=Path, help="folder of the run, which goes on there; by default one in runs/")
    add_engine_option(parser)
    add_json_option(parser)
    return parser


@refusals_in_one_line
def main(words: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = _parser()
    given = vars(parser.parse_args(words))
    try:
        given["memory"] = engine_arguments(given.pop("memory_arg"), option="--memory-arg")
        out = given.pop("out")
        config = build_config(ConversationConfig, given | {"out": out or Path("runs")})
        if out is None:
            config = build_config(ConversationConfig, given | {"out": default_folder(config)})
    except EvalError as error:
        parser.error(str(error))

    from rag_eval.conversation.run import run_conversations
    from rag_eval.conversation.table import table

    say_progress(f"records of each question go to {config.out}")
    return print_report(run_conversations(config, say_progress), table, as_json=given["json"])


def default_folder(config: ConversationConfig) -> Path:
    """Folder of a run under ``runs/``, the same for the same settings, so that the same command goes on."""
    text = json.dumps(config.identity(), sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    data, model = Path(config.dataset).stem, Path(config.model).stem
    return Path("runs") / f"conversation-{data}-{model}-{config.budget}-{digest}"


if __name__ == "__main__":
    sys.exit(main())
