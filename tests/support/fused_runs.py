"""A prompt of moved chunks, answered with several policies by one of several ranks."""

from __future__ import annotations

from typing import Any

from fusion_helpers import CHUNK, CHUNKS, PREFIX_IDS, lay_out, logprobs, report, tokens


def fused_case() -> dict[str, Any]:
    """What :func:`fused` asks, for the file that ranks read."""
    ids, spans = lay_out(CHUNKS[::-1], tokens(9, 2))
    return {"prefix": PREFIX_IDS, "chunks": CHUNKS, "ids": ids, "spans": spans}


def fused(engine: Any, case: dict[str, Any]) -> list[dict[str, Any]]:
    """Plain prefill of a prompt of moved chunks, then with each policy what is reused and said."""
    assert engine.runtime.is_on, engine.runtime.off_reason
    for chunk in case["chunks"]:
        engine.build(case["prefix"], chunk)
    told = []
    for policy in ("off", "full", "query:1.0", "query:0.5", "reuse"):
        engine.flush()
        given = {"spans": case["spans"], "policy": policy}
        req = engine.ask(case["ids"], 4, fusion={"mode": "off"} if policy == "off" else given)
        said = report(req) if policy != "off" else {}
        told.append(
            {
                "policy": policy,
                "fallback": said.get("fallback", ""),
                "reused": said.get("reused_tokens", 0),
                "logprobs": logprobs(req),
            }
        )
    return told


def check_fused(runs: list[dict[str, Any]]) -> None:
    """All rows computed say what plain prefill says; none computed says something else; half of them lies between."""
    plain, *exact, partly, reused = runs
    assert [run["fallback"] for run in runs] == [""] * 5
    for run in exact:
        pairs = zip(run["logprobs"], plain["logprobs"], strict=True)
        assert max(abs(a - b) for a, b in pairs) < 5e-4
    assert 0 < partly["reused"] < reused["reused"] == len(CHUNKS) * CHUNK
    assert abs(reused["logprobs"][0] - plain["logprobs"][0]) > 1e-3
