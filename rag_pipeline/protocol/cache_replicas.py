"""One answer of several replicas (``--dp-size``): each has a memory of its own, and all the same tiers below it.

What is counted is added up, except what lies in a tier that they share: there the one that saw most is right.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_SHARED = ("chunks", "bytes", "pinned_chunks", "pinned_bytes")
"""Figures of a tier below memory that are those of the place, and not of who asks."""
_DONE_FOR = {
    "not_pinned": "pinned",
    "not_fetched": "fetched",
    "already_there": "fetched",
    "absent": "present",
}
"""Lists of chunks that some replica could not serve, and the list of those that another one did."""
_BY_TIER = ("damaged_removed", "trimmed")
"""Lists of chunks, one per tier."""
_MEMORY = "memory"

Result = dict[str, Any]


def merge_replicas(results: Sequence[Result]) -> Result:
    """Join what replicas answered to one order; ``replicas`` holds the answers themselves.

    Parameters
    ----------
    results : sequence of dict
        In the form of one replica's answer, all to the same order; at least one.
    """
    merged: Result = {}
    for name in dict.fromkeys(name for result in results for name in result):
        values = [result[name] for result in results if name in result]
        if name == "tiers":
            merged[name] = _tiers(values)
        elif name == "entries":
            merged[name] = _entries(values)
        elif name in _BY_TIER:
            tiers = dict.fromkeys(tier for value in values for tier in value)
            merged[name] = {tier: _union([v.get(tier, []) for v in values]) for tier in tiers}
        elif isinstance(values[0], list):
            merged[name] = _union(values)
        elif name == "ttl_s":
            merged[name] = values[0]
        elif name == "total":
            merged[name] = max(values)
        else:
            merged[name] = sum(values)
    for left, done in _DONE_FOR.items():
        if left in merged:
            served = set(merged.get(done, ()))
            merged[left] = [key for key in merged[left] if key not in served]
    if "entries" in merged:
        merged["total"] = max(merged["total"], len(merged["entries"]))
    return merged | {"replicas": list(results)}


def _union(lists: Sequence[list[Any]]) -> list[Any]:
    return list(dict.fromkeys(one for values in lists for one in values))


def _tiers(replicas: Sequence[list[Result]]) -> list[Result]:
    """Figures by tier, in the order of the first replica that has it."""
    names = dict.fromkeys(tier["name"] for tiers in replicas for tier in tiers)
    found = []
    for name in names:
        rows = [tier for tiers in replicas for tier in tiers if tier["name"] == name]
        row: Result = {"name": name}
        for field in dict.fromkeys(field for one in rows for field in one):
            values = [one[field] for one in rows if one.get(field) is not None]
            is_number = all(isinstance(value, int | float) for value in values)
            if field == "name" or not values:
                row.setdefault(field, None)
            elif not is_number:
                row[field] = values[0]
            elif name != _MEMORY and field in _SHARED:
                row[field] = max(values)
            else:
                row[field] = sum(values)
        if "hit_rate" in row:
            asked = row["hits"] + row["misses"]
            row["hit_rate"] = row["hits"] / asked if asked else None
        found.append(row)
    return found


def _entries(replicas: Sequence[list[Result]]) -> list[Result]:
    """Records by key and namespace: memory of all replicas together, a pin where any of them holds one."""
    found: dict[tuple[str, str], Result] = {}
    for entry in (entry for entries in replicas for entry in entries):
        known = found.setdefault((entry["key"], entry["namespace"]), {**entry, "bytes": {}})
        for tier, size in entry["bytes"].items():
            had = known["bytes"].get(tier, 0)
            known["bytes"][tier] = had + size if tier == _MEMORY else max(had, size)
        if entry.get("pinned") and not known.get("pinned"):
            known |= {"pinned": True, "pin_ttl_s": entry.get("pin_ttl_s")}
    return list(found.values())
