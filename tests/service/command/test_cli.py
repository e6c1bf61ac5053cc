"""The `recofuse` command as a whole: how it is started, and what its help shows and costs."""

from __future__ import annotations

import re
import subprocess
import sys

from tests.service.command.calls import ROOT, recofuse_process, run

ORDER = [
    "fuse",
    "calibrate",
    "align",
    "serve",
    "api",
    "worker",
    "settings",
    "metrics",
    "info",
    "convert",
    "train",
    "ablate",
    "export",
    "train-cues",
    "evaluate",
    "sample",
    "simulate-cameras",
    "stream",
    "demo",
    "keys",
    "dead-letters",
    "bench",
]


def test_the_module_is_the_command() -> None:
    done = subprocess.run(recofuse_process("--version"), check=True, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.startswith("recofuse ")


def test_help_shows_the_verbs_by_trade_and_the_groups_after_them() -> None:
    result = run("--help", COLUMNS="120", TERM="dumb")
    assert result.exit_code == 0, result.output
    commands = result.stdout.partition("─ Commands ─")[2]
    assert re.findall(r"^│ ([a-z-]+) ", commands, re.MULTILINE) == ORDER


def test_help_imports_nothing_that_a_verb_needs() -> None:
    heavy = ("torch", "numpy", "cv2", "PIL", "fastapi", "grpc", "redis", "matplotlib", "prometheus_client", "uvicorn")
    probe = (
        "import sys\n"
        "from service.__main__ import main\n"
        "sys.argv = ['recofuse', '--help']\n"
        "try:\n    main()\nexcept SystemExit as done:\n    assert done.code == 0\n"
        "assert 'benchmarks.commands' in sys.modules\n"
        f"print('\\npulled in:', *[name for name in {heavy!r} if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", probe], check=False, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].strip() == "pulled in:"
