"""Keys and tenants: no answer without a key, and nothing of another tenant."""

from __future__ import annotations

import asyncio
import http.client
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from rag_eval.benchmarks.route_matrix import MatrixTarget, run_matrix
from rag_pipeline import ServerBackend
from rag_pipeline.protocol import GenerationRequest, SamplingOptions
from rag_pipeline.sglang_plugin.fusion.builds.erased import LOOK_S

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
        {"topics": rag_server.folder / "topics"},
        rag_server.folder / "tenants.json",
        operator_key=rag_server.keys["operator"],
    )
    assert cached("operator", "another") == 0
    acme = tenants.of(rag_server.keys["acme"])
    assert acme is not None
    assert cached("globex", acme.salt) == 0


def test_who_deletes_a_letter_leaves_the_chunks_of_others_in_place(rag_server: Any) -> None:
    """Every text holds the letter; a notice of its deletion is in force for minutes."""
    question = {
        "messages": [{"role": "user", "content": "Who guards the vault, and what does pass do?"}],
        "max_tokens": 2,
        "rag": {"k": 2, "policy": "query"},
    }
    documents = "/v1/rag/documents"

    def reused(tenant: str) -> int:
        rag_server.wait_idle()  # a chunk that the question before had not may be under way
        answer = rag_server.post("/v1/rag/chat/completions", question, tenant)
        assert answer.status_code == 200, answer.text
        details = answer.json()["usage"]["prompt_tokens_details"]
        return int(details["reused_tokens"])

    def warm(tenant: str) -> None:
        deadline = time.monotonic() + 60
        while not reused(tenant):
            rag_server.wait_idle()
            assert time.monotonic() < deadline, f"no chunk of {tenant} is reused"

    with rag_server.client("globex") as globex:

        def upload(name: str, text: bytes) -> None:
            given = {"params": {"index": "plant"}, "files": [("file", (name, text))]}
            answer = globex.post(documents, **given)
            assert answer.status_code == 202, answer.text
            job, deadline = answer.json()["id"], time.monotonic() + 60
            while (state := globex.get(f"/v1/rag/jobs/{job}").json()["state"]) != "done":
                assert state != "failed"
                assert time.monotonic() < deadline
                time.sleep(0.1)

        def delete(name: str) -> None:
            answer = globex.delete(f"{documents}/uploads/{name}", params={"index": "plant"})
            assert answer.status_code == 200, answer.text
            time.sleep(3 * LOOK_S)

        upload("eels.txt", b"A heron eats silver eels by the quiet pond beyond the old water mill.")
        warm("globex")
        delete("eels.txt")
        warm("globex")
        assert reused("globex"), "what was not deleted went too"
        upload("letter.txt", b"e")
        warm("acme")
        warm("globex")
        delete("letter.txt")
    assert not reused("globex"), "what globex deleted stays in its own chunk KV"
    assert reused("acme")


def test_a_damaged_index_stops_its_tenant_only(rag_server: Any) -> None:
    refused = rag_server.post(FIND, {"query": "x"}, "broken")
    assert refused.status_code == 503
    assert rag_server.is_one_line(refused)
    assert "'hurt' cannot be used" in refused.json()["error"]["message"]
    assert str(rag_server.folder) not in refused.text
    assert rag_server.post(FIND, {"query": "vault"}, "acme").status_code == 200
    health = {
        tenant: rag_server.client(tenant).get("/v1/rag/health").json()
        for tenant in ("operator", "acme", "broken")
    }
    assert [health[tenant]["status"] for tenant in health] == ["degraded", "ok", "degraded"]
    assert any("tenant broken, index hurt" in line for line in health["operator"]["problems"])
    assert not health["broken"]["index"]["hurt"]["ok"]


def test_no_figure_of_the_whole_server_reaches_a_tenant(rag_server: Any) -> None:
    with rag_server.client() as operator, rag_server.client("acme") as acme:
        assert operator.get("/v1/rag/health").json()["cache"]["store"]
        seen = acme.get("/v1/rag/health").json()
        assert seen["cache"] == {}
        assert list(seen["index"]) == ["acme"]
        assert set(seen["engine"]) == {"max_req_input_len", "incremental_streaming_output"}
        for path in ("/metrics", "/server_info", "/v1/loads", "/openapi.json"):
            assert acme.get(path).status_code == 403
    with rag_server.client(None) as nobody:
        assert nobody.get("/metrics").status_code == 401
        assert nobody.get("/health").status_code == 200
        assert (
            nobody.get("/v1/models", headers=[("Authorization", b"Bearer \xe9")]).status_code == 401
        )


def test_a_tenants_key_is_enough_for_this_projects_own_client(rag_server: Any) -> None:
    backends = [
        ServerBackend(rag_server.url, api_key=rag_server.keys[who]) for who in ("operator", "acme")
    ]
    limits = [backend.context_length for backend in backends]
    assert limits[0] == limits[1] > 0
    request = GenerationRequest(input_ids=(5, 6), sampling=SamplingOptions(max_new_tokens=4))
    assert list(backends[1].generate(request))
    for backend in backends:
        backend.close()


def test_the_route_matrix_of_a_running_server(rag_server: Any) -> None:
    target = MatrixTarget(
        url=rag_server.url,
        operator_key=rag_server.keys["operator"],
        tenant_key=rag_server.keys["acme"],
    )

    async def run() -> Any:
        async with httpx.AsyncClient(trust_env=False, timeout=120) as client:
            return await run_matrix(client, target, at_once=8)

    report = asyncio.run(run())
    assert report.failed == 0, report.to_json()
    assert report.tried > 1500


def test_who_holds_a_key_does_not_read_it_in_the_servers_facts(rag_server: Any) -> None:
    with rag_server.client() as client:
        assert rag_server.keys["operator"] not in client.get("/server_info").text
    with Path(f"/proc/{rag_server.pid}/cmdline").open() as words:
        assert rag_server.keys["operator"] not in words.read()


@pytest.fixture
def server_secrets() -> tuple[str, str]:
    return (
        "The purple walrus guards vault seventeen under the old lighthouse of Brenmark.",
        "Turbine nine is cooled with distilled rain water from the northern reservoir.",
    )
