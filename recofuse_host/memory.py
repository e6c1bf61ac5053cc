"""How much memory this process may use, and how it gives back what it has used.

glibc gives a large block back to the system at once, but each that is given back raises the size from which it does so,
up to 32 MiB; what is smaller then stays in heaps, one for each few threads, between what is still in use. A front end
that has passed on 60 MB uploads thus keeps several times what they were, which counts against its container's limit.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from pathlib import Path

from recofuse_host.cgroups import Group, groups

LARGE_BYTES = 1 << 20
NUM_HEAPS = 2
KEPT_BYTES = 64 << 20
LARGEST_KEPT_BYTES = 32 << 20  # of one block; glibc keeps no larger ones
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # M_* in malloc.h


def usable_memory(root: Path = Path("/")) -> int:
    """Bytes that this process may use: the machine's, or less where one of its cgroups says so. root: for tests."""
    limits = [limit for group in groups("memory", root) if (limit := _limit(group)) > 0]
    return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *limits])


def give_back_large_blocks() -> bool:
    """Let this process give back what it frees of `LARGE_BYTES` and more, always; False where that cannot be told.

    For processes that pass large blocks on. One that computes would get and clear the same pages all the time.
    """
    return _tell_malloc({_MMAP_THRESHOLD: LARGE_BYTES, _TRIM_THRESHOLD: 2 * LARGE_BYTES, _ARENA_MAX: NUM_HEAPS})


def keep_freed_blocks() -> bool:
    """Let this process keep `KEPT_BYTES` of what it has freed at the end of each heap, from its first block on.

    For processes that compute, whose every batch would else get and clear the pages that the one before gave back.
    glibc comes to this by itself once a block of `LARGEST_KEPT_BYTES` was freed. False where it cannot be told.
    """
    return _tell_malloc({_MMAP_THRESHOLD: LARGEST_KEPT_BYTES, _TRIM_THRESHOLD: KEPT_BYTES})


def _tell_malloc(values: dict[int, int]) -> bool:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # of glibc alone
    return mallopt is not None and all(mallopt(name, value) for name, value in values.items())


def _limit(group: Group) -> int:
    """Bytes that a group may use; 0 without a limit, or where nothing readable says one."""
    name = "memory.max" if group.version == 2 else "memory.limit_in_bytes"
    with contextlib.suppress(OSError, ValueError):  # not there; or "max"
        return int((group.folder / name).read_text("ascii"))
    return 0
