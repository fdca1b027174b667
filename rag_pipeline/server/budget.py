"""How much may be under way at once: requests, bytes of their bodies, and questions, in all and of one key.

What waits in a queue is counted where it waits. This counts what comes before: a body that is being received
or read lies in memory or in the temporary folder, whatever its route then says to it.
"""

from __future__ import annotations

from collections import Counter

from rag_pipeline.server.errors import ApiError

RETRY_S = 1


class Count:
    """Things of one kind that are under way, in all and by tenant.

    Parameters
    ----------
    what : str
        Their name in a refusal.
    limit : int
        Of all together.
    share : int
        Of one tenant; as large as `limit` where there are no others.
    """

    def __init__(self, what: str, limit: int, *, share: int) -> None:
        self._what = what
        self._limit = limit
        self._share = share
        self._by_tenant: Counter[str] = Counter()
        self.total = 0

    def check(self, tenant: str, more: int) -> None:
        """Refuse what :meth:`add` would; it reads two numbers, so any thread may.

        Raises
        ------
        ApiError
            429 where the tenant has its share, 503 where there is no room at all.
        """
        mine = self._by_tenant.get(tenant, 0)
        if mine + more > self._share and self._share < self._limit:
            raise ApiError(
                429,
                f"this key has {mine} of at most {self._share} {self._what} under way; send fewer at once",
                retry_s=RETRY_S,
            )
        if self.total + more > self._limit:
            # Without figures: what others have under way is not a tenant's business.
            raise ApiError(
                503, f"the server has too many {self._what} under way; try again", retry_s=RETRY_S
            )

    def add(self, tenant: str, more: int) -> None:
        """Count them in.

        Raises
        ------
        ApiError
            As :meth:`check` does.
        """
        self.check(tenant, more)
        self._by_tenant[tenant] += more
        self.total += more

    def give_back(self, tenant: str, number: int) -> None:
        """Count them out."""
        self.total -= number
        self._by_tenant[tenant] -= number
        if not self._by_tenant[tenant]:
            del self._by_tenant[tenant]


class Budget:
    """Counts of one server; used on its event loop only.

    Parameters
    ----------
    max_requests : int
        Requests under way.
    max_bytes : int
        Of their bodies, until an answer begins.
    max_questions : int
        Requests that search and then generate: refused now, they do not wait for a search in vain.
    shared : bool
        Whether there are tenants; each key then has half of each.
    """

    def __init__(
        self, *, max_requests: int, max_bytes: int, max_questions: int, shared: bool
    ) -> None:
        def count(what: str, limit: int) -> Count:
            return Count(what, limit, share=max(1, limit // 2) if shared else limit)

        self._requests = count("requests", max_requests)
        self._bytes = count("bytes of bodies", max_bytes)
        self._questions = count("questions", max_questions)

    @property
    def used(self) -> tuple[int, int]:
        """Requests and bytes that are counted now."""
        return self._requests.total, self._bytes.total

    @property
    def questions(self) -> int:
        """Questions that are counted now."""
        return self._questions.total

    def enter(self, tenant: str, *, declared: int = 0) -> Held:
        """Count a request in.

        Parameters
        ----------
        tenant : str
            Whose key it has.
        declared : int
            Bytes that its header announces: refused now, they are never received.

        Raises
        ------
        ApiError
            429 where the key has its share under way, 503 where the server has.
        """
        self._requests.add(tenant, 1)
        held = Held(tenant, self._requests, self._bytes, self._questions)
        try:
            held.reserve(declared)
        except ApiError:
            held.leave()
            raise
        return held


class Held:
    """What one request holds of a :class:`Budget`."""

    def __init__(self, tenant: str, requests: Count, num_bytes: Count, questions: Count) -> None:
        self._tenant = tenant
        self._requests = requests
        self._bytes = num_bytes
        self._questions = questions
        self._reserved = 0
        self._may_ask = self._is_question = self._body_is_over = self._left = False

    def reserve(self, body_bytes: int) -> None:
        """Hold as much as a body has by now, or will have; a header may have announced less.

        Raises
        ------
        ApiError
            429 or 503 where that is too much.
        """
        more = body_bytes - self._reserved
        if more > 0 and not self._body_is_over:
            self._bytes.add(self._tenant, more)
            self._reserved = body_bytes

    def expect_question(self) -> None:
        """Look for a place for a question, which it takes when its body has come.

        One that is still being sent holds nobody up: there are as many of them as there are connections.

        Raises
        ------
        ApiError
            429 or 503 where there is none.
        """
        self._questions.check(self._tenant, 1)
        self._may_ask = True

    def body_came(self) -> None:
        """Count an expected question, until it leaves.

        Raises
        ------
        ApiError
            429 or 503 where its place has gone in the meantime.
        """
        if self._may_ask and not self._is_question:
            self._questions.add(self._tenant, 1)
            self._is_question = True

    def end_body(self) -> None:
        """Give the bytes back: an answer has begun, and a stream may go on for long."""
        self._body_is_over = True
        self._bytes.give_back(self._tenant, self._reserved)
        self._reserved = 0

    def leave(self) -> None:
        """Give everything back; once is enough."""
        self.end_body()
        if not self._left:
            self._left = True
            self._requests.give_back(self._tenant, 1)
            if self._is_question:
                self._questions.give_back(self._tenant, 1)
