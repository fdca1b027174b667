"""Programs and examples against the real server; here because a second server would cost a minute."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from pydoc_data.topics import topics
from types import ModuleType

import pytest
import sglang as sgl

from rag_pipeline import EngineError, ModelTokenizer
from rag_pipeline.frontend import RagEndpoint, chunks, usage
from retrievers import Embedder, TokenSplitter, ingest
from retrievers.types import Document

pytestmark = [pytest.mark.engine, pytest.mark.slow]

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
WITH, EXIT = "What does the with statement do?", "How does the with statement call exit?"


@pytest.fixture(scope="module")
def index_dir(
    tmp_path_factory: pytest.TempPathFactory, smollm2_path: Path, minilm_path: Path
) -> str:
    folder = tmp_path_factory.mktemp("examples") / "index"
    names = ("with", "lambda", "for", "import")
    documents = [Document(id=name, text=topics[name].strip()[:1500], title=name) for name in names]
    splitter = TokenSplitter(ModelTokenizer.load(smollm2_path), chunk_tokens=96)
    embedder = Embedder(minilm_path, name="all-minilm-l6-v2")
    ingest(documents, folder, splitter=splitter, embedder=embedder)
    return str(folder)


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def numbers(output: str) -> list[tuple[int, ...]]:
    """Prompt, exact, reused, recomputed, fresh of every line that reports them."""
    pattern = r"(\d+) tokens: (\d+) exact prefix, (\d+) reused, (\d+) recomputed, (\d+) fresh"
    found = [tuple(map(int, match)) for match in re.findall(pattern, output)]
    assert all(prompt == sum(kinds) for prompt, *kinds in found)
    return found


@pytest.mark.parametrize(
    ("name", "questions", "reports"),
    [
        ("frontend_multi_document_qa", (WITH, EXIT), 2),
        ("frontend_map_combine", (WITH,), 4),
        ("frontend_multi_turn", (WITH, EXIT), 2),
    ],
)
def test_the_example_programs_reuse_kv(
    name: str,
    questions: tuple[str, ...],
    reports: int,
    model_server: str,
    index_dir: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    example(name).main(model_server, index_dir, *questions)
    output = capsys.readouterr().out
    found = numbers(output)
    assert len(found) == reports, output
    _, _, reused, recomputed, _ = found[-1]
    assert reused > recomputed > 0, output
    assert re.search(r"^A: \w", output, re.MULTILINE)


def test_the_langchain_examples(
    model_server: str, index_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example("langchain_rag").main(f"{model_server}/v1", index_dir, WITH)
    output = capsys.readouterr().out
    assert "source: with" in output
    assert "'reused_tokens'" in output
    file = tmp_path / "f.txt"
    file.write_text("A decorator takes a function.\n\nA generator yields values.\n")
    example("langchain_any_store").main(f"{model_server}/v1", "What is a decorator?", str(file))
    assert capsys.readouterr().out.count("'prompt_tokens'") == 2


def test_a_kept_turn_is_not_computed_again(model_server: str) -> None:
    @sgl.function
    def program(s):
        texts = [topics[name].strip()[:600] for name in ("assert", "pass", "del")]
        s += sgl.user("Text: " + chunks(texts) + "What is it about?")
        s += sgl.assistant(sgl.gen("first", max_tokens=6))
        s += sgl.user("And what else?")
        s += sgl.assistant(sgl.gen("second", max_tokens=6))

    found = {}
    for keep in (False, True):
        backend = RagEndpoint(model_server, policy="reuse", build_missing=True, keep_turns=keep)
        state = program.run(backend=backend, temperature=0)
        first, second = usage(state, "first"), usage(state, "second")
        assert first.reused_tokens > 0
        found[keep] = second.fresh_tokens
        # What came behind the first prompt: its answer, and the second question.
        behind = second.prompt_tokens - first.prompt_tokens
    assert found[True] <= behind < found[False]


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*_*.py")), ids=lambda path: path.name)
def test_examples_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 60


def test_the_endpoint_streams_selects_and_refuses(model_server: str, tmp_path: Path) -> None:
    backend = RagEndpoint(model_server)

    @sgl.function
    def program(s):
        s += sgl.user(chunks([topics["global"].strip()[:400]]) + "What is it about?")
        s += sgl.assistant(sgl.gen("answer", max_tokens=6))
        s += sgl.user("Is it about Python?")
        s += sgl.assistant(sgl.select("pick", choices=["yes", "no"]))

    plain = program.run(backend=backend, temperature=0)
    streamed = program.run(backend=backend, temperature=0, stream=True)
    assert "".join(streamed.text_iter("answer")) == plain["answer"]
    assert plain["pick"] == streamed["pick"]
    assert usage(plain, "answer").prompt_tokens == usage(streamed, "answer").prompt_tokens
    with pytest.raises(EngineError, match=r"refused the request \(400\)") as error:
        backend.send({"input_ids": [1], "sampling_params": {"max_new_tokens": -1}})
    assert "\n" not in str(error.value)
    with pytest.raises(EngineError, match="no server answers"):
        RagEndpoint("http://127.0.0.1:9")
