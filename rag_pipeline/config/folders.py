"""Where the project keeps what it made: converted models, indexes, the KV store."""

from __future__ import annotations

import os
from pathlib import Path

HOME_VARIABLE = "RAG_PIPELINE_HOME"
"""Environment variable that names the folder; read at every call, so a test may change it."""


def home_dir() -> Path:
    """Folder of everything this project writes that the user did not name.

    Returns
    -------
    Path
        ``$RAG_PIPELINE_HOME`` where set (``~`` is expanded), else the platform's folder for user
        data. The folder is not created here.
    """
    given = os.environ.get(HOME_VARIABLE, "").strip()
    if given:
        return Path(given).expanduser().absolute()
    from platformdirs import user_data_path

    return user_data_path("rag-pipeline", appauthor=False)


def models_dir() -> Path:
    """Folder of models converted by this project."""
    return home_dir() / "models"


def indexes_dir() -> Path:
    """Folder of indexes that were made without naming a place (the demo's)."""
    return home_dir() / "indexes"


def attention_dir() -> Path:
    """Folder of thresholds that models were calibrated with, found by engines."""
    return home_dir() / "attention"


def layers_dir() -> Path:
    """Folder of what was measured of models' layers, for the study of retention."""
    return home_dir() / "layers"


def tpla_dir() -> Path:
    """Folder of statistics of models' latents, found by engines."""
    return home_dir() / "tpla"


def kv_store_dir() -> Path:
    """Folder of the chunk-KV store on disk."""
    return home_dir() / "kv"


def uploads_dir() -> Path:
    """Folder of uploads that a server has accepted and not ingested yet."""
    return home_dir() / "uploads"
