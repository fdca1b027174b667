"""Ways to a Valkey server: passwords, rights, databases, sockets, and servers of a kind that is not served."""

from __future__ import annotations

import contextlib
import logging
import shutil
import socket
import ssl
import subprocess
import threading
import time
from pathlib import Path
from urllib.parse import quote

import pytest
from valkey_server import Server, free_port
from valkey_tier import BUDGET, Make, client_of, same

from chunk_cache import BackgroundWriter, KVContext
from chunk_cache.tiers.remote.connect import connect_remote
from chunk_cache.tiers.remote.valkey import ValkeyTier


def test_a_wrong_password_is_told_once_and_shown_nowhere(
    tmp_path: Path, make_record: Make, context: KVContext, caplog: pytest.LogCaptureFixture
) -> None:
    server = Server(tmp_path, "--requirepass", "right-word")
    try:
        url = f"valkey://:wrong-word@127.0.0.1:{server.port}"
        with caplog.at_level(logging.DEBUG):
            tier = connect_remote(url, byte_budget=BUDGET, model="")
            record = make_record(range(8))
            assert tier.open(record.key, record.token_ids) is None
            failed: list[OSError] = []
            writer = BackgroundWriter(tier, count=lambda kind: None, failed=failed.append)
            writer.put(record, context, "")
            assert writer.close(10)
        assert failed
        told = " ".join([caplog.text, *map(str, failed), repr(tier.tier.url), str(tier.stats())])  # type: ignore[attr-defined]
        assert "WRONGPASS" in told or "invalid" in told
        assert "wrong-word" not in told
        right = connect_remote(
            f"valkey://:right-word@127.0.0.1:{server.port}", byte_budget=BUDGET, model=""
        )
        assert right.put(record)
    finally:
        server.kill()


def test_nothing_is_asked_of_a_server_before_the_first_call() -> None:
    tier = ValkeyTier.connect(f"valkey://127.0.0.1:{free_port()}", byte_budget=1, model="")
    with pytest.raises(OSError, match="valkey://127"):
        tier.check()


def test_the_rights_that_the_page_names_are_enough(
    tmp_path: Path, make_record: Make, context: KVContext
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "tiers.md").read_text("utf-8")
    rights = page.partition("needs `")[2].partition("`")[0].split()
    server = Server(tmp_path, "--save", "3600 1")
    try:
        words = ["ACL", "SETUSER", "kv", "on", ">word", "~ragkv:2:*", *rights]
        client_of(server).execute_command(*words)
        url = f"valkey://kv:word@127.0.0.1:{server.port}?timeout=5&ttl=100"
        tier = connect_remote(url, byte_budget=BUDGET, model="")
        record = make_record(range(8))
        assert tier.put(record, context=context)
        assert same(tier.read(record.key), record)
        assert tier.keys_by_use() == [record.key]
        tier.note_member(32 * "a", record.key)
        (member,) = tier.members(32 * "a")
        assert member.key == record.key
        assert member.context["prefix_digest"] == context.prefix_digest
        assert member.token_ids.tolist() == record.token_ids.tolist()
        assert tier.remove(record.key)
        tier.sync()
        assert tier.stats()["state"] == "closed"
    finally:
        server.kill()


def test_a_socket_and_a_database_with_a_password_that_needs_quoting(
    tmp_path: Path, make_record: Make
) -> None:
    path, word = tmp_path / "kv one.sock", "p/a:s?s#w@rd%"
    words = ("--requirepass", word, "--unixsocket", str(path), "--unixsocketperm", "700")
    server = Server(tmp_path, *words)
    record, other = make_record(range(8)), make_record(range(50, 60))
    quoted = quote(word, safe="")
    try:
        local = f"valkey+unix://:{quoted}@{quote(str(path))}?db=3"
        tier = connect_remote(local, byte_budget=BUDGET, model="")
        assert tier.put(record)
        there = connect_remote(
            f"redis://default:{quoted}@127.0.0.1:{server.port}/3", byte_budget=BUDGET, model=""
        )
        assert same(there.read(record.key), record)
        elsewhere = connect_remote(
            f"redis://:{quoted}@127.0.0.1:{server.port}/4", byte_budget=BUDGET, model=""
        )
        assert elsewhere.put(other)
        assert list(there.keys()) == [record.key], "a database is a store of its own"
        (tmp_path / "word").write_text(word)
        by_file = f"{server.url}/4?password_file={tmp_path / 'word'}"
        assert list(connect_remote(by_file, byte_budget=BUDGET, model="").keys()) == [other.key]
    finally:
        server.kill()


@pytest.mark.parametrize(
    ("words", "mode"),
    [(("--cluster-enabled", "yes", "--cluster-port"), "cluster"), ((), "sentinel")],
)
def test_a_server_of_a_kind_that_is_not_served_is_one_line_at_the_start(
    words: tuple[str, ...],
    mode: str,
    tmp_path: Path,
    make_record: Make,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if mode == "sentinel":  # it keeps its state in its settings, which it reads from a file
        settings = tmp_path / "sentinel.conf"
        settings.write_text("")
        server = _Sentinel(tmp_path, str(settings))
    else:
        server = Server(tmp_path, *words, str(free_port()))
    try:
        with caplog.at_level(logging.WARNING):
            tier = connect_remote(server.url, byte_budget=BUDGET, model="")
        (line,) = [one.getMessage() for one in caplog.records]
        assert f"is a server in the mode '{mode}'" in line
        assert "clusters and sentinels are not served" in line
        record = make_record(range(8))
        assert tier.open(record.key, record.token_ids) is None
    finally:
        server.kill()


class _Sentinel(Server):
    def __init__(self, folder: Path, settings: str) -> None:
        self._settings = settings
        super().__init__(folder, "--sentinel")

    def start(self) -> None:
        words = [self._binary, self._settings, "--sentinel", "--port", str(self.port)]
        words += ["--dir", str(self._folder)]
        quiet = subprocess.DEVNULL
        self.process = subprocess.Popen(words, stdout=quiet, stderr=quiet)
        until = time.monotonic() + 20
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
            except OSError:
                assert time.monotonic() < until
                time.sleep(0.02)
            else:
                return


def test_tls_with_an_authority_of_its_own(
    server: Server, tmp_path: Path, make_record: Make
) -> None:
    """The wheel's server is built without TLS, so something that ends TLS stands before it."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate, and is not here")
    certificate, key = _certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(
            target=_end_tls, args=(listener, context, server.port), daemon=True
        ).start()
        url = f"valkeys://127.0.0.1:{listener.getsockname()[1]}"
        record = make_record(range(8))
        tier = connect_remote(
            f"{url}?timeout=5&ca_file={certificate}", byte_budget=BUDGET, model=""
        )
        assert tier.put(record)
        assert same(tier.read(record.key), record)
        stranger = connect_remote(f"{url}?timeout=5", byte_budget=BUDGET, model="")
        assert stranger.open(record.key, record.token_ids) is None
        assert stranger.stats()["state"] != "closed", "nobody vouches for its certificate"
        plain = url.replace("valkeys", "valkey") + "?timeout=0.5"
        assert connect_remote(plain, byte_budget=BUDGET, model="").read(record.key) is None


def _end_tls(listener: socket.socket, context: ssl.SSLContext, port: int) -> None:
    """Take connections with TLS and pass them on without, until the listener is closed."""

    def pump(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_RDWR)

    with contextlib.suppress(OSError):
        while True:
            peer, _ = listener.accept()
            with contextlib.suppress(OSError):  # a hand-shake that fails is the peer's affair
                inner = context.wrap_socket(peer, server_side=True)
                outer = socket.create_connection(("127.0.0.1", port))
                for pair in ((inner, outer), (outer, inner)):
                    threading.Thread(target=pump, args=pair, daemon=True).start()


def _certificate(folder: Path) -> tuple[str, str]:
    """Make a certificate of 127.0.0.1, which is its own authority, and its key."""
    certificate, key = str(folder / "cert.pem"), str(folder / "key.pem")
    made = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
    made += ["-nodes", "-days", "2", "-subj", "/CN=127.0.0.1", "-addext"]
    made += ["subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate]
    subprocess.run(made, check=True, capture_output=True)
    return certificate, key
