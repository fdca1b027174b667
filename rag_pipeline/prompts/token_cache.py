"""Token-id cache for recurring texts, such as chunks: each is tokenised alone, once."""

from __future__ import annotations

from collections import OrderedDict
from threading import Lock

from rag_pipeline.prompts.tokenizer import ModelTokenizer


class TokenCache:
    """Least-recently-used cache in front of a tokenizer; safe for several threads.

    Parameters
    ----------
    tokenizer : ModelTokenizer
        The model's tokenizer.
    size : int
        Number of texts whose ids are kept; 0 or less keeps none.
    """

    def __init__(self, tokenizer: ModelTokenizer, size: int) -> None:
        self._tokenizer = tokenizer
        self._size = max(0, size)
        self._known: OrderedDict[str, tuple[int, ...]] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        """Texts whose ids are kept."""
        return len(self._known)

    def clear(self) -> None:
        """Forget all texts."""
        with self._lock:
            self._known.clear()

    def ids(self, text: str) -> tuple[int, ...]:
        """Token ids of a text, special-token strings as ordinary characters."""
        with self._lock:
            known = self._known.get(text)
            if known is not None:
                self._known.move_to_end(text)
                return known
        ids = tuple(self._tokenizer.encode(text))
        with self._lock:
            self._known[text] = ids
            while len(self._known) > self._size:
                self._known.popitem(last=False)
        return ids
