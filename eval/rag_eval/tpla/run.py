"""Statistics of a model: read from a file, or measured at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rag_eval.command import Progress
from rag_eval.errors import EvalError
from rag_eval.tpla.calibrate import calibrate
from rag_eval.tpla.model import LatentModel
from rag_eval.tpla.texts import Windows, marks_of
from rag_kernels.latent import ModelStatistics
from rag_pipeline.models import fingerprint_checkpoint


def measured_statistics(
    model: LatentModel,
    name: str,
    folder: Path,
    ids: Sequence[int],
    *,
    window: int,
    batch: int,
    progress: Progress,
) -> ModelStatistics:
    """Calibrate a model with a text.

    Parameters
    ----------
    model : LatentModel
        The model.
    name : str
        As people call it.
    folder : Path
        Of its weights.
    ids : sequence of int
        The text; what does not fill a last window is left out.
    window, batch : int
        Tokens that are prefilled together, and how many such windows at a time.
    progress : callable
        Told as it goes on.

    Raises
    ------
    EvalError
        The text is shorter than a window.
    """
    count = len(ids) // window
    if not count:
        raise EvalError(f"the text has {len(ids)} tokens; a window of {window} is the least")
    seen = list(ids[: count * window])
    # Nothing is scored: windows lie side by side.
    windows = [
        Windows(prompt=1, window=window).cut(seen[i : i + window])[0]
        for i in range(0, len(seen), window)
    ]
    layers = calibrate(model, windows, batch=batch, progress=progress)
    return ModelStatistics(
        model=name,
        fingerprint=fingerprint_checkpoint(folder),
        tokens=len(seen),
        layers=layers,
        text_marks=marks_of(seen),
    )


def read_statistics(file: Path, folder: Path) -> ModelStatistics:
    """Read the statistics of a file.

    Parameters
    ----------
    file : Path
        Of ``tpla calibrate``.
    folder : Path
        Of the weights that they are to serve.

    Raises
    ------
    EvalError
        One line: the file is of another model, or broken.
    """
    try:
        found = ModelStatistics.read(file)
        found.check(fingerprint_checkpoint(folder))
    except ValueError as error:
        raise EvalError(str(error)) from error
    return found
