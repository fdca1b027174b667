"""What a notice of erasure says: hashes of the text that is gone, and whose chunk KV it is about."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from chunk_cache import TextMarks

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Reach:
    """Whose chunk KV a deletion goes through: everybody's, unless a server's tenant deletes.

    A tenant does not see the index of another, so what it deletes is never looked for there: it could empty the
    other's chunk KV by deleting a text that holds one letter. It is looked for in its own, in that of nobody in
    particular, which whoever runs the server fills from any index, and where nobody knows whose it is. Of what is
    nobody's only that goes which is surely meant.

    Parameters
    ----------
    tenant : str
        :func:`chunk_cache.tenant_mark` of who deletes; empty for whoever runs the server.
    spared : frozenset of str
        Marks of the server's other tenants.
    spares_unknown : bool
        Whether a tenant's deletion spares those too that its server does not know: a store that several servers share
        holds the KV of all their tenants.
    """

    tenant: str = ""
    spared: frozenset[str] = frozenset()
    spares_unknown: bool = False

    def spares(self, tenant: str) -> bool:
        """Whether nothing of a tenant goes."""
        is_unknown = bool(self.tenant) and tenant not in ("", self.tenant)
        return tenant in self.spared or (self.spares_unknown and is_unknown)

    def among_servers(self) -> Reach:
        """The same where the tenants of other servers are."""
        return dataclasses.replace(self, spares_unknown=True)

    def covers(self, marks: TextMarks, text: str | None, tenant: str) -> bool:
        """Whether a text of a tenant has to go; None is a text that cannot be read."""
        if self.spares(tenant):
            return False
        return text is None or marks.are_in(text, strict=bool(self.tenant) and not tenant)


EVERYBODY = Reach()


@dataclass(frozen=True, kw_only=True, slots=True)
class Notice:
    """What was erased, and where already."""

    name: str
    marks: TextMarks
    folders: tuple[str, ...]
    """Chunk stores that whoever deleted goes through."""
    reach: Reach

    def is_about(self, text: str | None, tenant: str) -> bool:
        """Whether a text of a tenant (:func:`chunk_cache.tenant_mark`), None for one that cannot be read, has to go."""
        return self.reach.covers(self.marks, text, tenant)

    def to_bytes(self) -> bytes:
        """Write it for other machines, whose folders are not these."""
        reach = {"tenant": self.reach.tenant, "spared": sorted(self.reach.spared)}
        return json.dumps(reach).encode() + b"\n" + self.marks.to_bytes()

    @classmethod
    def from_bytes(cls, name: str, data: bytes | None) -> Self:
        """Read what :meth:`to_bytes` wrote elsewhere; of what cannot be read everything may be meant."""
        from chunk_cache import TextMarks

        try:
            head, _, body = (data or b"").partition(b"\n")
            meta = json.loads(head)
            reach = Reach(tenant=str(meta["tenant"]), spared=frozenset(map(str, meta["spared"])))
            marks, reach = TextMarks.from_bytes(body), reach.among_servers()
        except Exception as error:  # anybody who can write to the store may have posted it
            logger.warning("Notice %s of erased text cannot be read: %r", ascii(name[:64]), error)
            marks, reach = TextMarks({}, everything=True), EVERYBODY
        return cls(name=name, marks=marks, folders=(), reach=reach)


def combined(notices: Iterable[Notice]) -> list[Notice]:
    """Say what notices say in one for each reach: a text is looked through once, not once for each of thousands."""
    from chunk_cache import TextMarks

    by_reach: dict[Reach, list[Notice]] = {}
    for notice in notices:
        by_reach.setdefault(notice.reach, []).append(notice)
    return [
        Notice(name="", marks=TextMarks.union(n.marks for n in some), folders=(), reach=reach)
        for reach, some in by_reach.items()
    ]
