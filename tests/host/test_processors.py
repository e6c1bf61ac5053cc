"""What a process may use: its affinity, and the least of the quotas of its groups and those above them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recofuse_host.cgroups import Group, groups
from recofuse_host.processors import Processors, read_processors

ALLOWED = len(os.sched_getaffinity(0))
FIRST = "32 31 0:29 {top} /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct"
SECOND = "41 31 0:38 {top} /sys/fs/cgroup rw,relatime - cgroup2 cgroup2 rw,nsdelegate"


def host(root: Path, mounts: str, own: str) -> Path:
    """A file system in which a process has these mounts and groups."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/mountinfo").write_text(f"23 0 8:1 / / rw - ext4 /dev/sda rw\n{mounts}\n")
    (root / "proc/self/cgroup").write_text(f"{own}\n")
    return root


def limit(folder: Path, quota: str, period: str = "100000") -> None:
    """A group's quota: `cpu.max` where version 2 is mounted, two files where version 1 is."""
    folder.mkdir(parents=True, exist_ok=True)
    if "cpu,cpuacct" in folder.parts:
        (folder / "cpu.cfs_quota_us").write_text(f"{quota}\n")
        (folder / "cpu.cfs_period_us").write_text(f"{period}\n")
    else:
        (folder / "cpu.max").write_text(f"{quota} {period}\n")


def test_a_host_without_cgroups_has_no_quota(tmp_path: Path) -> None:
    assert read_processors(tmp_path) == Processors(ALLOWED)
    assert read_processors(host(tmp_path, "", "0::/")) == Processors(ALLOWED)


@pytest.mark.parametrize(
    ("mount", "own", "top", "none"),
    [
        (FIRST, "7:memory:/elsewhere\n4:cpu,cpuacct:/a/b", "sys/fs/cgroup/cpu,cpuacct", "-1"),
        (SECOND, "0::/a/b", "sys/fs/cgroup", "max"),
    ],
    ids=["version 1", "version 2"],
)
def test_the_least_quota_up_to_the_root_holds(tmp_path: Path, mount: str, own: str, top: str, none: str) -> None:
    root = host(tmp_path, mount.format(top="/"), own)
    limit(root / top / "elsewhere", "10000")
    assert read_processors(root).quota is None  # no file where it should be
    limit(root / top / "a/b", none)
    assert read_processors(root).quota is None
    limit(root / top / "a/b", "400000")
    assert read_processors(root).quota == 4.0
    limit(root / top / "a", "75000", "50000")
    assert read_processors(root).quota == 1.5
    limit(root / top, none)
    assert read_processors(root).quota == 1.5
    limit(root / top, "100000")
    assert read_processors(root).quota == 1.0


@pytest.mark.parametrize(
    ("top", "own", "expected"),
    [
        ("/docker/abc", "/docker/abc", [""]),  # a container: its own group is at the top of what it sees
        ("/docker/abc", "/docker/abc/inner", ["inner", ""]),
        ("/docker/abc", "/docker/abcd", [""]),  # another's; what is mounted here holds all the same
        ("/", "/../../outside", [""]),  # a group above the root of its namespace
        ("/", "/", [""]),
        ("/", "/a/b", ["a/b", "a", ""]),
    ],
)
def test_which_groups_are_looked_at(tmp_path: Path, top: str, own: str, expected: list[str]) -> None:
    root = host(tmp_path, SECOND.format(top=top), f"0::{own}")
    assert list(groups("cpu", root)) == [Group(2, root / "sys/fs/cgroup" / path) for path in expected]


def test_both_versions_at_once_and_names_with_spaces(tmp_path: Path) -> None:
    mounts = [
        "32 31 0:29 / /cg\\040one rw - cgroup cgroup rw,cpu",
        "33 31 0:30 / /cg\\040memory rw - cgroup cgroup rw,memory",
        "41 31 0:38 / /cg\\040two rw - cgroup2 cgroup2 rw",
    ]
    root = host(tmp_path, "\n".join(mounts), "1:cpu:/mine: of two\n0::/all")
    found = [(group.version, group.folder.relative_to(root).as_posix()) for group in groups("cpu", root)]
    assert found == [(1, "cg one/mine: of two"), (1, "cg one"), (2, "cg two/all"), (2, "cg two")]


@pytest.mark.parametrize("text", ["", "max", "0 100000", "100000 0", "x y", "1 2 3"])
def test_a_file_that_says_nothing_is_no_limit(tmp_path: Path, text: str) -> None:
    root = host(tmp_path, SECOND.format(top="/"), "0::/")
    (root / "sys/fs/cgroup").mkdir(parents=True)
    (root / "sys/fs/cgroup/cpu.max").write_text(text)
    assert read_processors(root).quota is None


@given(st.integers(1, 512), st.none() | st.floats(0.001, 1024), st.integers(1, 64))
def test_what_is_used(allowed: int, quota: float | None, num_processes: int) -> None:
    processors = Processors(allowed, quota)
    usable = processors.usable
    assert 1 <= usable <= allowed
    if quota is None:
        assert usable == allowed
    else:
        assert usable <= max(1.0, quota)
        assert usable == allowed or usable + 1 > quota  # no more could be used
    share = processors.share(num_processes)
    assert share == 1 or share * num_processes <= usable
    assert processors.share(1) == usable


@given(st.integers(1, 64), st.floats(0.01, 64), st.floats(0.01, 64))
def test_more_quota_never_means_fewer_threads(allowed: int, one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert Processors(allowed, low).usable <= Processors(allowed, high).usable


def test_it_says_why() -> None:
    assert Processors(64, 2.0).told() == "64 allowed, cgroup quota 2"
    assert Processors(64).told() == "64 allowed, no cgroup quota"


def test_this_process() -> None:
    """Whatever this host is, the affinity is counted, and follows when it changes."""
    assert read_processors().allowed == ALLOWED
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert read_processors().usable == 1
    finally:
        os.sched_setaffinity(0, before)
