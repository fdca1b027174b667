"""How a model's publisher says that its answers are decoded, as far as that holds for greedy decoding."""

from __future__ import annotations

import json
from pathlib import Path


def repetition_penalty_of(folder: Path | str) -> float:
    """Repetition penalty that the model's ``generation_config.json`` names.

    SGLang's chat endpoint takes it from there; requests of token ids have to say it. Temperature and
    the like are left aside: answers from documents are greedy unless somebody asks otherwise.

    Parameters
    ----------
    folder : Path or str
        Folder in Hugging Face format; it may lie on another machine.

    Returns
    -------
    float
        1.0 (none) where the file is missing, says nothing, or says what SGLang refuses.
    """
    try:
        text = (Path(folder) / "generation_config.json").read_text(encoding="utf-8")
        value = json.loads(text).get("repetition_penalty")
    except (OSError, ValueError, AttributeError):
        return 1.0
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 2:
        return 1.0
    return float(value)
