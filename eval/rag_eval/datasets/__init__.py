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
from rag_eval.datasets.talk_files import TALK_FORMATS, read_conversations
from rag_eval.datasets.talks import CUT_SIDES, Conversation, CutSide, Question, Remark

__all__ = [
    "CUT_SIDES",
    "FORMATS",
    "GENERATORS",
    "ORDERS",
    "TALK_FORMATS",
    "Conversation",
    "CutSide",
    "DatasetOptions",
    "Encode",
    "Example",
    "Order",
    "Passage",
    "PromptChunk",
    "Question",
    "Remark",
    "arrange",
    "check_dataset",
    "corpus_texts",
    "load_dataset",
    "read_conversations",
    "read_examples",
    "shared_chunks",
]
