"""A bounded table that tenants share evenly: who holds most loses its least recently used entry."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class FairTable(Generic[K, V]):
    """Entries by tenant and key.

    One tenant alone has the whole table. However many entries it adds, it never pushes out those of a tenant that
    holds fewer; among equals the tenant that was not heard of for longest gives way.
    """

    def __init__(self) -> None:
        self._rows: OrderedDict[str, OrderedDict[K, V]] = OrderedDict()

    def __len__(self) -> int:
        """Count the entries of all tenants."""
        return sum(len(row) for row in self._rows.values())

    def get(self, tenant: str, key: K) -> V | None:
        """Return an entry as just used, or None."""
        row = self._rows.get(tenant)
        if row is None or key not in row:
            return None
        row.move_to_end(key)
        self._rows.move_to_end(tenant)
        return row[key]

    def put(self, tenant: str, key: K, value: V, capacity: int) -> list[V]:
        """Set an entry as just used; return those that had to go for it."""
        row = self._rows.setdefault(tenant, OrderedDict())
        row[key] = value
        row.move_to_end(key)
        self._rows.move_to_end(tenant)
        gone = []
        while len(self) > capacity:
            most = max(self._rows, key=lambda name: len(self._rows[name]))
            gone.append(self._rows[most].popitem(last=False)[1])
            if not self._rows[most]:
                del self._rows[most]
        return gone

    def pop(self, tenant: str, key: K) -> None:
        """Forget an entry if it is there."""
        row = self._rows.get(tenant)
        if row is not None and row.pop(key, None) is not None and not row:
            del self._rows[tenant]

    def of(self, tenant: str) -> list[V]:
        """Entries of a tenant, least recently used first."""
        return list(self._rows.get(tenant, {}).values())

    def values(self) -> list[V]:
        """Entries of all tenants."""
        return [value for row in list(self._rows.values()) for value in list(row.values())]

    def items(self) -> list[tuple[str, K, V]]:
        """Tenant, key and entry of all."""
        return [(name, *one) for name, row in list(self._rows.items()) for one in list(row.items())]

    def clear(self) -> None:
        """Forget all."""
        self._rows.clear()
