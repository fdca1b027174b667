"""Sensitivity of a model's layers in a JSON file, tied to the weights it was measured with."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from rag_eval.errors import EvalError
from rag_kernels.json_record import from_text, reason_of, to_text

FORMAT = 1
"""Version of the file; others are not read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerSensitivity:
    """How far each layer's keys change when the context is cut.

    Attributes
    ----------
    model : str
        As people call it.
    fingerprint : str
        Of the checkpoint that was measured.
    tokens : tuple of int
        Lengths of the samples.
    sinks, window : int
        The cut: first tokens that all see, and tokens of a window in the longest sample.
    cosines : tuple of float
        Per layer, -1 to 1; 1 where nothing changes.
    """

    model: str
    fingerprint: str
    tokens: tuple[int, ...]
    sinks: int
    window: int
    cosines: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.cosines or not all(
            math.isfinite(one) and abs(one) <= 1.001 for one in self.cosines
        ):
            raise ValueError("cosines must be numbers from -1 to 1, one per layer")

    def to_json(self) -> str:
        """Text of the file; :meth:`from_json` reads it."""
        return to_text(self, FORMAT)

    @classmethod
    def from_json(cls, text: str) -> LayerSensitivity:
        """Read the text of a file.

        Raises
        ------
        ValueError
            One line: what is wrong with it.
        """
        read = {
            "tokens": lambda counts: tuple(int(one) for one in counts),
            "cosines": lambda values: tuple(float(one) for one in values),
        }
        return from_text(cls, text, FORMAT, "a file of layers' sensitivity", read)


def read_sensitivity(path: Path, fingerprint: str) -> LayerSensitivity:
    """Read a file that must belong to a checkpoint.

    Raises
    ------
    EvalError
        One line: it cannot be read, or was measured with other weights.
    """
    try:
        found = LayerSensitivity.from_json(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise EvalError(
            f"{path} cannot be read ({reason_of(error)}); write one with `rag-pipeline memory calibrate`"
        ) from None
    if found.fingerprint != fingerprint:
        raise EvalError(
            f"{path} was measured with other weights ({found.model}); calibrate this model"
        )
    return found
