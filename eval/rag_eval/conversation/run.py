"""A whole evaluation of conversation memories: conversations in, one record per question and method, numbers out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from rag_eval.command import Progress, no_progress
from rag_eval.conversation.config import ConversationConfig
from rag_eval.conversation.measure import measure_question
from rag_eval.conversation.methods import MethodRun
from rag_eval.conversation.summary import summarise
from rag_eval.conversation.table import table
from rag_eval.conversation.talk import ROOM, SentenceEncoder, Talk, context_of, place
from rag_eval.datasets import Question, read_conversations
from rag_eval.errors import EvalError
from rag_eval.runner.engine import DEFAULT_ENGINE_ARGS, start_session
from rag_eval.runner.passage import fusion_settings
from rag_eval.runner.predictions import METRICS, RunFolder
from rag_eval.runner.prompts import PromptMaker
from rag_eval.runner.run import TABLE, model_folder, run_notes
from rag_eval.runner.session import EngineSession
from rag_pipeline import ModelTokenizer
from rag_pipeline.memory import MemoryBuilder, MemoryConfig, Planner, parse_memory
from rag_pipeline.whole_file import write_whole


def run_conversations(
    config: ConversationConfig, progress: Progress = no_progress
) -> dict[str, Any]:
    """Measure every method on every question, conversation by conversation, in one engine.

    Parameters
    ----------
    config : ConversationConfig
        Settings.
    progress : Progress
        Called with one line at a time.

    Returns
    -------
    dict
        The numbers that were also written into ``config.out``; see :func:`rag_eval.conversation.summary.summarise`.
        ``interrupted`` is true where the run was broken off with something measured.

    Raises
    ------
    EvalError
        A bad data set, method or output folder, conversations that do not fit the model; ``ModeUnavailableError``
        for an engine without memory.
    """
    conversations = read_conversations(config.dataset)[: config.limit_conversations]
    for name in config.method_names:
        _memory_config(config, name, 1 << 12)
    model, vocabulary = model_folder(config.model, progress)
    context = context_of(model)
    tokenizer = ModelTokenizer.load(model)
    encode = sentence_encoder(config.embedder, progress)
    talks = [place(config, talk, tokenizer, encode, context) for talk in conversations]
    notes = run_notes(
        methods=config.method_names,
        limit_conversations=config.limit_conversations,
        limit_questions=config.limit_questions,
        conversations={
            talk.conversation.id: {
                "utterances": len(talk.history),
                "history_tokens": talk.tokens,
                "budget_tokens": talk.budget,
                "questions": len(talk.conversation.questions),
                "left_out": talk.conversation.left_out,
            }
            for talk in talks
        },
    )
    folder = RunFolder(config.out, config.identity(), notes)
    work = list(_work(config, talks, folder))
    progress(
        f"{sum(len(left) for *_, left in work)} answers to measure in {len(talks)} conversations"
    )
    interrupted = False
    if work:
        maker = PromptMaker(model, gold_tokens=config.gold_tokens)
        longest = max(talk.tokens for talk in talks) + ROOM + config.max_new_tokens
        pool = max(DEFAULT_ENGINE_ARGS["max_total_tokens"], 2 * longest)
        with fusion_settings():
            session = start_session(
                maker, vocabulary, {"max_total_tokens": pool} | config.engine_args
            )
        try:
            measuring = Measuring(config, session, maker, encode, folder, progress)
            for talk, name, left in work:
                measuring.measure(talk, name, left)
        except KeyboardInterrupt:
            if not folder.records:
                raise
            interrupted = True
        finally:
            session.close()
    return _finish(config, talks, folder) | {"interrupted": interrupted}


class Measuring:
    """One engine that measures methods on conversations."""

    def __init__(
        self,
        config: ConversationConfig,
        session: EngineSession,
        maker: PromptMaker,
        encode: SentenceEncoder,
        folder: RunFolder,
        progress: Progress,
    ) -> None:
        from rag_pipeline.generation import EngineBackend

        self._config, self._session, self._maker = config, session, maker
        self._encode, self._folder, self._progress = encode, folder, progress
        self._backend = EngineBackend(session.engine)
        self._tokenizer = ModelTokenizer.load(maker.model)

    def measure(self, talk: Talk, name: str, left: Sequence[Question]) -> None:
        """Build a method's records of a conversation, and ask what is left to ask."""
        planner = Planner(
            _memory_config(self._config, name, talk.budget),
            self._tokenizer,
            self._encode,
            context_length=self._backend.context_length,
        )
        where = f"{talk.conversation.id} {name}"
        # What another method left in the radix tree would be found by this one.
        self._session.flush()
        builder = MemoryBuilder(self._backend)
        try:
            run = MethodRun(self._session, builder, planner, talk.history)
            built = run.build(lambda line: self._progress(f"{where}: {line}"))
            head = {"conversation": talk.conversation.id, "method": name}
            key = _build_key(talk, name)
            if key not in self._folder.records:
                self._folder.append({"id": key} | head | {"budget": talk.budget} | built)
            for done, question in enumerate(left, start=1):
                row = self._asked(run, talk, question)
                self._folder.append({"id": _key(question, name)} | head | row)
                self._progress(
                    f"{where} {done}/{len(left)}: recall {row['evidence_recall']:.2f}, NLL {row['nll']:.2f}, "
                    f"{row['turn_s']:.2f} s"
                )
        finally:
            builder.close()

    def _asked(self, run: MethodRun, talk: Talk, question: Question) -> dict[str, Any]:
        most = self._config.max_new_tokens
        room = max(most, self._config.gold_tokens)
        laid = run.lay_out(question.text, max_new_tokens=room)
        gold = self._maker.encode(question.answer)[: self._config.gold_tokens]
        row = measure_question(
            self._session,
            laid,
            question,
            talk.evidence(question),
            gold,
            max_new_tokens=most,
        )
        return row | {"in_episode": run.in_episodes(talk.places(question), laid.candidate)}


def _key(question: Question, method: str) -> str:
    return f"{question.id}|{method}"


def _build_key(talk: Talk, method: str) -> str:
    return f"{talk.conversation.id}|{method}|build"


def _asked_questions(config: ConversationConfig, talk: Talk) -> tuple[Question, ...]:
    return talk.conversation.questions[: config.limit_questions]


def _work(
    config: ConversationConfig, talks: Sequence[Talk], folder: RunFolder
) -> Iterator[tuple[Talk, str, list[Question]]]:
    """What is not measured yet: a conversation at a time with all methods, so that they have the same questions."""
    for talk in talks:
        for name in config.method_names:
            left = [
                question
                for question in _asked_questions(config, talk)
                if _key(question, name) not in folder.records
            ]
            if left:
                yield talk, name, left


def _memory_config(config: ConversationConfig, name: str, budget: int) -> MemoryConfig:
    found = parse_memory({**config.memory, "method": name, "budget_tokens": budget})
    if found is None:
        raise EvalError(f"method {name!r} is no memory; `full` stands for the whole history")
    return found


def sentence_encoder(name: str, progress: Progress = no_progress) -> SentenceEncoder:
    """Vectors of texts by a sentence model, on the CPU: what evaluates must not take an engine's GPU memory."""
    from rag_pipeline import resolve_embedder
    from retrievers import Embedder

    found = resolve_embedder(name, progress=lambda line, share: progress(line))
    embedder = Embedder(found.path, device="cpu")
    return lambda texts: embedder.encode_documents(texts)


def _finish(config: ConversationConfig, talks: Sequence[Talk], folder: RunFolder) -> dict[str, Any]:
    """Summarise what the folder holds of what was asked for, and write it beside the records."""
    names = config.method_names
    rows = {
        name: {
            question.id: folder.records[_key(question, name)]
            for talk in talks
            for question in _asked_questions(config, talk)
            if _key(question, name) in folder.records
        }
        for name in names
    }
    builds = {
        name: [
            folder.records[_build_key(talk, name)]
            for talk in talks
            if _build_key(talk, name) in folder.records
        ]
        for name in names
    }
    left_out: dict[str, int] = {}
    for talk in talks:
        for reason, count in talk.conversation.left_out.items():
            left_out[reason] = left_out.get(reason, 0) + count
    report = {
        "dataset": config.dataset,
        "model": config.model,
        "budget": config.budget,
        "conversations": len(talks),
        "history_tokens": [talk.tokens for talk in talks],
        "budget_tokens": [talk.budget for talk in talks],
        "left_out": left_out,
        **summarise(rows, builds),
    }
    text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False)
    write_whole(config.out / METRICS, text + "\n")
    write_whole(config.out / TABLE, table(report) + "\n")
    return report
