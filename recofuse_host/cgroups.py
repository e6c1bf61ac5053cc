"""Where the limits of this process's control groups stand: its own group, and every group above it.

A limit of any of them holds. Version 1 has a hierarchy for each controller, version 2 one for all; a host may have
both, with each controller in one of them. In a container the group's path is often that of the host, of which the
container sees the last part only: what is mounted says which.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath


@dataclass(frozen=True, slots=True)
class Group:
    """A folder of limits. version: 1 or 2, which name their files differently."""

    version: int
    folder: Path


def groups(controller: str, root: Path = Path("/")) -> Iterator[Group]:
    """The groups that bound this process by a controller such as `cpu`, own first; none where there are no cgroups.

    root: of the file system, for tests.
    """
    with contextlib.suppress(OSError):
        paths = dict(_own_paths((root / "proc/self/cgroup").read_text("utf-8"), controller))
        for version, top, mounted in _mounts((root / "proc/self/mountinfo").read_text("utf-8"), controller):
            if version in paths:
                parts = _below(paths[version], top)
                for length in range(len(parts), -1, -1):
                    yield Group(version, root.joinpath(mounted.lstrip("/"), *parts[:length]))


def _own_paths(text: str, controller: str) -> Iterator[tuple[int, str]]:
    """Version and path of the group that the process is in: lines such as `4:cpu,cpuacct:/user` and `0::/user`."""
    for line in text.splitlines():
        _, _, rest = line.partition(":")
        controllers, separator, path = rest.partition(":")
        if separator and not controllers:
            yield 2, path
        elif controller in controllers.split(","):
            yield 1, path


def _mounts(text: str, controller: str) -> Iterator[tuple[int, str, str]]:
    """Version, path of the group at its top, and place of each mounted hierarchy that may hold the controller."""
    for line in text.splitlines():
        left, separator, right = line.partition(" - ")
        before, after = left.split(" "), right.split(" ")
        if not separator or len(before) < 5:
            continue
        is_first = after[0] == "cgroup" and controller in after[-1].split(",")
        if is_first or after[0] == "cgroup2":
            yield 1 if is_first else 2, _plain(before[3]), _plain(before[4])


def _plain(name: str) -> str:
    r"""A name of mountinfo, where spaces and the like are written as `\040`."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), name)


def _below(path: str, top: str) -> tuple[str, ...]:
    """The folders from the mounted top down to a group; none if the group is not to be seen from here."""
    own = PurePosixPath(path)
    if ".." in own.parts or not own.is_relative_to(top):
        return ()
    return own.relative_to(top).parts
