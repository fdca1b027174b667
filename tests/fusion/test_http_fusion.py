"""Fusion over HTTP: one real server process with a tiny random model, reached as any client reaches it."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from chunk_cache import ChunkKey, ChunkKV, KVContext, StoreFolder
from rag_pipeline import EngineError, ServerBackend
from rag_pipeline.generation import fusion_report, usage_from_meta
from rag_pipeline.sglang_plugin import FUSION_VARIABLE, FusionConfig, FusionRequest, activation_of
from rag_pipeline.types import GenerationRequest, SamplingOptions, Span

pytestmark = pytest.mark.engine

BYTES = 256
CHAT = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
SYSTEM = "Answer from the passages."
PASSAGES = [
    "The lighthouse of Port Ellery was painted green in 1931 by its keeper, who liked the colour. ",
    "The bridge over the Tarn has seven arches of red stone and a toll house at its northern end. ",
    "In the mill of Aldermoor the wheel is older than the walls, which burned down more than once. ",
]
QUESTION = "Which of these buildings is the oldest?"


def write_tokenizer(folder: Path) -> None:
    """One token a byte: ids of a text do not depend on what stands around it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    assert len(alphabet) == BYTES
    vocabulary = {"<s>": 0, "</s>": 1} | {c: i + 2 for i, c in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = CHAT
    fast.save_pretrained(folder)


@pytest.fixture(scope="module")
def model(tiny_model) -> Path:
    folder = tiny_model("llama", "llama-bytes", vocab_size=BYTES + 8)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def encode(model: Path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    return lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]


def pinned_store(path: Path) -> int:
    """A chunk folder with one pinned record of some other model; returns its bytes in memory."""
    context = KVContext(
        model_fingerprint="other", dtype="float32", kv_dtype="float32", rope="{}", prefix_digest="-"
    )
    record = ChunkKV(
        key=ChunkKey.of(context, range(70)),
        token_ids=torch.arange(70, dtype=torch.int32).numpy(),
        base_position=3,
        k=torch.randn(2, 70, 2, 16),
        v=torch.randn(2, 70, 2, 16),
    )
    folder = StoreFolder(path, create=True)
    folder.put(record)
    folder.pin(record.key)
    return record.num_bytes


@pytest.fixture(scope="module")
def server(
    model: Path, sglang_server: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("server")
    pinned_bytes = pinned_store(folder / "kv")
    log = folder / "log.txt"
    variables = {FUSION_VARIABLE: FusionConfig(store_dir=str(folder / "kv")).to_env()}
    options = {"dtype": "float32", "max_total_tokens": 4096, "random_seed": 1}
    flags = {"enable_metrics": True, "sleep_on_idle": True}
    with sglang_server(model, log, variables, **options, **flags) as url:
        yield {"url": url, "pinned_bytes": pinned_bytes, "log": log}


class Client:
    """Requests of a test, and the server's counters."""

    def __init__(self, server: dict[str, Any]) -> None:
        self.url: str = server["url"]

    def post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", json=body, timeout=120, trust_env=False)

    def ok(self, path: str, body: dict[str, Any]) -> Any:
        answer = self.post(path, body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def stream(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        """Messages of a stream, which must end with the end mark."""
        url = f"{self.url}{path}"
        with httpx.stream("POST", url, json=body, timeout=120, trust_env=False) as answer:
            assert answer.status_code == 200
            data = [line[5:].strip() for line in answer.iter_lines() if line.startswith("data:")]
        assert data.pop() == "[DONE]"
        return [json.loads(text) for text in data]

    def generate(self, ids: list[int], fusion: FusionRequest | None, **fields: Any) -> Any:
        hints = {} if fusion is None else {"kv_hints": fusion.to_kv_hints()}
        sampling = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
        body = {"input_ids": ids, "sampling_params": sampling, "return_logprob": True}
        return self.ok("/generate", body | hints | fields)

    def flush(self) -> None:
        """Empty the radix tree; it refuses while anything runs."""
        deadline = time.monotonic() + 60
        while self.post("/flush_cache", {}).status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.1)

    def metrics(self) -> dict[str, float]:
        """Our samples of ``/metrics``, by name and kind."""
        text = httpx.get(f"{self.url}/metrics", timeout=30, trust_env=False).text
        found: dict[str, float] = {}
        for line in text.splitlines():
            match = re.match(r"rag_fusion:(\w+)\{(.*)\} (\S+)$", line)
            if match and 'le="' not in match[2]:
                kind = re.search(r'kind="(\w+)"', match[2])
                name = match[1].removesuffix("_total")
                found[f"{name}.{kind[1]}" if kind else name] = float(match[3])
        return found

    def state(self) -> dict[str, Any]:
        info = httpx.get(f"{self.url}/server_info", timeout=30, trust_env=False).json()
        return info["internal_states"][0]["rag_fusion"]


@pytest.fixture(scope="module")
def client(server) -> Client:
    return Client(server)


@pytest.fixture(scope="module")
def layout(encode):
    """Ids and spans of ``[system][passages in reverse][question]``, and the passages' prompts for building."""
    system, question = encode(SYSTEM + "\n"), encode("\n" + QUESTION)
    ids, spans = list(system), []
    for text in reversed(PASSAGES):
        chunk = encode(text)
        spans.append((len(ids), len(ids) + len(chunk)))
        ids += chunk
    builds = [(system + encode(t), (len(system), len(system) + len(encode(t)))) for t in PASSAGES]
    return {"ids": ids + question, "spans": tuple(spans), "builds": builds, "system": len(system)}


@pytest.fixture(scope="module")
def built(client: Client, layout) -> list[Any]:
    """Reports of the requests that stored the passages, sent to ``/generate`` with ``kv_hints``."""
    reports = []
    for ids, span in layout["builds"]:
        fusion = FusionRequest(mode="build", spans=(span,), prefix_len=span[0])
        reports.append(client.generate(ids, fusion)["meta_info"]["rag_fusion"])
    return reports


def test_server_info_shows_the_activation_and_the_pinned_chunk(server, client: Client):
    facts = activation_of(server["url"])
    assert facts.active
    assert facts.unapplied == ()
    assert facts.attention_backend == "rag_cpu"
    assert (facts.fusion_on, facts.fusion_off_reason) == (True, "")
    assert facts.self_check.startswith("passed: rotation")
    state = client.state()
    assert state["on"]
    assert state["self_check"].startswith("passed: rotation")
    assert state["counts"]["disk.loaded"] == 1
    assert state["store"]["pinned_bytes_now"] == server["pinned_bytes"]


def test_generate_builds_fuses_and_leaves_alone(client: Client, layout, built):
    assert [report["built_chunks"] for report in built] == [1, 1, 1]
    ids, spans = layout["ids"], layout["spans"]
    client.flush()
    off = client.generate(ids, FusionRequest(mode="off"))
    assert "rag_fusion" not in off["meta_info"]

    def facts(answer):
        return answer["output_ids"], [e[0] for e in answer["meta_info"]["output_token_logprobs"]]

    client.flush()
    full = client.generate(ids, FusionRequest(spans=spans, prefix_len=spans[0][0], policy="full"))
    report = full["meta_info"]["rag_fusion"]
    # The first chunk stands where it was computed: exact, so never recomputed.
    own = spans[0][1] - spans[0][0]
    assert report["reused_tokens"] == own
    assert report["recomputed_tokens"] == sum(end - start for start, end in spans) - own
    assert facts(full)[0] == facts(off)[0]
    assert facts(full)[1] == pytest.approx(facts(off)[1], abs=1e-3)
    client.flush()
    fusion = FusionRequest(
        spans=spans, prefix_len=spans[0][0], policy="query", ratio=0.5, passage=False
    )
    report = client.generate(ids, fusion)["meta_info"]["rag_fusion"]
    parts = [f"{part}_tokens" for part in ("exact_prefix", "reused", "recomputed", "fresh")]
    assert sum(report[part] for part in parts) == len(ids)
    assert report["reused_tokens"] > 0
    assert report["recomputed_tokens"] > 0
    assert (report["policy"], report["ratio"]) == ("query", 0.5)
    # Behind a fused request the exact one finds the system part and nothing else.
    again = client.generate(ids, FusionRequest(mode="off"))
    assert again["meta_info"]["cached_tokens"] <= layout["system"]
    assert facts(again)[0] == facts(off)[0]


def test_several_samples_and_a_batch_with_hints_for_each(client: Client, layout, built):
    ids, spans = layout["ids"], layout["spans"]
    fuse = FusionRequest(
        spans=spans, prefix_len=spans[0][0], policy="reuse", passage=False
    ).to_kv_hints()
    off = FusionRequest(mode="off").to_kv_hints()
    sampling = {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True}
    client.flush()
    pair = client.ok(
        "/generate",
        {"input_ids": [ids, ids], "sampling_params": sampling, "kv_hints": [fuse, off]},
    )
    assert pair[0]["meta_info"]["rag_fusion"]["reused_tokens"] == sum(e - s for s, e in spans)
    assert "rag_fusion" not in pair[1]["meta_info"]
    client.flush()
    twice = client.ok(
        "/generate",
        {"input_ids": ids, "sampling_params": sampling | {"n": 2}, "kv_hints": fuse},
    )
    assert len(twice) == 2
    assert twice[0]["output_ids"] == twice[1]["output_ids"]


def test_the_report_reaches_the_client_in_a_stream(client: Client, layout, built):
    ids, spans = layout["ids"], layout["spans"]
    client.flush()
    sampling = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
    fusion = FusionRequest(spans=spans, prefix_len=spans[0][0], policy="reuse", passage=False)
    body = {"input_ids": ids, "sampling_params": sampling, "kv_hints": fusion.to_kv_hints()}
    messages = client.stream("/generate", body | {"stream": True})
    reports = [fusion_report(message["meta_info"]) for message in messages]
    assert len(messages) > 1
    assert reports[-1] is not None
    assert reports[-1]["reused_tokens"] == sum(end - start for start, end in spans)
    assert all(report in (None, reports[-1]) for report in reports)


def test_the_server_backend_streams_text_and_usage(client: Client, model: Path, layout, built):
    backend = ServerBackend(client.url)
    backend.check_model(model)
    ids, spans = layout["ids"], layout["spans"]
    client.flush()
    request = GenerationRequest(
        input_ids=tuple(ids),
        sampling=SamplingOptions(max_new_tokens=6),
        spans=tuple(Span(start=start, end=end) for start, end in spans),
        policy="epic",
        ratio=0.25,
    )
    pieces = list(backend.generate(request))
    usage = usage_from_meta(pieces[-1].meta_info, prompt_tokens=len(ids))
    assert usage.reused_tokens > 0
    assert usage.recomputed_tokens > 0
    assert usage.fresh_tokens >= len(ids) - spans[-1][1]
    beyond = (Span(start=4, end=99),)
    bad = GenerationRequest(input_ids=tuple(ids[:9]), spans=beyond, policy="reuse")
    with pytest.raises(
        EngineError, match=r"fusion span \(4, 99\) in a prompt of 9 tokens"
    ) as caught:
        list(backend.generate(bad))
    assert "\n" not in str(caught.value)
    backend.close()


def deltas(client: Client, before: dict[str, float]) -> dict[str, float]:
    after = client.metrics()
    return {name: after[name] - before.get(name, 0) for name in after}


def test_completions_take_custom_params(client: Client, layout, built):
    ids, spans = layout["ids"], layout["spans"]

    def complete(fusion: FusionRequest, **fields: Any) -> Any:
        body = {"model": "m", "prompt": ids, "max_tokens": 6, "temperature": 0, "ignore_eos": True}
        return body | {"custom_params": fusion.to_custom_params()} | fields

    client.flush()
    off = client.ok("/v1/completions", complete(FusionRequest(mode="off")))
    for policy in ("full", "reuse"):
        client.flush()
        before = client.metrics()
        fusion = FusionRequest(spans=spans, prefix_len=spans[0][0], policy=policy, passage=False)
        fused = client.ok("/v1/completions", complete(fusion))
        moved = deltas(client, before)
        assert moved["requests.fused"] == 1
        assert moved["spans.hit"] == 3
        if policy == "full":
            assert fused["choices"][0]["text"] == off["choices"][0]["text"]
            assert moved["tokens.recomputed"] > 0
        else:
            assert moved["tokens.reused"] == sum(end - start for start, end in spans)
    client.flush()
    messages = client.stream("/v1/completions", complete(fusion, stream=True))
    text = "".join(m["choices"][0]["text"] for m in messages if m["choices"])
    assert text == fused["choices"][0]["text"]

    # A chunk of its own, built through this endpoint.
    before = client.metrics()
    new, (start, end) = layout["builds"][0]
    shorter = FusionRequest(mode="build", spans=((start, end - 5),), prefix_len=start)
    client.ok("/v1/completions", complete(shorter, prompt=new[: end - 5]))
    moved = deltas(client, before)
    assert (moved["requests.built"], moved["spans.stored"]) == (1, 1)


def test_chat_takes_custom_params_and_returns_the_report(client: Client, encode):
    system = f"system: {SYSTEM}\n"
    head = len(encode(system + "user: "))
    messages = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": "".join(PASSAGES[::-1]) + QUESTION},
    ]

    def chat(content: list[dict[str, str]], fusion: FusionRequest, **fields: Any) -> dict[str, Any]:
        body = {"model": "m", "messages": content, "max_tokens": 6, "temperature": 0}
        return body | {"custom_params": fusion.to_custom_params(), "ignore_eos": True} | fields

    for passage in PASSAGES:
        span = (head, head + len(encode(passage)))
        build = FusionRequest(mode="build", spans=(span,), prefix_len=head)
        content = [messages[0], {"role": "user", "content": passage}]
        answer = client.ok("/v1/chat/completions", chat(content, build, return_meta_info=True))
        assert answer["choices"][0]["meta_info"]["rag_fusion"]["built_chunks"] == 1
    spans, at = [], head
    for passage in PASSAGES[::-1]:
        spans.append((at, at + len(encode(passage))))
        at = spans[-1][1]
    fusion = FusionRequest(spans=tuple(spans), prefix_len=head, policy="reuse", passage=False)
    client.flush()
    answer = client.ok("/v1/chat/completions", chat(messages, fusion, return_meta_info=True))
    report = answer["choices"][0]["meta_info"]["rag_fusion"]
    assert report["reused_tokens"] == at - head
    assert report["prompt_tokens"] == answer["usage"]["prompt_tokens"]
    client.flush()
    before = client.metrics()
    streamed = client.stream("/v1/chat/completions", chat(messages, fusion, stream=True))
    parts = [m["choices"][0]["delta"].get("content") or "" for m in streamed if m["choices"]]
    assert "".join(parts) == answer["choices"][0]["message"]["content"]
    assert deltas(client, before)["tokens.reused"] == at - head
    # A client that knows nothing of spans: the prompt is scanned for what is stored.
    client.flush()
    before = client.metrics()
    plain = {"model": "m", "messages": messages, "max_tokens": 2}
    client.ok("/v1/chat/completions", plain)
    moved = deltas(client, before)
    assert moved["requests.fused"] == 1
    assert moved["tokens.reused"] + moved["tokens.recomputed"] == at - head
    client.flush()
    before = client.metrics()
    client.ok("/v1/chat/completions", plain | {"custom_params": {"rag_mode": "off"}})
    assert deltas(client, before)["tokens.reused"] == 0


def bad_fields() -> list[tuple[dict[str, Any], str]]:
    return [
        ({"spans": [[3, 5000]]}, "tokens"),
        ({"spans": [[1, 5], [4, 8]]}, "overlap"),
        ({"spans": "all"}, "token positions"),
        ({"mode": "fly"}, "fuse, build, off"),
        ({"policy": "best"}, "query"),
        ({"policy": "query", "ratio": 7}, "between 0 and 1"),
        ({"span": [1, 5]}, "spans"),
    ]


def one_line(answer: httpx.Response) -> str:
    assert answer.status_code == 400, answer.text
    body = answer.json()
    message: str = body.get("message") or body["error"]["message"]
    assert "\n" not in message
    return message


@pytest.mark.parametrize(("fields", "words"), bad_fields())
def test_malformed_fields_are_http_400_in_one_line_on_every_endpoint(
    client: Client, fields: dict[str, Any], words: str
):
    action = {
        "action_id": "a",
        "action_type": "rag.fusion",
        "action_version": "1",
        "payload": fields,
    }
    hints = {"protocol_version": "1", "message_id": "m", "actions": [action]}
    flat = {"custom_params": {f"rag_{name}": value for name, value in fields.items()}}
    ids = list(range(2, 40))
    bodies = [
        ("/generate", {"input_ids": ids, "kv_hints": hints}),
        ("/generate", {"input_ids": [ids, ids], "kv_hints": [None, hints]}),
        ("/generate", {"input_ids": ids, "sampling_params": flat}),
        ("/v1/completions", {"model": "m", "prompt": ids, **flat}),
        ("/v1/completions", {"model": "m", "prompt": ids, "stream": True, **flat}),
        (
            "/v1/chat/completions",
            {"model": "m", "messages": [{"role": "user", "content": "What?"}], **flat},
        ),
    ]
    for path, body in bodies:
        assert words in one_line(client.post(path, body)), path
    # SGLang answers a stream of /generate before it reads the request: the fault is its one message.
    (message,) = client.stream("/generate", bodies[0][1] | {"stream": True})
    assert message["error"]["code"] == 400
    assert words in message["error"]["message"]
    assert httpx.get(f"{client.url}/health", timeout=30, trust_env=False).status_code == 200


def test_after_all_refusals_requests_are_served_as_before(client: Client, layout, built, server):
    ids, spans = layout["ids"], layout["spans"]
    client.flush()
    fusion = FusionRequest(spans=spans, prefix_len=spans[0][0], policy="reuse", passage=False)
    report = client.generate(ids, fusion)["meta_info"]["rag_fusion"]
    assert report["reused_tokens"] == sum(end - start for start, end in spans)
    assert client.state()["on"]
    assert "Scheduler hit an exception" not in server["log"].read_text()


def test_metrics_show_counters_and_histograms_moving(client: Client, layout, built):
    before = client.metrics()
    client.flush()
    spans = layout["spans"]
    fusion = FusionRequest(
        spans=spans, prefix_len=spans[0][0], policy="query", ratio=0.5, passage=False
    )
    report = client.generate(layout["ids"], fusion)["meta_info"]["rag_fusion"]
    missing = FusionRequest(spans=((4, 40),), prefix_len=4, policy="reuse", passage=False)
    client.generate(list(range(2, 60)), missing)
    moved = deltas(client, before)
    for part in ("reused", "recomputed"):
        assert (
            moved[f"tokens.{part}_total" if f"tokens.{part}_total" in moved else f"tokens.{part}"]
            == report[f"{part}_tokens"]
        )
    assert moved["requests.fused"] == 1
    assert moved["fallbacks.miss"] == 1
    assert moved["match_seconds_count"] == 2
    for name in ("plan_seconds", "probe_seconds", "forward_seconds"):
        assert moved[f"{name}_count"] == 1
        assert moved[f"{name}_sum"] > 0
    assert client.metrics()["store_chunks"] == client.state()["store"]["chunks_now"]
