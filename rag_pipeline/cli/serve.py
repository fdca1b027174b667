"""``rag-pipeline serve``: SGLang's own server with retrieval, fusion, documents and the page."""

from __future__ import annotations

import dataclasses
import os
import signal
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rag_pipeline.cli.common import (
    DEFAULT_CHUNK_TOKENS,
    DEFAULT_EMBEDDER,
    MEMORY_DEFAULTS,
    chosen_memory,
    resolve_llm_shown,
)
from rag_pipeline.cli.console import say
from rag_pipeline.config import kv_store_dir
from rag_pipeline.errors import RagPipelineError
from rag_pipeline.prompts.document_order import check_document_order

if TYPE_CHECKING:
    from rag_pipeline.server import Tenants
    from rag_pipeline.sglang_plugin.http.server import ServerFacts, ServerKeys
    from retrievers import Index

_KEY_FILE_VARIABLES = (
    "RAG_PIPELINE_SERVE_API_KEY_FILE",
    "RAG_PIPELINE_SERVE_ADMIN_API_KEY_FILE",
    "RAG_PIPELINE_SERVE_TENANTS",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeOptions:
    """Options of the command, as parsed; `words` go to SGLang."""

    index: tuple[str, ...]
    model: str
    host: str = "127.0.0.1"
    port: int = 30000
    tenants: Path | None = None
    api_key: str | None = field(default=None, repr=False)
    api_key_file: Path | None = None
    admin_api_key: str | None = field(default=None, repr=False)
    admin_api_key_file: Path | None = None
    unprotected: bool = False
    embedder: str | None = None
    policy: str = "query"
    attention: str | None = None
    tpla: str = "off"
    memory: str = "off"
    memory_budget: int = MEMORY_DEFAULTS.budget_tokens
    memory_episodes: int = MEMORY_DEFAULTS.episodes
    memory_block: int = MEMORY_DEFAULTS.block_tokens
    search: str = "dense"
    top_k: int = 4
    document_order: str = "retrieved"
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS
    overlap: int = 0
    max_upload_mb: int = 16
    parse_seconds: int = 60
    parse_memory_mb: int = 1024
    job_seconds: int = 1800
    max_index_chunks: int = 1_000_000
    max_searches: int = 64
    max_questions: int = 128
    max_connections: int = 1024
    max_body_mb: int = 64
    stop_seconds: int = 15
    automatic: bool | None = None
    store: Path | None = None
    kv_remote: str | None = field(default=None, repr=False)
    words: tuple[str, ...] = ()


def run_serve(options: ServeOptions) -> None:
    """Serve; everything that can be refused is refused before the engine starts."""
    from rag_pipeline.cli.cache import use_store
    from rag_pipeline.cli.doctor import gate_facts
    from rag_pipeline.protocol import FusionChoice
    from rag_pipeline.server import (
        ServerSettings,
        Tenants,
        parse_indexes,
        refuse_exposure,
        serve,
    )

    keys = _keys(options)
    _refuse_words(options)
    fusion = FusionChoice(policy=options.policy)
    fusion.check()
    check_document_order(options.document_order)
    memory = chosen_memory(options)
    _choose_attention(options.attention)
    _choose_tpla(options.tpla)
    _choose_remote(options.kv_remote)
    indexes = parse_indexes(options.index)
    tenants = Tenants.load(indexes, options.tenants, operator_key=keys.api_key)
    refuse_exposure(options.host, tenants, open_to_network=options.unprotected)
    _warn_of_the_open(options.host, has_key=tenants.has_key)
    settings = ServerSettings(
        model=resolve_llm_shown(options.model).path,
        embedder=options.embedder or DEFAULT_EMBEDDER,
        policy=options.policy,
        memory=memory,
        search=options.search,
        top_k=options.top_k,
        document_order=options.document_order,
        chunk_tokens=options.chunk_tokens,
        overlap=options.overlap,
        max_upload_bytes=options.max_upload_mb << 20,
        parse_seconds=options.parse_seconds,
        parse_bytes=options.parse_memory_mb << 20,
        job_seconds=options.job_seconds,
        max_index_chunks=options.max_index_chunks,
        open_to_network=options.unprotected,
        max_searches=options.max_searches,
        max_questions=options.max_questions,
        max_connections=options.max_connections,
        max_body_bytes=options.max_body_mb << 20,
        stop_seconds=options.stop_seconds,
    )
    if not fusion.is_exact:
        # No tenant's chunks are computed behind the text of another.
        shared = None if len(tenants) else _opened(next(iter(indexes.values())))
        with shared or nullcontext():
            salts = [t.salt for t in tenants.all() if t.salt] if len(tenants) else None
            use_store(options.store or kv_store_dir(), shared, tenants=salts)
    _choose_automatic(tenants, options.automatic)
    words = ["--host", options.host, "--port", str(options.port), *options.words]
    if not any(word.partition("=")[0] == "--served-model-name" for word in options.words):
        # The folder of a converted model is named by its contents; clients read the name given here.
        words += ["--served-model-name", Path(options.model).name.replace(":", "-")]
    # The server ends by itself on SIGTERM and then passes it on: to the system, as its supervisor expects.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    say(f"Starting SGLang with {options.model}; this takes half a minute on a CPU")
    serve(
        settings,
        tenants,
        words,
        keys=keys,
        on_ready=_say_ready,
        model_gate=lambda attention: gate_facts(settings.model, attention, name=options.model),
    )


def _choose_automatic(tenants: Tenants, given: bool | None) -> None:
    """Tell the engine whose prompts it may approximate unasked: the flag, else the setting, and each tenant's own."""
    from rag_pipeline.sglang_plugin import FUSION_VARIABLE, FusionConfig

    config = FusionConfig.from_env()
    everybody = config.automatic if given is None else given
    choices = {
        tenant.salt: everybody if tenant.automatic is None else tenant.automatic
        for tenant in tenants.all()
    }
    everybody = all(choices.values())
    chosen = () if everybody else tuple(salt for salt, on in choices.items() if on)
    chosen = tuple(sorted({*config.automatic_tenants, *chosen}))
    config = dataclasses.replace(config, automatic=everybody, automatic_tenants=chosen)
    os.environ[FUSION_VARIABLE] = config.to_env()


def _choose_tpla(given: str) -> None:
    """Tell the engine in which basis latents are sliced; a bad name ends the command here."""
    from rag_pipeline.sglang_plugin.tpla.choice import TPLA, chosen_basis

    if given != "off" or TPLA in os.environ:
        os.environ[TPLA] = given
    chosen_basis()


def _choose_attention(given: str | None) -> None:
    """Tell the engine the default attention method: the flag, else the setting. A bad name ends the command here."""
    from rag_pipeline.protocol import FusionRequest, RequestError
    from rag_pipeline.sglang_plugin import FUSION_VARIABLE, FusionConfig

    config = FusionConfig.from_env()
    if given is None:
        return
    try:
        FusionRequest(attention=given).make_attention()
    except RequestError as error:
        raise RagPipelineError(f"--attention: {error}") from None
    config = dataclasses.replace(config, attention=given)
    os.environ[FUSION_VARIABLE] = config.to_env()


def _choose_remote(given: str | None) -> None:
    """Tell the engine its remote tier: the flag, else the setting. A bad address ends the command here."""
    from chunk_cache import parse_remote_url
    from rag_pipeline.sglang_plugin import FUSION_VARIABLE, FusionConfig

    config = FusionConfig.from_env()
    if given is None:
        return
    try:
        parse_remote_url(given)
    except ValueError as error:
        raise RagPipelineError(f"--kv-remote: {error}") from None
    config = dataclasses.replace(config, remote=given)
    os.environ[FUSION_VARIABLE] = config.to_env()
    if "@" in given:
        _hide_command_line(
            "a password", "in a file (?password_file=FILE), or the address as fusion.remote"
        )


def _opened(folder: Path) -> Index | None:
    """Index of a folder; None where there is none yet, or none that can be read: the routes say so."""
    from retrievers import Index, RetrievalError

    try:
        return Index.open(folder)
    except RetrievalError:
        return None


def _say_ready(facts: ServerFacts) -> None:
    shown = f"[{facts.host}]" if ":" in facts.host else facts.host
    url = f"http://{shown}:{facts.port}"
    say(f"Ready: {url}/v1 for OpenAI clients, {url}/v1/rag/chat/completions with documents,")
    say(f"       {url}/rag for the page, {url}/v1/rag/health for the state")


def _keys(options: ServeOptions) -> ServerKeys:
    """Keys by flag, file or environment; one on the command line is taken out of the process list."""
    from rag_pipeline.server import ADMIN_API_KEY_VARIABLE, API_KEY_VARIABLE, MIN_KEY, read_key
    from rag_pipeline.sglang_plugin.http.server import ServerKeys

    for variable in _KEY_FILE_VARIABLES:
        # Elsewhere an empty variable is one that is not set; here it would mean that no key is wanted.
        if not os.environ.get(variable, variable).strip():
            raise RagPipelineError(f"{variable} is empty; name a file, or take the variable away")
    keys = ServerKeys(
        api_key=read_key(
            flag="--api-key",
            given=options.api_key,
            file=options.api_key_file,
            variable=API_KEY_VARIABLE,
        ),
        admin_api_key=read_key(
            flag="--admin-api-key",
            given=options.admin_api_key,
            file=options.admin_api_key_file,
            variable=ADMIN_API_KEY_VARIABLE,
        ),
    )
    for flag, key in (("--api-key", keys.api_key), ("--admin-api-key", keys.admin_api_key)):
        if key is not None and len(key) < MIN_KEY:
            say(f"WARNING: {flag} has {len(key)} characters; a key of {MIN_KEY} cannot be guessed")
    if options.api_key is not None or options.admin_api_key is not None:
        _hide_command_line("a key", "as --api-key-file or RAG_PIPELINE_API_KEY")
    return keys


def _hide_command_line(what: str, instead: str) -> None:
    from setproctitle import setproctitle

    setproctitle("rag-pipeline serve")
    say(
        f"WARNING: {what} on the command line stood in the process list until now, and may stand in "
        f"the shell's history; give it {instead}"
    )


def _warn_of_the_open(host: str, *, has_key: bool) -> None:
    from rag_pipeline.server import is_loopback

    if is_loopback(host):
        return
    say("!" * 78)
    say(f"WARNING: listening on {host}: other machines can reach this server, without encryption.")
    if not has_key:
        say("WARNING: no key: WHOEVER REACHES IT can read, add and delete all documents.")
    say("WARNING: put a TLS proxy in front, or leave out --host to serve this machine only.")
    say("!" * 78)


def _refuse_words(options: ServeOptions) -> None:
    """Options of this command that SGLang spells otherwise, and words that are no flags."""
    if options.words and not options.words[0].startswith("-"):
        raise RagPipelineError(f"{options.words[0]!r} is not a flag; `serve` takes flags only")
    for word in options.words:
        if word.partition("=")[0] in ("--model-path", "--tokenizer-path", "--config"):
            raise RagPipelineError(f"{word.partition('=')[0]} is not taken here; use --model")
