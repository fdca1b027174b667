"""The connection to a Valkey or Redis server: from an address to a client whose errors hold no secret."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from chunk_cache.errors import ChunkCacheError
from chunk_cache.tiers.encoding import DamagedRecordError
from chunk_cache.tiers.remote.url import RemoteURL

PREFIX = "ragkv:2:"
"""What the names of all keys begin with."""
TIMEOUT_S = 1.0
"""Longest that one read of the socket waits, by default; also what a request waits for all layers of a record."""
_READ_BYTES = 1 << 20
"""Bytes per read of the socket."""


class ValkeyServer:
    """One server, to which nothing is sent before the first call.

    Parameters
    ----------
    url : RemoteURL
        Where it is; see :class:`~chunk_cache.tiers.remote.valkey.ValkeyTier` for the options.

    Attributes
    ----------
    client : valkey.Valkey
        Safe to use from several threads; to be used within :meth:`answers`.
    errors : module
        The client's exceptions.
    wait_s : float
        Longest read of the socket, seconds.

    Raises
    ------
    ChunkCacheError
        If the client is not installed.
    """

    def __init__(self, url: RemoteURL) -> None:
        self.url = url
        self.wait_s = url.seconds("timeout", TIMEOUT_S)
        self.client, self.errors = _connect(url, self.wait_s)

    def check(self) -> None:
        """Ask whether the server answers, lets us in, and is of a kind that is served.

        Raises
        ------
        OSError
            If not.
        """
        with self.answers():
            self.client.ping()
            try:
                told = self.client.info("server")
            except self.errors.ResponseError:
                return  # without the right to ask, the first record shows it
        mode = told.get("server_mode", told.get("redis_mode", "standalone"))
        if mode != "standalone":
            raise OSError(
                f"{self.url.shown} is a server in the mode {str(mode)[:32]!a}; give the address of a single server or "
                "of a primary: clusters and sentinels are not served"
            )

    @contextlib.contextmanager
    def answers(self) -> Iterator[None]:
        """Turn whatever the client raises into :class:`OSError`, without what is secret."""
        try:
            yield
        except (self.errors.OutOfMemoryError, DamagedRecordError):
            raise
        except self.errors.TimeoutError as error:
            raise TimeoutError(f"{self.url.shown}: {error}") from None
        except self.errors.ValkeyError as error:
            raise OSError(f"{self.url.shown}: {error}") from None


def need_client(url: RemoteURL) -> Any:
    """Import the client's package.

    Raises
    ------
    ChunkCacheError
        If it is not installed.
    """
    try:
        import valkey
    except ImportError:
        raise ChunkCacheError(
            f'{url.shown} needs the package valkey: pip install "rag-pipeline[valkey]"'
        ) from None
    return valkey


def _connect(url: RemoteURL, wait_s: float) -> tuple[Any, Any]:
    """A client that has sent nothing yet, and the module of its exceptions."""
    valkey = need_client(url)
    from valkey.backoff import NoBackoff
    from valkey.retry import Retry

    # Once more at once: a server that was restarted closed the connections of before. Not after a time-out.
    gone = (valkey.exceptions.ConnectionError,)
    where: dict[str, Any]
    if url.is_socket:
        where = {"connection_class": valkey.UnixDomainSocketConnection, "path": url.path}
    else:
        where = {
            "host": url.host,
            "port": url.port,
            "socket_connect_timeout": wait_s,
            "socket_keepalive": True,
        }
    if url.is_tls:
        where["connection_class"] = valkey.SSLConnection
        if "ca_file" in url.options:
            where["ssl_ca_certs"] = url.options["ca_file"]
    pool = valkey.ConnectionPool(
        db=url.database,
        username=url.user,
        password=url.password,
        socket_timeout=wait_s,
        # Layers are long: the default of 64 KiB spends more time in Python than in the network.
        socket_read_size=_READ_BYTES,
        retry=Retry(NoBackoff(), 1, gone),
        retry_on_error=list(gone),
        **where,
    )
    client = valkey.Valkey(connection_pool=pool)
    return client, valkey.exceptions
