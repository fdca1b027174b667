"""A server without a key, from start to SIGTERM: protected, under load, and stopping with work under way."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
import pytest
from transformers import AutoTokenizer

from rag_eval.benchmarks.route_matrix import MatrixTarget, run_matrix
from rag_pipeline.sglang_plugin.cpu.detect import accelerator_present

pytestmark = pytest.mark.engine

FIND, ASK = "/v1/rag/search", "/v1/rag/chat/completions"


@pytest.fixture(scope="module")
def lone_server(
    tiny_llm: Path,
    make_index: Callable[[Path, dict[str, str]], Path],
    serving: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[str, int, Path]]:
    """URL, process and log of a server of its own: one test ends it."""
    folder = tmp_path_factory.mktemp("lone-server")
    make_index(folder / "index", {"a": "The lighthouse keeper paints the purple door."})
    words: list[str | Path] = [
        sys.executable,
        "-c",
        "import sys; from rag_pipeline.cli import main; sys.exit(main())",
    ]
    words += ["serve", "--model", tiny_llm, "--index", folder / "index", "--store", folder / "kv"]
    words += ["--max-searches", "8", "--max-questions", "2"]
    words += ["--stop-seconds", "2", "--max-body-mb", "1"]
    words += ["--memory", "epicache", "--memory-budget", "256", "--memory-block", "32"]
    words += ["--max-total-tokens", "8192", "--context-length", "4096"]
    log = folder / "log.txt"
    with serving(
        words, log, ready=lambda url: "Ready:" in log.read_text(errors="replace")
    ) as found:
        yield *found, log


def client(url: str) -> httpx.Client:
    return httpx.Client(base_url=url, trust_env=False, timeout=300)


@contextmanager
def scheduler_halted(pid: int) -> Iterator[None]:
    """The scheduler of a server says nothing until the block ends."""
    scheduler = max(
        psutil.Process(pid).children(recursive=True), key=lambda child: child.memory_info().rss
    )
    scheduler.suspend()
    try:
        yield
    finally:
        scheduler.resume()


def test_health_is_known_before_anybody_asked_for_it(lone_server: Any) -> None:
    # The first thing that a server gets may be load: its scheduler then says nothing for seconds.
    url, pid, _ = lone_server
    with scheduler_halted(pid), client(url) as asking:
        answer = asking.get("/v1/rag/health")
    assert answer.status_code == 200
    assert answer.json()["activation"]["active"]


def test_an_engine_on_the_same_cores_gives_way_to_the_http_process(lone_server: Any) -> None:
    server = psutil.Process(lone_server[1])
    scheduler = max(server.children(recursive=True), key=lambda child: child.memory_info().rss)
    behind = min(19, server.nice() + (0 if accelerator_present() else 5))
    assert scheduler.nice() == behind
    # Its threads compute, and Linux has a priority for each; those that write chunk KV give way to these.
    writing = min(19, behind + 10)
    found = []
    for thread in scheduler.threads():
        with suppress(ProcessLookupError):
            found.append(os.getpriority(os.PRIO_PROCESS, thread.id))
    assert set(found) <= {behind, writing}
    assert found.count(writing) <= 2


def test_the_route_matrix_of_a_server_without_a_key(lone_server: Any) -> None:
    async def run() -> Any:
        async with httpx.AsyncClient(trust_env=False, timeout=120) as asking:
            return await run_matrix(asking, MatrixTarget(url=lone_server[0]), at_once=8)

    report = asyncio.run(run())
    assert report.failed == 0, report.to_json()


def test_a_stock_route_has_a_limit_of_its_body(lone_server: Any) -> None:
    with client(lone_server[0]) as asking:
        for content in (b"x" * (2 << 20), (b"x" * (1 << 16) for _ in range(40))):
            headers = {"content-type": "application/json"}
            large = asking.post("/generate", content=content, headers=headers)
            assert large.status_code == 413


def test_health_is_answered_while_searches_are_refused_and_waiting(lone_server: Any) -> None:
    url, _, log = lone_server
    callers, enough = 100, threading.Event()
    answers: list[httpx.Response] = []

    def search(_: int) -> None:
        with client(url) as asking:
            while not enough.is_set():
                answers.append(asking.post(FIND, json={"query": "Who paints the door?"}))

    deadline = time.monotonic() + 240
    with ThreadPoolExecutor(callers) as pool, client(url) as asking:
        searches = [pool.submit(search, number) for number in range(callers)]
        try:
            # Nobody stops to search before health was asked while some wait and others are refused.
            for _ in range(3):
                before = len(answers)
                while {found.status_code for found in answers[before:]} < {200, 503}:
                    assert time.monotonic() < deadline, {found.status_code for found in answers}
                    assert asking.get("/v1/rag/health").status_code == 200
                    assert asking.get("/ready").status_code == 200
        finally:
            enough.set()
        for ended in searches:
            ended.result()
    assert {found.status_code for found in answers} == {200, 503}
    for refused in (found for found in answers if found.status_code == 503):
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["code"] == 503
    assert '"route": "/v1/rag/search", "status": 503' in log.read_text()


QUESTION = {"messages": [{"role": "user", "content": "Who paints the door?"}], "max_tokens": 1}


def test_a_question_that_is_still_being_sent_takes_no_place(lone_server: Any) -> None:
    url, _, _ = lone_server
    place = urlsplit(url)
    with ExitStack() as stack:
        for _ in range(4):
            raw = stack.enter_context(
                socket.create_connection((place.hostname, place.port), timeout=60)
            )
            head = f"POST {ASK} HTTP/1.1\r\nHost: {place.netloc}\r\nContent-Length: 90\r\n\r\n{{"
            raw.sendall(head.encode())
        with client(url) as asking:
            for _ in range(3):
                assert asking.post(ASK, json=QUESTION).status_code == 200


def test_one_question_too_many_is_refused_without_a_search(lone_server: Any) -> None:
    url, pid, _ = lone_server
    long = {**QUESTION, "max_tokens": 3000, "stream": True}
    with client(url) as asking:
        with ExitStack() as stack:
            pieces = []  # held: an iterator that is collected closes its connection
            for _ in range(2):
                answer = stack.enter_context(asking.stream("POST", ASK, json=long))
                pieces.append(answer.iter_lines())
                assert next(pieces[-1]).startswith("data: ")
            stack.enter_context(scheduler_halted(pid))  # neither ends meanwhile
            refused = asking.post(ASK, json=QUESTION)
            assert refused.status_code == 503
            assert "questions" in refused.json()["error"]["message"]
            assert int(refused.headers["retry-after"]) >= 1
            assert asking.post(FIND, json={"query": "door"}).status_code == 200
            bodies = [json.dumps(QUESTION)] * 3
            assert _refusals_on_one_connection(url, bodies) == [(503, False)] * 3
            # A body that is not worth reading costs its connection.
            assert _refusals_on_one_connection(url, [" " * (128 << 10)]) == [(503, True)]
        # The two have gone, and their places with them.
        for _ in range(100):
            if (found := asking.post(ASK, json=QUESTION)).status_code == 200:
                break
            time.sleep(0.1)
        assert found.status_code == 200


def _refusals_on_one_connection(url: str, bodies: list[str]) -> list[tuple[int, bool]]:
    """Status of each, and whether the server closes behind it; the first half of a body comes by itself."""
    place = urlsplit(url)
    raw = http.client.HTTPConnection(place.hostname or "", place.port, timeout=60)
    seen: list[tuple[int, bool]] = []
    ports: set[int] = set()
    with closing(raw):
        for body in bodies:
            raw.putrequest("POST", ASK)
            raw.putheader("Content-Length", str(len(body)))
            raw.endheaders(body[: len(body) // 2].encode())
            assert raw.sock is not None
            ports.add(raw.sock.getsockname()[1])
            with suppress(OSError):  # it may have closed by now
                raw.send(body[len(body) // 2 :].encode())
            answer = raw.getresponse()
            assert json.loads(answer.read())["error"]["code"] == answer.status
            seen.append((answer.status, answer.will_close))
    assert len(ports) == 1  # http.client connects anew, unasked, where the server has closed
    return seen


def conversation(messages: int) -> list[dict[str, str]]:
    """So many messages of about twenty tokens, and a question."""
    said = [
        {"role": ("user", "assistant")[n % 2], "content": f"Note {n}: the tower was of blue stone."}
        for n in range(messages)
    ]
    return [*said, {"role": "user", "content": "Of what was the tower?"}]


def test_a_chat_whose_memory_is_off_is_answered_as_by_stock_sglang(
    lone_server: Any, tiny_llm: Path
) -> None:
    """Tokens and log-probabilities are those of SGLang's own route, given the tokens of the whole conversation."""
    url, messages = lone_server[0], conversation(40)
    ids = AutoTokenizer.from_pretrained(tiny_llm).apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    sampling = {"temperature": 0, "max_new_tokens": 6, "ignore_eos": True}
    whole = {"input_ids": ids, "sampling_params": sampling, "return_logprob": True}
    chat = {"model": "default", "messages": messages, "temperature": 0, "max_tokens": 6}
    chat |= {"ignore_eos": True, "return_meta_info": True}
    numbers = {"logprobs": True, "top_logprobs": 4, "memory": "off"}
    with client(url) as asking:
        asking.post("/flush_cache").raise_for_status()
        stock = asking.post("/generate", json=whole | {"top_logprobs_num": 4}).json()["meta_info"]
        asking.post("/flush_cache").raise_for_status()
        off = asking.post("/v1/chat/completions", json=chat | numbers).json()
        on = asking.post("/v1/chat/completions", json=chat).json()
    choice = off["choices"][0]
    assert off["usage"]["prompt_tokens"] == stock["prompt_tokens"] == len(ids) > 600
    assert "memory" not in choice["meta_info"].get("rag_fusion", {})
    told = choice["logprobs"]["content"]
    assert [one["logprob"] for one in told] == [one[0] for one in stock["output_token_logprobs"]]
    assert [[top["logprob"] for top in one["top_logprobs"]] for one in told] == [
        [top[0] for top in tops] for tops in stock["output_top_logprobs"]
    ]
    # Off is not what this server does by itself.
    assert on["usage"]["prompt_tokens"] < len(ids)
    assert on["choices"][0]["meta_info"]["rag_fusion"]["memory"]["loaded"] == 128


def begin_records(url: str) -> None:
    """Ask about a long conversation, and leave while its records are being made."""
    body = {"model": "default", "max_tokens": 2, "messages": conversation(120)}
    with client(url) as asking:
        before = asking.get("/v1/rag/cache").json()["memory"]
        with pytest.raises(httpx.ReadTimeout):
            asking.post("/v1/chat/completions", json=body, timeout=1)
        memory = asking.get("/v1/rag/cache").json()["memory"]
    assert memory["memories"] == 1
    assert memory["answers"] == before["answers"]  # the answer waits for its record


def test_sigterm_takes_no_more_gives_up_on_time_and_leaves_nothing(
    lone_server: Any, exit_code: Callable[[int], int]
) -> None:
    url, pid, log = lone_server
    family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    body = {
        "messages": [{"role": "user", "content": "Who paints the door?"}],
        "max_tokens": 3000,
        "stream": True,
    }
    with (
        client(url) as asking,
        client(url) as late,
        asking.stream("POST", ASK, json=body) as answer,
    ):
        pieces = answer.iter_lines()
        assert next(pieces).startswith("data: ")
        begin_records(url)
        for process in family:  # as a supervisor does, whichever comes first
            process.send_signal(signal.SIGTERM)
        refused = late.get("/v1/rag/health")
        while refused.status_code == 200:
            refused = late.get("/v1/rag/health")
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) > 1
        last = [line for line in pieces if line][-2:]
    # Three thousand tokens take longer than two seconds: the client is told, not cut off.
    assert '"code": 503' in last[0]
    assert last[1] == "data: [DONE]"
    gone, alive = psutil.wait_procs(family, timeout=120)
    assert not alive
    assert len(gone) == len(family)
    assert exit_code(pid) == 0
    assert "Traceback" not in log.read_text(errors="replace")
    assert not list((log.parent / "kv").rglob("*.tmp*"))
