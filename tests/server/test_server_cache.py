"""The chunk cache of a running server: what each key sees of it, and what the administrator may do with it."""

from __future__ import annotations

import json
import math
import random
import time
from pathlib import Path
from typing import Any

import pytest

from chunk_cache import StoreFolder
from rag_pipeline.cli import main
from rag_pipeline.protocol import build_requests
from rag_pipeline.server.keys import ADMIN_API_KEY_VARIABLE, API_KEY_VARIABLE

pytestmark = pytest.mark.engine

CACHE = "/v1/rag/cache"
PREFIX, CHUNK = 48, 80


def build(server: Any, tenant: str, seed: int) -> None:
    """Have a chunk of random tokens computed for a tenant, in both variants."""
    numbers = random.Random(seed)
    ids = [numbers.randrange(100, 4000) for _ in range(PREFIX + CHUNK)]
    for fusion in build_requests(PREFIX, CHUNK):
        body = {
            "input_ids": ids,
            "sampling_params": {"max_new_tokens": 1},
            "kv_hints": fusion.to_kv_hints(),
        }
        answer = server.post("/generate", body, tenant)
        assert answer.status_code == 200, answer.text


def get(server: Any, path: str, tenant: str | None = "operator", **query: Any) -> Any:
    with server.client(tenant) as client:
        return client.get(f"{CACHE}{path}", params=query)


def entries(server: Any, **query: Any) -> dict[str, Any]:
    answer = get(server, "/entries", **query)
    assert answer.status_code == 200, answer.text
    return {entry["key"]: entry for entry in answer.json()["entries"]}


def order(server: Any, action: str, **body: Any) -> dict[str, Any]:
    answer = server.post(f"{CACHE}/{action}", body)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.fixture(scope="module")
def built(rag_server: Any) -> list[str]:
    """Keys of the operator's new chunks; a tenant has one too. All are on the disk."""
    before = set(entries(rag_server))
    for seed in (1, 2, 3):
        build(rag_server, "operator", seed)
    mine = sorted(set(entries(rag_server)) - before)
    build(rag_server, "acme", 4)
    deadline = time.monotonic() + 120
    while any(tier.get("queued") for tier in get(rag_server, "").json()["tiers"]):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert len(mine) >= 3
    return mine


def test_the_operator_sees_every_tier_and_a_tenant_its_own(
    rag_server: Any, built: list[str]
) -> None:
    everything = get(rag_server, "").json()
    memory, disk = everything["tiers"]
    assert (memory["name"], disk["name"]) == ("memory", "disk")
    assert memory["chunks"] > len(built)
    assert 0 < memory["bytes"] <= memory["byte_budget"]
    assert disk["written"] > 0
    assert disk["bytes"] > 0
    assert disk["written_s"] > 0
    rows = entries(rag_server).values()
    assert sum("memory" in row["bytes"] for row in rows) == memory["chunks"]
    marks = {row["tenant"] for row in rows}
    assert "" in marks
    assert len(marks) > 1
    seen = {name: get(rag_server, "", name).json()["tiers"] for name in ("acme", "globex")}
    own = max(sum(row["tenant"] == mark for row in rows) for mark in marks if mark)
    assert [tier["name"] for tier in seen["acme"]] == ["memory", "disk"]
    assert 0 < seen["acme"][0]["chunks"] <= own < memory["chunks"]
    assert seen["acme"][0]["bytes"] < memory["bytes"]
    assert "byte_budget" not in seen["acme"][0]
    assert seen["globex"][0]["chunks"] < seen["acme"][0]["chunks"]


def test_without_the_administrators_key_nothing_is_listed_or_changed(
    rag_server: Any, built: list[str]
) -> None:
    before = entries(rag_server)
    bodies = {
        "pin": {"keys": built},
        "unpin": {"keys": built},
        "evict": {"keys": built},
        "prefetch": {"keys": built},
        "verify": {},
    }
    for tenant, status in (("acme", 403), (None, 401)):
        refusals = [get(rag_server, "/entries", tenant)]
        refusals += [
            rag_server.post(f"{CACHE}/{action}", body, tenant) for action, body in bodies.items()
        ]
        assert {answer.status_code for answer in refusals} == {status}
        assert all(rag_server.is_one_line(answer) for answer in refusals)
        assert not any(key in answer.text for answer in refusals for key in built)
    assert get(rag_server, "", None).status_code == 401
    after = entries(rag_server)
    assert {key: row["pinned"] for key, row in after.items()} == {
        key: row["pinned"] for key, row in before.items()
    }


@pytest.mark.parametrize(
    ("action", "body", "status", "word"),
    [
        ("pin", {"keys": ["dead" * 16]}, 404, "no chunk"),
        ("pin", {"keys": []}, 400, "keys"),
        ("pin", {"keys": ["xyz"]}, 400, "keys"),
        ("pin", {"keys": ["abcd"], "ttl_s": 0}, 400, "ttl_s"),
        ("pin", {"keys": ["abcd"], "ttl_s": "2h"}, 400, "ttl_s"),
        ("pin", {"keys": ["abcd"], "ttl_s": 1e12}, 400, "ttl_s"),
        ("unpin", {"keys": ["abcd"], "why": 1}, 400, "why"),
        ("evict", {}, 400, "max_bytes"),
        ("evict", {"max_bytes": 1, "tier": "memory"}, 400, "max_bytes"),
        ("verify", {"tier": "tape"}, 400, "memory, disk"),
        ("burn", {}, 404, "no route"),
    ],
)
def test_a_wrong_order_is_one_line(
    rag_server: Any, action: str, body: Any, status: int, word: str
) -> None:
    answer = rag_server.post(f"{CACHE}/{action}", body)
    assert answer.status_code == status
    assert rag_server.is_one_line(answer)
    assert word in answer.json()["error"]["message"]


def test_a_pin_with_an_end_holds_in_memory_and_on_the_disk(
    rag_server: Any, built: list[str]
) -> None:
    one, two = built[:2]
    assert order(rag_server, "pin", keys=[one[:20]], ttl_s=3600)["pinned"] == [one]
    assert order(rag_server, "pin", keys=[two])["not_pinned"] == []
    shown = entries(rag_server, key=[one, two])
    assert set(shown) == {one, two}
    assert 3500 < shown[one]["pin_ttl_s"] <= 3600
    assert shown[two]["pinned"]
    assert shown[two]["pin_ttl_s"] is None
    folder = StoreFolder(rag_server.folder / "kv")
    ends = {key.digest: until for key, until in folder.pins().items()}
    assert time.time() + 3500 < ends[one] < time.time() + 3700
    assert math.isinf(ends[two])
    kept = order(rag_server, "evict", keys=[one, two])
    assert sorted(kept["pinned_kept"]) == sorted([one, two])
    assert kept["evicted"] == []
    # Set again it ends soon, and nobody has to do anything for it.
    order(rag_server, "pin", keys=[one], ttl_s=0.2)
    time.sleep(0.3)
    assert not entries(rag_server, key=one)[one]["pinned"]
    assert order(rag_server, "unpin", keys=[one, two])["unpinned"] == [two]


def test_what_leaves_memory_can_be_fetched_again_and_what_is_evicted_is_gone(
    rag_server: Any, built: list[str]
) -> None:
    key = built[2]
    assert order(rag_server, "evict", keys=[key], tier="memory")["evicted"] == [key]
    assert set(entries(rag_server, key=key)[key]["bytes"]) == {"disk"}
    assert order(rag_server, "prefetch", keys=[key])["fetched"] == [key]
    assert set(entries(rag_server, key=key)[key]["bytes"]) == {"memory", "disk"}
    assert order(rag_server, "prefetch", keys=[key])["already_there"] == [key]
    assert order(rag_server, "evict", keys=[key])["evicted"] == [key]
    answer = get(rag_server, "/entries", key=key)
    assert answer.status_code == 404
    assert rag_server.is_one_line(answer)


def test_an_index_is_warmed_piece_by_piece(rag_server: Any) -> None:
    before = set(entries(rag_server))
    first = order(rag_server, "warm", index="topics", limit=2)
    assert (first["index"], first["warmed"], first["next_offset"]) == ("topics", 2, 2)
    assert len(set(entries(rag_server)) - before) >= 2
    last = order(rag_server, "warm", offset=first["total"] - 1)
    assert (last["warmed"], last["next_offset"]) == (1, None)
    refusal = rag_server.post(f"{CACHE}/warm", {"index": "extra"})
    assert refusal.status_code == 404
    assert rag_server.is_one_line(refusal)
    assert rag_server.post(f"{CACHE}/warm", {}, "acme").status_code == 403


def test_the_command_line_warms_a_running_server(
    rag_server: Any,
    tiny_llm: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["cache", "warm", "--index", str(rag_server.folder / "acme"), "--model", str(tiny_llm)]
    words += ["--url", rag_server.url, "--limit", "1", "--json"]
    before = set(entries(rag_server))
    monkeypatch.setenv(API_KEY_VARIABLE, "not-the-key-of-anybody-here")
    assert main(words) == 1
    assert capsys.readouterr().err.count("error: ") == 1
    monkeypatch.setenv(API_KEY_VARIABLE, rag_server.keys["operator"])
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["warmed"] == 1
    new = set(entries(rag_server)) - before
    assert len(new) >= 1
    assert {row["tenant"] for key, row in entries(rag_server).items() if key in new} == {""}


def test_a_damaged_file_is_found_and_removed(rag_server: Any, built: list[str]) -> None:
    (file,) = (rag_server.folder / "kv").rglob(f"{built[0]}*.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    report = order(rag_server, "verify")
    assert report["damaged_removed"] == {"memory": [], "disk": [built[0]]}
    assert not file.exists()
    assert set(entries(rag_server, key=built[0])[built[0]]["bytes"]) == {"memory"}


def test_the_command_line_reaches_a_server(
    rag_server: Any,
    built: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(ADMIN_API_KEY_VARIABLE, raising=False)

    def run(*words: str, code: int = 0, variable: str = API_KEY_VARIABLE) -> str:
        monkeypatch.setenv(variable, rag_server.keys["operator"])
        assert main(["cache", *words, "--url", rag_server.url]) == code
        printed = capsys.readouterr()
        return printed.err if code else printed.out

    assert [tier["name"] for tier in json.loads(run("stats", "--json"))["tiers"]] == [
        "memory",
        "disk",
    ]
    key = built[1]
    report = json.loads(run("pin", key, "--ttl", "2h", "--json", variable=ADMIN_API_KEY_VARIABLE))
    assert (report["pinned"], report["ttl_s"]) == ([key], 7200)
    line = next(row for row in run("ls").splitlines() if row.startswith(key[:16]))
    assert "memory+disk" in line
    assert "pinned for 7" in line
    assert json.loads(run("unpin", key, "--json"))["unpinned"] == [key]
    refusal = run("pin", "0" * 64, code=1)
    assert refusal.count("\n") == 1
    assert "no chunk's key begins with" in refusal
    monkeypatch.delenv(API_KEY_VARIABLE, raising=False)
    assert main(["cache", "ls", "--url", rag_server.url]) == 1
    refusal = capsys.readouterr().err
    assert refusal.count("\n") == 1
    assert "401" in refusal
