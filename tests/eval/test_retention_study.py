"""The study of retention: a small run of its command, what it measures, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rag_eval.benchmarks.retention import RetentionConfig, main, run
from rag_eval.errors import EvalError
from rag_eval.retention.measures import evidence_share, kept_mask, mass_recall
from rag_eval.retention.model import LayerCache
from rag_eval.retention.talk import AskedQuestion, Talk

THINGS = ["a red kite", "the old boat", "my blue bike", "a tin drum", "the green tent", "her map"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two conversations of one session in LoCoMo's format, and two questions about each."""
    samples = []
    for name in ("a", "b"):
        said = [
            {
                "speaker": "Ann" if i % 2 == 0 else "Bob",
                "dia_id": f"D1:{i + 1}",
                "text": f"On day {i} I saw {THINGS[i * 7 % 6]} near the {name} house by the lake.",
            }
            for i in range(40)
        ]
        qa = [
            {"question": f"What was seen on day {day}?", "answer": THINGS[day * 7 % 6],
             "evidence": [f"D1:{day + 1}"], "category": 4}
            for day in (1, 3)
        ]  # fmt: skip
        talk = {
            "speaker_a": "Ann",
            "speaker_b": "Bob",
            "session_1_date_time": "1 May",
            "session_1": said,
        }
        samples.append({"sample_id": name, "conversation": talk, "qa": qa})
    path = tmp_path_factory.mktemp("talks") / "talks.json"
    path.write_text(json.dumps(samples))
    return path


def test_a_small_run_measures_every_variant(
    dataset: Path, tiny_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--dataset", str(dataset), "--model", str(tiny_path), "--conversations", "1", "--json"]
    words += ["--tokens", "512", "--block", "64", "--budget", "128", "--episodes", "2"]
    assert main([*words, "--dtype", "float32"]) == 0
    report = json.loads(capsys.readouterr().out)
    found = report["variants"]
    assert report["questions"] == [2]
    assert {"full", "epicache", "other_episodes", "kvzip", "random"} <= found.keys()
    assert found["full"]["recall"] == found["full"]["evidence"] == 1
    for name, one in found.items():
        assert one["n"] == 2
        assert 0 <= one["recall"] <= 1
        assert one["nll"] > 0
        if name not in ("full", "other_episodes"):
            most = 128 + (0 if name not in report["budgets"] else max(report["budgets"][name]))
            assert one["peak_tokens"] <= most + 64 + 64  # a block, and a system part that competes
    assert set(report["budgets"]) == {n for n in found if n.startswith("epicache-layers")}
    assert all(sum(one) == 4 * 128 for one in report["budgets"].values())


def test_a_broken_off_run_keeps_what_it_has(
    dataset: Path, tiny_path: Path, interrupt_at: Callable[[str], Callable[[str], None]]
) -> None:
    config = RetentionConfig(
        dataset=str(dataset), model=str(tiny_path), variants="random,streaming", dtype="float32",
        tokens=512, block=64, budget=128, episodes=2, conversations=1,
    )  # fmt: skip
    report = run(config, interrupt_at("streaming"))
    assert report["interrupted"] is True
    assert "random" in report["variants"]
    assert "streaming" not in report["variants"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--variants", "epicache,nix"], "variant 'nix' is not known"),
        (["--budget", "0"], "budget is 0"),
        (["--tokens", "600"], "tokens is 600"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], message: str, refusal: Callable[..., str]) -> None:
    assert message in refusal(main, words)


def test_no_data_set_is_refused() -> None:
    with pytest.raises(EvalError, match="--dataset FILE"):
        run(RetentionConfig())


def test_shares_count_kept_tokens() -> None:
    question = AskedQuestion(id="q", ids=(1,), answer_ids=(2,), evidence=((1, 3),), episode=0)
    talk = Talk(system=(7, 7), history=(1, 2, 3, 4), tail=(), probes=((),), questions=(question,))
    none = torch.zeros(2, 3, 1)
    positions = torch.tensor([[2, 3, -1], [3, 4, 5]])  # padding; true positions behind the system
    kept = kept_mask([LayerCache(k=none, v=none, positions=positions)], talk)
    assert kept.tolist() == [[[True, True, False, False], [False, True, True, True]]]
    assert evidence_share(question, kept) == 0.75
    mass = torch.tensor([[[0.5, 0.1, 0.3, 0.1], [0.2, 0.0, 0.1, 0.1]]])
    assert mass_recall(mass, kept) == pytest.approx((0.6 + 0.5) / 2)
    assert evidence_share(question, torch.ones_like(kept)) == 1
