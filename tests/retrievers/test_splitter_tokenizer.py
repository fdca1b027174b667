from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from retrievers import HFTokenizer, RetrievalError

_TEXT = "Hello <|im_start|> wörld 🎉 x = f(1)\n\n  end<|im_end|>"


def test_special_tokens_in_a_text_are_ordinary_text(
    tokenizer: HFTokenizer, tokenizer_folder: Path
) -> None:
    vocabulary = json.loads((tokenizer_folder / "tokenizer.json").read_text())["added_tokens"]
    special = {token["id"] for token in vocabulary}
    assert len(special) == 2
    assert not special & set(tokenizer.encode(_TEXT))
    assert not special & set(tokenizer.encode_batch([_TEXT])[0])


def test_offsets_and_batches_agree_with_encode(tokenizer: HFTokenizer) -> None:
    ids = tokenizer.encode(_TEXT)
    offsets = tokenizer.encode_offsets(_TEXT)
    assert len(ids) == len(offsets)
    assert (offsets[0][0], offsets[-1][1]) == (0, len(_TEXT))
    assert tokenizer.encode_batch([_TEXT, "", "a"]) == [ids, [], tokenizer.encode("a")]
    assert tokenizer.count_batch([_TEXT, "", "a"]) == [len(ids), 0, 1]


def test_truncation_and_padding_of_the_file_are_switched_off(
    tokenizer: HFTokenizer, tokenizer_folder: Path, tmp_path: Path
) -> None:
    content = json.loads((tokenizer_folder / "tokenizer.json").read_text())
    content["truncation"] = {
        "direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0,
    }  # fmt: skip
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(content))
    other = HFTokenizer(file)
    assert other.encode(_TEXT) == tokenizer.encode(_TEXT)
    assert other.fingerprint != tokenizer.fingerprint


def test_the_fingerprint_follows_the_file(tokenizer: HFTokenizer, tokenizer_folder: Path) -> None:
    assert HFTokenizer(tokenizer_folder / "tokenizer.json").fingerprint == tokenizer.fingerprint
    assert len(tokenizer.fingerprint) == 64


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RetrievalError, match=r"expected tokenizer\.json or tokenizer\.model"):
        HFTokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_a_broken_tokenizer_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"model": 3')
    with pytest.raises(RetrievalError, match=r"cannot (read|convert)"):
        HFTokenizer(tmp_path)


def test_a_sentencepiece_folder_is_converted(tmp_path: Path) -> None:
    from pydoc_data.topics import topics

    sentencepiece = pytest.importorskip("sentencepiece", reason="comes with the server extra")
    corpus = [line for line in "\n".join(topics.values()).splitlines() if line.strip()][:3000]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=800,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert not (tmp_path / "tokenizer.json").exists()
    tokenizer = HFTokenizer(tmp_path)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    text = "The assert statement is a convenient way to insert debugging assertions."
    assert tokenizer.encode(text) == processor.encode(text)


def test_the_adapter_imports_neither_transformers_nor_torch(tokenizer_folder: Path) -> None:
    program = (
        "import sys; from retrievers import HFTokenizer, TokenSplitter, Document\n"
        "s = TokenSplitter(HFTokenizer(sys.argv[1])); s.split(Document(id='a', text='b', title='c'))\n"
        "print([m for m in ('torch', 'transformers', 'sglang') if m in sys.modules])"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program, str(tokenizer_folder)],
        cwd=root, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "[]"
