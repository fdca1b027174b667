"""The tokenizer of a model's files as transformers has it, which SGLang uses too.

Prompts are laid out with :class:`rag_pipeline.prompts.tokenizer.ModelTokenizer`, which is made of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any


def load_stock_tokenizer(folder: Path | str, *, gguf_file: str | None = None) -> Any:
    """Load a tokenizer from this machine; nothing is downloaded.

    Parameters
    ----------
    folder : Path or str
        Folder in Hugging Face format, or the one that holds `gguf_file`.
    gguf_file : str, optional
        Name of a GGUF file that carries the tokenizer.

    Raises
    ------
    Exception
        Whatever transformers raises where there is none that it can read.
    """
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder), gguf_file=gguf_file, local_files_only=True)
