"""The nouns of long conversations: what was said, what is asked about it, and a cut to a number of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from rag_eval.errors import EvalError

Role = Literal["user", "assistant"]

CutSide = Literal["first", "newest"]
CUT_SIDES: tuple[CutSide, ...] = ("first", "newest")

ADVERSARIAL = "adversarial: the conversation holds no answer"
NO_EVIDENCE = "the data set names no utterance of this conversation as evidence"
CUT_OFF = "evidence lies outside the cut"


@dataclass(frozen=True, kw_only=True, slots=True)
class Remark:
    """One utterance.

    Parameters
    ----------
    id : str
        As questions name it for evidence.
    role : Role
        Side of the chat on which it stands.
    text : str
        As the model reads it: with the name of a speaker, a caption of a picture, and the date where a session begins,
        as far as the data set has them.
    """

    id: str
    role: Role
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A question about a conversation.

    Parameters
    ----------
    id : str
        Unique in its data set; a run resumes by it.
    text, answer : str
        The question, and the accepted answer, which is the teacher-forced one too.
    category : str
        As the data set sorts its questions.
    evidence : tuple of str
        Ids of the utterances that hold the answer; at least one.
    """

    id: str
    text: str
    answer: str
    category: str
    evidence: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """Utterances in order, and questions that are asked behind them.

    Parameters
    ----------
    id : str
        Unique in its data set.
    remarks : tuple of Remark
        The oldest first.
    questions : tuple of Question
        Those that can be scored: an answer, and evidence among `remarks`.
    left_out : dict of str to int
        Numbers of the other questions, by reason.
    """

    id: str
    remarks: tuple[Remark, ...]
    questions: tuple[Question, ...]
    left_out: dict[str, int] = field(default_factory=dict)

    def cut(self, lengths: Sequence[int], most: int, side: CutSide) -> Conversation:
        """Keep as many whole utterances as fit, and the questions whose evidence lies among them.

        Parameters
        ----------
        lengths : sequence of int
            Tokens of each utterance.
        most : int
            Most tokens together.
        side : CutSide
            Which end stays.

        Raises
        ------
        EvalError
            Not even one utterance fits.
        """
        order = range(len(lengths)) if side == "first" else range(len(lengths) - 1, -1, -1)
        kept: list[int] = []
        size = 0
        for index in order:
            size += lengths[index]
            if size > most:
                break
            kept.append(index)
        if not kept:
            raise EvalError(
                f"no utterance of conversation {self.id} fits into {most} tokens; give a larger --max-tokens"
            )
        remarks = self.remarks[min(kept) : max(kept) + 1]
        known = {remark.id for remark in remarks}
        inside = tuple(q for q in self.questions if known.issuperset(q.evidence))
        lost = len(self.questions) - len(inside)
        left_out = dict(self.left_out) | ({CUT_OFF: lost} if lost else {})
        return replace(self, remarks=remarks, questions=inside, left_out=left_out)


def make_conversation(
    name: str,
    remarks: Sequence[Remark],
    questions: Sequence[Question],
    left_out: dict[str, int] | None = None,
) -> Conversation:
    """Put a conversation together; questions without evidence among its utterances are counted, not kept.

    Raises
    ------
    ValueError
        No utterance, or two of the same id.
    """
    known = {remark.id for remark in remarks}
    if not remarks:
        raise ValueError("no utterance")
    if len(known) != len(remarks):
        raise ValueError("two utterances have the same id")
    counts = dict(left_out or {})
    kept = [q for q in questions if q.evidence and known.issuperset(q.evidence)]
    if len(kept) < len(questions):
        counts[NO_EVIDENCE] = counts.get(NO_EVIDENCE, 0) + len(questions) - len(kept)
    return Conversation(id=name, remarks=tuple(remarks), questions=tuple(kept), left_out=counts)
