"""Namespace of a request in SGLang's radix tree, and whom its chunks belong to."""

from __future__ import annotations

from typing import NamedTuple

from chunk_cache import tenant_mark


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
