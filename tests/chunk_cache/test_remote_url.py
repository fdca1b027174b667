"""Addresses of remote tiers: what is read, what is refused in one line, and that secrets are shown nowhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from chunk_cache import ChunkCacheError
from chunk_cache.tiers.remote.connect import connect_remote
from chunk_cache.tiers.remote.url import parse_remote_url, shown_url


def test_an_address_is_read() -> None:
    url = parse_remote_url("valkeys://me:p%40ss@cache.example:7000/3?timeout=0.5&ttl=60")
    assert (url.kind, url.host, url.port, url.database) == ("valkeys", "cache.example", 7000, 3)
    assert (url.user, url.password, url.seconds("timeout", 1.0)) == ("me", "p@ss", 0.5)
    assert url.shown == "valkeys://cache.example:7000/3"
    assert "p@ss" not in repr(url)


def test_what_an_address_leaves_out() -> None:
    url = parse_remote_url("redis://[::1]")
    assert (url.host, url.port, url.database, url.user, url.password) == (
        "::1",
        6379,
        0,
        None,
        None,
    )
    assert url.shown == "redis://[::1]:6379"


def test_a_password_may_stand_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text("hunter22\n")
    assert parse_remote_url(f"valkey://h?password_file={file}").password == "hunter22"
    with pytest.raises(ChunkCacheError, match="cannot be read"):
        parse_remote_url(f"valkey://h?password_file={tmp_path}/none")


def test_addresses_of_sglangs_backends() -> None:
    url = parse_remote_url("hicache+mooncake://10.0.0.1:50051?protocol=tcp")
    assert (url.kind, url.backend, url.host, url.port) == ("hicache", "mooncake", "10.0.0.1", 50051)
    assert url.options == {"protocol": "tcp"}
    url = parse_remote_url("hicache+file:///var/kv%20cache")
    assert (url.backend, url.path, url.host) == ("file", "/var/kv cache", "")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "of no known kind"),
        ("localhost:6379", "of no known kind"),
        ("http://:hunter22@h/", "of no known kind"),
        ("valkey://:hunter22@", "names no host"),
        ("valkey://:hunter22@h:port", "is no address"),
        ("valkey://:hunter22@h:99999", "is no address"),
        ("valkey://:hunter22@h/zero", "no number of a database"),
        ("valkey://:hunter22@h?tls=hunter22", "no option 'tls'; allowed: timeout, ttl"),
        ("valkey://:hunter22@h?timeout=soon", "give seconds above 0"),
        ("valkey://:hunter22@h?timeout=-1", "give seconds above 0"),
        ("valkey://:hunter22@h?ttl=nan", "give seconds above 0"),
        ("valkey://:hunter22@[::1", "is no address"),
        ("hicache+://h", "give hicache\\+BACKEND"),
        ("hicache+mooncake://a:hunter22@h", "without a user"),
    ],
)
def test_anything_else_is_one_line_without_secrets(text: str, words: str) -> None:
    with pytest.raises(ChunkCacheError, match=words) as caught:
        connect_remote(text, byte_budget=1, model="")
    assert "\n" not in str(caught.value)
    assert "hunter22" not in str(caught.value)
    assert "hunter22" not in shown_url(text)
