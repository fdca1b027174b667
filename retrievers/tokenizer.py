"""The language model's tokenizer, read from a model folder without transformers or torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from retrievers.errors import RetrievalError
from retrievers.types import Tokenizer


@runtime_checkable
class BatchTokenizer(Protocol):
    """A tokenizer that also takes many texts at once, in parallel and without offsets."""

    def count_batch(self, texts: Sequence[str]) -> list[int]:
        """Count the tokens of every text alone: ``len(encode(text))`` for each."""
        ...


def count_tokens(tokenizer: Tokenizer, texts: Sequence[str]) -> list[int]:
    """Count the tokens of every text alone, in one batch where `tokenizer` can."""
    if isinstance(tokenizer, BatchTokenizer):
        return tokenizer.count_batch(texts)
    return [len(tokenizer.encode(text)) for text in texts]


class HFTokenizer:
    """Tokenizer of a Hugging Face model folder, on the ``tokenizers`` library.

    Strings that look like special tokens are encoded as ordinary text, and none is added, so a
    retrieved document cannot smuggle a control token into a prompt. Truncation and padding that
    the file may carry are switched off.

    Parameters
    ----------
    folder : str or Path
        Folder with ``tokenizer.json``, or the path of such a file. A folder that has only
        ``tokenizer.model`` (SentencePiece) is converted through transformers, imported then.

    Raises
    ------
    RetrievalError
        When the folder holds no tokenizer, or one that cannot be read.
    """

    def __init__(self, folder: str | Path) -> None:
        path = Path(folder)
        file = path / "tokenizer.json" if path.is_dir() else path
        if file.is_file():
            payload = file.read_bytes()
        elif (path / "tokenizer.model").is_file():
            payload = _convert_sentencepiece(path)
        else:
            raise RetrievalError(
                f"no tokenizer in {path}: expected tokenizer.json or tokenizer.model; "
                "give the folder of a Hugging Face model"
            )
        from tokenizers import Tokenizer as Backend

        try:
            backend = Backend.from_buffer(payload)
        # The library raises bare Exception for a file it cannot parse.
        except Exception as error:
            raise RetrievalError(
                f"cannot read the tokenizer {file}: {error}; copy the file again"
            ) from error
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        self._backend: Any = backend
        settings = json.dumps({"adapter": 1, "special_tokens": "as text"}, sort_keys=True)
        self._fingerprint = hashlib.sha256(payload + settings.encode()).hexdigest()

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the bytes of ``tokenizer.json`` and the settings of this adapter."""
        return self._fingerprint

    def save(self, file: Path) -> None:
        """Write the tokenizer as one ``tokenizer.json``, which gives the same tokens."""
        self._backend.save(str(file))

    def encode(self, text: str) -> list[int]:
        """Token ids of `text` alone, without special tokens."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens as they are written."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=False)
        return text

    def encode_offsets(self, text: str) -> list[tuple[int, int]]:
        """Character span ``(start, end)`` of every token of :meth:`encode`.

        Several tokens of one character (bytes of an emoji) share that character's span.
        """
        offsets: list[tuple[int, int]] = self._backend.encode(
            text, add_special_tokens=False
        ).offsets
        return offsets

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of every text alone; runs on as many threads as the machine gives."""
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def count_batch(self, texts: Sequence[str]) -> list[int]:
        """Count the tokens of every text alone."""
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [len(encoding) for encoding in encodings]


def _convert_sentencepiece(folder: Path) -> bytes:
    """Return ``tokenizer.json`` bytes of a folder that only has a SentencePiece model."""
    try:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        serialized: str = tokenizer.backend_tokenizer.to_str()
    except Exception as error:
        raise RetrievalError(
            f"cannot convert tokenizer.model in {folder}: {error}; "
            "save the tokenizer as tokenizer.json with transformers' save_pretrained"
        ) from error
    return serialized.encode()
