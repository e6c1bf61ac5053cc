"""What the benchmark of neighbours concludes from its rows, and that its processes do what it says."""

from __future__ import annotations

import json
import os
from pathlib import Path
from signal import SIGCONT

import pytest

from benchmarks import neighbours
from benchmarks.neighbours import Cost, Fuser, NeighbourError, Outcome, Row, _busy, _cgroup, _limit
from recofuse_host.cgroups import Group

ALONE = Cost(clock_s=1.0, cpu_s=2.0)
POLITE = Row(name="command", alone=ALONE, busy=Cost(clock_s=2.4, cpu_s=2.2))
LIGHT = "import os, sys\nprint('ready', flush=True)\nfor _ in sys.stdin: print(0.5, os.getpid(), flush=True)"


def state(pid: int) -> str:
    """A process's state as Linux names it: T for stopped, R and S for running, empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


@pytest.mark.parametrize(
    ("row", "is_met"),
    [
        (POLITE, True),
        (Row(name="library", alone=ALONE, busy=Cost(2.4, 17.8)), False),
        (Row(name="library", alone=ALONE, busy=Cost(2.6, 2.2)), False),
        (Row(name="spinning", alone=ALONE, busy=Cost(17.8, 17.7)), True),  # for comparison alone
    ],
)
def test_rows_are_judged_beside_busy_processes(row: Row, is_met: bool) -> None:
    outcome = Outcome((POLITE, row), (), "no cgroup")
    assert outcome.all_met is is_met
    assert ("MISSED" in outcome.line) is not is_met


def test_in_a_cgroup_the_choice_is_compared_with_one_thread() -> None:
    one = Row(name="--threads 1", alone=ALONE)
    slow = Row(name="as it chooses", alone=Cost(1.2, 2.0))
    assert Outcome((POLITE,), (one, one, slow)).all_met
    outcome = Outcome((POLITE,), (slow, one))
    assert not outcome.all_met
    assert "one processor of the host, clock 1.20 (<=1.1, MISSED)" in outcome.line


def test_a_way_to_run_is_a_process_that_answers_until_it_ends() -> None:
    fuser = Fuser(LIGHT)
    try:
        fuser.wait_ready()
        assert fuser.fuse() == fuser.fuse()
        assert fuser.fuse().clock_s == 0.5
        pid = int(fuser.fuse().cpu_s)
    finally:
        fuser.end()
    assert state(pid) == ""
    ending = Fuser("raise SystemExit(3)")
    with pytest.raises(NeighbourError, match="status 3"):
        ending.wait_ready()
    ending.end()


def test_a_process_joins_before_anything_else(tmp_path: Path) -> None:
    fuser = Fuser(LIGHT, [tmp_path / "cgroup.procs"])
    try:
        fuser.wait_ready()
        assert int((tmp_path / "cgroup.procs").read_text()) == int(fuser.fuse().cpu_s)
    finally:
        fuser.end()


def test_no_busy_process_is_left() -> None:
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    before = set(children.read_text().split())
    with _busy(2) as tell:
        busy = [int(pid) for pid in children.read_text().split() if pid not in before]
        assert len(busy) == 2
        tell(SIGCONT)
    assert [state(pid) for pid in busy] == ["", ""]


def test_the_programs_are_whole() -> None:
    for name, code in neighbours.WAYS.items():
        compile(code, name, "exec")


def test_limits_of_both_versions(tmp_path: Path) -> None:
    _limit(Group(1, tmp_path))
    _limit(Group(2, tmp_path))
    found = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert found == {"cpu.cfs_period_us": "100000", "cpu.cfs_quota_us": "100000", "cpu.max": "100000 100000"}


def test_a_group_without_the_controller_is_no_place_for_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cgroup.subtree_control").write_text("memory pids\n")
    monkeypatch.setattr(neighbours, "groups", lambda _: [Group(2, tmp_path)])
    with pytest.raises(OSError, match="controller"), _cgroup():
        pass


def test_a_run_writes_its_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    light = LIGHT.replace("os.getpid()", "1.0")
    monkeypatch.setattr(neighbours, "WAYS", dict.fromkeys(neighbours.WAYS, light))
    monkeypatch.setattr(neighbours, "groups", lambda _: [])
    monkeypatch.setattr(neighbours, "SETTLE_S", 0.0)
    lines: list[str] = []
    outcome = neighbours.run(repeats=2, num_busy=1, json_path=tmp_path / "a/figures.json", say=lines.append)
    assert outcome.all_met
    assert [row.name for row in outcome.rows] == ["command", "graphs", "library", "one thread"]
    written = json.loads((tmp_path / "a/figures.json").read_text())
    assert written["figures"]["command, clock"] == {"ratio": 1.0, "bound": 2.5}
    assert "graphs to torch, processor time: 1.00 as it is" in lines
    assert written["left_out"] in "\n".join(lines)
    assert lines[-1].startswith("ratios: command, processor time 1.00 (<=1.2)")
