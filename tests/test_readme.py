"""The README's commands and its Python, run as they stand there, in a folder of their own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with ``docs/`` and the README's index."""
    place = tmp_path_factory.mktemp("readme")
    (place / "docs").mkdir()
    for name, text in DOCS.items():
        (place / "docs" / name).write_text(text, "utf-8")
    run("rag-pipeline ingest docs/ --index my-index", place)
    return place


@pytest.fixture(scope="module", autouse=True)
def store_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Chunk KV of this module goes to a home of its own; converted models stay where they are."""
    from rag_pipeline.config import HOME_VARIABLE, home_dir

    home = tmp_path_factory.mktemp("home")
    models = home_dir() / "models"
    models.mkdir(parents=True, exist_ok=True)
    (home / "models").symlink_to(models)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(HOME_VARIABLE, str(home))
        yield


def run(command: str, place: Path) -> subprocess.CompletedProcess[str]:
    """Run a README command with this interpreter's ``rag-pipeline``."""
    program = Path(sys.executable).with_name("rag-pipeline")
    words = [word.strip("\"'") for word in re.findall(r'"[^"]*"|\S+', command)]
    assert Path(words[0]).name == "rag-pipeline", command
    done = subprocess.run(
        [str(program), *words[1:]], cwd=place, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    return done


def test_every_command_of_the_readme_is_known() -> None:
    known = [line for line in COMMANDS if line in MAKE_TARGETS or "rag-pipeline " in line]
    assert known == COMMANDS
    assert {line for line in COMMANDS if line.startswith("make")} == set(MAKE_TARGETS)
    ci = (ROOT / ".ci" / "run").read_text("utf-8")
    assert all(target in ci for target in MAKE_TARGETS)


@pytest.mark.engine
@pytest.mark.parametrize("command", [line for line in COMMANDS if "rag-pipeline " in line])
def test_command_of_the_readme(command: str, folder: Path) -> None:
    done = run(command, folder)
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
def test_python_of_the_readme(folder: Path) -> None:
    (code,) = [body for language, body in BLOCKS if language == "python"]
    script = folder / "readme.py"
    script.write_text(f"if __name__ == '__main__':\n{re.sub('^', '    ', code, flags=re.M)}")
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=500,
        env={**os.environ, "PYTHONPATH": ""},
    )
    assert done.returncode == 0, done.stderr
    assert "Rotation" in done.stdout
