"""``rag-pipeline demo``: a real corpus, real questions, real SGLang; nothing to prepare."""

from __future__ import annotations

import dataclasses

from rag_pipeline.cli.ask import AskOptions, ask_shown, open_pipeline, print_answer
from rag_pipeline.cli.console import emit_json, say, write
from rag_pipeline.cli.ingest import IngestOptions, ingest_paths, report_lines
from rag_pipeline.config import indexes_dir

CORPUS = "pydoc-topics"
"""The Python language reference by topic, which every CPython carries (``pydoc_data.topics``)."""

QUESTIONS = (
    "What does the with statement do?",
    "How does Python look up a name that is used inside a function?",
    "What is the difference between break and continue?",
)


def run_demo(*, model: str, json_output: bool) -> None:
    """Ingest, ask three questions, print the answers; a second run finds the index ready."""
    index = indexes_dir() / CORPUS
    say(f"Corpus: {CORPUS} (the Python language reference by topic). Index: {index}")
    report, loaded = ingest_paths(IngestOptions(paths=(CORPUS,), index=index, model=model))
    for line in report_lines(report, loaded):
        say(line)
    options = AskOptions(question=QUESTIONS[0], index=index, model=model)
    answers = []
    with open_pipeline(options) as pipeline:
        for question in QUESTIONS:
            answer = ask_shown(
                pipeline,
                dataclasses.replace(options, question=question),
                json_output=json_output,
            )
            answers.append({"question": question, **answer.to_json()})
            if not json_output:
                write(f"\n=== {question}\n\n")
                print_answer(answer)
    if json_output:
        emit_json({"index": str(index), "answers": answers})
    else:
        say(
            "\nAsk your own: rag-pipeline ask 'What is a decorator?' "
            f"--index {index} --model {model}"
        )
