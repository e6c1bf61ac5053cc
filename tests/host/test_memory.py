"""How much memory a process may use, and that it gives back what it has used."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from recofuse_host.memory import LARGE_BYTES, usable_memory

MACHINE = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
FIRST = "32 31 0:29 {top} /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory"
SECOND = "41 31 0:38 {top} /sys/fs/cgroup rw,relatime - cgroup2 cgroup2 rw,nsdelegate"

# Large blocks between small ones that stay, as in a process that passes uploads on. Prints what is left of them.
PASSING_ON = """
from pathlib import Path
from recofuse_host.memory import LARGE_BYTES, give_back_large_blocks

def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

if {does_give_back}:
    assert give_back_large_blocks()
bytes(31 << 20)  # from now on, glibc keeps what is smaller
before, kept = resident_bytes(), []
for _ in range(3):
    blocks = []
    for _ in range(40):
        blocks.append(b"x" * (2 * LARGE_BYTES))
        kept.append(b"y" * 50_000)
    del blocks
print(resident_bytes() - before - sum(map(len, kept)))
"""

# Batches of files, each read where the one before was. Prints how many pages the system had to give for the last three.
BATCHES = """
import resource
from recofuse_host.memory import keep_freed_blocks

if {does_keep}:
    assert keep_freed_blocks()
for number in range(6):
    if number == 3:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    batch = [b"x" * 600_000 for _ in range(8)]
    del batch
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def host(root: Path, mount: str, own: str) -> Path:
    """A file system in which a process has this mount and is in this group."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/mountinfo").write_text(f"23 0 8:1 / / rw - ext4 /dev/sda rw\n{mount}\n")
    (root / "proc/self/cgroup").write_text(f"{own}\n")
    return root


@pytest.mark.parametrize(
    ("mount", "own", "folder", "file", "none"),
    [
        (FIRST, "7:cpu:/other\n4:memory:/a/b", "sys/fs/cgroup/memory", "memory.limit_in_bytes", str((1 << 63) - 4096)),
        (SECOND, "0::/a/b", "sys/fs/cgroup", "memory.max", "max"),
    ],
    ids=["version 1", "version 2"],
)
def test_the_least_limit_up_to_the_root_holds(
    tmp_path: Path, mount: str, own: str, folder: str, file: str, none: str
) -> None:
    assert usable_memory(tmp_path) == MACHINE  # no cgroups
    root = host(tmp_path, mount.format(top="/"), own)
    assert usable_memory(root) == MACHINE  # no file where it should be
    (root / folder / "a/b").mkdir(parents=True)
    for group, limit, expected in (
        ("a/b", none, MACHINE),
        ("a/b", str(1 << 20), 1 << 20),
        ("a", str(1 << 19), 1 << 19),
        (".", "0", 1 << 19),
        (".", str(1 << 18), 1 << 18),
    ):
        (root / folder / group / file).write_text(f"{limit}\n")
        assert usable_memory(root) == expected


def test_large_blocks_are_given_back() -> None:
    def left(does_give_back: bool) -> int:
        script = PASSING_ON.format(does_give_back=does_give_back)
        return int(subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout)

    assert left(does_give_back=True) < 4 * LARGE_BYTES
    assert left(does_give_back=False) > 40 * LARGE_BYTES  # or there is nothing to tell it for


def test_a_process_that_computes_keeps_its_heap() -> None:
    def num_pages(does_keep: bool) -> int:
        script = BATCHES.format(does_keep=does_keep)
        return int(subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout)

    assert num_pages(does_keep=True) < 100
    assert num_pages(does_keep=False) > 1000  # or there is nothing to tell it for
