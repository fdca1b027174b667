"""The work folder: whole stages or none, and never those of another conversion."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rag_pipeline.conversion import ConversionError
from rag_pipeline.conversion.work import work_folder, work_path

JOB = {"model": "a", "latent": 32}


def test_stages_come_back_in_the_next_run_of_the_same_conversion(tmp_path: Path) -> None:
    tensor = torch.randn(3, 4)
    with work_folder(tmp_path / "out", JOB) as work:
        assert not work.resumed
        work.save("one", {"x": tensor.T}, {"lost": "0.5"})
        work.save_json("two", {"a": 1})
    with work_folder(tmp_path / "out", dict(JOB)) as work:
        assert work.resumed
        tensors, facts = work.load("one") or ({}, {})
        assert torch.equal(tensors["x"], tensor.T)
        assert facts["lost"] == "0.5"
        assert work.load_json("two") == {"a": 1}
        assert work.load("three") is None
        assert work.load_json("three") is None


def test_stages_of_another_conversion_are_removed(tmp_path: Path) -> None:
    with work_folder(tmp_path / "out", JOB) as work:
        work.save("one", {"x": torch.ones(1)}, {})
        (work.path / "checkpoint").mkdir()
    with work_folder(tmp_path / "out", JOB | {"latent": 48}) as work:
        assert not work.resumed
        assert work.load("one") is None
        assert not (work.path / "checkpoint").exists()


def test_an_unfinished_or_damaged_stage_is_none(tmp_path: Path) -> None:
    with work_folder(tmp_path / "out", JOB) as work:
        work.save("one", {"x": torch.ones(100)}, {})
        whole = work.path / "one.safetensors"
        (work.path / "two.1.tmp").write_bytes(whole.read_bytes())
        assert work.load("two") is None
        whole.write_bytes(whole.read_bytes()[:-50])
        assert work.load("one") is None
        (work.path / "three.json").write_text("{", "utf-8")
        assert work.load_json("three") is None


def test_two_conversions_into_one_folder_do_not_meet(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with work_folder(out, JOB), pytest.raises(ConversionError, match="another process"):  # noqa: SIM117
        with work_folder(out, JOB):
            pass
    with work_folder(out, JOB):  # free again
        pass


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", "utf-8")
    out = tmp_path / "file" / "out"
    with (
        pytest.raises(ConversionError, match=r"out cannot be made.*name a place"),
        work_folder(out, JOB),
    ):
        pass
    assert work_path(out).name == ".out.work"


def test_a_result_that_another_made_meanwhile_is_refused_before_any_work(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(ConversionError, match="made by another"), work_folder(out, JOB):
        pytest.fail("work began")
    assert list(tmp_path.iterdir()) == [out]
