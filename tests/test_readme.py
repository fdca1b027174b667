"""The README's commands and its Python, run as they stand there, in a folder of their own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from warm import WarmStart

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [
    line.split("#")[0].strip()
    for language, body in BLOCKS
    if language == ""
    for line in body.splitlines()
    if line.strip()
]
MAKE_TARGETS = ("make demo", "make test")
"""Run by ``.ci/run``; a test cannot run the suite it is part of."""

DOCS = {
    "rotation.md": "# Rotation\n\nKeys are rotated by calling rerotate_keys with the difference.\n",
    "lighthouse.txt": "The lighthouse of Port Ellery was painted green in 1931.\n",
}
ASK_KEYS = {"answer", "sources", "usage", "timing", "policy", "ratio"}
PARTS = ("exact_prefix_tokens", "reused_tokens", "recomputed_tokens", "fresh_tokens")


INGEST = "rag-pipeline ingest docs/ --index my-index"
Done = subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def ran(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    warm_start: WarmStart,
) -> dict[str, Done]:
    """The selected commands, and the README's ``python``, in a folder with ``docs/`` and the README's index."""
    from rag_pipeline.config import HOME_VARIABLE, home_dir

    items = [item for item in request.session.items if item.path == request.path]
    wanted = {str(item.callspec.params["command"]) for item in items if hasattr(item, "callspec")}
    # Chunk KV goes to a home of its own; converted models stay where they are.
    models, place = home_dir() / "models", tmp_path_factory.mktemp("readme")
    home = tmp_path_factory.mktemp("home")
    models.mkdir(parents=True, exist_ok=True)
    (home / "models").symlink_to(models)
    environment = {**os.environ, "PYTHONPATH": "", HOME_VARIABLE: str(home)}
    (place / "docs").mkdir()
    for file, text in DOCS.items():
        (place / "docs" / file).write_text(text, "utf-8")

    def run(words: list[str]) -> Done:
        return warm_start.run(words, environment=environment, cwd=place)

    # The one that all need is started as a user starts it.
    first = subprocess.run(
        console_words(INGEST), env=environment, cwd=place, capture_output=True, text=True
    )
    assert first.returncode == 0, first.stderr
    done = {line: run(console_words(line)) for line in COMMANDS if line in wanted}
    if any(item.name.startswith("test_python_of_the_readme") for item in items):
        (code,) = [body for language, body in BLOCKS if language == "python"]
        body = re.sub("^", "    ", code, flags=re.M)
        (place / "readme.py").write_text(f"if __name__ == '__main__':\n{body}")
        done["python"] = run([sys.executable, "readme.py"])
    return done


def console_words(command: str) -> list[str]:
    """Words of a README command, with this interpreter's ``rag-pipeline``."""
    program = Path(sys.executable).with_name("rag-pipeline")
    words = [word.strip("\"'") for word in re.findall(r'"[^"]*"|\S+', command)]
    assert Path(words[0]).name == "rag-pipeline", command
    return [str(program), *words[1:]]


def test_every_command_of_the_readme_is_known() -> None:
    known = [line for line in COMMANDS if line in MAKE_TARGETS or "rag-pipeline " in line]
    assert known == COMMANDS
    assert {line for line in COMMANDS if line.startswith("make")} == set(MAKE_TARGETS)
    ci = (ROOT / ".ci" / "run").read_text("utf-8")
    assert all(target in ci for target in MAKE_TARGETS)


@pytest.mark.engine
@pytest.mark.parametrize("command", [line for line in COMMANDS if "rag-pipeline " in line])
def test_command_of_the_readme(command: str, ran: dict[str, Done]) -> None:
    done = ran[command]
    assert done.returncode == 0, done.stderr
    if "--json" in command:
        answer = json.loads(done.stdout)
        assert set(answer) >= ASK_KEYS
        assert answer["answer"]
        assert {source["title"] for source in answer["sources"]} <= {"Rotation", "lighthouse"}
        usage = answer["usage"]
        assert sum(usage[part] for part in PARTS) == usage["prompt_tokens"]
        assert 0 < answer["timing"]["ttft_s"] <= answer["timing"]["total_s"]
        if "--policy" in command:
            # The block before warmed the chunks and left them on disk; this is another process.
            assert usage["reused_tokens"] + usage["exact_prefix_tokens"] > 0
    elif " ask " in command:
        assert "Sources" in done.stdout
    elif " doctor" in command:
        assert re.search(r"engine plugin +active", done.stdout)
    elif " ingest " in command:
        assert "nothing embedded" in done.stderr
        assert ("chunks sent" in done.stderr) == ("--warm" in command)
    elif " cache " in command:
        assert re.search(r"chunks +[1-9]", done.stdout)


@pytest.mark.engine
def test_python_of_the_readme(ran: dict[str, Done]) -> None:
    done = ran["python"]
    assert done.returncode == 0, done.stderr
    assert "Rotation" in done.stdout
