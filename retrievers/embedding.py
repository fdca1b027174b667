"""Text to unit vectors with sentence-transformers, and the identity of the model that made them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrievers.errors import RetrievalError

if TYPE_CHECKING:
    from retrievers.text_embedder import Vectors

_DTYPES = ("auto", "float32", "bfloat16", "float16")
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".onnx", ".xml")
# What decides the vectors besides the weights. README, licence and training data do not.
_CONFIG_NAMES = frozenset(
    {
        "config.json",
        "modules.json",
        "config_sentence_transformers.json",
        "sentence_bert_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "vocab.txt",
        "merges.txt",
        "sentencepiece.bpe.model",
        "spiece.model",
    }
)


class Embedder:
    """A sentence-transformers model with its query and document prompts.

    The model is loaded on first use, so the fingerprint of an index can be checked before the
    weights are read.

    Parameters
    ----------
    model : str or Path
        Folder in sentence-transformers or Hugging Face format, or a hub id.
    name : str, optional
        Readable name; the last part of `model` by default.
    device : str, optional
        Anything torch accepts; ``None`` takes the accelerator when there is one.
    dtype : str
        ``"auto"`` (as stored), ``"float32"``, ``"bfloat16"`` or ``"float16"``.
    batch_size : int
        Texts per forward pass.
    query_prompt, document_prompt : str, optional
        Override the prompts that the model brings; ``None`` keeps them.
    trust_remote_code : bool
        Passed on; needed by models that ship their own module files.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        name: str | None = None,
        device: str | None = None,
        dtype: str = "auto",
        batch_size: int = 32,
        query_prompt: str | None = None,
        document_prompt: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        if dtype not in _DTYPES:
            raise RetrievalError(f"embedder dtype {dtype!r} is not one of {', '.join(_DTYPES)}")
        if batch_size < 1:
            raise RetrievalError(f"embedder batch_size must be at least 1, got {batch_size}")
        self._source = str(model)
        self._name = name or self._source.rstrip("/").rsplit("/", 1)[-1]
        self._device = device
        self._dtype = dtype
        self.batch_size = batch_size
        self._prompt_overrides = {
            key: prompt
            for key, prompt in (("query", query_prompt), ("document", document_prompt))
            if prompt is not None
        }
        self._trust_remote_code = trust_remote_code
        self._model: Any = None
        self._fingerprint: str | None = None
        self._folder = Path(model) if Path(model).is_dir() else None
        if self._folder is None and _looks_like_path(self._source):
            raise RetrievalError(
                f"embedder folder {self._source} does not exist; give a folder with a "
                "sentence-transformers model or a hub id such as sentence-transformers/"
                "all-MiniLM-L6-v2"
            )

    @property
    def name(self) -> str:
        """Readable name, for messages and the manifest."""
        return self._name

    @property
    def source(self) -> str:
        """Folder or hub id the model is loaded from."""
        return self._source

    @property
    def dim(self) -> int:
        """Length of every vector."""
        return int(self._loaded().get_embedding_dimension())

    @property
    def max_tokens(self) -> int | None:
        """Tokens the model reads of a text; what lies behind is cut off by the model."""
        limit = self._loaded().max_seq_length
        return int(limit) if limit else None

    @property
    def fingerprint(self) -> str:
        """Hex digest over weights, configuration, tokenizer, prompts and normalisation."""
        if self._fingerprint is None:
            digest = hashlib.sha256(b"rag-embedder-1")
            if self._folder is not None:
                digest.update(_folder_digest(self._folder).encode())
            else:
                # A hub id: the commit that was resolved names the weights exactly.
                config = self._loaded()[0].auto_model.config
                commit = getattr(config, "_commit_hash", None)
                digest.update(f"{self._source}@{commit}".encode())
            settings = {
                "dtype": self._dtype,
                "normalise": True,
                "prompts": self._prompt_overrides,
            }
            digest.update(json.dumps(settings, sort_keys=True).encode())
            self._fingerprint = digest.hexdigest()[:32]
        return self._fingerprint

    def encode_query(self, text: str) -> Vectors:
        """Vector of one query.

        Parameters
        ----------
        text : str
            The question as asked; the model's query prompt is put before it.

        Returns
        -------
        ndarray
            ``(dim,)`` float32, unit length.
        """
        vector: Vectors = self.encode_queries([text])[0]
        return vector

    def encode_queries(self, texts: Sequence[str]) -> Vectors:
        """Vectors of several queries, ``(len(texts), dim)`` float32, unit length."""
        if not texts:
            return self._empty()
        model = self._loaded()
        return _as_float32(model.encode_query(list(texts), **self._options()))

    def encode_documents(
        self, texts: Sequence[str], *, progress: Callable[[int], None] | None = None
    ) -> Vectors:
        """Vectors of passages.

        Parameters
        ----------
        texts : sequence of str
            Passages; the model's document prompt is put before each. They are batched by length
            over the whole call, so that little padding is computed.
        progress : callable, optional
            Called with the number of texts done since the last call.

        Returns
        -------
        ndarray
            ``(len(texts), dim)`` float32, unit length, in the order given.
        """
        if not texts:
            return self._empty()
        import numpy as np

        model = self._loaded()
        if progress is None:
            return _as_float32(model.encode_document(list(texts), **self._options()))
        out = np.empty((len(texts), self.dim), dtype=np.float32)
        order = np.argsort([-len(text) for text in texts], kind="stable")
        stride = self.batch_size * 4
        for start in range(0, len(order), stride):
            rows = order[start : start + stride]
            out[rows] = model.encode_document([texts[i] for i in rows], **self._options())
            progress(len(rows))
        return out

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text in the model's own tokenizer, without truncation or prompt."""
        tokenizer = self._loaded().tokenizer
        encoded = tokenizer(list(texts), truncation=False, padding=False, verbose=False)
        return [len(ids) for ids in encoded["input_ids"]]

    def _options(self) -> dict[str, Any]:
        return {
            "batch_size": self.batch_size,
            "normalize_embeddings": True,
            "show_progress_bar": False,
            "convert_to_numpy": True,
        }

    def _empty(self) -> Vectors:
        import numpy as np

        return np.empty((0, self.dim), dtype=np.float32)

    def _loaded(self) -> Any:
        if self._model is None:
            self._model = self._load()
        return self._model

    def _load(self) -> Any:
        # Imported here: torch costs seconds, and reading an index must not need it.
        from sentence_transformers import SentenceTransformer

        dtype = None if self._dtype == "auto" else self._dtype
        # A folder loads in a moment; a download is the one wait that deserves a bar.
        bars = _no_progress_bars() if self._folder is not None else nullcontext()
        try:
            with bars:
                model = SentenceTransformer(
                    self._source,
                    device=self._device,
                    trust_remote_code=self._trust_remote_code,
                    model_kwargs={} if dtype is None else {"dtype": dtype},
                )
        except (OSError, ValueError) as exc:
            reason = str(exc).splitlines()[0] if str(exc) else type(exc).__name__
            raise RetrievalError(f"cannot load the embedder {self._source}: {reason}") from exc
        model.prompts.update(self._prompt_overrides)
        return model


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Keep the loader's bar off stderr, where it would run into the program's own lines."""
    from transformers.utils import logging as hf_logging

    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()


def _looks_like_path(source: str) -> bool:
    return source.startswith((".", "/", "~")) or source.count("/") > 1


def _as_float32(vectors: Any) -> Vectors:
    import numpy as np

    return np.ascontiguousarray(vectors, dtype=np.float32)


def _folder_digest(folder: Path) -> str:
    """Digest of everything in a model folder that decides its vectors."""
    digest = hashlib.sha256()
    found = False
    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        name = path.relative_to(folder).as_posix()
        if path.suffix in _WEIGHT_SUFFIXES:
            found = True
        elif path.name not in _CONFIG_NAMES and path.suffix != ".py":
            continue
        digest.update(name.encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    if not found:
        raise RetrievalError(
            f"{folder} holds no model weights ({', '.join(_WEIGHT_SUFFIXES)}); give the folder of "
            "a sentence-transformers model"
        )
    return digest.hexdigest()
