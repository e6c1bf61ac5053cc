"""`python -m benchmarks.drills [NAME...] [--quick] [--json OUT.json]`: run drills; exit status 1 if any failed."""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import benchmarks.drills
from benchmarks.drills import Report
from benchmarks.processes import machine


def names() -> list[str]:
    """Every drill there is."""
    return sorted(module.name for module in pkgutil.iter_modules(benchmarks.drills.__path__) if module.name[0] != "_")


def run(name: str, *, is_quick: bool) -> Report:
    """One drill; an error of its own is a failed drill."""
    module = importlib.import_module(f"benchmarks.drills.{name}")
    try:
        report = module.run(is_quick=is_quick, say=lambda line: print(f"  {line}", file=sys.stderr, flush=True))
    except Exception as error:  # noqa: BLE001 - the next drill shall run all the same
        traceback.print_exc()
        return Report(False, f"ended by {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
    if not isinstance(report, Report):
        raise TypeError(f"benchmarks.drills.{name}.run returned {type(report).__name__}, not a Report")
    return report


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.drills", description=__doc__)
    parser.add_argument("drills", nargs="*", metavar="NAME", help=f"{', '.join(names())}; all of them if none is named")
    parser.add_argument("--quick", action="store_true", help="fewer requests and shorter windows, for a first look")
    parser.add_argument("--json", type=Path, metavar="OUT.json", help="write all figures")
    asked = parser.parse_args(arguments)
    if unknown := sorted(set(asked.drills) - set(names())):
        parser.error(f"there is no drill {', '.join(unknown)}; there are {', '.join(names())}")
    document: dict[str, Any] = {"machine": machine(), "is_quick": asked.quick, "drills": {}}
    lines, num_failed = [], 0
    for name in asked.drills or names():
        started = time.monotonic()
        report = run(name, is_quick=asked.quick)
        seconds = time.monotonic() - started
        num_failed += not report.is_passed
        lines.append(f"{name:9} {'passed' if report.is_passed else 'FAILED'} in {seconds:.0f} s: {report.line}")
        document["drills"][name] = {
            "passed": report.is_passed,
            "seconds": round(seconds, 1),
            "line": report.line,
            **report.figures,
        }
        if asked.json:
            asked.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        print(lines[-1], flush=True)
    if len(lines) > 1:
        print(f"drills: {len(lines) - num_failed} of {len(lines)} passed", flush=True)
    return 1 if num_failed else 0


if __name__ == "__main__":
    sys.exit(main())
