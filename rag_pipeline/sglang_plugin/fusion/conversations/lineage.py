"""What the KV of a turn was computed behind: a text that goes into the key of its record, and is read back from it.

Everything in it follows from contents, so it means the same in another process and after a restart. It stands as the
``prefix_digest`` of the record's context, which a tier keeps beside the record in the clear: from there the table of
turns is made again (:meth:`Lineage.decode`). Whose the turn is stands in the context's ``tenant``, as of every chunk.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

import numpy as np
import numpy.typing as npt

from chunk_cache import canonical_json, hash_token_ids

EXACT = "exact"
"""Plain prefill computed it, and all in front of it."""
_MARK = "turn:1:"
"""Begins every lineage; the number is raised when the meaning of a field changes."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Lineage:
    """Lineage of one turn, the same on every tensor-parallel rank.

    Attributes
    ----------
    space : str
        Digest of the conversation and of all that its turns' KV depends on besides tokens and model.
    start : int
        First position of the turn.
    before : str
        :func:`~chunk_cache.hash_token_ids` of all tokens in front of it.
    parent : int
        Number of the turn that it was computed behind; 0 for none. Of an exact turn only a note of the one that it
        touches: what is exact depends on tokens alone.
    through : str
        :data:`EXACT`, or a digest of the approximations that its KV went through. The two are never equal.
    """

    space: str
    start: int
    before: str
    parent: int
    through: str

    @property
    def is_exact(self) -> bool:
        """Plain prefill computed the turn, and all in front of it."""
        return self.through == EXACT

    def number(self, ids: npt.NDArray[np.int64]) -> int:
        """Number of the turn that holds these tokens: a digest of both, positive."""
        told = f"{self.encode()} {hash_token_ids(ids)}"
        return int(hashlib.blake2b(told.encode(), digest_size=32).hexdigest(), 16) or 1

    def encode(self) -> str:
        """Write it as the ``prefix_digest`` of a context."""
        return _MARK + canonical_json(dataclasses.asdict(self) | {"parent": f"{self.parent:x}"})

    @classmethod
    def decode(cls, text: Any) -> Lineage | None:
        """Read what :meth:`encode` wrote; None for anything else, the prefix digest of a chunk among it."""
        if not isinstance(text, str) or not text.startswith(_MARK):
            return None
        try:
            fields = json.loads(text.removeprefix(_MARK))
            found = cls(**fields | {"parent": int(fields["parent"], 16)})
            # Whatever was written otherwise was not written here.
            is_ours = type(found.start) is int and found.start >= 0 and found.encode() == text
            return found if is_ours else None
        except (ValueError, TypeError, KeyError, RecursionError):
            return None
