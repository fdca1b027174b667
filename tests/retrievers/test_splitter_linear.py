"""Splitting takes steps in proportion to the text, whatever the text: twice the text, about twice the steps."""

from __future__ import annotations

import re
import sys
from types import FrameType
from typing import Any

import pytest

from retrievers import Document, HFTokenizer, TokenSplitter
from retrievers.splitter import atoms as atoms_module
from retrievers.splitter.atoms import find_atoms
from retrievers.splitter.packing import pack

_CHARS = 6000
_UNITS = {
    "stops and quotes": "\"'.",
    "stops": ".",
    "exclamations": "!",
    "brackets and stops": ".)",
    "ellipses": "\u2026\u201d",
    "questions": "?!",
    "stops and blanks": ". ",
    "blanks": " ",
    "one letter": "x",
    "no blanks": "天地玄黃。」",
    "combining": "e\u0301",
    "marks alone": "\u0301",
    "lines": "\nx",
    "paragraphs": "\n\nx",
    "list marks": "- a\n",
    "numbers": "1. ",
    "headings": "# x\n",
    "underlines": "x\n===\n\n",
    "rules": "=",
    "nested brackets": "[({",
    "nested markup": "<b><i>",
    "table": "| a | b |\n",
    "minified JSON": '{"a":"b."},',
    "fences": "```\n",
    "code": "f(x);",
    "joined emoji": "👩\u200d",
    "stops far apart": ". " + " " * 50,
}


class _Steps:
    """Counts lines of Python in the splitter and the sentence model, and what their patterns look over.

    For each stop the model's pattern looks on to the end of the word: those are the steps that no line of
    Python shows, and the ones that once grew with the square of the text.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        model = atoms_module._tokenizer()
        monkeypatch.setattr(atoms_module, "_tokenizer", lambda: self._watched(model))

    def _watched(self, model: Any) -> Any:
        def spans(run: str) -> Any:
            for word in re.finditer(r"\S+", run):
                ends = [match.start() for match in re.finditer("[.?!\u2026]", word[0])]
                self.count += sum(len(word[0]) - end for end in ends)
            return model(run)

        return spans

    def of(self, splitter: TokenSplitter, text: str) -> int:
        self.count = 0
        before = sys.gettrace()
        sys.settrace(self._trace)
        try:
            splitter.split(Document(id="d", title="t", text=text))
        finally:
            sys.settrace(before)
        return self.count

    def _trace(self, frame: FrameType, event: str, arg: object) -> Any:
        name = frame.f_globals.get("__name__", "")
        if not name.startswith(("retrievers.splitter", "nupunkt")):
            return None
        self.count += event == "line"
        return self._trace


@pytest.mark.parametrize("unit", _UNITS.values(), ids=_UNITS.keys())
def test_twice_the_text_takes_twice_the_steps(
    unit: str, tokenizer: HFTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    splitter = TokenSplitter(tokenizer, chunk_tokens=64, overlap=16)
    steps = _Steps(monkeypatch)
    once, twice = (
        steps.of(splitter, (unit * (chars // len(unit) + 1))[:chars])
        for chars in (_CHARS, 2 * _CHARS)
    )
    assert twice < 2.5 * once + 1000


def test_packing_looks_back_no_further_than_a_chunk_though_atoms_have_no_tokens() -> None:
    class Counts(list[int]):
        looks = 0

        def __getitem__(self, key: Any) -> Any:
            Counts.looks += 1
            return super().__getitem__(key)

    counts = Counts([0] * 4000)
    ranges = pack(counts, [atoms_module.Boundary.WORD] * 4000, 16)
    assert (ranges[0][0], ranges[-1][1]) == (0, 4000)
    assert Counts.looks < 4000 * 18


def test_an_overlong_word_is_covered_and_breaks_nothing_around_it() -> None:
    word = "a.b!" * 5000
    text = f"The first sentence. Then {word} stands here. The last one."
    atoms = find_atoms(text)
    found = [text[atom.start : atom.end] for atom in atoms]
    assert found[0] == "The first sentence."
    assert found[-1] == "The last one."
    assert "".join(found).replace(" ", "") == text.replace(" ", "")
