"""Backend on a running SGLang server, reached by URL."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncGenerator, Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from rag_pipeline.errors import EngineError, one_line
from rag_pipeline.models.stock_tokenizer import load_stock_tokenizer
from rag_pipeline.protocol import GenerationPiece, GenerationRequest, StreamReader

_CONNECT_S = 10.0
_INFO_S = 30.0


class ServerBackend:
    """Generates through ``/generate`` of an SGLang server.

    Parameters
    ----------
    url : str
        Base URL, for example ``http://127.0.0.1:30000``.
    api_key : str, optional
        Sent as bearer token, for servers started with ``--api-key``.
    read_timeout_s : float or None
        Longest silence between two pieces, seconds; None waits for ever. The first piece comes
        only after the prefill.

    Raises
    ------
    EngineError
        One line: the URL is malformed, nobody answers, who answers is not SGLang, or does not take the key.
    """

    def __init__(
        self, url: str, *, api_key: str | None = None, read_timeout_s: float | None = 600.0
    ) -> None:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise EngineError(f"server URL {url!r} is malformed; write it as http://HOST:PORT")
        self.url = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._timeout = httpx.Timeout(read_timeout_s, connect=_CONNECT_S)
        # trust_env would send requests for localhost through a proxy named in the environment.
        self._client = httpx.Client(timeout=self._timeout, headers=self._headers, trust_env=False)
        try:
            self.model_info = self._info("/model_info", needed="model_path")
            server_info = self._server_info()
        except BaseException:
            self._client.close()
            raise
        if self.model_info.get("is_generation") is False:
            raise EngineError(
                f"the server at {self.url} serves an embedding model "
                f"({self.model_info['model_path']}); start one with a language model"
            )
        self._incremental = bool(server_info.get("incremental_streaming_output"))
        limit = server_info.get("max_req_input_len") or server_info.get("context_length")
        if not isinstance(limit, int):
            raise EngineError(f"the server at {self.url} does not say its context length")
        self._context_length = limit

    @property
    def context_length(self) -> int:
        """Most tokens of prompt and answer together that the server admits."""
        return self._context_length

    @property
    def model_path(self) -> str:
        """Model folder or hub id as the server names it; it may lie on another machine."""
        return str(self.model_info["model_path"])

    def check_model(self, folder: Path) -> None:
        """Refuse a server whose model is another than the one prompts are laid out for.

        Token ids mean something only to the model they were made for, so a mismatch would give
        an answer made of noise.

        Parameters
        ----------
        folder : Path
            Local folder whose tokenizer makes the prompts.

        Raises
        ------
        EngineError
            Names both models.
        """
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        theirs = (self.model_info.get("architectures"), self.model_info.get("model_type"))
        ours = (config.get("architectures"), config.get("model_type"))
        same_vocabulary = self._tokenize(_PROBE) == _local_ids(folder, _PROBE)
        if theirs != ours or not same_vocabulary:
            raise EngineError(
                f"the server at {self.url} serves {self.model_path}, whose "
                f"{'tokenizer' if theirs == ours else 'architecture'} is not that of {folder}; "
                "name the server's model with --model"
            )

    def generate(self, request: GenerationRequest) -> Generator[GenerationPiece, None, None]:
        """Yield pieces as they come; closing the generator aborts the request."""
        with (
            self._exchange(request) as (body, reader),
            self._client.stream("POST", f"{self.url}/generate", json=body) as response,
        ):
            if response.status_code != 200:
                raise _refusal(self.url, response.status_code, response.read())
            for line in response.iter_lines():
                if (piece := reader.read(line)) is not None:
                    yield piece

    async def agenerate(self, request: GenerationRequest) -> AsyncGenerator[GenerationPiece, None]:
        """Yield as :meth:`generate` does, without blocking the event loop."""
        # One client a request: an async client belongs to the loop that first used it, and a
        # pipeline may be used from several.
        async with httpx.AsyncClient(
            timeout=self._timeout, headers=self._headers, trust_env=False
        ) as client:
            with self._exchange(request) as (body, reader):
                async with client.stream("POST", f"{self.url}/generate", json=body) as response:
                    if response.status_code != 200:
                        raise _refusal(self.url, response.status_code, await response.aread())
                    async for line in response.aiter_lines():
                        if (piece := reader.read(line)) is not None:
                            yield piece

    def close(self) -> None:
        """Close the connections; the server runs on."""
        self._client.close()

    @contextmanager
    def _exchange(self, request: GenerationRequest) -> Iterator[tuple[dict[str, Any], _SseReader]]:
        """Body to send and reader of what comes; a stream that is left before its end is aborted."""
        rid = uuid.uuid4().hex
        body = {
            "input_ids": list(request.input_ids),
            "sampling_params": request.sampling.to_params(),
            "stream": True,
            "rid": rid,
            "kv_hints": request.fusion.to_kv_hints(),
        }
        reader = _SseReader(self.url, incremental=self._incremental)
        try:
            yield body, reader
            reader.check_end()
        except httpx.HTTPError as error:
            raise _http_error(self.url, error) from error
        finally:
            if not reader.done:
                self._abort(rid)

    def _abort(self, rid: str) -> None:
        """Ask for an abort; a closed connection alone is noticed only at the next token."""
        try:
            self._client.post(f"{self.url}/abort_request", json={"rid": rid}, timeout=_CONNECT_S)
        except httpx.HTTPError:
            return  # the server is gone, and the request with it

    def _tokenize(self, text: str) -> list[int] | None:
        body = {"prompt": text, "add_special_tokens": False}
        try:
            response = self._client.post(f"{self.url}/v1/tokenize", json=body, timeout=_INFO_S)
            tokens = response.json()["tokens"]
        except (httpx.HTTPError, ValueError, KeyError, TypeError):
            return None
        return tokens[0] if tokens and isinstance(tokens[0], list) else tokens

    def _server_info(self) -> dict[str, Any]:
        """How the server streams and how much it admits.

        A stock server says it to every key. One of this project keeps that route, which shows the whole
        server, for its operator, and says to a tenant what it needs in its health.
        """
        response = self._get("/server_info")
        if response.status_code != 403:
            return self._read(response, "/server_info", needed="version")
        health = self._get("/v1/rag/health")
        if health.status_code == 404:
            raise _key_refused(self.url, "/server_info", response, given=bool(self._headers))
        engine = self._read(health, "/v1/rag/health", needed="engine")["engine"]
        return engine if isinstance(engine, dict) else {}

    def _info(self, path: str, *, needed: str) -> dict[str, Any]:
        return self._read(self._get(path), path, needed=needed)

    def _get(self, path: str) -> httpx.Response:
        try:
            return self._client.get(f"{self.url}{path}", timeout=_INFO_S)
        except httpx.HTTPError as error:
            raise _http_error(self.url, error) from error

    def _read(self, response: httpx.Response, path: str, *, needed: str) -> dict[str, Any]:
        if response.status_code in (401, 403):
            raise _key_refused(self.url, path, response, given=bool(self._headers))
        # Health is whole with 503 too, where the plugin is off.
        try:
            info = response.json() if response.status_code in (200, 503) else None
        except ValueError:
            info = None
        if not isinstance(info, dict) or needed not in info:
            raise EngineError(
                f"{self.url} answers, but is not an SGLang server (GET {path} gave "
                f"{response.status_code}); give the URL of one"
            )
        return info


class _SseReader:
    """Turns server-sent lines into pieces."""

    def __init__(self, url: str, *, incremental: bool) -> None:
        self.done = False
        self._url = url
        self._reader = StreamReader(incremental=incremental, sender="server")

    def read(self, line: str) -> GenerationPiece | None:
        """Piece of one line; None for blank lines and the end mark."""
        if not line.startswith("data:"):
            return None
        data = line[len("data:") :].strip()
        if data == "[DONE]":
            self.done = True
            return None
        try:
            out: Mapping[str, Any] = json.loads(data)
        except ValueError as error:
            raise EngineError(f"the server at {self._url} sent a broken line") from error
        if "error" in out:
            self.done = True
            raise EngineError(f"the server refused the request: {_message(out['error'])}")
        try:
            return self._reader.read(out)
        finally:
            self.done = self.done or self._reader.finish is not None

    def check_end(self) -> None:
        """Refuse a stream that broke off."""
        if not self.done:
            raise EngineError(f"the server at {self._url} closed the stream before the end")


def _key_refused(url: str, path: str, response: httpx.Response, *, given: bool) -> EngineError:
    if not given:
        return EngineError(f"the server at {url} wants an API key; give its --api-key")
    try:
        said = _message(response.json()["error"])
    except (ValueError, KeyError, TypeError):
        said = "no reason"
    return EngineError(
        f"the server at {url} does not open {path} with the API key that was given "
        f"({response.status_code}: {said}); give another"
    )


def _refusal(url: str, status: int, content: bytes) -> EngineError:
    try:
        detail: object = json.loads(content)
    except ValueError:
        detail = content.decode("utf-8", "replace")
    if isinstance(detail, Mapping):
        detail = detail.get("error", detail)
    return EngineError(f"the server at {url} refused the request ({status}): {_message(detail)}")


def _message(error: object) -> str:
    if isinstance(error, Mapping):
        error = error.get("message", error)
    return one_line(error, 300)


def _http_error(url: str, error: httpx.HTTPError) -> EngineError:
    if isinstance(error, httpx.ConnectError):
        return EngineError(
            f"no server answers at {url} ({_message(error)}); start one with "
            "`rag-pipeline serve` or change the URL"
        )
    if isinstance(error, httpx.TimeoutException):
        return EngineError(f"the server at {url} did not answer in time; is it still starting?")
    return EngineError(f"talking to {url} failed ({type(error).__name__}: {_message(error)})")


_PROBE = "Retrieval 2026: naïve façade, 12345 tokens -> Ωμέγα {x[0]}\n\tend."
"""Text on which different vocabularies differ: digits, accents, Greek, code, white space."""


def _local_ids(folder: Path, text: str) -> list[int]:
    ids: list[int] = load_stock_tokenizer(folder)(text, add_special_tokens=False)["input_ids"]
    return ids
