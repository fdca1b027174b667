"""Who builds which key, and which builds failed. No locks: the store's job."""

from __future__ import annotations

from collections import OrderedDict

from chunk_cache.errors import IntegrityError
from chunk_cache.handles import Build, ChunkState
from chunk_cache.keys import ChunkKey

_MAX_FAILURES_KEPT = 4096


class BuildTable:
    """Keys in BUILDING and FAILED; no key is in both.

    Parameters
    ----------
    retry_failed_s
        Back-off before a FAILED key may be built again, seconds.
    """

    def __init__(self, retry_failed_s: float) -> None:
        self._retry_failed_s = retry_failed_s
        self.building: dict[ChunkKey, Build] = {}
        # Oldest failure first, and the back-off is one for all, so the first to end is in front; bounded,
        # because failing keys come from what clients send.
        self.failed: OrderedDict[ChunkKey, tuple[float, str]] = OrderedDict()

    def state(self, key: ChunkKey) -> ChunkState | None:
        """Return BUILDING, FAILED or neither; call :meth:`expire` first."""
        if key in self.building:
            return ChunkState.BUILDING
        return ChunkState.FAILED if key in self.failed else None

    def begin(self, build: Build) -> None:
        """Register the one writer of a key."""
        self.failed.pop(build.key, None)
        self.building[build.key] = build

    def end(self, build: Build) -> bool:
        """Take the right back; ``False`` if ``build`` does not hold it any more."""
        if self.building.get(build.key) is not build:
            return False
        del self.building[build.key]
        return True

    def fail(self, key: ChunkKey, reason: str, now: float) -> None:
        """Remember a failure."""
        self.failed[key] = (now + self._retry_failed_s, reason)
        self.failed.move_to_end(key)
        while len(self.failed) > _MAX_FAILURES_KEPT:
            self.failed.popitem(last=False)

    def expire(self, now: float) -> int:
        """Fail builds past their deadline and forget failures past their back-off; returns how many builds."""
        late = [build for build in self.building.values() if build.deadline <= now]
        for build in late:
            del self.building[build.key]
            self.fail(build.key, f"build of {build.owner or 'an unnamed owner'} timed out", now)
        while self.failed and next(iter(self.failed.values()))[0] <= now:
            self.failed.popitem(last=False)
        return len(late)

    def check(self, ready: set[ChunkKey], *, expect_idle: bool) -> None:
        """Check that states exclude each other; see :meth:`MemoryStore.check_integrity`."""
        building, failed = set(self.building), set(self.failed)
        for one, two in ((ready, building), (ready, failed), (building, failed)):
            if one & two:
                raise IntegrityError(f"store: in two states: {[str(key) for key in one & two]}")
        if any(build.key != key for key, build in self.building.items()):
            raise IntegrityError("store: a build is filed under another key")
        if expect_idle and building:
            raise IntegrityError(f"store: still building {[str(key) for key in building]}")
