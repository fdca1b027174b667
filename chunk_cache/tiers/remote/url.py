"""Addresses of remote tiers: ``valkey://[user:password@]host:port[/db]``, ``hicache+BACKEND://...``.

What is secret in one is shown nowhere: neither in messages nor in ``repr``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from chunk_cache.errors import ChunkCacheError

_SOCKETS = ("valkey+unix", "redis+unix")
_TLS = ("valkeys", "rediss")
VALKEY_SCHEMES = ("valkey", "redis", *_TLS)
"""Kinds that :class:`~chunk_cache.tiers.remote.valkey.ValkeyTier` serves; those with a final ``s`` speak TLS."""
_HICACHE = "hicache+"
_VALKEY_OPTIONS = ("timeout", "ttl", "password_file", "ca_file")
_MOST_DATABASE = 65_535
_DEFAULT_PORT = 6379
# To the last @: a password may hold what ought to be written as %2F.
_USER_INFO = re.compile(r"//.*@", re.DOTALL)
_FILE = re.compile(r"(?<=[?&])(password_file|ca_file|catalog)=[^&]*")
"""Options whose value may hold an @."""
_ALLOWED = (
    "give valkey://[user:password@]host:port[/db], the same with valkeys (TLS), valkey+unix:///path/of.sock[?db=N], "
    "or hicache+BACKEND://..."
)
_MANY = ("cluster", "sentinel")


@dataclass(frozen=True, kw_only=True, slots=True)
class RemoteURL:
    """A remote tier's address, checked.

    Attributes
    ----------
    kind : str
        Scheme without what follows a ``+``: ``valkey``, ``hicache``.
    backend : str
        What follows it, else empty: ``mooncake``, ``unix``.
    host, port, path : str, int or None, str
        As in the address; `host` has no brackets.
    user, password : str or None
        Not in :func:`repr`.
    options : mapping of str to str
        Its query. Not in :func:`repr`.
    """

    kind: str
    backend: str = ""
    host: str = ""
    port: int | None = None
    path: str = ""
    user: str | None = field(default=None, repr=False)
    password: str | None = field(default=None, repr=False)
    options: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def shown(self) -> str:
        """The address for messages: without user, password and options."""
        scheme = f"{self.kind}+{self.backend}" if self.backend else self.kind
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{scheme}://{host}{'' if self.port is None else f':{self.port}'}{self.path}"

    @property
    def is_socket(self) -> bool:
        """Whether a Valkey address names a socket in this machine's file system, which is `path`."""
        return self.backend == "unix" and self.kind in VALKEY_SCHEMES

    @property
    def is_tls(self) -> bool:
        """Whether a Valkey address asks for TLS."""
        return self.kind in _TLS

    @property
    def database(self) -> int:
        """Number of the database of a Valkey address."""
        return int(self.options.get("db", 0) if self.is_socket else self.path.strip("/") or 0)

    def seconds(self, option: str, default: float) -> float:
        """Return an option that is a number of seconds above 0.

        Raises
        ------
        ChunkCacheError
            If it is none.
        """
        text = self.options.get(option)
        try:
            value = default if text is None else float(text)
        except ValueError:
            value = -1.0
        if not 0 < value < float("inf"):
            raise ChunkCacheError(
                f"{self.shown}: {option}={text!r}; give seconds above 0, such as {option}=2"
            )
        return value


def shown_url(text: str) -> str:
    """Any text that is meant as an address, with nothing in it that may be secret."""
    return _USER_INFO.sub("//", _FILE.sub("", text)).partition("?")[0]


def parse_remote_url(text: str) -> RemoteURL:
    """Check an address.

    Raises
    ------
    ChunkCacheError
        One line: what was given (without secrets), what is allowed.
    """
    shown = shown_url(text)
    try:
        parts = urlsplit(text)
        port = parts.port
        user = None if parts.username is None else unquote(parts.username)
        password = None if parts.password is None else unquote(parts.password)
        options = dict(
            parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
        )
    except ValueError:
        # The words of the parser quote what they could not read, which may be a part of a password.
        raise ChunkCacheError(
            f"remote tier {shown!r} is no address (its port or its options cannot be read; in a password write / as %2F, "
            f"? as %3F, # as %23, @ as %40): {_ALLOWED}"
        ) from None
    if parts.scheme.startswith(_HICACHE):
        return _hicache(parts, port, user, password, options)
    kind, _, backend = parts.scheme.partition("+")
    if kind in VALKEY_SCHEMES and any(word in backend for word in _MANY):
        raise ChunkCacheError(
            f"remote tier {shown!r}: clusters and sentinels are not served; give the address of a single server or of a "
            "primary: valkey://host:port"
        )
    if parts.scheme not in (*VALKEY_SCHEMES, *_SOCKETS):
        raise ChunkCacheError(f"remote tier {shown!r} is of no known kind: {_ALLOWED}")
    if "@" in parts.path + parts.fragment or "@" in _FILE.sub("", f"?{parts.query}"):
        raise ChunkCacheError(
            f"remote tier {shown!r}: an @ stands behind the host; in a password write / as %2F, ? as %3F, # as %23, "
            "@ as %40"
        )
    return _valkey(parts, port, user, password, options, shown)


def _valkey(
    parts: SplitResult,
    port: int | None,
    user: str | None,
    password: str | None,
    options: Mapping[str, str],
    shown: str,
) -> RemoteURL:
    is_socket = parts.scheme in _SOCKETS
    if parts.fragment or bool(parts.hostname) is is_socket or (is_socket and len(parts.path) < 2):
        what = "names no socket" if is_socket else "names no host"
        raise ChunkCacheError(f"remote tier {shown!r} {what}: {_ALLOWED}")
    if "," in parts.netloc.rpartition("@")[2]:
        raise ChunkCacheError(
            f"remote tier {shown!r} names several hosts; give the address of one: {_ALLOWED}"
        )
    database = options.get("db", "") if is_socket else parts.path.strip("/")
    if not re.fullmatch(r"[0-9]{0,5}", database) or int(database or 0) > _MOST_DATABASE:
        raise ChunkCacheError(
            f"remote tier {shown!r}: {database!r} is no number of a database; {_ALLOWED}"
        )
    allowed = (*_VALKEY_OPTIONS, *(("db",) if is_socket else ()))
    for name in options:
        if name not in allowed:
            raise ChunkCacheError(
                f"remote tier {shown!r} has no option {name!r}; allowed: {', '.join(allowed)}"
            )
    if "ca_file" in options and parts.scheme not in _TLS:
        raise ChunkCacheError(
            f"remote tier {shown!r}: ca_file is for TLS; give valkeys:// or rediss://"
        )
    kind, _, backend = parts.scheme.partition("+")
    path = unquote(parts.path) if is_socket else f"/{database}" if database else ""
    url = RemoteURL(
        kind=kind,
        backend=backend,
        host=parts.hostname or "",
        port=port if is_socket or port is not None else _DEFAULT_PORT,
        path=path,
        user=user or None,
        password=_password(password, options, shown),
        options=options,
    )
    url.seconds("timeout", 1.0)
    url.seconds("ttl", 1.0)
    return url


def _hicache(
    parts: SplitResult,
    port: int | None,
    user: str | None,
    password: str | None,
    options: Mapping[str, str],
) -> RemoteURL:
    backend = parts.scheme.removeprefix(_HICACHE)
    if not backend or user or password or parts.fragment:
        raise ChunkCacheError(
            f"remote tier {shown_url(parts.geturl())!r}: give hicache+BACKEND://[host:port][/path][?option=value], "
            "without a user"
        )
    return RemoteURL(
        kind="hicache",
        backend=backend,
        host=parts.hostname or "",
        port=port,
        path=unquote(parts.path),
        options=options,
    )


def _password(given: str | None, options: Mapping[str, str], shown: str) -> str | None:
    file = options.get("password_file")
    if file is None:
        return given or None
    try:
        return Path(file).read_text("utf-8").strip() or None
    except (OSError, ValueError):
        raise ChunkCacheError(
            f"remote tier {shown!r}: password_file {file} cannot be read; name a file that holds the password"
        ) from None
