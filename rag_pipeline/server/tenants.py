"""Tenants: who a key belongs to, which indexes it sees, and the cache namespace of its requests.

The operator's own key is SGLang's ``--api-key``; without tenants everybody is the operator. A tenants
file adds keys, each with indexes of its own::

    {"acme": {"api_key": "...", "index": "indexes/acme"},
     "globex": {"api_key_sha256": "...", "index": {"law": "indexes/law", "news": "indexes/news"}}}
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rag_pipeline.errors import RagPipelineError

OPERATOR = "operator"
"""Name of whoever holds SGLang's own key, or of everybody where there is none."""

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MIN_KEY = 16

# What a tenant's key opens: serving, and nothing that changes or shows the server.
_OPEN_PREFIXES = ("/v1/rag/", "/v1/models/")
_OPEN_PATHS = frozenset(
    {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/models",
        "/v1/tokenize",
        "/v1/detokenize",
        "/generate",
        "/model_info",
        "/get_model_info",
    }
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Tenant:
    """One party of a server.

    Parameters
    ----------
    name
        Shown in the log and in health.
    salt
        Cache namespace; empty for the operator, whose chunk KV the command line shares.
    indexes
        Folder of each index by the name that requests use; the first one is the default.
    """

    name: str
    salt: str
    indexes: Mapping[str, Path]


class Tenants:
    """All tenants of a server.

    Parameters
    ----------
    operator_indexes
        Indexes of the operator.
    by_key
        SHA-256 (hex) of a key, and its tenant.
    """

    def __init__(
        self, operator_indexes: Mapping[str, Path], by_key: Mapping[str, Tenant] | None = None
    ) -> None:
        self.operator = Tenant(name=OPERATOR, salt="", indexes=dict(operator_indexes))
        self._by_key = dict(by_key or {})

    def __len__(self) -> int:
        return len(self._by_key)

    def all(self) -> list[Tenant]:
        """The operator and every tenant."""
        return [self.operator, *self._by_key.values()]

    def of(self, token: str | None) -> Tenant:
        """Tenant of a key that SGLang's own check has let through."""
        return self._find(token) or self.operator

    def accepts(self, token: str, path: str) -> bool:
        """Whether a tenant's key opens a path."""
        allowed = path in _OPEN_PATHS or path.startswith(_OPEN_PREFIXES)
        return allowed and self._find(token) is not None

    def salt_of(self, token: str | None) -> str:
        """Cache namespace of a key."""
        return self.of(token).salt

    def _find(self, token: str | None) -> Tenant | None:
        if token is None or not self._by_key:
            return None
        # Looked up by digest, so the time taken says nothing about a key.
        return self._by_key.get(_digest(token))

    @classmethod
    def load(cls, operator_indexes: Mapping[str, Path], path: Path | None) -> Tenants:
        """Read a tenants file.

        Raises
        ------
        RagPipelineError
            One line for anything that is missing, unknown or given twice.
        """
        if path is None:
            return cls(operator_indexes)
        try:
            given = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RagPipelineError(f"--tenants {path} cannot be read as JSON ({error})") from error
        if not isinstance(given, dict) or not given:
            raise RagPipelineError(f"--tenants {path} must be a JSON object of at least one tenant")
        by_key: dict[str, Tenant] = {}
        for name, fields in given.items():
            digest, tenant = _read_tenant(path, str(name), fields)
            if digest in by_key:
                raise RagPipelineError(f"--tenants {path}: {name} has the key of another tenant")
            by_key[digest] = tenant
        _refuse_shared_folders(path, [cls(operator_indexes).operator, *by_key.values()])
        return cls(operator_indexes, by_key)


def parse_indexes(given: Iterable[str]) -> dict[str, Path]:
    """Read ``--index`` options: ``DIR``, named by its last part, or ``NAME=DIR``; the first is the default.

    Raises
    ------
    RagPipelineError
        None given, a name that is not allowed, or one given twice.
    """
    indexes: dict[str, Path] = {}
    for word in given:
        name, equals, folder = word.partition("=")
        if not equals:
            folder = word
            name = re.sub(r"[^a-z0-9_-]+", "-", Path(word).absolute().name.lower()).strip("-_")
        _check_name("--index", name)
        if name in indexes:
            raise RagPipelineError(f"--index {name!r} is given twice; write NAME=DIR")
        indexes[name] = Path(folder).expanduser().absolute()
    if not indexes:
        raise RagPipelineError("--index is missing; give a folder (a new one for an empty index)")
    return indexes


def _read_tenant(path: Path, name: str, fields: Any) -> tuple[str, Tenant]:
    where = f"--tenants {path}: {name}"
    _check_name(where, name)
    if name == OPERATOR:
        raise RagPipelineError(f"{where} is the name of --api-key's holder; choose another")
    if not isinstance(fields, dict):
        raise RagPipelineError(f"{where} must be an object with api_key and index")
    unknown = sorted(set(fields) - {"api_key", "api_key_sha256", "index"})
    if unknown:
        raise RagPipelineError(f"{where} has unknown fields {', '.join(unknown)}")
    key, digest = fields.get("api_key"), fields.get("api_key_sha256")
    if (key is None) == (digest is None):
        raise RagPipelineError(f"{where} needs one of api_key and api_key_sha256")
    if key is not None:
        if not isinstance(key, str) or len(key) < _MIN_KEY or not key.isascii() or " " in key:
            raise RagPipelineError(f"{where}: api_key needs {_MIN_KEY} or more ASCII characters")
        digest = _digest(key)
    if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
        raise RagPipelineError(f"{where}: api_key_sha256 must be 64 hexadecimal digits")
    index = fields.get("index")
    words = [index] if isinstance(index, str) else None
    if isinstance(index, dict):
        words = [f"{key}={folder}" for key, folder in index.items()]
    if not words:
        raise RagPipelineError(
            f"{where}: index must be a folder, or an object of names and folders"
        )
    salt = f"tenant-{hashlib.sha256(f'rag-tenant:{name}'.encode()).hexdigest()[:32]}"
    return digest, Tenant(name=name, salt=salt, indexes=parse_indexes(words))


def _refuse_shared_folders(path: Path, tenants: list[Tenant]) -> None:
    owners: dict[Path, str] = {}
    for tenant in tenants:
        for folder in tenant.indexes.values():
            owner = owners.setdefault(folder.resolve(), tenant.name)
            if owner != tenant.name:
                raise RagPipelineError(
                    f"--tenants {path}: {owner} and {tenant.name} share the index {folder}; "
                    "give each its own"
                )


def _check_name(where: str, name: str) -> None:
    if not _NAME.fullmatch(name):
        raise RagPipelineError(
            f"{where}: {name!r} is not a name; use lower-case letters, digits, - and _ (at most 64)"
        )


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
