"""Every door into the pipeline offers all that a client may choose of fusion."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import pytest
import typer

from rag_pipeline.cli.app import app
from rag_pipeline.cli.ask import AskOptions
from rag_pipeline.frontend.backend import ProgramOptions
from rag_pipeline.langchain import ChatSGLangRag
from rag_pipeline.protocol import FusionChoice, FusionFields
from rag_pipeline.question_run import QuestionOptions, QuestionRun
from rag_pipeline.server.schemas import RagOptions

FIELDS = {field.name for field in dataclasses.fields(FusionChoice)}
ASK = typer.main.get_command(app).commands["ask"]  # type: ignore[attr-defined]
DOORS: dict[str, Iterable[str]] = {
    "keywords": FusionFields.__annotations__,
    "RagPipeline": QuestionOptions.__annotations__,
    "programs": ProgramOptions.__annotations__,
    "HTTP": RagOptions.model_fields,
    "LangChain": ChatSGLangRag.model_fields,
    "command": [option.name for option in ASK.params],
    "command's options": [field.name for field in dataclasses.fields(AskOptions)],
}


@pytest.mark.parametrize("door", DOORS)
def test_each_door_offers_every_field(door: str) -> None:
    assert set(DOORS[door]) >= FIELDS


def test_a_field_that_is_left_out_is_the_default() -> None:
    assert FusionChoice.of(RagOptions()) == FusionChoice()
    assert FusionChoice.of(RagOptions(), policy="query").policy == "query"
    said = RagOptions(policy="epic", ratio=0.5, attention="edges")
    chosen = FusionChoice.of(said, policy="query")
    assert chosen == FusionChoice(policy="epic", ratio=0.5, attention="edges")


def test_a_question_carries_its_attention_to_the_engine() -> None:
    run = QuestionRun.start("q", 3, policy="query", attention="edges")
    request = run.fusion.request(())
    assert (run.top_k, request.policy, request.attention) == (3, "query", "edges")
