"""How the threads that compute wait for each other: asleep.

Left alone, a thread of OpenMP that waits spins for milliseconds before it sleeps. On a host that others use it burns
the processor that the thread it waits for could have: beside two busy processes on two processors a run takes nine
times the processor time. Sleeping at once costs little where nobody else is (docs/operations.md, Beside other work).

OpenMP reads how to wait when it is loaded, and torch loads it. So `sleep_while_waiting` comes before torch and sets
OMP_WAIT_POLICY, which processes started from this one inherit; it is the one place outside the command that looks at
the environment, since that is where OpenMP is told. Where a GNU OpenMP is loaded already, as in a program that has
imported torch first, it is told otherwise: GNU's spins only some hundred times while it has more threads than
processors (its manual, GOMP_SPINCOUNT), so threads that sleep for good are added to it.

Whoever has set one of the variables is left alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from dataclasses import dataclass
from functools import cache
from pathlib import Path

WAIT_POLICY = "OMP_WAIT_POLICY"
VARIABLES = (WAIT_POLICY, "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # of the standard, GNU's, and Intel's and LLVM's
GNU_LIBRARY = "libgomp"


@dataclass(frozen=True, slots=True)
class Waiting:
    """What was decided. asked: the variable that had been set before, as NAME=VALUE; late: OpenMP was there before."""

    asked: str = ""
    late: bool = False

    def told(self) -> str:
        """In words."""
        if self.asked:
            return f"as {self.asked} says"
        if self.late:
            return "asleep after a moment (OpenMP was loaded before recofuse)"
        return "asleep"


@cache
def sleep_while_waiting() -> Waiting:
    """Let threads that wait sleep; to be called before torch is imported. Only the first call of a process acts."""
    asked = next((f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ), "")
    if asked:
        return Waiting(asked=asked)
    os.environ[WAIT_POLICY] = "PASSIVE"
    had_sleepers = [_add_sleepers(path) for path in loaded_libraries()]
    return Waiting(late=any(had_sleepers))


def loaded_libraries(maps: Path = Path("/proc/self/maps")) -> list[str]:
    """Paths of the GNU OpenMP libraries that this process has loaded; a wheel may bring one of its own."""
    try:
        lines = maps.read_text("utf-8", "surrogateescape").splitlines()
    except OSError:  # not Linux
        return []
    paths = {fields[5] for line in lines if len(fields := line.split(maxsplit=5)) == 6}
    return sorted(path for path in paths if path.rpartition("/")[2].startswith(GNU_LIBRARY))


def _add_sleepers(path: str) -> bool:
    """Start a team of threads more than there are processors, which never gets work; whether that could be done."""
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(path)  # the one that is loaded
        num_processors: int = library.omp_get_num_procs()
        start_team = library.GOMP_parallel  # what a compiled parallel region calls
        start_team.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        start_team.restype = None
        nothing = ctypes.cast(ctypes.CDLL(None).sched_yield, ctypes.c_void_p)
        started = threading.Event()

        def own_team() -> None:
            start_team(nothing, None, num_processors + 1, 0)
            started.set()
            threading.Event().wait()  # a team lives as long as the thread that started it

        threading.Thread(target=own_team, name="openmp-sleepers", daemon=True).start()
        return started.wait()
    return False
