"""How many processors this process may use: those that its affinity names, and no more than its cgroups pay for.

A container that may use two of sixty-four processors sees all sixty-four (`os.cpu_count`), and mostly may run on any
of them (its affinity): only the quota of its cgroup says two. A thread more than that computes nothing sooner: once the
quota of a period is used up some of them stand still, and the others wait for those.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from recofuse_host.cgroups import Group, groups


@dataclass(frozen=True, slots=True)
class Processors:
    """What a process may use. allowed: processors of its affinity; quota: processors' worth of time, None: no limit."""

    allowed: int
    quota: float | None = None

    @property
    def usable(self) -> int:
        """Threads that can compute at once, one at least. A part of a processor is worth none: docs/operations.md."""
        if self.quota is None:
            return self.allowed
        return max(1, min(self.allowed, math.floor(self.quota)))

    def share(self, num_processes: int) -> int:
        """Threads of each of several processes that divide them; each has one at least."""
        return max(1, self.usable // num_processes)

    def told(self) -> str:
        """In words, such as `64 allowed, cgroup quota 2`."""
        limit = "no cgroup quota" if self.quota is None else f"cgroup quota {self.quota:g}"
        return f"{self.allowed} allowed, {limit}"


@dataclass(frozen=True, slots=True)
class Threads:
    """How many threads to compute with, and why, in words."""

    count: int
    why: str


def decide_threads(asked: int, processors: Processors, num_sharing: int = 1) -> Threads:
    """The number that was asked for, or for 0 a share of what the process may use."""
    if asked:
        return Threads(asked, "as asked")
    sharing = f", {num_sharing} share them" if num_sharing > 1 else ""
    return Threads(processors.share(num_sharing), f"{processors.told()}{sharing}")


def read_processors(root: Path = Path("/")) -> Processors:
    """What this process may use now. root: of the file system, for tests."""
    quotas = [quota for group in groups("cpu", root) if (quota := _quota(group)) is not None]
    return Processors(_num_allowed(), min(quotas, default=None))


def _num_allowed() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # not Linux


def _quota(group: Group) -> float | None:
    """Processors' worth of time that a group has; None without a limit, or where nothing readable says one."""
    try:
        quota, period = _microseconds(group)
    except (OSError, ValueError):  # not there; or "max"
        return None
    return quota / period if quota > 0 and period > 0 else None  # -1: no limit


def _microseconds(group: Group) -> Iterator[int]:
    """Quota and period."""
    if group.version == 2:
        texts = (group.folder / "cpu.max").read_text("ascii").split()
    else:
        texts = [(group.folder / f"cpu.cfs_{name}_us").read_text("ascii") for name in ("quota", "period")]
    return map(int, texts)
