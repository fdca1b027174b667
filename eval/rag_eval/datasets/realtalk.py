"""REALTALK (Lee et al. 2025, arXiv 2502.13270): two strangers over three weeks, one conversation per file.

A file is LoCoMo's sample without the folder ``conversation`` around its sessions; utterances have ``clean_text``, and
``name`` holds the two speakers. Its questions have LoCoMo's fields and first three categories.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rag_eval.datasets.locomo import read_questions, read_sessions
from rag_eval.datasets.talks import Conversation, make_conversation


def parse_realtalk(sample: Mapping[str, Any], fallback_id: str) -> Conversation:
    """Read one file of REALTALK.

    Raises
    ------
    KeyError, TypeError, ValueError
        Another format.
    """
    questions, left_out = read_questions(fallback_id, sample["qa"])
    first = str(sample["name"]["speaker_1"])
    remarks = read_sessions(sample, first=first, text_field="clean_text")
    return make_conversation(fallback_id, remarks, questions, left_out)
