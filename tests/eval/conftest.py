"""One session for the tests of this folder: the shared engine where it allows teacher forcing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kept_fork_server import keep_fork_server

from rag_eval.benchmarks.tiny_model import write_tiny_model


@pytest.fixture
def interrupt_at() -> Callable[[str], Callable[[str], None]]:
    """Makes a progress that stands in for Ctrl-C: it breaks off at the line that holds a text."""

    def made(text: str) -> Callable[[str], None]:
        def progress(line: str) -> None:
            if text in line:
                raise KeyboardInterrupt

        return progress

    return made


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must end with one line on stderr, and returns that line.

    With code 2 its options are refused, which ends the program; with another one the command returns it.
    """

    def refused(main: Callable[[list[str]], int], words: list[str], code: int = 2) -> str:
        if code == 2:
            with pytest.raises(SystemExit) as stop:
                main(words)
            assert stop.value.code == 2
        else:
            assert main(words) == code
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.startswith("error: ")
        assert said.err.count("\n") == 1
        return said.err

    return refused


@pytest.fixture(scope="session")
def prompt_maker(smollm2_path: Path) -> Any:
    from rag_eval.runner.prompts import PromptMaker

    return PromptMaker(smollm2_path, gold_tokens=6)


@pytest.fixture(scope="session")
def eval_session(engine: Any, prompt_maker: Any) -> Any:
    """A session on the suite's engine."""
    from rag_eval.runner.session import EngineSession

    return EngineSession(engine, prompt_maker.decode, 49152)


@pytest.fixture(scope="session")
def tiny_path(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random-weight model in fp32 behind the packaged model's tokenizer.

    Its weights are large enough for attention to matter: reuse changes the answer, and so does a
    wrong key.
    """
    folder = tmp_path_factory.mktemp("models") / "tiny"
    return write_tiny_model(folder, smollm2_path, context=8192, peaked=True)


@pytest.fixture(scope="session")
def tiny_session(tiny_path: Path) -> Iterator[Any]:
    """A session on an engine with the tiny model, which measures attention."""
    from rag_eval.runner.engine import start_session
    from rag_eval.runner.passage import fusion_settings
    from rag_eval.runner.prompts import PromptMaker

    keep_fork_server()
    maker = PromptMaker(tiny_path, gold_tokens=6)
    with fusion_settings(time_attention=True):
        session = start_session(maker, 49152, {"max_total_tokens": 8192, "dtype": "float32"})
    yield session
    session.close()
