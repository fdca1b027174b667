"""A real server with somebody else's distribution installed: what its entry points offer, asked for over HTTP."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from extension_pages import PAGES, install, read_page

from rag_pipeline.protocol import FusionRequest
from rag_pipeline.sglang_plugin import FUSION_VARIABLE

pytestmark = [pytest.mark.engine, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[3]
SETTINGS = {
    "attention_kernel": "fp64",
    "conversation_memory": "bounded_turns",
    "tier": "shelf",
    "store_dir": "here",
}


@pytest.fixture(scope="module")
def url(model: Path, sglang_server: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    site, folder = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("theirs")
    install([read_page(page) for page in PAGES], site)
    paths = [site, ROOT, ROOT / "kernels", ROOT / "eval"]
    variables = {
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        FUSION_VARIABLE: json.dumps(SETTINGS),
    }
    options = {"dtype": "float32", "max_total_tokens": 4096, "random_seed": 1}
    with sglang_server(model, folder / "log.txt", variables, **options) as address:
        yield address


@pytest.fixture
def ask(url: str) -> Callable[..., httpx.Response]:
    def send(ids: list[int], fusion: FusionRequest) -> httpx.Response:
        body = {
            "input_ids": ids,
            "kv_hints": fusion.to_kv_hints(),
            "sampling_params": {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True},
        }
        return httpx.post(f"{url}/generate", json=body, timeout=120, trust_env=False)

    return send


@pytest.fixture
def state(url: str) -> Callable[[], dict[str, Any]]:
    def read() -> dict[str, Any]:
        info = httpx.get(f"{url}/server_info", timeout=30, trust_env=False).json()
        return info["internal_states"][0]["rag_fusion"]

    return read


@pytest.fixture(autouse=True)
def stored(ask, state, layout) -> None:
    """Store the passages; empty the radix tree."""
    for ids, span in layout["builds"]:
        answer = ask(ids, FusionRequest(mode="build", spans=(span,), prefix_len=span[0]))
        assert answer.status_code == 200, answer.text
    flush(answer.url)


def flush(url: httpx.URL) -> None:
    deadline = time.monotonic() + 60
    while httpx.post(url.join("/flush_cache"), trust_env=False).status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def told(answer: httpx.Response) -> dict[str, Any]:
    assert answer.status_code == 200, answer.text
    return answer.json()["meta_info"]["rag_fusion"]


def test_the_settings_name_what_others_wrote(state) -> None:
    assert state()["on"], state()["off_reason"]
    assert {name: state()["config"][name] for name in SETTINGS} == SETTINGS
    # The self-check has run with their kernel; chunks go to their tier.
    assert state()["self_check"].startswith("passed")
    deadline = time.monotonic() + 30
    while not state()["counts"].get(f"{SETTINGS['tier']}.written"):
        assert time.monotonic() < deadline, state()["counts"]
        time.sleep(0.1)


@pytest.mark.parametrize("policy", ["strided", "value_norm"])
def test_a_policy_and_a_signal(ask, layout, policy: str) -> None:
    fusion = FusionRequest(
        spans=layout["spans"], prefix_len=layout["system"], policy=policy, ratio=0.7
    )
    report = told(ask(layout["ids"], fusion))
    assert (report["policy"], report["fallback"]) == (policy, "")
    assert report["reused_tokens"] > 0
    assert report["recomputed_tokens"] > 0


def test_an_attention_method(ask, layout) -> None:
    fusion = FusionRequest(attention="sink_window:block=16+recent=2", policy="reuse")
    first = told(ask(layout["ids"], fusion))
    assert first["attention"].startswith("sink_window")
    # What it computed is approximate: nobody else finds it. The system part may have come from a build since.
    second = told(ask(layout["ids"], FusionRequest(spans=layout["spans"], policy="full")))
    assert second["exact_prefix_tokens"] in (0, layout["system"])
    assert "attention" not in second


def test_a_conversation_memory(ask, layout) -> None:
    fusion = FusionRequest(
        spans=layout["spans"], prefix_len=layout["system"], policy="reuse", conversation="theirs"
    )
    first = ask(layout["ids"], fusion)
    told(first)
    flush(first.url)
    ids = [*layout["ids"], *first.json()["output_ids"], *layout["ids"][:9]]
    assert told(ask(ids, fusion))["conversation_tokens"] > 0


def test_a_name_that_nobody_offers_is_told_with_those_that_are(ask, layout) -> None:
    answer = ask(layout["ids"], FusionRequest(spans=layout["spans"], policy="no-such"))
    assert answer.status_code == 400
    assert "strided" in answer.text
    assert "value_norm" in answer.text
