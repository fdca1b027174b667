"""The model gate on a tiny engine: what must be exact, what must fail, and what is kept."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rag_eval import DatasetOptions, EvalError, fidelity
from rag_eval.gate import GateConfig, Thresholds, gate, last_gate, run_gate, save_gate
from rag_eval.gate.exactness import Distance, Exactness
from rag_eval.gate.record import gates_dir, model_identity
from rag_eval.gate.verdict import notes
from rag_eval.runner.modes import PLAIN_REUSE, Mode, parse_modes
from rag_pipeline.cli.doctor import gate_facts
from rag_pipeline.config import HOME_VARIABLE

OPTIONS = DatasetOptions(chunks=3, chunk_tokens=64)
# Random weights follow no instruction: agreement and F1 say nothing, KL and exactness do.
LIMITS = Thresholds(min_agreement=0.0, max_f1_drop=1.0, max_kl_of_reuse=1.5)


class Kept:
    """The suite's session, which a command must not shut down; some modes may be served as others."""

    def __init__(self, session: Any, swap: Any = None) -> None:
        self._session, self._swap = session, swap

    def __getattr__(self, name: str) -> Any:
        return (lambda: None) if name == "close" else getattr(self._session, name)

    def follow_gold(self, prompt: Any, mode: Mode, **options: Any) -> Any:
        mode = self._swap(mode) if self._swap else mode
        return self._session.follow_gold(prompt, mode, **options)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path / "home"))
    return tmp_path / "home"


def config(model: Path, **changes: Any) -> GateConfig:
    given: dict[str, Any] = {
        "model": str(model),
        "policies": "query:0.15,epic:0.15,cacheblend:0.15",
        "examples": 1,
        "exact_prompts": 2,
        "options": OPTIONS,
        "max_new_tokens": 4,
        "gold_tokens": 4,
        "thresholds": LIMITS,
    }
    return GateConfig(**(given | changes))


@pytest.fixture(scope="module")
def result(tiny_session: Any, tiny_path: Path) -> dict[str, Any]:
    """A gate of a sound engine. It comes first: later runs find this one's chunks stored."""
    return run_gate(config(tiny_path), session=tiny_session)


@pytest.mark.engine
def test_a_sound_engine_passes_with_every_check_made(result: dict[str, Any]) -> None:
    failed = [check for check in result["checks"] if not check["passed"]]
    assert failed == []
    assert result["passed"]
    made = {(check["name"], check["policy"]) for check in result["checks"]}
    assert {("no spans", ""), ("off", ""), ("own place", "")} <= made
    for policy in ("query:0.15", "epic:0.15", "cacheblend:0.15"):
        own = {"ratio 1", "isolation", "KL / reuse", "agreement", "f1 drop", "fallbacks"}
        assert {(name, policy) for name in own} <= made
    # fp32: exact means rounding, and reuse is far outside of it.
    assert result["thresholds"]["exact_kl"] == LIMITS.least_kl_fp32
    assert (
        result["fidelity"]["modes"][PLAIN_REUSE]["kl_answer"]
        > 100 * result["thresholds"]["exact_kl"]
    )
    assert result["fidelity"]["n"] == 1
    # Its answers are random, which is said; its exactness is proven all the same.
    (note,) = result["notes"]
    assert "finds none of the planted facts" in note
    json.dumps(result, allow_nan=False)


@pytest.mark.engine
def test_an_engine_that_recomputes_nothing_at_ratio_one_is_caught(
    tiny_session: Any, tiny_path: Path
) -> None:
    def broken(mode: Mode) -> Mode:
        return replace(mode, ratio=0.05) if mode.ratio == 1.0 else mode

    found = run_gate(
        config(tiny_path, policies="query:0.15", exact_prompts=1, seed=5),
        session=Kept(tiny_session, broken),
    )
    assert not found["passed"]
    assert "ratio 1" in found["policies"]["query:0.15"]["failed"]
    (check,) = [check for check in found["checks"] if check["name"] == "ratio 1"]
    assert check["value"] > check["limit"]


@pytest.mark.engine
def test_a_policy_that_the_engine_does_not_serve_fails_alone(
    tiny_session: Any, tiny_path: Path
) -> None:
    from rag_eval.errors import ModeUnavailableError

    def refuse(mode: Mode) -> Mode:
        if mode.policy == "epic":
            raise ModeUnavailableError("mode 'epic' is not served")
        return mode

    found = run_gate(
        config(tiny_path, policies="query:0.15,epic:0.1", exact_prompts=1, seed=6),
        session=Kept(tiny_session, refuse),
    )
    assert found["policies"]["epic:0.1"]["failed"] == ["served"]
    assert found["policies"]["query:0.15"]["passed"]
    assert not found["passed"]
    assert "epic:0.1" not in found["fidelity"]["modes"]


@pytest.mark.engine
def test_the_command_keeps_the_verdict_and_an_impossible_limit_ends_with_one(
    tiny_session: Any,
    tiny_path: Path,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(gate, "_start", lambda *given: Kept(tiny_session))
    words = ["gate", "--model", str(tiny_path), "--policies", "query:0.1", "--examples", "1"]
    words += ["--exact-prompts", "1", "--chunks", "2", "--chunk-tokens", "48", "--seed", "7"]
    words += ["--max-new-tokens", "2", "--min-agreement", "0", "--max-f1-drop", "1"]
    out = home.parent / "verdict.json"
    assert fidelity.main([*words, "--max-kl-of-reuse", "0", "--out", str(out)]) == 1
    printed = capsys.readouterr().out
    assert "FAIL" in printed
    assert "KL / reuse" in printed
    assert "\nnote: full prefill finds none" in printed
    stored = json.loads(out.read_text("utf-8"))
    assert stored["policies"]["query:0.1"]["failed"] == ["KL / reuse"]
    assert gate_facts(tiny_path, "", name="tiny")["status"] == "failed"
    # Same model and versions: the new verdict replaces the old one.
    assert fidelity.main([*words, "--max-kl-of-reuse", "2", "--json"]) == 0
    printed = capsys.readouterr().out
    assert json.loads(printed)["passed"]
    facts = gate_facts(tiny_path, "", name="tiny")
    assert (facts["status"], facts["hint"]) == ("passed", "")
    assert len(list(gates_dir().rglob("*.json"))) == 1
    assert not list(gates_dir().rglob("*.tmp"))


def test_doctor_tells_none_stale_and_holding_verdicts_apart(tiny_path: Path, home: Path) -> None:
    facts = gate_facts(tiny_path, "a.B", name="tiny")
    assert facts["status"] == "none"
    assert "eval gate --model tiny" in facts["hint"]
    found = verdict(tiny_path)
    old = found["versions"] | {"sglang": "0.0.1"}
    save_gate(found | {"versions": old, "date": "2030-01-01T00:00:00Z"})
    facts = gate_facts(tiny_path, "a.B", name="tiny")
    assert facts["status"] == "stale"
    assert "sglang 0.0.1" in facts["stale"][0]
    # A verdict of the installed versions counts before a younger one of others.
    save_gate(found)
    assert gate_facts(tiny_path, "a.B", name="tiny")["status"] == "passed"
    assert gate_facts(tiny_path, "c.D", name="tiny")["status"] == "stale"
    assert gate_facts(tiny_path / "elsewhere", "a.B", name="x")["status"] == "none"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"versions": 3}'])
def test_a_damaged_verdict_counts_as_none(text: str, tiny_path: Path, home: Path) -> None:
    save_gate(verdict(tiny_path)).write_text(text, "utf-8")
    assert last_gate(tiny_path) is None


def verdict(model: Path) -> dict[str, Any]:
    from rag_eval.gate.record import installed_versions

    return {
        "identity": model_identity(model),
        "versions": installed_versions(),
        "date": "2026-01-01T00:00:00Z",
        "passed": True,
        "policies": {"query:0.15": {"passed": True, "failed": []}},
        "engine": {"attention_class": "a.B"},
    }


def test_other_weights_and_other_configurations_are_other_models(
    tiny_path: Path, tmp_path: Path
) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(tiny_path, copy)
    assert model_identity(copy) == model_identity(tiny_path)
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    for place in range(len(data) // 2, len(data), 4096):
        data[place] ^= 1
    weights.write_bytes(bytes(data))
    tuned = model_identity(copy)
    assert tuned != model_identity(tiny_path)
    (copy / "config.json").write_text("{}", "utf-8")
    assert model_identity(copy) != tuned


EXACT = Distance(kl=1e-9, kl_max=1e-8, log_prob=1e-4, lead=0.0)
MODES = parse_modes("full,query:0.15")[1:]


def judged(distance: Distance, **limits: Any) -> dict[str, Any]:
    found = Exactness(
        floor=[EXACT], checks={("ratio 1", "query:0.15"): [EXACT, distance]}, fp32=True
    )
    return gate.judge(found, None, MODES, Thresholds(**limits))["policies"]["query:0.15"]


@pytest.mark.parametrize(
    ("distance", "passed"),
    [
        (EXACT, True),
        (replace(EXACT, kl=1e-3), False),
        (replace(EXACT, kl=math.nan), False),
        (replace(EXACT, lead=1.5e-4), True),  # a tie: re-batching alone moves both tokens so far
        (replace(EXACT, lead=1e-2), False),
        (replace(EXACT, lead=math.nan), False),
        (replace(EXACT, fault="nothing was recomputed"), False),
    ],
)
def test_each_kind_of_distance_is_judged(distance: Distance, passed: bool) -> None:
    assert judged(distance)["passed"] is passed


def test_a_verdict_on_broken_logits_can_still_be_written() -> None:
    broken = replace(EXACT, kl=math.nan, lead=math.nan)
    found = Exactness(floor=[EXACT, broken], checks={("off", ""): [broken, EXACT]})
    result = gate.judge(found, None, MODES, Thresholds())
    assert not result["passed"]
    json.dumps(result, allow_nan=False)


def test_what_a_model_cannot_show_is_said_in_a_line_each() -> None:
    def said(f1: float, kl: float) -> list[str]:
        return notes({"full": {"f1": f1}, PLAIN_REUSE: {"kl_answer": kl}}, exact_kl=1e-6)

    assert said(0.5, 0.2) == []
    assert [line.partition(":")[0] for line in said(0.0, 0.2)] == [
        "full prefill finds none of the planted facts, as with random weights"
    ]
    # Weights without any effect, such as a head of zeros: the exactness checks could not fail.
    (line,) = said(0.5, 1e-9)
    assert "prove nothing here" in line


def test_half_precision_is_noisier_and_a_large_floor_raises_the_limit() -> None:
    limits = Thresholds()
    assert limits.exact_kl(0.0, fp32=True) < limits.exact_kl(0.0, fp32=False)
    assert limits.exact_kl(0.01, fp32=False) == limits.noise_factor * 0.01


def test_a_policy_without_any_measurement_fails() -> None:
    found = gate.judge(Exactness(floor=[EXACT]), None, MODES, Thresholds())
    assert not found["passed"]
    assert found["policies"]["query:0.15"]["failed"] == ["not measured"]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--policies", "magic:0.1"], "magic"),
        (["--policies", "prefix"], "prefix"),
        (["--policies", "query:2"], "query:2"),
        (["--chunks", "1"], "chunks"),
        (["--examples", "0"], "examples"),
        (["--min-agreement", "1.5"], "min_agreement"),
        (["--noise-factor", "-1"], "noise_factor"),
        (["--engine-arg", "x"], "NAME=JSON"),
    ],
)
def test_bad_input_is_one_line(
    words: list[str], named: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fidelity.main(["gate", *words]) == 1
    captured = capsys.readouterr()
    assert named in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert not home.exists()


def test_the_default_policy_is_the_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    from rag_pipeline.sglang_plugin import FUSION_VARIABLE

    monkeypatch.setenv(FUSION_VARIABLE, json.dumps({"policy": "epic:0.2"}))
    assert [mode.name for mode in GateConfig(model="m").parsed()] == ["epic:0.2"]
    monkeypatch.delenv(FUSION_VARIABLE)
    (mode,) = GateConfig(model="m").parsed()
    assert mode.name == f"query:{mode.ratio:g}"
    with pytest.raises(EvalError, match="nothing to judge"):
        GateConfig(model="m", policies="query,full")
