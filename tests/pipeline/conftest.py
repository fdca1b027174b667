"""Tokenizers and chunks for the layout's and the pipeline's tests."""

from __future__ import annotations

import json
import pydoc_data.topics
from pathlib import Path

import pytest
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from rag_pipeline.prompts.tokenizer import ModelTokenizer
from retrievers.types import Chunk, SearchHit

LLAMA_CHAT = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}"
    "<<SYS>>\n{{ m['content'] }}\n<</SYS>>\n\n{% elif m['role'] == 'user' %}"
    "[INST] {{ m['content'] | trim }} [/INST]{% endif %}{% endfor %}"
)


def make_hit(
    topic: str, *, score: float = 1.0, length: int = 600, text: str | None = None
) -> SearchHit:
    body = text if text is not None else pydoc_data.topics.topics[topic][:length].strip()
    chunk = Chunk(
        id=f"id-{topic}",
        document_id=topic,
        text=body,
        title=topic,
        path=f"{topic}.txt",
        start=0,
        end=len(body),
        num_tokens=1,
    )
    return SearchHit(chunk=chunk, score=score)


@pytest.fixture(scope="session")
def byte_level(smollm2_path: Path) -> ModelTokenizer:
    """Byte-level BPE with ChatML control tokens: the packaged model's own."""
    return ModelTokenizer.load(smollm2_path)


def _sentencepiece_like(scheme: str, folder: Path) -> ModelTokenizer:
    """A real BPE trained here, with byte fallback and the leading space of older Llama models."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    if scheme == "prepend":
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        tokenizer.decoder = decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
        tokenizer.decoder = decoders.Sequence(
            [
                decoders.ByteFallback(),
                decoders.Metaspace(prepend_scheme=scheme),
                decoders.Fuse(),
            ]
        )
    special = [AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>")]
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=special,
        show_progress=False,
    )
    texts = [pydoc_data.topics.topics[name] for name in ("with", "for", "lambda", "import")]
    tokenizer.train_from_iterator(texts, trainer)
    # Byte pieces go into the vocabulary itself; as trainer's special tokens they would be matched
    # in texts that spell them out.
    settings = json.loads(tokenizer.to_str())
    vocabulary = settings["model"]["vocab"]
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    tokenizer = Tokenizer.from_str(json.dumps(settings))
    hf = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    hf.chat_template = LLAMA_CHAT
    hf.save_pretrained(folder)
    return ModelTokenizer.load(folder)


@pytest.fixture(scope="session", params=["always", "first", "prepend"])
def sentencepiece_like(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> ModelTokenizer:
    """Metaspace tokenizers in the three ways they put a space before a text."""
    return _sentencepiece_like(request.param, tmp_path_factory.mktemp(f"sp-{request.param}"))
