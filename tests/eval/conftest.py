"""One session for the tests of this folder: the shared engine where it allows teacher forcing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def interrupt_at() -> Callable[[str], Callable[[str], None]]:
    """Makes a progress that stands in for Ctrl-C: it breaks off at the line that holds a text."""

    def made(text: str) -> Callable[[str], None]:
        def progress(line: str) -> None:
            if text in line:
                raise KeyboardInterrupt

        return progress

    return made


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
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    source = json.loads((smollm2_path / "config.json").read_text("utf-8"))
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=source["vocab_size"],
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=8192,
            tie_word_embeddings=True,
            bos_token_id=source["bos_token_id"],
            eos_token_id=source["eos_token_id"],
        )
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                scale = 3.0 if "q_proj" in name or "k_proj" in name else 1.5
                parameter.normal_(0.0, scale / parameter.shape[1] ** 0.5)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    model.to(torch.float32).save_pretrained(folder)
    for file in smollm2_path.glob("*"):
        if "token" in file.name or file.name.endswith(".jinja"):
            shutil.copy(file, folder / file.name)
    return folder


@pytest.fixture(scope="session")
def tiny_session(tiny_path: Path) -> Iterator[Any]:
    """A session on an engine with the tiny model."""
    from rag_eval.runner.engine import start_session
    from rag_eval.runner.prompts import PromptMaker

    maker = PromptMaker(tiny_path, gold_tokens=6)
    session = start_session(maker, 49152, {"max_total_tokens": 8192, "dtype": "float32"})
    yield session
    session.close()
