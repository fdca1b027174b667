"""Names of other people's implementations: by a call, or by an installed distribution."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rag_kernels import Registry, choose_kernel


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


def test_a_module_that_ends_the_process_ends_nothing(install: Callable) -> None:
    install("rag_pipeline.toys", "ball = somebody_elses:BALL", "raise SystemExit(3)")
    with pytest.raises(ValueError, match=r"cannot be loaded \(SystemExit"):
        make().get("ball")


def test_what_two_distributions_offer_is_neither(install: Callable, tmp_path: Path) -> None:
    install("rag_pipeline.toys", "ball = somebody_elses:BALL", "BALL = 'round'")
    info = tmp_path / "another-2.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: another\nVersion: 2.0\n")
    (info / "entry_points.txt").write_text("[rag_pipeline.toys]\nball = somebody_elses:BALL\n")
    with pytest.raises(ValueError, match=r"is offered by another and somebody-elses; uninstall"):
        make().get("ball")


@pytest.mark.parametrize("source", ["BALL = 'round'", "class BALL: pass"])
def test_what_is_nothing_of_the_kind_is_refused(install: Callable, source: str) -> None:
    install("rag_pipeline.toys", "ball = somebody_elses:BALL", source)
    toys: Registry[type[Path]] = Registry("toy", "rag_pipeline.toys", {}, base=Path)
    with pytest.raises(ValueError, match=r"toy 'ball' is .*; give a subclass of pathlib\.Path\."):
        toys.get("ball")
    with pytest.raises(ValueError, match=r"give a subclass of pathlib\.Path\."):
        toys.register("other", str)


def test_a_name_that_means_something_else_is_reserved(install: Callable) -> None:
    install("rag_pipeline.toys", "auto = somebody_elses:BALL", "BALL = 'round'")
    toys: Registry[str] = Registry(
        "toy", "rag_pipeline.toys", {"sep": "os:sep"}, reserved=("auto",)
    )
    assert toys.names() == ("sep",)
    with pytest.raises(ValueError, match="has a meaning already"):
        toys.register("auto", "x")


def test_an_attention_kernel_for_other_devices_is_not_imported() -> None:
    """A machine without a GPU may lack Triton, and a first call must not wait for its import."""
    program = """
import subprocess
import sys
sys.modules["triton"] = None  # importing it raises
import torch
from rag_kernels import plan_position_causal, position_causal_attention
for device in ("cpu", "meta"):
    plan = plan_position_causal(
        [torch.arange(4)], [torch.arange(4, device=device)], num_q_heads=2, num_kv_heads=1, head_dim=8
    )
    q, pool = torch.ones(4, 2, 8, device=device), torch.ones(4, 1, 8, device=device)
    print(plan.kernel, tuple(position_causal_attention(q, pool, pool, plan, 1.0).shape))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1000:]
    on_cpu = choose_kernel("auto", torch.device("cpu")).name
    assert done.stdout.splitlines() == [f"{on_cpu} (4, 2, 8)", "reference (4, 2, 8)"]
