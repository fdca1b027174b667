"""Names of other people's implementations: by a call, or by an installed distribution."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rag_kernels import Registry


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str, str], None]:
    """Put a distribution with one module and one entry point where Python finds it, as pip does."""

    def put(group: str, entry: str, source: str) -> None:
        (tmp_path / "somebody_elses.py").write_text(source)
        info = tmp_path / "somebody_elses-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            "Metadata-Version: 2.1\nName: somebody-elses\nVersion: 1.0\n"
        )
        (info / "entry_points.txt").write_text(f"[{group}]\n{entry}\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        importlib.invalidate_caches()

    yield put
    sys.modules.pop("somebody_elses", None)


def make() -> Registry[str]:
    return Registry("toy", "rag_pipeline.toys", {"sep": "os:sep"})


def test_built_in_registered_and_unknown_names() -> None:
    toys = make()
    assert toys.get("sep") == "/"
    toys.register("mine", "a value")
    assert toys.names() == ("sep", "mine")
    assert toys.get("mine") == "a value"
    with pytest.raises(ValueError, match=r"toy 'ball' is not known; choose one of sep, mine\."):
        toys.get("ball")


@pytest.mark.parametrize("name", ["sep", "", "a b", "a:b"])
def test_a_name_is_nobody_elses_and_fits_into_a_request(name: str) -> None:
    with pytest.raises(ValueError, match="toy"):
        make().register(name, "x")


def test_what_a_distribution_offers_is_loaded_when_it_is_asked_for(install: Callable) -> None:
    install("rag_pipeline.toys", "ball = somebody_elses:BALL", "BALL = 'round'")
    toys = make()
    assert toys.names() == ("sep", "ball")
    assert "somebody_elses" not in sys.modules
    assert toys.get("ball") == "round"


def test_a_distribution_takes_no_built_in_name(install: Callable) -> None:
    install("rag_pipeline.toys", "sep = somebody_elses:SEP", "SEP = 'stolen'")
    assert make().get("sep") == "/"


def test_one_that_cannot_be_loaded_says_whose_it_is(install: Callable) -> None:
    install("rag_pipeline.toys", "ball = somebody_elses:BALL", "import no_such_module")
    with pytest.raises(
        ValueError, match=r"toy 'ball' of somebody-elses cannot be loaded .*no_such"
    ):
        make().get("ball")
