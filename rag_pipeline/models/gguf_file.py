"""What a GGUF file says about itself, read from its header before any heavy work."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from rag_pipeline.errors import ModelError

_MAGIC = b"GGUF"


@dataclass(frozen=True, kw_only=True, slots=True)
class GgufSummary:
    """Header facts of a GGUF file.

    Parameters
    ----------
    architecture : str
        ``general.architecture``, for example ``llama``.
    num_parameters : int
        Elements of all tensors together.
    """

    architecture: str
    num_parameters: int


def check_magic(path: Path) -> None:
    """Refuse a file that does not begin as a GGUF file does.

    Parameters
    ----------
    path : Path
        The file.

    Raises
    ------
    ModelError
        Unreadable, or another kind of file.
    """
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror}); check its rights") from error
    if magic != _MAGIC:
        raise ModelError(f"{path} is not a GGUF file; allowed is a GGUF file or a model folder")


def read_gguf(path: Path) -> GgufSummary:
    """Read and check the header of a GGUF file.

    Parameters
    ----------
    path : Path
        The file.

    Returns
    -------
    GgufSummary
        Its architecture and size.

    Raises
    ------
    ModelError
        Not a GGUF file, truncated, or without an architecture.
    """
    check_magic(path)
    from gguf import GGUFReader

    size = path.stat().st_size
    try:
        reader = GGUFReader(os.fspath(path))
        architecture = reader.get_field("general.architecture")
        ends = [int(t.data_offset) + int(t.n_bytes) for t in reader.tensors]
        elements = sum(int(t.n_elements) for t in reader.tensors)
    except Exception as error:
        # gguf raises whatever NumPy raises when it reads behind the end of the file.
        raise ModelError(
            f"{path} is truncated or damaged ({size} bytes); fetch it again"
        ) from error
    if ends and max(ends) > size:
        raise ModelError(f"{path} is truncated: {size} bytes of {max(ends)}; fetch the file again")
    if architecture is None or not ends:
        raise ModelError(f"{path} names no architecture or holds no tensors; fetch another file")
    return GgufSummary(architecture=str(architecture.contents()), num_parameters=elements)


def check_convertible(path: Path, summary: GgufSummary) -> None:
    """Refuse an architecture that transformers cannot dequantise.

    Parameters
    ----------
    path, summary : Path, GgufSummary
        The file and what :func:`read_gguf` said about it.

    Raises
    ------
    ModelError
        Names the architecture and the supported ones.
    """
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    supported = sorted(GGUF_SUPPORTED_ARCHITECTURES)
    if summary.architecture not in supported:
        raise ModelError(
            f"{path} has architecture {summary.architecture!r}, which cannot be converted; "
            f"supported are {', '.join(supported)}"
        )
