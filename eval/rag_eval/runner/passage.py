"""The passage that a run's chunks are computed behind: text of the data set, as an index gives a sample of itself."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from rag_eval.datasets import corpus_texts
from rag_eval.runner.config import EvalConfig
from rag_pipeline.prompts.passage_sample import PASSAGE_NAME, sample_passage
from rag_pipeline.whole_file import write_whole
from retrievers import Index


def run_passage(config: EvalConfig) -> str:
    """Path of the passage file of a run, written into its folder at first.

    Parameters
    ----------
    config : EvalConfig
        Of the run.

    Returns
    -------
    str
        Empty for the built-in prose: where it is asked for, or the data set is too small for a
        sample.
    """
    if config.passage == "builtin":
        return ""
    file = config.out / PASSAGE_NAME
    if not file.exists():
        # Written once: a run that goes on with a higher limit keeps its passage.
        text = sample_passage(_texts(config))
        if not text:
            return ""
        write_whole(file, text)
    return str(file.absolute())


def _texts(config: EvalConfig) -> list[str]:
    if config.retrieve is None:
        return corpus_texts(config.dataset, behind=config.limit)
    index = Index.open(config.retrieve)
    try:
        return [chunk.text for chunk in index.chunks()]
    finally:
        index.close()


@contextmanager
def fusion_settings(**changes: Any) -> Iterator[None]:
    """The operator's fusion settings with some changed, for engines started inside.

    Without a folder of chunk KV unless one is among the changes: a measurement starts empty, and
    leaves nothing behind. A passage that the operator has set stays.
    """
    from rag_pipeline.sglang_plugin import FUSION_VARIABLE, FusionConfig

    before = os.environ.get(FUSION_VARIABLE)
    config = FusionConfig.from_env()
    if config.passage_file:
        changes.pop("passage_file", None)
    os.environ[FUSION_VARIABLE] = replace(config, **{"store_dir": "", **changes}).to_env()
    try:
        yield
    finally:
        if before is None:
            del os.environ[FUSION_VARIABLE]
        else:
            os.environ[FUSION_VARIABLE] = before


def write_corpus_passage(dataset: str, folder: Path) -> str:
    """Write a generator's passage into a folder and return its path."""
    file = folder / PASSAGE_NAME
    write_whole(file, sample_passage(corpus_texts(dataset)))
    return str(file)
