"""What a namespace stands for, as a remote tier keeps it: JSON without any tenant's salt."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from chunk_cache.keys import KVContext
from chunk_cache.tiers.disk.layout import tenant_mark


def describe_context(context: KVContext, *, model: str, tenant: str | None = None) -> bytes:
    """Write the fields of a context, with the :func:`~.tenant_mark` of its tenant, and the model's folder."""
    mark = tenant_mark(context.tenant) if tenant is None else tenant
    fields = dataclasses.asdict(context) | {"tenant": mark, "model": model}
    return json.dumps(fields, sort_keys=True).encode()


def read_description(data: bytes | None) -> dict[str, Any] | None:
    """Read what :func:`describe_context` wrote; ``None`` for anything else."""
    try:
        found = json.loads(data or b"")
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
