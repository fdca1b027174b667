"""Tenants: who a key belongs to, which indexes it sees, and the cache namespace of its requests.

The operator's own key is ``--api-key``; without any key everybody is the operator. A tenants file adds
keys, each with indexes of its own::

    {"acme": {"api_key": "...", "index": "indexes/acme", "automatic": true},
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
from rag_pipeline.server.keys import EVERYBODYS_DIGESTS, MIN_KEY, check_key, digest_of

OPERATOR = "operator"
"""Name of whoever holds SGLang's own key, or of everybody where there is none."""

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Tenant:
    """One party of a server.

    Parameters
    ----------
    name : str
        Shown in the log and in health.
    salt : str
        Cache namespace; empty for the operator, whose chunk KV the command line shares.
    indexes : mapping of str to Path
        Folder of each index by the name that requests use; the first one is the default.
    automatic : bool or None
        Whether stored chunks are looked for in prompts that do not ask for it; None: as the server is set.
    """

    name: str
    salt: str
    indexes: Mapping[str, Path]
    automatic: bool | None = None


class Tenants:
    """All tenants of a server.

    Parameters
    ----------
    operator_indexes : mapping of str to Path
        Indexes of the operator.
    by_key : mapping of str to Tenant, optional
        SHA-256 (hex) of a key, and its tenant.
    operator_key : str, optional
        The operator's key; None where nobody needs one.

    Raises
    ------
    RagPipelineError
        Tenants without an operator's key, or with the operator's own.
    """

    def __init__(
        self,
        operator_indexes: Mapping[str, Path],
        by_key: Mapping[str, Tenant] | None = None,
        *,
        operator_key: str | None = None,
    ) -> None:
        self.operator = Tenant(name=OPERATOR, salt="", indexes=dict(operator_indexes))
        self._by_key = dict(by_key or {})
        self._operator_key = None if operator_key is None else digest_of(operator_key)
        if self._by_key and self._operator_key is None:
            raise RagPipelineError(
                "--tenants without an operator's key would leave the operator's side open; give --api-key-file too"
            )
        if self._operator_key in self._by_key:
            name = self._by_key[self._operator_key].name
            raise RagPipelineError(f"--api-key is also the key of tenant {name}; take another")

    def __len__(self) -> int:
        return len(self._by_key)

    @property
    def has_key(self) -> bool:
        """Whether a request needs a key."""
        return self._operator_key is not None

    def all(self) -> list[Tenant]:
        """The operator and every tenant."""
        return [self.operator, *self._by_key.values()]

    def of(self, key: str | None) -> Tenant | None:
        """Whose key it is, None for nobody's; without an operator's key everybody is the operator."""
        if self._operator_key is None:
            return self.operator
        if key is None:
            return None
        digest = digest_of(key)
        if digest == self._operator_key:
            return self.operator
        # The file may hold a digest only: how long its key is, is seen here.
        return self._by_key.get(digest) if len(key) >= MIN_KEY else None

    @classmethod
    def load(
        cls,
        operator_indexes: Mapping[str, Path],
        path: Path | None,
        *,
        operator_key: str | None = None,
    ) -> Tenants:
        """Read a tenants file.

        Raises
        ------
        RagPipelineError
            One line for anything that is missing, unknown or given twice.
        """
        if path is None:
            return cls(operator_indexes, operator_key=operator_key)
        try:
            given = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_once)
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
        tenants = cls(operator_indexes, by_key, operator_key=operator_key)
        _refuse_shared_folders(path, tenants.all())
        return tenants


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
    unknown = sorted(set(fields) - {"api_key", "api_key_sha256", "index", "automatic"})
    if unknown:
        raise RagPipelineError(f"{where} has unknown fields {', '.join(unknown)}")
    key, digest = fields.get("api_key"), fields.get("api_key_sha256")
    if (key is None) == (digest is None):
        raise RagPipelineError(f"{where} needs one of api_key and api_key_sha256")
    if key is not None:
        if not isinstance(key, str) or len(check_key(key, f"{where}: api_key")) < MIN_KEY:
            raise RagPipelineError(f"{where}: api_key needs {MIN_KEY} or more ASCII characters")
        digest = digest_of(key)
    if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
        raise RagPipelineError(f"{where}: api_key_sha256 must be 64 hexadecimal digits")
    if digest in EVERYBODYS_DIGESTS:
        raise RagPipelineError(
            f"{where}: api_key_sha256 is the digest of a word that everybody knows; take a random key "
            f"of {MIN_KEY} or more characters"
        )
    index = fields.get("index")
    words = [index] if isinstance(index, str) else None
    if isinstance(index, dict):
        words = [f"{key}={folder}" for key, folder in index.items()]
    if not words:
        raise RagPipelineError(
            f"{where}: index must be a folder, or an object of names and folders"
        )
    automatic = fields.get("automatic")
    if automatic is not None and not isinstance(automatic, bool):
        raise RagPipelineError(
            f"{where}: automatic is {automatic!r}; give true or false, or leave it out"
        )
    salt = f"tenant-{hashlib.sha256(f'rag-tenant:{name}'.encode()).hexdigest()[:32]}"
    indexes = parse_indexes(words)
    return digest, Tenant(name=name, salt=salt, indexes=indexes, automatic=automatic)


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


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse a name that stands twice in one object: JSON's readers would drop the first silently."""
    names = [name for name, _ in pairs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{twice!r} stands twice")
    return dict(pairs)


def _check_name(where: str, name: str) -> None:
    if not _NAME.fullmatch(name):
        raise RagPipelineError(
            f"{where}: {name!r} is not a name; use lower-case letters, digits, - and _ (at most 64)"
        )
