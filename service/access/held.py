"""What requests hold in memory, over all faces of a process: from a body's first byte on, until it is answered.

The queue's bound begins when a job is complete, and with Redis it is that of all front ends together; this one keeps a
single process from being ended by uploads that each are within their limits.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from service.terms.errors import OverloadedError

SHARE = 0.4  # of the memory that the process may use; parsing and sending hold pieces twice for a while
CGROUPS = Path("/sys/fs/cgroup")


class Held:
    """One count for all faces. most: bytes; 0: `SHARE` of the memory that the process may use."""

    def __init__(self, most: int, *, retry_after_s: float) -> None:
        self._most = most or int(SHARE * usable_memory())
        self._retry_after_s = retry_after_s
        self._num_bytes = 0

    @contextlib.contextmanager
    def holding(self) -> Iterator[Holding]:
        """What one request holds; given back at the end of the block."""
        holding = Holding(self)
        try:
            yield holding
        finally:
            holding.release()

    def take(self, num_bytes: int) -> None:
        """Count more, or less if it is negative. Raises OverloadedError if that is too much."""
        if self._num_bytes + num_bytes > self._most:
            raise OverloadedError(
                "too much is being uploaded at once; try again later", retry_after_s=self._retry_after_s
            )
        self._num_bytes += num_bytes


class Holding:
    """The part of one request."""

    def __init__(self, held: Held) -> None:
        self._held = held
        self._num_bytes = 0

    def add(self, num_bytes: int) -> None:
        """More has come. Raises OverloadedError if that is too much for the process."""
        self._held.take(num_bytes)
        self._num_bytes += num_bytes

    def release(self) -> None:
        """Nothing is held any more; at the latest at the end of the request."""
        self._held.take(-self._num_bytes)
        self._num_bytes = 0


def usable_memory(cgroups: Path = CGROUPS) -> int:
    """Bytes of memory that this process may use: the machine's, or less where a container or cgroup says so."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in _limit_files(cgroups):
        with contextlib.suppress(OSError, ValueError):  # not there, or "max"
            found.append(int(path.read_text("ascii")))
    return min(size for size in found if size > 0)


def _limit_files(cgroups: Path) -> Iterator[Path]:
    """Where the limits of the process's own cgroup and of those above it stand, by version 2 and version 1."""
    yield cgroups / "memory.max"
    yield cgroups / "memory" / "memory.limit_in_bytes"
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text("utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers in ("", "memory"):
                root = cgroups / controllers if controllers else cgroups
                own = root / path.strip("/")
                for folder in (own, *own.parents):
                    if folder == root or root not in folder.parents:
                        break
                    yield folder / ("memory.limit_in_bytes" if controllers else "memory.max")
