"""Folders of chunk KV for the codec benchmark: filled by an engine once, then a copy for each codec."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from chunk_cache import ChunkKV, LayerKV, StoreFolder, codec_named, encode_layers
from rag_eval.errors import EvalError
from rag_eval.runner.prompts import EvalPrompt
from rag_eval.runner.session import EngineSession

_WRITE_WAIT_S = 120.0
_VARIANTS = 2
"""Records of a chunk: behind the shared prefix, and behind the passage."""


def fill_folder(session: EngineSession, prompts: Sequence[EvalPrompt], folder: Path) -> None:
    """Have the engine build every chunk of the prompts, and wait until its folder has them.

    Raises
    ------
    EvalError
        The engine stores no chunk KV there, or not in time.
    """
    session.flush()  # once: the passage in front of every chunk is computed once, too
    for prompt in prompts:
        session.build_chunks(prompt, store=True)
    wanted = _VARIANTS * len({chunk.ids for prompt in prompts for chunk in prompt.chunks})
    deadline = time.monotonic() + _WRITE_WAIT_S
    while (found := len(list(StoreFolder(folder).keys()))) < wanted:
        if time.monotonic() > deadline:
            raise EvalError(f"the engine wrote {found} of {wanted} records: is fusion on?")
        time.sleep(0.2)


def copy_with_codec(source: Path, target: Path, codec: str) -> dict[str, Any]:
    """Copy a folder, every record encoded and decoded once by a codec.

    What an engine reads from the copy is what it would read from a tier that was written with the codec; the records
    say so, and are never exact there.

    Parameters
    ----------
    source, target : Path
        A folder of lossless records; a folder that is made.
    codec : str
        Name of the codec.

    Returns
    -------
    dict
        ``bytes_per_token`` of the encoded tensors; ``encode_mb_s`` and ``decode_mb_s`` in MB of decoded KV.

    Raises
    ------
    EvalError
        The codec refused a record, so that it was not what was measured.
    """
    shutil.copytree(source, target)
    folder = StoreFolder(target)
    tokens = encoded_bytes = plain_bytes = 0
    encode_s = decode_s = 0.0
    for key in list(folder.keys()):
        record = folder.read(key)
        if record is None:
            raise EvalError(f"record {key} of the engine's folder cannot be read")
        started = time.perf_counter()
        used, encoded = encode_layers(record, codec)
        encode_s += time.perf_counter() - started
        if used != codec:
            raise EvalError(f"codec {codec} refused record {key}: its KV is not finite")
        started = time.perf_counter()
        layers = [codec_named(codec).decode(layer, record.k.dtype) for layer in encoded]
        decode_s += time.perf_counter() - started
        folder.put(_with_layers(record, layers, codec))
        tokens += record.num_tokens
        plain_bytes += record.k.nbytes + record.v.nbytes
        encoded_bytes += sum(part.nbytes for layer in encoded for part in layer.values())
    return {
        "records": len(list(folder.keys())),
        "bytes_per_token": encoded_bytes / tokens,
        "size_vs_plain": encoded_bytes / plain_bytes,
        "encode_mb_s": plain_bytes / encode_s / 1e6,
        "decode_mb_s": plain_bytes / decode_s / 1e6,
    }


def _with_layers(record: ChunkKV, layers: Sequence[LayerKV], codec: str) -> ChunkKV:
    return dataclasses.replace(
        record,
        k=torch.stack([layer.k for layer in layers]),
        v=torch.stack([layer.v for layer in layers]),
        codec=codec,
        checksum=None,
    )
