"""Tiny grouped-query models with a real tokenizer, and what the original does on a few windows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conversion_parts import Sample, sample_of, write_llama


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory, smollm2_path: Path) -> Callable[..., Path]:
    """Folder of a tiny Llama; equal fields give the same one."""
    made: dict[str, Path] = {}

    def make(**fields: Any) -> Path:
        key = repr(sorted(fields.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp("llama") / "model"
            made[key] = write_llama(folder, smollm2_path, **fields)
        return made[key]

    return make


@pytest.fixture(scope="session")
def sample(llama: Callable[..., Path]) -> Sample:
    """The first layer of the tiny Llama on three windows."""
    with torch.inference_mode():
        return sample_of(llama())


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Prose enough to calibrate a tiny model on."""
    from pydoc_data.topics import topics

    file = tmp_path / "prose.txt"
    file.write_text("\n\n".join(topics[name] for name in sorted(topics)[:12]), "utf-8")
    return file
