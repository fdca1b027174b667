"""One session for the tests of this folder: the shared engine where it allows teacher forcing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def prompt_maker(smollm2_path: Path) -> Any:
    from rag_eval.runner.prompts import PromptMaker

    return PromptMaker(smollm2_path, gold_tokens=6)


@pytest.fixture(scope="session")
def eval_session(request: pytest.FixtureRequest, prompt_maker: Any) -> Iterator[Any]:
    """A session on the suite's engine; on one of its own where that engine forces nothing."""
    from rag_eval.runner.engine import start_session
    from rag_eval.runner.session import EngineSession

    shared = request.getfixturevalue("engine")
    if getattr(shared.server_args, "enable_custom_logit_processor", False):
        yield EngineSession(shared, prompt_maker.decode, 49152)
        return
    own = start_session(prompt_maker, 49152, {})
    yield own
    own.close()
