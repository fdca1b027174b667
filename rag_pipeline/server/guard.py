"""The one way in: an ASGI middleware around the whole application, SGLang's own routes and ``/metrics`` included.

In this order: is the server stopping, is the request well-formed, may a browser have been tricked into it
(only where no key is needed), does its key open the route, is there room for it, is its body small enough. What
the guard refuses reaches nothing behind it.

**Protected mode.** A server without a key answers this machine and its own page only. SGLang's app allows
every origin, with credentials; a server on the loopback address would then be open to any web page that its
user visits, directly or by a name that resolves there. A key closes that: browsers send none by themselves.
"""

from __future__ import annotations

import hmac
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from rag_pipeline.errors import RagPipelineError
from rag_pipeline.server.access import ROUTES, Access, find_route
from rag_pipeline.server.addresses import HostName, is_loopback, is_own_origin, parse_host
from rag_pipeline.server.budget import Budget, Held
from rag_pipeline.server.errors import ApiError, error_response
from rag_pipeline.server.headers import Headers, host_of, is_preflight, key_of, no_key
from rag_pipeline.server.request_log import Exchange
from rag_pipeline.server.stock_faults import TOLD
from rag_pipeline.server.tenants import Tenant, Tenants
from rag_pipeline.sglang_plugin.http.access import admitted

JSON_LIMIT_BYTES = 1 << 20
"""Largest body of one of this project's routes that does not say otherwise."""

OPEN_FLAG = "--unprotected-without-key"

ASK, SEARCH = "/v1/rag/chat/completions", "/v1/rag/search"

_DRAINED_BYTES = 64 << 10
"""Largest body that is read and dropped behind a refusal; a larger one costs its connection."""

_ALWAYS = "/v1/rag/health"
"""Answered however full the server is, as what needs no key is: neither reads a body."""

_PAGES = frozenset(path for path in ROUTES if path.startswith("/rag"))


@dataclass(frozen=True, kw_only=True, slots=True)
class GuardRules:
    """What the guard holds requests to.

    Parameters
    ----------
    host : str
        Address that the server listens on.
    tenants : Tenants
        Keys of the operator and of tenants.
    admin_key : str or None
        Of SGLang's administrative routes; None where the operator's key opens them.
    open_to_network : bool
        Whether a server without a key answers other machines too.
    max_body_bytes : int
        Largest body of a route without a limit of its own.
    body_limits : mapping of str to int
        Limits by path template.
    max_requests, max_held_bytes, max_questions : int
        Under way at once: requests, bytes of their bodies, and questions; a key has half of each where there are
        tenants.
    rooms : mapping of str to callable
        What refuses a key's request at the door, by path template: a queue behind it that is full. A full server
        is asked most, and the way to a route and back takes several times as long.
    closed : mapping of str to str
        What a route needs that this server was started without, by path template: SGLang's scheduler dies of it.
    """

    host: str
    tenants: Tenants
    admin_key: str | None = None
    open_to_network: bool = False
    max_body_bytes: int = 64 << 20
    body_limits: Mapping[str, int] = field(default_factory=dict)
    max_requests: int = 896
    max_held_bytes: int = 512 << 20
    max_questions: int = 128
    rooms: Mapping[str, Callable[[str], None]] = field(default_factory=dict)
    closed: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        refuse_exposure(self.host, self.tenants, open_to_network=self.open_to_network)


def refuse_exposure(host: str, tenants: Tenants, *, open_to_network: bool) -> None:
    """Refuse to serve other machines without a key.

    Raises
    ------
    RagPipelineError
        Unless a key is set, only this machine can reach `host`, or the caller said that it may be so.
    """
    if not (tenants.has_key or open_to_network or is_loopback(host)):
        raise RagPipelineError(
            f"--host {host} without a key lets whoever reaches this server read, add and delete all "
            "documents; give --api-key-file (or RAG_PIPELINE_API_KEY), leave out --host to serve this "
            f"machine only, or accept it with {OPEN_FLAG}"
        )


class Guard:
    """The middleware.

    Parameters
    ----------
    app : ASGIApp
        The application behind it.
    rules : GuardRules
        What is allowed.
    """

    def __init__(self, app: ASGIApp, rules: GuardRules) -> None:
        self._app = app
        self._rules = rules
        self._own_names = {socket.gethostname().lower(), socket.getfqdn().lower()}
        self.budget = Budget(
            max_requests=rules.max_requests,
            max_bytes=rules.max_held_bytes,
            max_questions=rules.max_questions,
            shared=bool(len(rules.tenants)),
        )
        """What is under way of it, by key."""
        self.in_flight = 0
        """Requests that were admitted and have not ended."""
        self.stopping = False
        """Set, no further request is admitted; :attr:`in_flight` then only falls."""
        self.background: list[Callable[[], None]] = []
        """Each ends work that goes on behind the answers, without waiting."""

    def end_background(self) -> None:
        """End all work that no request waits for."""
        for end in self.background:
            end()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer or refuse one request."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        template, access = find_route(scope)
        exchange = Exchange(scope, template, receive, send, limit=self._limit(template))
        try:
            tenant = self._admit(scope, template, access)
            if template in self._rules.closed:
                raise ApiError(400, f"{template} needs {self._rules.closed[template]} at the start")
            if tenant is not None:
                exchange.tenant = tenant.name
                if template != _ALWAYS:
                    exchange.held = self.budget.enter(tenant.name, declared=exchange.announced)
                    self._find_room(template, tenant, exchange.held)
        except ApiError as refusal:
            if exchange.held is not None:
                exchange.held.leave()
            await _answer(
                refusal, exchange, stays=refusal.retry_s is not None and not self.stopping
            )
            exchange.end(refused=str(refusal))
            return
        # Read by this project's routes; without it they answer nobody.
        scope.setdefault("state", {})["rag_tenant"] = tenant
        token = admitted.set("" if tenant is None else tenant.salt)
        self.in_flight += 1
        try:
            await self._app(scope, exchange.receive, exchange.send)
        except ApiError as refusal:
            # The body was too large, and nobody behind here made an answer of it.
            if not exchange.begun:
                await _answer(refusal, exchange)
        except Exception:
            # Starlette raises it again behind the answer; uvicorn would log it a second time.
            if not scope["state"].get(TOLD):
                raise
        finally:
            self.in_flight -= 1
            if exchange.held is not None:
                exchange.held.leave()
            admitted.reset(token)
            exchange.end()

    def _find_room(self, template: str, tenant: Tenant, held: Held) -> None:
        """Refuse what would find a full queue."""
        if template == ASK:
            held.expect_question()
        if (check := self._rules.rooms.get(template)) is not None:
            check(tenant.name)

    def _limit(self, template: str) -> int:
        other = JSON_LIMIT_BYTES if template.startswith("/v1/rag") else self._rules.max_body_bytes
        return self._rules.body_limits.get(template, other)

    def _admit(self, scope: Scope, template: str, access: Access) -> Tenant | None:
        """Return whose request it is; None for nobody's, which an open route takes.

        Raises
        ------
        ApiError
            With the status of the refusal.
        """
        if self.stopping:
            raise ApiError(
                503, "the server is stopping; send it again to another, or later", retry_s=10
            )
        headers = Headers(scope)
        host = host_of(headers)
        if not self._rules.tenants.has_key:
            self._refuse_strangers(scope, headers, host, template)
        if is_preflight(scope, headers):
            return None
        return self._caller(headers, access)

    def _caller(self, headers: Headers, access: Access) -> Tenant | None:
        tenants, admin_key = self._rules.tenants, self._rules.admin_key
        if access is Access.OPEN:
            return None
        if access is Access.ADMIN and admin_key is not None:
            key = key_of(headers)
            if key is not None and hmac.compare_digest(key, admin_key):
                return tenants.operator
            raise no_key("this route is opened by --admin-api-key")
        if not tenants.has_key:
            return tenants.operator
        tenant = tenants.of(key_of(headers))
        if tenant is None:
            raise no_key("send `Authorization: Bearer KEY` with a key of this server")
        if tenant is not tenants.operator and access is not Access.TENANT:
            raise ApiError(403, "a tenant's key does not open this route")
        return tenant

    def _refuse_strangers(
        self, scope: Scope, headers: Headers, host: HostName | None, template: str
    ) -> None:
        """Protected mode: this machine, called by its own name, and this server's own page."""
        if host is None:
            raise ApiError(400, "the request has no Host header; send the name of this server")
        origins = headers.all(b"origin")
        if origins and not (len(origins) == 1 and is_own_origin(origins[0], host)):
            raise ApiError(
                403,
                f"origin {ascii(origins[0])[:120]} is not this server; start it with --api-key to allow it",
            )
        # An image or a link of a foreign page sends no Origin; a link may lead to the page here.
        site = headers.one(b"sec-fetch-site")
        if site not in (None, "same-origin", "none") and template not in _PAGES:
            raise ApiError(
                403, "another site's page sent this; start the server with --api-key to allow it"
            )
        if self._rules.open_to_network:
            # A name that anybody can register could have been given this server's address.
            if not (host.address is not None or host.is_loopback or self._is_own_name(host.name)):
                raise ApiError(403, _other_name(host))
            return
        if not host.is_loopback:
            raise ApiError(403, _other_name(host))
        client = scope.get("client")
        if client is not None and client[0] and not is_loopback(client[0]):
            raise ApiError(
                403,
                "a server without a key answers this machine only, and a proxy says that this comes "
                "from another; start it with --api-key",
            )

    def _is_own_name(self, name: str) -> bool:
        given = parse_host(self._rules.host)
        return name in self._own_names or (given is not None and name == given.name)


def _other_name(host: HostName) -> str:
    return (
        f"host {host.name[:120]!r} is not this machine's own name; start the server with --api-key to "
        "serve under another name"
    )


async def _answer(refusal: ApiError, exchange: Exchange, *, stays: bool = False) -> None:
    """Answer with a refusal; the connection may stay open where the client is to come again."""
    response: Response = error_response(
        refusal.status, str(refusal), refusal.param, retry_s=refusal.retry_s
    )
    if refusal.status == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
    if not (stays and 0 < exchange.announced <= _DRAINED_BYTES):
        # A connection can be used again only behind the rest of the body. Little of it is read and dropped: to
        # connect anew costs a full server more than the refusal.
        response.headers["Connection"] = "close"
    if exchange.scope["type"] == "websocket":
        await exchange.refuse_websocket(response)
    else:
        await response(exchange.scope, exchange.receive, exchange.send)
