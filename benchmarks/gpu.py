"""Everything that only a GPU can show, in one command of under ten minutes: `make check-gpu`.

The tests marked `gpu`, the engine's table at 640x480 with the targets of docs/performance.md, and what the service
keeps of the engine's throughput. Without a GPU nothing is checked, and it says so with status 2.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
NO_GPU = 2


@dataclass(frozen=True, slots=True)
class Part:
    """One of the three, with the line that says how it went."""

    name: str
    passed: bool
    line: str
    seconds: float


def run_tests() -> tuple[bool, str]:
    """The tests that need a GPU; a run in which none was found, or one was skipped, has not passed."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/core", "tests/service"]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    print(done.stdout[-4000:], done.stderr[-2000:], sep="")
    lines = [line for line in done.stdout.splitlines() if " passed" in line or " failed" in line or "error" in line]
    summary = lines[-1].strip("= ") if lines else "no test ran"
    return done.returncode == 0 and "skipped" not in summary, summary


def run_engine() -> tuple[bool, str]:
    """`recofuse bench engine --quick` on the GPU."""
    from benchmarks import engine

    outcome = engine.run(is_quick=True, device="cuda")
    return outcome.all_met, outcome.line


def run_kept() -> tuple[bool, str]:
    """`recofuse bench kept` on the GPU."""
    from benchmarks import kept

    outcome = kept.run(device="cuda", num_images=400, num_clients=32)
    return outcome.kept >= kept.TARGET, outcome.line


def has_gpu() -> bool:
    """Whether torch sees one."""
    import torch

    return torch.cuda.is_available()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all three, whatever becomes of each; returns 0 if all passed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--json", type=Path, help="where all of it goes")
    path: Path | None = parser.parse_args(arguments).json
    if not has_gpu():
        print("gpu: NOT CHECKED: torch sees no GPU here")
        return NO_GPU
    parts: list[Part] = []
    for name, check in (("tests", run_tests), ("engine", run_engine), ("kept", run_kept)):
        started = time.monotonic()
        try:
            passed, line = check()
        except Exception as error:  # noqa: BLE001 - the other parts are to run all the same
            passed, line = False, f"{type(error).__name__}: {error}"
        parts.append(Part(name, passed, line, time.monotonic() - started))
    line = "gpu: " + " | ".join(f"{part.name} {'passed' if part.passed else 'FAILED'}: {part.line}" for part in parts)
    if path is not None:
        document: dict[str, Any] = {"parts": [asdict(part) for part in parts], "line": line}
        path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(line)
    return 0 if all(part.passed for part in parts) else 1


if __name__ == "__main__":
    sys.exit(main())
