"""Writes ``planted_facts.jsonl``, the data of the two tasks in this folder: no download, no hub.

``python eval/lm_eval_tasks/make_planted.py --model smollm2-135m`` writes the same file again. The
model only measures the length of the passages; any will do.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from rag_eval.datasets import DatasetOptions, load_dataset

HERE = Path(__file__).resolve().parent
EXAMPLES = 40
CHOICES = 4


def records(model: str) -> list[dict[str, object]]:
    """Planted facts with wrong codes to choose from, taken from the facts beside the right one."""
    from rag_pipeline import ModelTokenizer, resolve_llm

    encode = ModelTokenizer.load(resolve_llm(model).path).encode
    options = DatasetOptions(chunks=CHOICES, chunk_tokens=96)
    found: list[dict[str, object]] = []
    for example in load_dataset("planted-1hop", encode=encode, options=options, limit=EXAMPLES):
        text = " ".join(passage.text for passage in example.passages)
        codes = sorted({word.strip(".") for word in text.split() if word.strip(".").isdigit()})
        codes = [code for code in codes if len(code) == 5]
        assert len(codes) == CHOICES
        random.Random(example.id).shuffle(codes)
        found.append(
            {
                "id": example.id,
                "context": "\n\n".join(passage.text for passage in example.passages),
                "lead": example.lead,
                "answer": example.answers[0],
                "codes": codes,
                "label": codes.index(example.answers[0]),
            }
        )
    return found


def main() -> None:
    """Write the file under a temporary name and rename it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    lines = [json.dumps(record) for record in records(parser.parse_args().model)]
    path = HERE / "planted_facts.jsonl"
    temporary = path.with_suffix(".tmp")
    temporary.write_text("\n".join(lines) + "\n", "utf-8")
    temporary.replace(path)


if __name__ == "__main__":
    main()
