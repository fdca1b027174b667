"""``rag-pipeline chat``: a conversation in the terminal, or through a pipe."""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rag_pipeline.cli.chat_lines import COMMANDS, help_text, read_messages
from rag_pipeline.cli.common import MEMORY_DEFAULTS, chosen_memory, resolve_llm_shown
from rag_pipeline.cli.console import emit_json, say, step, write, write_error
from rag_pipeline.cli.transcript import Transcript
from rag_pipeline.errors import RagPipelineError

if TYPE_CHECKING:
    from rag_pipeline.chat_session import ChatSession, FinishedTurn
    from rag_pipeline.generation import Backend


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ChatOptions:
    """Options of the command, as parsed."""

    model: str
    memory: str = "off"
    memory_budget: int = MEMORY_DEFAULTS.budget_tokens
    memory_episodes: int = MEMORY_DEFAULTS.episodes
    memory_block: int = MEMORY_DEFAULTS.block_tokens
    system: str | None = None
    server: str | None = None
    history: Path | None = None
    store: Path | None = None
    max_new_tokens: int = 256


def run_chat(options: ChatOptions, *, json_output: bool) -> None:
    """Run the command: everything that can be refused is refused before the engine starts."""
    from rag_pipeline.chat_session import ChatSession
    from rag_pipeline.protocol import SamplingOptions

    memory = chosen_memory(options)
    transcript = None if options.history is None else Transcript(options.history)
    system = transcript.system if options.system is None and transcript else options.system or ""
    folder = resolve_llm_shown(options.model).path
    backend = _open_backend(options, folder)
    with ChatSession(
        backend,
        folder,
        memory=memory,
        system=system,
        sampling=SamplingOptions(max_new_tokens=options.max_new_tokens),
        messages=transcript.messages if transcript else (),
    ) as session:
        if transcript and transcript.messages:
            say(f"{options.history}: {len(transcript.messages)} messages")
        elif transcript and system and not transcript.system:
            transcript.append([("system", system)])
        if sys.stdin.isatty():
            say('Type a message; /help lists the commands, """ holds several lines, Ctrl-D ends.')
        _converse(session, transcript, json_output=json_output)


def _open_backend(options: ChatOptions, folder: Path) -> Backend:
    from rag_pipeline import EngineBackend, ServerBackend
    from rag_pipeline.cli.cache import use_store
    from rag_pipeline.cli.cache_server import operator_key

    if options.server is not None:
        server = ServerBackend(options.server, api_key=operator_key())
        try:
            server.check_model(folder)
        except BaseException:
            server.close()
            raise
        return server
    if options.memory != "off":
        use_store(options.store)
    with step(f"Starting SGLang with {options.model}"):
        return EngineBackend.start(folder)


def _converse(session: ChatSession, transcript: Transcript | None, *, json_output: bool) -> None:
    for text in read_messages():
        command = text.split()[0].lower() if text.startswith("/") and "\n" not in text else ""
        if command in ("/quit", "/exit", "/bye"):
            return
        if command:
            _obey(command, session, json_output=json_output)
            continue
        try:
            turn = _answer(session, text, json_output=json_output)
        except RagPipelineError as error:
            # A message that does not fit ends a pipe, which must not go on as if it had been answered; not a person's chat.
            if not sys.stdin.isatty():
                raise
            say(f"error: {error}")
            continue
        if transcript is not None:
            transcript.append([("user", text), ("assistant", turn.text)])


def _obey(command: str, session: ChatSession, *, json_output: bool) -> None:
    if command == "/memory":
        facts = session.memory_facts()
        if json_output:
            emit_json({"memory": facts})
        else:
            _show_facts(facts)
    elif command == "/clear":
        session.clear()
        say("The conversation is forgotten; what the file holds stays.")
    elif command in ("/help", "/?"):
        write_error(help_text())
    else:
        say(f"{command} is no command; allowed are {', '.join(COMMANDS)}")


def _show_facts(facts: dict[str, Any]) -> None:
    width = max(map(len, facts))
    for name, value in facts.items():
        write(f"  {name:{width}}  {value}\n")


def _answer(session: ChatSession, text: str, *, json_output: bool) -> FinishedTurn:
    """Ask, print the answer as it comes, and return the turn."""
    started = time.perf_counter()
    first = None
    for piece in session.ask(text):
        if first is None:
            first = time.perf_counter()
        if not json_output:
            write(piece)
    turn = session.last
    if json_output:
        now = time.perf_counter()
        emit_json(
            {
                "turn": session.num_turns,
                "question": text,
                "answer": turn.text,
                "finish_reason": turn.finish_reason,
                "usage": dataclasses.asdict(turn.usage),
                "timing": {
                    "ttft_s": round((first or now) - started, 6),
                    "total_s": round(now - started, 6),
                },
                "memory": turn.memory,
                "truncated": turn.truncated.to_json(),
            }
        )
    else:
        write("\n" if turn.text.endswith("\n") else "\n\n" if sys.stdout.isatty() else "\n")
    return turn
