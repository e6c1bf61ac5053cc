"""What kernels of our own need of a host: Triton, a C compiler with Python's headers, and a cache to execute from.

Triton compiles its way to the driver, and older ones a launcher for every kernel, with a C compiler of the host, and
loads them from its cache.
"""

import os
import shutil
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from recofuse_core.kernels.choice import KINDS, KernelChoice

COMPILERS = ("gcc", "clang")  # in the order in which Triton looks for them


@dataclass(frozen=True, slots=True)
class Host:
    """What was found of it. Each of `lacks` says what is missing, in words."""

    triton: str  # its version, empty if it is not there
    compiler: str
    cache: Path | None
    lacks: tuple[str, ...]


def look(include: Path | None = None) -> Host:
    """What this host has. include: where Python's headers are, if not where it says."""
    try:
        import triton
    except ImportError:
        return Host("", "", None, ("Triton is not installed",))
    named = triton.knobs.build.cc
    found = [path for name in ((named,) if named else COMPILERS) if (path := shutil.which(name))]
    cache = Path(triton.knobs.cache.dir)
    headers = (include or Path(sysconfig.get_paths()["include"])) / "Python.h"
    lacks = []
    if not found:
        lacks.append(f"there is no C compiler ({named or ' or '.join(COMPILERS)})")
    if not headers.is_file():
        lacks.append(f"Python's headers are not installed ({headers})")
    if reason := unfit(cache):
        lacks.append(reason)
    return Host(str(triton.__version__), found[0] if found else "", cache, tuple(lacks))


def unfit(cache: Path) -> str:
    """Why nothing can be compiled into a folder and executed from it; empty if it can."""
    there = next(folder for folder in (cache, *cache.absolute().parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        return f"Triton's cache {cache} cannot be written"
    if os.statvfs(there).f_flag & os.ST_NOEXEC:
        return f"nothing can be executed from Triton's cache {cache}"
    return ""


def told(choice: KernelChoice, host: Host, *, on_gpu: bool) -> dict[str, str]:
    """What a person wants to know of it, in words."""
    return {
        "written for": ", ".join(KINDS),
        "asked": choice,
        "used": _use(choice, host, on_gpu=on_gpu),
        "Triton": host.triton or "not installed",
        **({"compiler": host.compiler or "none", "cache": str(host.cache)} if host.triton else {}),
    }


def _use(choice: KernelChoice, host: Host, *, on_gpu: bool) -> str:
    if choice == "eager":
        return "none, as asked"
    if not on_gpu:
        return "none: they are for a GPU"
    if host.lacks:
        return f"none: {'; '.join(host.lacks)}"
    if choice == "triton":
        return "all, untried"
    return "those that a trial at the start finds to agree with torch's and to be faster; none in float32"
