"""One door to every data set: a file by its path, a generator by its name."""

from __future__ import annotations

from pathlib import Path

from rag_eval.datasets.core import DatasetOptions, Encode, Example
from rag_eval.datasets.files import read_examples
from rag_eval.datasets.filler import paragraphs
from rag_eval.datasets.planted import planted_facts
from rag_eval.datasets.ruler import TASKS, ruler_task
from rag_eval.errors import EvalError
from rag_pipeline.prompts.passage_sample import LEAST_TEXTS

GENERATORS = ("planted-1hop", "planted-2hop", *(f"ruler-{task}" for task in TASKS))
DEFAULT_COUNT = 100
"""Examples that a generator makes when no limit is given."""


def check_dataset(name_or_path: str | Path) -> None:
    """Find faults of a data set without a tokenizer.

    Raises
    ------
    EvalError
        Unknown name, or a file that is missing, empty or malformed (the record is named).
    """
    if str(name_or_path) not in GENERATORS:
        _read(name_or_path)


def load_dataset(
    name_or_path: str | Path,
    *,
    encode: Encode,
    options: DatasetOptions | None = None,
    limit: int | None = None,
) -> list[Example]:
    """Load or generate examples.

    Parameters
    ----------
    name_or_path : str or Path
        One of ``GENERATORS`` or a file in one of the formats of :func:`read_examples`.
    encode : Encode
        Tokeniser of the model under test; generators measure chunks with it.
    options : DatasetOptions, optional
        Chunks, lengths and seed of generated examples.
    limit : int, optional
        First n examples only.

    Raises
    ------
    EvalError
        Unknown name, or a file that is missing, empty or malformed (the record is named).
    """
    if limit is not None and limit < 1:
        raise EvalError(f"limit is {limit}; allowed: 1 or more")
    options = options or DatasetOptions()
    name = str(name_or_path)
    if name in GENERATORS:
        count = limit or DEFAULT_COUNT
        if name.startswith("planted-"):
            return planted_facts(count, 1 if name == "planted-1hop" else 2, options, encode)
        return ruler_task(name.removeprefix("ruler-"), count, options, encode)
    return _read(name_or_path)[:limit]


def corpus_texts(name_or_path: str | Path, *, behind: int | None = None) -> list[str]:
    """Texts in the manner of a data set's chunks.

    Parameters
    ----------
    name_or_path : str or Path
        As for :func:`load_dataset`.
    behind : int, optional
        Leave out this many examples at the beginning, which a run measures, if texts are left.

    Returns
    -------
    list of str
        Distinct, in the data set's order; of a generator its filler.
    """
    if str(name_or_path) in GENERATORS:
        return list(paragraphs())
    examples = _read(name_or_path)
    rest = _texts(examples[behind or 0 :])
    return rest if len(rest) >= LEAST_TEXTS else _texts(examples)


def _texts(examples: list[Example]) -> list[str]:
    return list(dict.fromkeys(p.text for example in examples for p in example.passages))


def _read(name_or_path: str | Path) -> list[Example]:
    path = Path(name_or_path)
    if not path.exists():
        raise EvalError(
            f"data set {str(path)!r} is neither a file nor a generator; "
            f"generators: {', '.join(GENERATORS)}"
        )
    return read_examples(path)
