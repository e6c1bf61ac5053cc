"""Threads that wait sleep, whether recofuse comes before torch or after it, unless somebody has said otherwise."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from recofuse_host.waiting import VARIABLES, Waiting, loaded_libraries, sleep_while_waiting

pytest.importorskip("torch")
ROOT = Path(__file__).parents[2]
needs_two = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one processor: no thread waits")

# Prints the processor time, in s, that waiting takes the threads that OpenMP has started, over twenty short regions.
WAITED = """
import json, os, time
import torch
{middle}
torch.set_num_threads(2)
numbers = torch.zeros(1 << 20)
def others():
    own = str(os.getpid())
    return sum(int(open(f"/proc/self/task/{{task}}/schedstat").read().split()[0]) * 1e-9
               for task in os.listdir("/proc/self/task") if task != own)
numbers.add_(1)
before = others()
for _ in range(20):
    numbers[: 1 << 17].add_(1)
    time.sleep(0.01)
print(json.dumps([others() - before, {told}]))
"""


def told_by(code: str, **environment: str) -> Any:
    """What a process of its own prints, in an environment that says nothing of OpenMP but this."""
    environ = {name: value for name, value in os.environ.items() if name not in VARIABLES} | environment
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environ, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


LIBRARY = "import recofuse_core; from recofuse_host.waiting import sleep_while_waiting"
TOLD = "sleep_while_waiting().told()"


@needs_two
def test_threads_that_wait_take_no_processor_time() -> None:
    """In a program of torch alone they do; a library that comes after torch stops it as one that comes before."""
    spun_s, _ = told_by(WAITED.format(middle="", told="''"))
    late_s, late = told_by(WAITED.format(middle=LIBRARY, told=TOLD))
    early_s, early = told_by(f"{LIBRARY}\n{WAITED.format(middle='', told=TOLD)}")
    assert (early, late) == (Waiting().told(), Waiting(late=True).told())
    assert early_s < spun_s / 4
    assert late_s < spun_s / 4


@pytest.mark.parametrize(
    ("name", "value"), [("OMP_WAIT_POLICY", "ACTIVE"), ("GOMP_SPINCOUNT", "1000"), ("KMP_BLOCKTIME", "1")]
)
def test_what_was_asked_for_is_left_alone(name: str, value: str) -> None:
    code = (
        "import json, os, threading, torch\nfrom recofuse_host.waiting import sleep_while_waiting\n"
        "told = sleep_while_waiting().told()\n"
        "print(json.dumps([told, os.environ.get('OMP_WAIT_POLICY'), threading.active_count()]))"
    )
    expected = "ACTIVE" if name == "OMP_WAIT_POLICY" else None
    assert told_by(code, **{name: value}) == [f"as {name}={value} says", expected, 1]


def test_processes_that_are_started_later_inherit_it() -> None:
    code = (
        "import json, os, subprocess, sys\nfrom recofuse_host.waiting import sleep_while_waiting\n"
        "sleep_while_waiting(), sleep_while_waiting()\n"
        "child = 'import os; print(os.environ[\"OMP_WAIT_POLICY\"])'\n"
        "print(json.dumps([subprocess.check_output([sys.executable, '-c', child], text=True), "
        "'torch' in sys.modules, sleep_while_waiting().told()]))"
    )
    assert told_by(code) == ["PASSIVE\n", False, "asleep"]


def test_the_command_is_told_before_torch_is_there() -> None:
    code = (
        "import json, os, sys\nfrom service.command import cli\n"
        "before = ['OMP_WAIT_POLICY' in os.environ, 'torch' in sys.modules]\n"
        "sys.argv = ['recofuse', '--version']\n"
        "try:\n    cli.main()\nexcept SystemExit:\n    pass\n"
        "print('\\n' + json.dumps([*before, os.environ.get('OMP_WAIT_POLICY'), 'torch' in sys.modules]))"
    )
    environ = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environ, timeout=120
    )
    assert json.loads(done.stdout.splitlines()[-1]) == [False, False, "PASSIVE", False], done.stderr


def test_these_tests_are_neighbours_too() -> None:
    """tests/conftest.py comes before the first import of torch."""
    waiting = sleep_while_waiting()
    assert not waiting.late
    assert any(name in os.environ for name in VARIABLES)


def test_libraries_are_found_in_what_is_mapped(tmp_path: Path) -> None:
    maps = tmp_path / "maps"
    maps.write_text(
        "7f00-7f01 r-xp 00000000 08:01 17   /opt/a b/torch/lib/libgomp.so.1\n"
        "7f01-7f02 rw-p 00001000 08:01 17   /opt/a b/torch/lib/libgomp.so.1\n"
        "7f02-7f03 r-xp 00000000 08:01 18   /opt/sklearn.libs/libgomp-a34b3233.so.1.0.0\n"
        "7f03-7f04 r-xp 00000000 08:01 19   /usr/lib/libc.so.6\n"
        "7f04-7f05 rw-p 00000000 00:00 0\n"
        "7f05-7f06 rw-p 00000000 00:00 0    [heap]\n"
    )
    assert loaded_libraries(maps) == [
        "/opt/a b/torch/lib/libgomp.so.1",
        "/opt/sklearn.libs/libgomp-a34b3233.so.1.0.0",
    ]
    assert loaded_libraries(tmp_path / "none") == []
