"""The flags of SGLang's server: what the caller gave, what this project adds, what it refuses."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rag_pipeline.errors import EngineError
from rag_pipeline.sglang_plugin.launch import launch_hooks, startup

MAX_QUEUED_REQUESTS = 128
"""``--max-queued-requests`` where the caller says nothing; SGLang's own queue has no end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerKeys:
    """SGLang's two keys; None for one that is not wanted."""

    api_key: str | None = field(default=None, repr=False)
    admin_api_key: str | None = field(default=None, repr=False)


def read_flags(model_path: Path, words: Sequence[str], keys: ServerKeys) -> Any:
    """SGLang's settings from the caller's words, this project's defaults behind them.

    Parameters
    ----------
    model_path : Path
        Folder in Hugging Face format.
    words : sequence of str
        Flags as ``sglang serve`` takes them.
    keys : ServerKeys
        Put in behind the words, which SGLang shows.

    Returns
    -------
    object
        SGLang's ``ServerArgs``.

    Raises
    ------
    EngineError
        One line: a flag that SGLang does not know, or one that the RAG routes cannot live with.
    """
    import sglang.srt.plugins
    from sglang.srt.server_args import prepare_server_args

    sglang.srt.plugins.load_plugins()
    launch_hooks.ensure_applied()
    given = ["--model-path", str(model_path), *words]
    with _argparse_in_one_line():
        server_args = prepare_server_args([*given, *_default_words(words)])
    for name, value in _missing_defaults(words).items():
        if value is True:  # as a word, one of these is called deprecated on every start
            setattr(server_args, name, value)
    for name, wanted in (("tokenizer_worker_num", 1), ("enable_http2", False), ("nnodes", 1)):
        if getattr(server_args, name) != wanted:
            raise EngineError(
                f"--{name.replace('_', '-')} is {getattr(server_args, name)}; the RAG routes live in "
                f"SGLang's one HTTP process: leave it at {wanted}"
            )
    if server_args.grpc_mode or server_args.smg_grpc_mode or server_args.encoder_only:
        raise EngineError(
            "gRPC and encoder-only servers have no HTTP routes; leave out that flag, or use `sglang serve`"
        )
    if server_args.grpc_port is not None or os.environ.get("SGLANG_RUST_SERVER", "0") not in (
        "",
        "0",
    ):
        raise EngineError(
            "--grpc-port and SGLANG_RUST_SERVER open a way in that no key guards; leave them out, or use "
            "`sglang serve`"
        )
    for name in ("api_key", "admin_api_key"):
        if getattr(server_args, name) is not None:
            flag = f"--{name.replace('_', '-')}"
            raise EngineError(f"{flag} must be written in full, so that it is seen here")
        setattr(server_args, name, getattr(keys, name))
    startup.check_port({"host": server_args.host, "port": server_args.port})
    return server_args


def _default_words(words: Sequence[str]) -> list[str]:
    """Flags of the CPU defaults that the caller did not give."""
    flags: list[str] = []
    for name, value in _missing_defaults(words).items():
        if value is not True:
            flags += [f"--{name.replace('_', '-')}", str(value)]
    return flags


def _missing_defaults(words: Sequence[str]) -> dict[str, Any]:
    given = {word.split("=", 1)[0] for word in words if word.startswith("--")}
    defaults = {"max_queued_requests": MAX_QUEUED_REQUESTS} | startup.cpu_defaults({})
    return {k: v for k, v in defaults.items() if f"--{k.replace('_', '-')}" not in given}


@contextmanager
def _argparse_in_one_line() -> Iterator[None]:
    """Argparse prints a page of usage before the one line that matters."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            yield
    except SystemExit as stop:
        if stop.code in (0, None):
            raise EngineError("`sglang serve --help` lists SGLang's own flags") from None
        lines = said.getvalue().strip().splitlines() or ["flags that SGLang does not take"]
        reason = lines[-1].partition("error: ")[2] or lines[-1]
        raise EngineError(f"{reason}; `sglang serve --help` lists SGLang's flags") from None
