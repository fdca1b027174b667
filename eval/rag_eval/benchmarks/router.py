"""Two SGLang servers behind a router: where requests about the same chunks go, and what that saves.

Chunk KV lives in one server's memory. A router that spreads a chunk's requests over its servers has
every server compute it. This benchmark starts two servers with the plugin and each given router with
each of its policies, sends the same kind of workload, and reports per server which topics came and how
many tokens of chunks were loaded instead of computed. It counts tokens, not time.

``python -m rag_eval.benchmarks.router --router smg --router sglang-router --json``

A topic is a pool of chunks; a request takes some of them in random order, and names the topic in the
header ``X-SMG-Routing-Key``. Requests go one at a time, and background builds are waited for, so the
counts do not depend on the machine.

Behind a router that drops ``kv_hints`` a server learns of no spans and stores nothing. There each
server is given every chunk's KV ahead, directly, and finds the chunks in the prompts by itself.
"""

from __future__ import annotations

import dataclasses
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx

from rag_eval.arguments import parse_config, require_at_least
from rag_eval.benchmarks.frame import benchmark_parser, keep_measured, versions_of
from rag_eval.benchmarks.local_server import local_server
from rag_eval.benchmarks.router_process import (
    HINTS,
    ROUTING_KEY,
    RouterProgram,
    counters,
    passes,
    running_router,
)
from rag_eval.benchmarks.tiny_model import write_tiny_model
from rag_eval.command import Progress, no_progress, print_report, refusals_in_one_line, say_progress
from rag_eval.errors import EvalError
from rag_pipeline.protocol import FusionRequest, build_requests

PREFIX_TOKENS = 24
QUESTION_TOKENS = 12
_VOCABULARY = 49_152
_POLICIES = ("round_robin", "cache_aware", "manual", "consistent_hashing")
_SETTLE_S = 60.0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RouterBenchConfig:
    """Shape of the workload."""

    topics: int = 10
    """Pools of chunks."""
    pool: int = 6
    """Chunks of a topic."""
    chunks: int = 4
    """Chunks of it that a request takes."""
    chunk_tokens: int = 96
    """Length of a chunk in tokens."""
    requests: int = 6
    """Requests per topic."""
    policy: str = "query:0.15"
    """Fusion policy of every request."""
    seed: int = 0
    """Chooses chunks and order."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "topics", "pool", "chunks", "chunk_tokens", "requests")
        if self.chunks > self.pool:
            raise EvalError(f"chunks is {self.chunks}; a topic has only {self.pool} to choose from")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TopicRequest:
    """One request: the topic it names, its tokens, and the spans of its chunks."""

    topic: str
    input_ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]


def make_requests(config: RouterBenchConfig, salt: str) -> list[TopicRequest]:
    """Draw the requests of one run; another `salt` gives chunks that no server has seen."""
    rng = random.Random(f"router/{config.seed}/{salt}")

    def draw(length: int) -> tuple[int, ...]:
        # Past the control tokens, which a request may not hold.
        return tuple(rng.randrange(1000, _VOCABULARY) for _ in range(length))

    prefix = draw(PREFIX_TOKENS)
    made = []
    for number in range(config.topics):
        pool = [draw(config.chunk_tokens) for _ in range(config.pool)]
        for _ in range(config.requests):
            ids, spans = list(prefix), []
            for chunk in rng.sample(pool, config.chunks):
                spans.append((len(ids), len(ids) + len(chunk)))
                ids += chunk
            ids += draw(QUESTION_TOKENS)
            made.append(
                TopicRequest(topic=f"topic-{number}", input_ids=tuple(ids), spans=tuple(spans))
            )
    rng.shuffle(made)
    return made


def run(
    config: RouterBenchConfig,
    programs: Sequence[RouterProgram],
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Measure every router with every policy it offers, on the same two servers.

    Returns
    -------
    dict
        ``routers{NAME{version, passes, warmed, policies{NAME{servers, split_topics, ...}}}}``, ``config``,
        ``versions``.
    """
    report: dict[str, Any] = {}
    with two_servers(progress) as urls, keep_measured(lambda: report) as end:
        for program in programs:
            entry: dict[str, Any] = {"version": program.version, "policies": {}}
            for policy in (name for name in _POLICIES if name in program.policies):
                progress(f"{program.name} {program.version}: {policy}")
                with running_router(program, policy, urls) as address:
                    entry.setdefault("passes", passes(address))
                    requests = make_requests(config, f"{program.name}/{policy}")
                    if not entry["passes"][HINTS]:
                        warm(requests, urls)
                    entry["policies"][policy] = send(config, requests, address, urls)
            entry["warmed"] = not entry["passes"][HINTS]
            report[program.name] = entry
    return {
        "benchmark": "router",
        "routers": report,
        "config": dataclasses.asdict(config),
        "versions": versions_of("rag-pipeline", "sglang", "torch"),
    } | end.report()


@contextmanager
def two_servers(progress: Progress) -> Iterator[list[str]]:
    """Start two servers with the plugin on a tiny model of random weights; yields their URLs.

    They match automatically: a router that drops the fields of a request drops its asking too.
    """
    from rag_pipeline.models import resolve_llm
    from rag_pipeline.sglang_plugin import FUSION_VARIABLE, FusionConfig

    environment = {FUSION_VARIABLE: FusionConfig(automatic=True).to_env()}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rag-bench-")))
        write_tiny_model(folder, resolve_llm("smollm2-135m").path, tied=False)
        settings = {"max_total_tokens": 16384, "enable_metrics": True}
        urls = []
        for number in (1, 2):
            progress(f"starting server {number} of 2")
            urls.append(stack.enter_context(local_server(folder, settings, environment)).url)
        yield urls


def warm(requests: Sequence[TopicRequest], urls: Sequence[str]) -> None:
    """Have each server compute and keep the KV of every chunk, behind the shared prefix."""
    prefix = requests[0].input_ids[: requests[0].spans[0][0]]
    chunks = {request.input_ids[start:end] for request in requests for start, end in request.spans}
    for url in urls:
        for chunk in sorted(chunks):
            for fusion in build_requests(len(prefix), len(chunk)):
                _generate(url, [*prefix, *chunk], fusion)


def _generate(
    address: str, input_ids: Sequence[int], fusion: FusionRequest, **headers: str
) -> None:
    answer = httpx.post(
        f"{address}/generate",
        json={
            "input_ids": list(input_ids),
            "sampling_params": {"temperature": 0.0, "max_new_tokens": 1, "ignore_eos": True},
            "kv_hints": fusion.to_kv_hints(),
        },
        headers=headers,
        timeout=120,
        trust_env=False,
    )
    answer.raise_for_status()


def send(
    config: RouterBenchConfig, requests: Sequence[TopicRequest], address: str, urls: Sequence[str]
) -> dict[str, Any]:
    """Send the requests one by one and count, on each server, what became of them."""
    before = [counters(url) for url in urls]
    seen = [value["requests"] for value in before]
    topics: list[set[str]] = [set() for _ in urls]
    for request in requests:
        fusion = FusionRequest(
            spans=request.spans, prefix_len=request.spans[0][0], policy=config.policy
        )
        _generate(address, request.input_ids, fusion, **{ROUTING_KEY: request.topic})
        now = _settled(urls, sum(seen) + 1)
        for index, count in enumerate(now):
            if count > seen[index]:
                topics[index].add(request.topic)
        seen = now
    servers = []
    for url, start, names in zip(urls, before, topics, strict=True):
        end = counters(url)
        grown = {name: int(end[name] - start.get(name, 0)) for name in end}
        servers.append({**grown, "topics": len(names)})
    return _summary(config, servers, topics)


def _settled(urls: Sequence[str], requests: float) -> list[float]:
    """Wait until the servers counted the request and no background build is open."""
    deadline = time.monotonic() + _SETTLE_S
    quiet = 0
    while time.monotonic() < deadline:
        found = [counters(url) for url in urls]
        open_builds = sum(value["builds_open"] for value in found)
        counts = [value["requests"] for value in found]
        quiet = quiet + 1 if open_builds == 0 and sum(counts) == requests else 0
        if quiet == 2:
            return counts
        time.sleep(0.1)
    raise EvalError(
        f"the servers did not settle within {_SETTLE_S:.0f} s: {sum(counts):.0f} requests counted, "
        f"{requests:.0f} sent, {open_builds:.0f} background builds open"
    )


def _summary(
    config: RouterBenchConfig, servers: list[dict[str, Any]], topics: list[set[str]]
) -> dict[str, Any]:
    total = config.topics * config.requests * config.chunks * config.chunk_tokens
    loaded = sum(server["reused"] + server["recomputed"] for server in servers)
    return {
        "servers": [
            {name: value for name, value in server.items() if name != "builds_open"}
            for server in servers
        ],
        "split_topics": len(set.intersection(*topics)),
        "chunks_computed_for_the_store": sum(server["stored"] for server in servers),
        "distinct_chunks": config.topics * config.pool,
        "chunk_tokens_loaded": loaded,
        "chunk_tokens_sent": total,
        "loaded_share": round(loaded / total, 4),
        "requests_spread": statistics.pstdev(server["requests"] for server in servers),
    }


def table(report: dict[str, Any]) -> str:
    """The report as text, a line per router and per policy of it."""
    lines = []
    for name, entry in report["routers"].items():
        passed, warmed = entry["passes"], entry["warmed"]
        lines.append(f"{name} {entry['version']}, forwards {passed}, warmed {warmed}")
        for policy, found in entry["policies"].items():
            spread = " + ".join(str(server["requests"]) for server in found["servers"])
            lines.append(
                f"  {policy:20} requests {spread:9} topics on both {found['split_topics']:3}  "
                f"chunk tokens loaded {100 * found['loaded_share']:5.1f}%  "
                f"chunks computed {found['chunks_computed_for_the_store']} "
                f"of {found['distinct_chunks']} distinct"
            )
    return "\n".join(lines)


@refusals_in_one_line
def main(words: Sequence[str] | None = None) -> int:
    """Run from a shell."""
    parser = benchmark_parser("python -m rag_eval.benchmarks.router", __doc__)
    parser.add_argument(
        "--router",
        action="append",
        required=True,
        metavar="PROGRAM",
        help="smg or sglang-router, a name or a path; may be repeated",
    )
    config, given = parse_config(parser, RouterBenchConfig, words)
    try:
        programs = [RouterProgram.find(name) for name in given.router]
    except EvalError as error:
        parser.error(str(error))
    return print_report(run(config, programs, say_progress), table, as_json=given.json)


if __name__ == "__main__":
    sys.exit(main())
