"""Keys and tenants: no answer without a key, and nothing of another tenant."""

from __future__ import annotations

import http.client
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

pytestmark = pytest.mark.engine

FIND = "/v1/rag/search"


@pytest.mark.parametrize("path", ["/v1/rag/health", "/v1/rag/documents", "/v1/rag/jobs/x"])
def test_no_key_no_answer(rag_server: Any, path: str) -> None:
    for tenant in (None, "wrong"):
        headers = {} if tenant is None else {"Authorization": "Bearer nobody-has-this-key"}
        answer = httpx.get(f"{rag_server.url}{path}", headers=headers, trust_env=False)
        assert answer.status_code == 401
    # A host that looks like an open path does not open a closed one.
    place = urlsplit(rag_server.url)
    raw = http.client.HTTPConnection(place.hostname or "", place.port, timeout=30)
    raw.putrequest("GET", path, skip_host=True)
    raw.putheader("Host", "x/health?")
    raw.endheaders()
    assert raw.getresponse().status in (400, 401)
    raw.close()


def test_tenants_see_their_own_documents_only(rag_server: Any, server_secrets: Any) -> None:
    mine, other = server_secrets
    everything = {
        "query": "walrus vault lighthouse turbine water reservoir",
        "k": 64,
        "search": "bm25",
    }
    seen = {
        tenant: rag_server.post(FIND, everything, tenant)
        for tenant in ("operator", "acme", "globex")
    }
    assert mine in seen["acme"].text
    assert other in seen["globex"].text
    for tenant, secret in (
        ("acme", other),
        ("globex", mine),
        ("operator", mine),
        ("operator", other),
    ):
        assert secret not in seen[tenant].text
    for index in ("topics", "plant", "acme "):
        answer = rag_server.post(FIND, {"query": "x", "index": index}, "acme")
        assert answer.status_code in (400, 404)
        assert rag_server.is_one_line(answer)
    for path in ("/server_info", "/flush_cache", "/openapi.json"):
        assert rag_server.post(path, {}, "acme").status_code in (401, 403)


def test_tenants_share_no_kv_whatever_salt_they_send(rag_server: Any) -> None:
    """The same prompt of another tenant is not found in the radix tree, on the stock route either."""
    words = " ".join(f"unusual{n}" for n in range(60))
    salts: list[str | None] = [None, "x", "tenant-guess"]

    def cached(tenant: str, salt: str | None) -> int:
        body: dict[str, Any] = {"text": words, "sampling_params": {"max_new_tokens": 1}}
        if salt is not None:
            body["cache_salt"] = salt
        answer = rag_server.post("/generate", body, tenant)
        assert answer.status_code == 200, answer.text
        return int(answer.json()["meta_info"]["cached_tokens"])

    for salt in salts:
        assert cached("acme", salt) == 0
        assert cached("acme", salt) > 50
    for salt in salts:
        assert cached("globex", salt) == 0
    assert cached("operator", None) == 0
    from rag_pipeline.server import Tenants

    tenants = Tenants.load(
        {"topics": rag_server.folder / "topics"}, rag_server.folder / "tenants.json"
    )
    assert cached("operator", "another") == 0
    assert cached("globex", tenants.salt_of(rag_server.keys["acme"])) == 0


@pytest.fixture
def server_secrets() -> tuple[str, str]:
    return (
        "The purple walrus guards vault seventeen under the old lighthouse of Brenmark.",
        "Turbine nine is cooled with distilled rain water from the northern reservoir.",
    )
