"""The simulator of the tiers: its traces, its clockwork by hand, its bounds, and its command."""

from __future__ import annotations

import json
import random
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from chunk_cache.eviction import WaitingJob, create_eviction
from chunk_cache.eviction.lookahead import LookAheadPolicy
from rag_eval.errors import EvalError
from rag_eval.simulator import Regime, Trace, TraceJob, measure, read_trace, zipf_trace
from rag_eval.simulator.command import main
from rag_eval.simulator.regimes import POLICIES, make_player
from rag_eval.simulator.replay import Replay
from rag_eval.simulator.two_tiers import DISK, MEMORY, TwoTiers, unbounded_hits
from rag_pipeline.cli import main as rag_pipeline


def write_chats(path: Path, *, chats: int = 60, turns: int = 4, seed: int = 0) -> Path:
    """Conversations in Mooncake's format: block 0 is everybody's, each turn appends two blocks."""
    draw = random.Random(seed)
    rows = []
    block = 1
    for _ in range(chats):
        at, ids = draw.randrange(100_000), [0]
        for _ in range(turns):
            ids = [*ids, block, block + 1]
            block += 2
            rows.append((at, ids))
            at += draw.randrange(20_000, 60_000)
    lines = [
        json.dumps(
            {
                "timestamp": at,
                "input_length": 512 * len(ids) - 100,
                "output_length": 9,
                "hash_ids": ids,
            }
        )
        for at, ids in sorted(rows)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    return write_chats(tmp_path / "chats.jsonl")


def jobs(*rows: tuple[float, str], tokens: int = 100) -> list[TraceJob]:
    """A job per row: when, and keys of one letter each; a key weighs 10 tokens."""
    return [
        TraceJob(
            arrival_s=at, tokens=tokens, keys=tuple(keys), weights=(10,) * len(keys), session=n
        )
        for n, (at, keys) in enumerate(rows)
    ]


def replay(
    trace: Trace, memory: int, disk: int, label: str, *, load: float = 1.0, speed: float = 10.0
) -> tuple[Replay, TwoTiers]:
    player = make_player(label, trace, memory, disk)
    tiers = TwoTiers(memory, disk, player.policy)
    run = Replay(trace, tiers, load=load, prefetcher=player.prefetcher, disk_speed=speed)
    run.run()
    return run, tiers


# -- traces ----------------------------------------------------------------------------------------


def test_a_trace_in_mooncakes_format(chats: Path) -> None:
    trace = read_trace(chats)
    assert len(trace.jobs) == 240
    assert trace.is_prefix
    assert trace.distinct_tokens == 512 * (1 + 60 * 8)
    first = trace.jobs[0]
    assert first.keys == (0, *first.keys[1:])
    assert first.weights == (512,) * len(first.keys)
    assert first.session == first.keys[1]  # block 0 is everybody's
    assert len({job.session for job in trace.jobs}) == 60
    assert [job.arrival_s for job in trace.jobs] == sorted(job.arrival_s for job in trace.jobs)
    assert len(read_trace(chats, limit=7).jobs) == 7


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("not json", "bad.jsonl:2: no JSON object"),
        ("[1]", "bad.jsonl:2: no JSON object"),
        ('{"timestamp": 1, "input_length": 3}', "bad.jsonl:2: give timestamp"),
        ('{"timestamp": -1, "input_length": 3, "hash_ids": [1]}', "give timestamp"),
        ('{"timestamp": 1, "input_length": 0, "hash_ids": [1]}', "give timestamp"),
        ('{"timestamp": 1, "input_length": 3, "hash_ids": []}', "give timestamp"),
        ('{"timestamp": 1, "input_length": 3, "hash_ids": [[1]]}', "give timestamp"),
        ("", "give at least two at different times"),
    ],
)
def test_a_trace_of_another_form_is_refused_in_one_line(
    line: str, told: str, tmp_path: Path
) -> None:
    good = '{"timestamp": 1, "input_length": 3, "hash_ids": [1]}'
    path = tmp_path / "bad.jsonl"
    path.write_text(f"{good}\n{line}\n")
    with pytest.raises(EvalError, match=told) as caught:
        read_trace(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(EvalError, match="cannot be read"):
        read_trace(tmp_path / "none.jsonl")
    path.write_bytes(b"\xff\xfe\n")
    with pytest.raises(EvalError, match="cannot be read"):
        read_trace(path)


def test_a_generated_trace_follows_its_seed_and_its_law() -> None:
    trace = zipf_trace(400, num_chunks=200, top_k=4, seed=3)
    again = zipf_trace(400, num_chunks=200, top_k=4, seed=3)
    assert trace.jobs == again.jobs
    assert trace.jobs != zipf_trace(400, num_chunks=200, top_k=4, seed=4).jobs
    assert not trace.is_prefix
    asked = [sum(key in job.keys for job in trace.jobs) for key in (0, 20, 150)]
    assert asked[0] > asked[1] > asked[2]
    assert all(len(set(job.keys)) == 4 for job in trace.jobs)
    with pytest.raises(EvalError, match="top_k=9"):
        zipf_trace(10, num_chunks=8, top_k=9)


# -- the clockwork, by hand ------------------------------------------------------------------------


def test_hits_are_where_the_pieces_are_at_admission() -> None:
    trace = Trace(name="t", jobs=jobs((0, "a"), (10, "b"), (20, "a"), (30, "a")), is_prefix=False)
    run, tiers = replay(trace, 10, 10, "lru")
    # a computed; b computed, a demoted; a read from disk, b demoted; a is in memory.
    assert (run.hits.asked, run.hits.memory, run.hits.disk) == (40, 10, 10)
    assert (tiers.place("a"), tiers.place("b")) == (MEMORY, DISK)
    assert (tiers.moves.demoted, tiers.moves.dropped, tiers.moves.fetched) == (20, 0, 0)


def test_behind_a_missing_block_nothing_is_a_hit_in_a_trace_of_prefixes() -> None:
    rows = jobs((0, "ab"), (10, "xb"), (20, "ab"))
    for is_prefix, found in ((True, 20), (False, 30)):
        trace = Trace(name="t", jobs=rows, is_prefix=is_prefix)
        run, _ = replay(trace, 1000, 0, "lru")
        assert run.hits.memory == found
        assert unbounded_hits(trace) == found / 60


def test_the_end_of_a_prompt_leaves_first() -> None:
    trace = Trace(name="t", jobs=jobs((0, "abc"), (10, "abc")), is_prefix=True)
    run, _ = replay(trace, 20, 0, "lru")
    assert run.hits.memory == 20  # a and b are still there


def test_the_queue_grows_with_the_load() -> None:
    rows = jobs(*((float(n), "a") for n in range(50)))
    trace = Trace(name="t", jobs=rows, is_prefix=False)
    waiting = [replay(trace, 10, 0, "lru", load=load)[0].hits.waiting for load in (0.5, 1.0, 2.0)]
    assert waiting[0] == 0
    assert waiting[0] <= waiting[1] < waiting[2]


def test_what_waits_is_fetched_while_the_server_is_busy_as_fast_as_the_disk_reads() -> None:
    # At a load of 2 a job takes 1.6 s, so the last one waits from 4.0 to 6.4 s. Its piece weighs 10 tokens; at a speed
    # of 1 the disk reads 150 tokens in that time, at 0.01 less than 2.
    rows = jobs((0, "a"), (1, "b"), (2, "c"), (3, "d"), (4, "a"))
    trace = Trace(name="t", jobs=rows, is_prefix=False)
    fast, _ = replay(trace, 20, 100, "lookahead", load=2.0, speed=1.0)
    assert (fast.hits.memory, fast.hits.disk) == (10, 0)
    slow, _ = replay(trace, 20, 100, "lookahead", load=2.0, speed=0.01)
    assert (slow.hits.memory, slow.hits.disk) == (0, 10)
    without, tiers = replay(trace, 20, 100, "lookahead-prefetch", load=2.0, speed=1.0)
    assert (without.hits.memory, without.hits.disk, tiers.moves.fetched) == (0, 10, 0)


def test_a_piece_that_is_first_to_leave_is_not_kept_by_fetching_it() -> None:
    policy = LookAheadPolicy(memory_bytes=10, disk_bytes=100, watermark=0.0)
    tiers = TwoTiers(10, 100, policy)
    for key in ("late", "soon"):
        tiers.use(key, 10, key, 0.0)
    policy.note_queue([WaitingJob("1", ("soon",)), WaitingJob("2", ("late",))])
    assert not tiers.fetch("late", 1.0)
    assert (tiers.place("soon"), tiers.place("late")) == (MEMORY, DISK)


def test_a_ttl_drops_what_nobody_used_and_nobody_waits_for() -> None:
    rows = jobs((0, "a"), (1, "b"), (100, "b"), (200, "a"))
    trace = Trace(name="t", jobs=rows, is_prefix=False)
    policy = LookAheadPolicy(memory_bytes=1000, ttl_s=150)
    tiers = TwoTiers(1000, 0, policy, drops_expired=True)
    hits = Replay(trace, tiers, load=1.0, prefetcher=policy, disk_speed=1.0).run()
    assert hits.memory == 10
    assert (tiers.moves.expired, tiers.moves.dropped) == (10, 10)


# -- measuring -------------------------------------------------------------------------------------

LOADED = {"loaded": Regime(memory=0.1, disk=0.6, load=1.3)}


def test_look_ahead_finds_more_in_memory_than_lru_where_requests_wait(chats: Path) -> None:
    report = measure(read_trace(chats), regimes=LOADED)
    assert list(report["regimes"]["loaded"]["policies"]) == list(POLICIES)
    assert report["n"] == 240
    assert report["dram_hits_lookahead_vs_lru"] >= 1.3
    low, high = report["spread"]
    assert low <= report["dram_hits_lookahead_vs_lru"] <= high
    bound = report["trace"]["unbounded_hits"]
    for shares in report["regimes"]["loaded"]["policies"].values():
        assert shares["hits"] == pytest.approx(shares["memory"] + shares["disk"], abs=2e-4)
        assert shares["hits"] <= bound + 1e-4
    assert json.loads(json.dumps(report)) == report


def test_the_same_arguments_give_the_same_numbers(chats: Path) -> None:
    trace = read_trace(chats)
    assert measure(trace, regimes=LOADED) == measure(trace, regimes=LOADED)


def test_with_room_for_all_every_policy_has_all_that_recurs(chats: Path) -> None:
    report = measure(read_trace(chats), regimes={"all": Regime(memory=1.1, disk=0, load=1)})
    for label, shares in report["regimes"]["all"]["policies"].items():
        assert shares["memory"] == report["trace"]["unbounded_hits"], label


def test_without_both_policies_there_is_no_ratio(chats: Path) -> None:
    report = measure(read_trace(chats), regimes=LOADED, policies=["lru"])
    assert report["dram_hits_lookahead_vs_lru"] is None
    assert report["spread"] is None


def test_the_ledger_of_the_engine_and_the_simulator_share_the_policies() -> None:
    trace = zipf_trace(4, num_chunks=4, top_k=1)
    for name in ("lru", "lfu", "fifo", "lookahead", "lookahead:ttl"):
        ours = make_player(name, trace, 10, 10).policy
        assert type(ours) is type(create_eviction(name, memory_bytes=10, disk_bytes=10))


# -- the command -----------------------------------------------------------------------------------


def test_the_command_prints_json(chats: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "simulate",
        "tiers",
        "--trace",
        str(chats),
        "--json",
        "--memory",
        "0.1",
        "--load",
        "1.3",
    ]
    assert rag_pipeline([*words, "--policy", "lru", "--policy", "lookahead", "--disk", "0"]) == 0
    report = json.loads(capsys.readouterr().out)
    (name,) = report["regimes"]
    assert name == "memory 0.1, disk 0, load 1.3"
    assert set(report["regimes"][name]["policies"]) == {"lru", "lookahead"}
    assert report["dram_hits_lookahead_vs_lru"] > 0


def test_the_command_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--trace", "zipf", "--limit", "200", "--regime", "light", "--regime", "loaded"]
    assert main([*words, "--policy", "belady", "--policy", "lru", "--ttl", "60"]) == 0
    shown = capsys.readouterr().out
    assert "zipf-1: 200 requests" in shown
    assert "light, small disk" not in shown
    assert shown.count("belady") == 2


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--trace", "none.jsonl"], "cannot be read"),
        (["--trace", "zipf", "--policy", "mru"], "choose one of lru, lfu, fifo, lookahead, belady"),
        (["--trace", "zipf", "--policy", "lookahead:x"], "allowed: lru, lfu, fifo-birth, ttl"),
        (["--trace", "zipf", "--memory", "0"], "memory and load must be positive"),
        (["--trace", "zipf", "--memory", "nan"], "memory and load must be positive"),
        (["--trace", "zipf", "--load", "0"], "memory and load must be positive"),
        (["--trace", "zipf", "--load", "1", "--regime", "light"], "leave out"),
        (["--trace", "zipf", "--regime", "heavy"], "invalid choice"),
        (["--trace", "zipf", "--limit", "0"], "must be positive"),
        (["--trace", "zipf", "--limit", "1"], "num_jobs=1"),
        ([], "--trace"),
    ],
)
def test_a_mistake_is_one_line(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert rag_pipeline(["simulate", "tiers", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert told in captured.err
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("error: ")


def test_an_interrupted_simulation_prints_what_it_has(
    chats: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    def player(label: str, *given: Any, **options: Any) -> Any:
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(label)
        return make_player(label, *given, **options)

    monkeypatch.setattr(import_module("rag_eval.simulator.measure"), "make_player", player)
    assert main(["--trace", str(chats), "--policy", "lru", "--policy", "fifo", "--json"]) == 130
    said = capsys.readouterr()
    report = json.loads(said.out)
    assert [list(row["policies"]) for row in report["regimes"].values()] == [
        ["lru", "fifo"],
        ["lru"],
    ]
    assert report["interrupted"] is True
    assert said.err == "error: interrupted; what was measured until then is printed\n"
    assert main(["--trace", str(chats), "--policy", "lru"]) == 130
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "error: interrupted; there is no report yet\n")


def test_a_simulation_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert rag_pipeline(["simulate", "weather"]) == 1
    assert capsys.readouterr().err == "error: no simulation 'weather'; choose one of tiers\n"
    assert rag_pipeline(["simulate", "--help"]) == 0
    assert "simulate tiers" in capsys.readouterr().out
