"""Data sets: files in the public QA formats, generators, and prompts made from them."""

from rag_eval.datasets.arrange import PromptChunk, arrange, shared_chunks
from rag_eval.datasets.catalog import GENERATORS, check_dataset, corpus_texts, load_dataset
from rag_eval.datasets.core import (
    ORDERS,
    DatasetOptions,
    Encode,
    Example,
    Order,
    Passage,
)
from rag_eval.datasets.files import FORMATS, read_examples

__all__ = [
    "FORMATS",
    "GENERATORS",
    "ORDERS",
    "DatasetOptions",
    "Encode",
    "Example",
    "Order",
    "Passage",
    "PromptChunk",
    "arrange",
    "check_dataset",
    "corpus_texts",
    "load_dataset",
    "read_examples",
    "shared_chunks",
]
