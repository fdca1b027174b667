"""Namespace of a request in SGLang's radix tree, and whom its chunks belong to."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

from chunk_cache import tenant_mark

METHOD_SPACE = "rag-attention-"
"""How the ``extra_key`` of a request of an attention method begins; clients' keys are refused this beginning."""


class RadixNamespace(NamedTuple):
    """What separates requests in the radix tree, and so separates chunks too (SGLang's two fields)."""

    extra_key: str | None
    cache_salt: str | None

    @property
    def salt(self) -> str:
        """Part of the identity of chunk KV; empty for requests without either."""
        if self.extra_key is None and self.cache_salt is None:
            return ""
        return repr((self.extra_key or "", self.cache_salt or ""))

    @property
    def owner(self) -> str:
        """To whom its chunks belong: whose share of the stores and queues they take, and whose deletions reach them.

        The same before and after they were on a disk. A tenant of a server may split its salt by a ``/`` as often
        as it likes, and is one.
        """
        salt = self.cache_salt or self.extra_key or ""
        return tenant_mark(salt.partition("/")[0] or salt)

    def moved(self, before: str, space: str) -> RadixNamespace:
        """The same client's namespace within another space, see :func:`method_space`; it stands in space `before`."""
        key = self.extra_key
        if before:
            # None and "" are two namespaces: a key of the client's own stands behind a mark.
            rest = (key or "").removeprefix(before)
            key = rest[1:] if rest else None
        if space:
            key = space if key is None else f"{space}:{key}"
        return RadixNamespace(key, self.cache_salt)


def method_space(identity: str, epoch: int) -> str:
    """Beginning of the ``extra_key`` of what one attention method computed with the weights of one epoch.

    Parameters
    ----------
    identity : str
        Of the method for the loaded weights: every option, and what it was calibrated to.
    epoch : int
        Updates of the weights so far.
    """
    told = repr((identity, epoch)).encode()
    return METHOD_SPACE + hashlib.blake2b(told, digest_size=16, person=b"ragkv-space").hexdigest()
