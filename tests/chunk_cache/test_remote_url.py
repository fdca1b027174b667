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


def test_an_address_of_a_socket_is_read() -> None:
    url = parse_remote_url("valkey+unix://me:p%2Fss@/run/kv%20one.sock?db=3&timeout=2")
    assert (url.is_socket, url.path, url.database, url.port) == (True, "/run/kv one.sock", 3, None)
    assert (url.user, url.password) == ("me", "p/ss")
    assert url.shown == "valkey+unix:///run/kv one.sock"
    assert shown_url("valkey://h:1/0?password_file=/a@b") == "valkey://h:1/0"
    assert not parse_remote_url("hicache+unix:///run/x").is_socket


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
        ("valkey://:hunter22@h/99999", "no number of a database"),
        ("valkey://:hun/hunter22@h:1", "as %2F"),
        ("valkey://:6/hunter22@h:1", "as %2F"),
        ("valkey://user:6?hunter22@h=1", "as %2F"),
        ("valkey://a?hunter22@h:1/0", "as %3F"),
        ("valkey://:hun#hunter22@h:1", "as %23"),
        ("valkey://6#hunter22@h:1", "as %23"),
        ("valkey://:hunter22@h?ca_file=/x", "ca_file is for TLS"),
        ("valkey://:hunter22@h?db=3", "no option 'db'"),
        ("valkey+unix://:hunter22@", "names no socket"),
        ("valkey+unix://:hunter22@host/run/kv.sock", "names no socket"),
        ("valkey+unix://:hunter22@/run/kv.sock?db=x", "no number of a database"),
        ("valkey+sentinel://:hunter22@h:26379/primary", "sentinels are not served"),
        ("rediss+cluster://:hunter22@h", "clusters and sentinels are not served"),
        ("redis-sentinel://:hunter22@h", "of no known kind"),
        ("valkey://:hunter22@a,b", "several hosts"),
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
