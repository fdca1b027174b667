"""Host names as clients and browsers write them: which of them can only be this machine.

A web page reaches a server on the loopback address by sending requests there (its ``Origin`` gives it away)
or by giving its own name that address (the ``Host`` gives it away). Both headers are parsed, never compared
by their beginning: ``127.evil.example`` is a name that anybody can register.
"""

from __future__ import annotations

import re
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import NamedTuple

_NAME = re.compile(r"[a-z0-9_]([a-z0-9_.-]*[a-z0-9_-])?")
_DEFAULT_PORTS = {"http": 80, "https": 443}


class HostName(NamedTuple):
    """A host as a header gives it.

    Parameters
    ----------
    name : str
        In lower case, without brackets and the root's dot; an address in its one canonical form.
    address : IPv4Address, IPv6Address or None
        The address, where it is one; an IPv4 address in IPv6 clothes is that IPv4 address.
    port : int or None
        None where none is given.
    """

    name: str
    address: IPv4Address | IPv6Address | None
    port: int | None

    @property
    def is_loopback(self) -> bool:
        """Whether it names this machine and cannot be made to name another."""
        return self.name == "localhost" if self.address is None else self.address.is_loopback


def parse_host(text: str) -> HostName | None:
    """Parse a ``Host`` header or an address to listen on; None for anything else, the empty text too."""
    if text.startswith("["):
        inner, closed, tail = text[1:].partition("]")
        if not closed or (tail and not tail.startswith(":")):
            return None
        address, port = _address(inner), tail[1:]
        if not isinstance(address, IPv6Address) or (tail and not port):
            return None
    else:
        inner, colon, port = text.lower().partition(":")
        if colon and not port:
            return None
        inner = inner.removesuffix(".")
        address = _address(inner)
        if address is None and (not _NAME.fullmatch(inner) or ".." in inner):
            return None
    if port and not (port.isascii() and port.isdigit() and int(port) <= 0xFFFF):
        return None
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    name = inner if address is None else str(address)
    return HostName(name, address, int(port) if port else None)


def is_loopback(host: str) -> bool:
    """Whether an address to listen on, or of a client, is this machine only."""
    parsed = parse_host(f"[{host}]" if ":" in host else host)
    return parsed is not None and parsed.is_loopback


def is_own_origin(origin: str, host: HostName) -> bool:
    """Whether an ``Origin`` header names the place that the request was sent to."""
    scheme, _, rest = origin.partition("://")
    default = _DEFAULT_PORTS.get(scheme.lower())
    page = parse_host(rest)
    if default is None or page is None:
        return False
    ports = [default if port is None else port for port in (page.port, host.port)]
    return page.name == host.name and ports[0] == ports[1]


def _address(text: str) -> IPv4Address | IPv6Address | None:
    if "%" in text:
        return None
    try:
        return ip_address(text)
    except ValueError:
        return None
