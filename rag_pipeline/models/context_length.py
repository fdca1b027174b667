"""How many positions a model was made for."""

from __future__ import annotations

import json
from pathlib import Path

from rag_pipeline.errors import RagPipelineError


def model_context_length(folder: Path) -> int:
    """Most positions a model was made for, from its ``config.json``.

    Parameters
    ----------
    folder : Path
        Folder in Hugging Face format.

    Returns
    -------
    int
        ``max_position_embeddings`` (of the text model, where there are several).

    Raises
    ------
    RagPipelineError
        When the configuration does not say.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RagPipelineError(f"{folder / 'config.json'} cannot be read ({error})") from error
    for part in (config.get("text_config") or {}, config):
        for key in ("max_position_embeddings", "n_positions", "max_seq_len"):
            if isinstance(part.get(key), int):
                return int(part[key])
    raise RagPipelineError(
        f"{folder / 'config.json'} names no max_position_embeddings; give context_length"
    )
