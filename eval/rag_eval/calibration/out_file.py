"""The file that a calibration writes."""

from __future__ import annotations

from pathlib import Path

from rag_eval.errors import EvalError
from rag_pipeline.whole_file import write_whole


def write_calibration(out: Path, text: str) -> None:
    """Write a file whole, and make its folder.

    Raises
    ------
    EvalError
        One line: the disk refuses.
    """
    try:
        write_whole(out, text)
    except OSError as error:
        raise EvalError(f"{out} cannot be written: {error}") from error
