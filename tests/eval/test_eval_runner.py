"""Modes, records on disk, summaries, tables and plots: everything of a run but the engine."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from rag_eval import EvalConfig, EvalError, fidelity
from rag_eval.datasets import corpus_texts
from rag_eval.report import publish, render_tables, write_plots
from rag_eval.runner import parse_modes, summarise, table_text
from rag_eval.runner.forcing import FollowAnswer, forcing_params, read_logits
from rag_eval.runner.passage import run_passage
from rag_eval.runner.predictions import CONFIG, PREDICTIONS, RunFolder


def test_modes_are_read_with_ratio_and_options() -> None:
    full, prefix, blend, query = parse_modes("full,prefix,cacheblend:0.05,query:0.15+mean_shift=0")
    assert (full.fused, prefix.fused) == (False, False)
    assert (blend.policy, blend.ratio, blend.options) == ("cacheblend", 0.05, {})
    assert query.options == {"mean_shift": 0}
    assert query.name == "query:0.15+mean_shift=0"


def test_full_is_always_measured() -> None:
    assert [mode.name for mode in parse_modes("reuse")] == ["full", "reuse"]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("nonsense", "nonsense"),
        ("full:0.5", "full:0.5"),
        ("query:much", "much"),
        ("query:1.5", "query:1.5"),
        ("reuse:0.5", "reuse"),
        ("query:0.1+colour=red", "colour"),
        ("query+x", "KEY=VALUE"),
        ("reuse,reuse", "twice"),
    ],
)
def test_a_bad_mode_is_one_line_that_names_it(text: str, named: str) -> None:
    with pytest.raises(EvalError) as caught:
        parse_modes(text)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def config(out: Path, **changes: Any) -> EvalConfig:
    given: dict[str, Any] = {"dataset": "planted-1hop", "model": "m", "out": out, "modes": "reuse"}
    return EvalConfig(**(given | changes))


def test_a_run_resumes_and_may_grow(tmp_path: Path) -> None:
    out = tmp_path / "run"
    RunFolder(out, config(out, limit=2).identity(), {}).append({"id": "a", "x": 1.5})
    again = RunFolder(out, config(out, limit=9).identity(), {})
    assert again.records == {"a": {"id": "a", "x": 1.5}}
    again.append({"id": "ü", "x": 2})
    assert set(RunFolder(out, config(out).identity(), {}).records) == {"a", "ü"}


def test_a_run_keeps_the_passage_that_it_began_with(tmp_path: Path) -> None:
    data = tmp_path / "data.json"
    example = {"question": "Q?", "answers": ["a"]}
    rows = [
        {
            **example,
            "ctxs": [{"text": f"Passage {row} of {n}. It ends. So it is."} for n in range(9)],
        }
        for row in range(40)
    ]
    data.write_text(json.dumps(rows), "utf-8")
    out = tmp_path / "run"
    out.mkdir()
    told = config(out, dataset=str(data), limit=10)
    file = Path(run_passage(told))
    text = file.read_text("utf-8")
    assert file.parent == out
    # Of the examples behind those that are measured.
    assert {int(n) for n in re.findall(r"Passage (\d+) of", corpus_sample(data, 10))} == set(
        range(10, 40)
    )
    assert run_passage(config(out, dataset=str(data), limit=30)) == str(file)
    assert file.read_text("utf-8") == text
    assert run_passage(config(out, passage="builtin")) == ""
    with pytest.raises(EvalError, match="passage is 'none'; allowed: corpus, builtin"):
        config(out, passage="none")


def corpus_sample(data: Path, behind: int) -> str:
    return "\n".join(corpus_texts(data, behind=behind))


def test_a_line_cut_off_by_a_crash_is_dropped_and_done_again(tmp_path: Path) -> None:
    identity = config(tmp_path).identity()
    RunFolder(tmp_path, identity, {}).append({"id": "a"})
    with (tmp_path / PREDICTIONS).open("ab") as file:
        file.write(b'{"id": "b", "mod')
    again = RunFolder(tmp_path, identity, {})
    assert set(again.records) == {"a"}
    again.append({"id": "b"})
    assert set(RunFolder(tmp_path, identity, {}).records) == {"a", "b"}


def test_a_folder_of_another_run_is_refused_by_the_field_that_differs(tmp_path: Path) -> None:
    RunFolder(tmp_path, config(tmp_path).identity(), {})
    with pytest.raises(EvalError, match="seed"):
        RunFolder(tmp_path, config(tmp_path, seed=1).identity(), {})
    with pytest.raises(EvalError, match="modes"):
        RunFolder(tmp_path, config(tmp_path, modes="epic").identity(), {})


@pytest.mark.parametrize(
    ("file", "text", "named"),
    [
        (PREDICTIONS, '{"id": "a"}\n', CONFIG),
        (CONFIG, "- a list\n", CONFIG),
        (CONFIG, "identity: [\n", CONFIG),
    ],
)
def test_a_foreign_folder_is_refused(tmp_path: Path, file: str, text: str, named: str) -> None:
    (tmp_path / file).write_text(text, "utf-8")
    with pytest.raises(EvalError, match=named):
        RunFolder(tmp_path, config(tmp_path).identity(), {})


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    identity = config(tmp_path).identity()
    RunFolder(tmp_path, identity, {})
    (tmp_path / PREDICTIONS).write_text('{"id": "a"}\nbroken\n{"id": "b"}\n', "utf-8")
    with pytest.raises(EvalError, match="line 2"):
        RunFolder(tmp_path, identity, {})


def test_config_is_plain_yaml_with_identity_and_notes(tmp_path: Path) -> None:
    RunFolder(tmp_path, config(tmp_path).identity(), {"cpus": 2})
    stored = yaml.safe_load((tmp_path / CONFIG).read_text("utf-8"))
    assert stored["identity"]["modes"] == ["full", "reuse"]
    assert stored["notes"] == {"cpus": 2}


def test_a_resumed_run_keeps_the_first_notes_and_lists_every_call(tmp_path: Path) -> None:
    identity = config(tmp_path).identity()
    first = {"command": ["a"], "started": "10:00", "cpus": 2}
    RunFolder(tmp_path, identity, first)
    RunFolder(tmp_path, identity, first | {"command": ["a", "--limit", "9"], "started": "11:00"})
    RunFolder(tmp_path, identity, first | {"started": "12:00", "cpus": 4})
    text = (tmp_path / CONFIG).read_text("utf-8")
    stored = yaml.safe_load(text)
    assert stored["notes"] == first
    assert stored["calls"] == [
        first,
        {"command": ["a", "--limit", "9"], "started": "11:00"},
        {"started": "12:00", "cpus": 4},
    ]
    assert "&id" not in text


def test_a_run_folder_of_before_calls_were_listed_is_continued(tmp_path: Path) -> None:
    identity = config(tmp_path).identity()
    old = {"identity": identity, "notes": {"started": "10:00"}}
    (tmp_path / CONFIG).write_text(yaml.safe_dump(old), "utf-8")
    RunFolder(tmp_path, identity, {"started": "11:00"})
    stored = yaml.safe_load((tmp_path / CONFIG).read_text("utf-8"))
    assert stored["notes"] == {"started": "10:00"}
    assert stored["calls"] == [{"started": "10:00"}, {"started": "11:00"}]


def row(**changes: Any) -> dict[str, Any]:
    base = {
        "f1": 1.0,
        "em": 1.0,
        "rouge_l": 1.0,
        "answer_nll": 0.5,
        "kl_first": 0.0,
        "kl_answer": 0.0,
        "agree_full": 1.0,
        "computed_fraction": 1.0,
        "reused_tokens": 0,
        "ttft_s": 4.0,
        "ttft_cpu_s": 8.0,
        "fallback": "",
    }
    return base | changes


def records() -> list[dict[str, Any]]:
    found = []
    for number, (f1, kl) in enumerate([(1.0, 0.2), (0.5, 0.1), (0.0, 0.6)]):
        modes = {
            "full": row(em=float(number < 2)),
            "reuse": row(f1=f1, em=0.0, kl_first=2 * kl, kl_answer=kl, ttft_s=0.3 + number / 10),
            "query:0.15": row(kl_answer=kl / 4, computed_fraction=0.2, ttft_s=1.0),
        }
        record: dict[str, Any] = {"id": str(number), "prompt_tokens": 1000 + number, "modes": modes}
        if number == 0:
            record["noise_floor"] = {
                "kl_first": 3e-4,
                "kl_answer": 2e-4,
                "answer_nll_abs": 0.01,
                "agree_full": 1.0,
            }
        found.append(record)
    return found


def result_of(rows: list[dict[str, Any]]) -> Any:
    modes = ["full", "reuse", "query:0.15"]
    return summarise(rows, modes, dataset="d", model="m", seed=0)


def test_summary_takes_means_medians_and_paired_intervals() -> None:
    result = result_of(records())
    reuse = result.modes["reuse"]
    assert reuse["f1"] == pytest.approx(0.5)
    assert reuse["kl_answer"] == pytest.approx(0.3)
    assert reuse["kl_first"] == pytest.approx(0.6)
    assert reuse["ttft_p50_s"] == pytest.approx(0.4)
    entry = result.significance["reuse"]
    assert entry["f1_diff_vs_full"] == pytest.approx(-0.5)
    assert entry["ci95"][0] <= -0.5 <= entry["ci95"][1] <= 0
    assert result.significance["query:0.15"]["kl_ratio_to_reuse"] == pytest.approx(0.25)
    assert "full" not in result.significance
    assert result.noise_floor["kl_answer"] == pytest.approx(2e-4)
    assert result.noise_floor["n"] == 1


def test_the_second_table_holds_what_full_prefill_gets_right() -> None:
    right = result_of(records()).full_right
    assert right["n"] == 2
    assert right["modes"]["reuse"]["f1"] == pytest.approx(0.75)


def test_json_has_the_keys_that_users_rely_on() -> None:
    found = json.loads(json.dumps(result_of(records()).to_json(), allow_nan=False))
    assert {"dataset", "model", "n", "modes", "noise_floor", "significance"} <= set(found)
    assert {
        "f1",
        "em",
        "answer_nll",
        "kl_first",
        "kl_answer",
        "agree_full",
        "computed_fraction",
        "reused_tokens",
        "ttft_p50_s",
        "ttft_cpu_p50_s",
    } <= set(found["modes"]["query:0.15"])
    assert {"kl_first", "kl_answer"} <= set(found["noise_floor"])
    assert {"f1_diff_vs_full", "ci95"} <= set(found["significance"]["reuse"])


def test_the_table_shows_every_mode_the_floor_and_the_ratio_to_reuse() -> None:
    text = table_text(result_of(records()))
    assert all(part in text for part in ("full", "reuse", "query:0.15", "25%", "0.00020", "n = 3"))
    assert "only the 2 questions" in text
    assert len(render_tables(result_of(records()))) == 3


def test_fallbacks_are_counted_and_shown() -> None:
    rows = records()
    rows[1]["modes"]["reuse"]["fallback"] = "lora"
    result = result_of(rows)
    assert result.modes["reuse"]["fallbacks"] == 1
    assert "1 of 3 prompts of reuse fell back" in table_text(result)


def test_plots_are_written(tmp_path: Path) -> None:
    written = write_plots(result_of(records()), records(), tmp_path)
    assert {path.name for path in written} == {
        "kl_over_computed.png",
        "quality_over_ttft.png",
        "ttft_over_prompt.png",
    }
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in written)
    assert not list(tmp_path.glob(".*"))


def test_a_published_run_names_no_folder_of_the_machine(tmp_path: Path) -> None:
    data = tmp_path / "hotpot.json"
    data.write_text("[]", "utf-8")
    run = tmp_path / "run"
    identity = config(run, dataset=str(data), model=str(tmp_path / "model")).identity()
    RunFolder(run, identity, {"command": ["x.py", "--dataset", str(data)], "cpus": 2})
    publish(result_of(records()), run, tmp_path / "results" / "one.json")
    text = (tmp_path / "results" / "one.json").read_text("utf-8")
    found = json.loads(text)
    assert str(tmp_path) not in text
    assert found["command"] == "x.py --dataset hotpot.json"
    assert found["dataset_sha256"] == hashlib.sha256(b"[]").hexdigest()
    assert found["result"]["n"] == 3
    assert found["environment"] == {"cpus": 2}
    assert found["calls"] == [{"command": "x.py --dataset hotpot.json"}]


def test_the_processor_forces_the_answer_and_keeps_the_logits(tmp_path: Path) -> None:
    params = forcing_params([3, 1], tmp_path / "x.bin")
    first, second = torch.randn(2, 5), torch.randn(2, 5)
    processor = FollowAnswer()
    chosen = []
    for logits in (first, second):
        out = processor(logits.clone(), [params, {}])
        chosen.append(out.argmax(-1).tolist())
        assert torch.equal(out[1], logits[1])  # a neighbour in the batch is left alone
    assert [pair[0] for pair in chosen] == [3, 1]
    kept = read_logits(tmp_path / "x.bin", 2)
    np.testing.assert_array_equal(kept, torch.stack([first[0], second[0]]).numpy())


def test_pieces_of_a_chunked_prefill_are_not_steps(tmp_path: Path) -> None:
    class Request:
        extend_end = 4
        origin_input_ids = [1] * 8
        output_ids: list[int] = []  # noqa: RUF012

    params = forcing_params([3], tmp_path / "x.bin") | {"__req__": Request()}
    logits = torch.randn(1, 5)
    assert torch.equal(FollowAnswer()(logits.clone(), [params]), logits)
    Request.extend_end = 8
    assert FollowAnswer()(logits.clone(), [params]).argmax().item() == 3


def test_logits_that_were_not_written_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="forced nothing"):
        read_logits(tmp_path / "absent.bin", 2)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--dataset", "absent.json"], "absent.json"),
        (["--dataset", "planted-1hop", "--modes", "bad"], "bad"),
        (["--dataset", "planted-1hop", "--limit", "0"], "limit"),
        (["--dataset", "planted-1hop", "--engine-arg", "x"], "NAME=JSON"),
        (["--dataset", "planted-1hop", "--chunks", "0"], "chunks"),
        (["--dataset", "planted-1hop", "--seen-before", "never"], "never"),
    ],
)
def test_the_command_ends_with_one_line_and_code_one(
    arguments: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fidelity.main([*arguments, "--model", str(tmp_path), "--out", str(tmp_path / "o")]) == 1
    captured = capsys.readouterr()
    assert named in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
