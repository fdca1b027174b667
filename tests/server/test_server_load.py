"""The load and abuse run in small: a few seconds of the same mix, on the folder's server."""

from __future__ import annotations

import asyncio
import random
from dataclasses import asdict
from typing import Any

import pytest

from rag_eval.benchmarks.load import main
from rag_eval.benchmarks.load_requests import KINDS, make_request, malformed_requests, refusal_line
from rag_eval.benchmarks.load_run import LoadTarget, run_load


def test_the_mix_has_every_kind_and_is_repeatable() -> None:
    def draw() -> list[Any]:
        rng = random.Random(3)
        return [make_request(rng, number) for number in range(400)]

    first = draw()
    assert {request.kind for request in first} == set(KINDS)
    assert first == draw()
    assert len(malformed_requests()) > 20


def test_one_line_is_told_from_a_page() -> None:
    assert refusal_line(b'{"error": {"message": "no"}}') == "no"
    assert refusal_line(b'{"message": "no"}') == "no"
    assert refusal_line(b'{"error": "Unauthorized"}') == "Unauthorized"
    for page in (b"", b"<html>", b'{"error": {"message": "a\\nb"}}', b'{"detail": 1}', b"[]"):
        assert refusal_line(page) is None


@pytest.mark.parametrize(
    "words", [["--model", "x", "--seconds", "0"], ["--model", "x", "--concurrency", "0"], []]
)
def test_bad_options_are_one_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.engine
def test_the_server_survives_the_mix(rag_server: Any) -> None:
    target = LoadTarget(
        url=rag_server.url,
        operator_key=rag_server.keys["operator"],
        tenants={"acme": rag_server.keys["acme"], "globex": rag_server.keys["globex"]},
        marks={"acme": "Brenmark", "globex": "Turbine nine"},
    )
    report = asyncio.run(run_load(target, seconds=10, concurrency=24, seed=1))
    # One tenant's index is damaged from the start, and health says so to the operator.
    (hurt,) = report.faults
    assert hurt.startswith("health: tenant broken"), asdict(report)
    assert report.requests >= 24
    assert report.at_rest["integrity"][0]["store"] == "ok"
