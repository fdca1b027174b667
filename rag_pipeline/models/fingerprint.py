"""Which weights a folder holds, whoever loads them: for files that were measured on one model only."""

from __future__ import annotations

import hashlib
from pathlib import Path

from rag_pipeline.errors import ModelError

_ENDS = 64
"""Rows, or numbers of a vector, that are read at either end of a tensor."""


def fingerprint_checkpoint(folder: Path) -> str:
    """Hash of the tensors in a folder's safetensors files: name, shape, type, and the values at both ends of each.

    The loader of an engine fuses and splits tensors, so what it holds cannot be compared with what another one does.
    A part of the values suffices to tell checkpoints apart, and takes milliseconds where all of them take seconds:
    this guards no KV, for which the loaded weights are hashed as a whole.

    Parameters
    ----------
    folder : Path
        In Hugging Face format.

    Returns
    -------
    str
        32 hexadecimal digits; how tensors are spread over files has no part in it.

    Raises
    ------
    ModelError
        No safetensors file, or one that cannot be read.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(f"folder {folder} holds no *.safetensors; its weights have no fingerprint")
    parts: dict[str, str] = {}
    try:
        for file in files:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - it is no mapping
                    part = tensors.get_slice(name)
                    shape = part.get_shape()
                    digest = hashlib.blake2b(digest_size=16)
                    digest.update(f"{shape} {part.get_dtype()}".encode())
                    if shape and shape[0]:
                        for rows in (part[:_ENDS], part[max(0, shape[0] - _ENDS) :]):
                            flat = rows.contiguous().flatten().view(torch.uint8)
                            digest.update(memoryview(flat.numpy()))
                    parts[name] = digest.hexdigest()
    except (OSError, SafetensorError) as error:
        raise ModelError(f"the weights in {folder} cannot be read: {error}") from error
    text = "\n".join(f"{name} {parts[name]}" for name in sorted(parts))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
