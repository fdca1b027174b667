"""How much of a busy engine's work may go into builds of missing chunks."""

from __future__ import annotations

_LEAST_ROWS = 32
"""Rows that a forward counts as at least: a decode step reads all weights for a handful of rows, and takes the time
of about so many rows of a prefill."""


class BuildShare:
    """A debt in rows: builds run it up, everybody else's forwards pay it back.

    A build may start when nothing is owed. After a build of ``n`` rows the clients' forwards must compute
    ``n / share`` rows before the next one, so builds take ``share`` of the clients' rows over any longer time, and
    at most one build stands in a batch. Rows are counted, not seconds, so that tensor-parallel ranks agree.

    Parameters
    ----------
    share : float
        Rows of builds for each row of clients; 0 for no builds while the engine is busy.
    """

    def __init__(self, share: float) -> None:
        self.share = share
        self.owed = 0.0
        """Rows of builds that are not paid back yet."""

    @property
    def may_start(self) -> bool:
        """Whether a build may start now."""
        return self.share > 0 and self.owed <= 0

    def note_forward(self, rows: int, build_rows: int) -> None:
        """Count a forward.

        Parameters
        ----------
        rows : int
            Rows that it computed.
        build_rows : int
            Those among them that were of builds.
        """
        self.owed += build_rows
        clients = rows - build_rows
        if clients > 0:
            self.owed = max(0.0, self.owed - self.share * max(clients, _LEAST_ROWS))
