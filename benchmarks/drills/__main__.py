"""`python -m benchmarks.drills [NAME...] [--quick] [--json OUT] [--markdown DOC]`: exit status 1 if any failed.

--markdown replaces what stands between the two marks of a document with the figures of this run.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import sys
import time
import traceback
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import benchmarks.drills
from benchmarks.drills import Report
from benchmarks.processes import machine

FIRST = ("overhead",)  # judged by its times, so it comes before the others have made the machine busy
MARKS = ("<!-- figures -->", "<!-- end of figures -->")


def names() -> list[str]:
    """Every drill there is, in the order in which all of them run."""
    found = {module.name for module in pkgutil.iter_modules(benchmarks.drills.__path__) if module.name[0] != "_"}
    return [*FIRST, *sorted(found.difference(FIRST))]


def machine_line(where: dict[str, Any]) -> str:
    """What the figures were taken on, in words."""
    return (
        f"{where['cpu']}, {where['num_cpus']} cores, Linux {where['kernel']}, Python {where['python']}, "
        f"load average {where['load_average']} at the start"
    )


def markdown(document: dict[str, Any], tables: dict[str, str]) -> str:
    """A run's figures: the machine, a line for each drill, and the tables of those that have one."""
    parts = [f"Machine: {machine_line(document['machine'])}. {document['date']}."]
    if document["is_quick"]:
        parts.append("Short runs (`--quick`): these figures only show that the drills work.")
    rows = ["| Drill | | Time | Figures |", "|---|---|--:|---|"]
    for name, found in document["drills"].items():
        line = found["line"].replace("|", ";")
        rows.append(
            f"| `{name}` | {'passed' if found['passed'] else '**failed**'} | {found['seconds']:.0f} s | {line} |"
        )
    parts.append("\n".join(rows))
    parts += [table for table in tables.values() if table]
    return "\n\n".join(parts)


def replace_figures(path: Path, figures: str) -> None:
    """Put figures between a document's marks. Raises ValueError if it has none."""
    text = path.read_text("utf-8")
    first, last = MARKS
    head, is_begun, rest = text.partition(first)
    _, is_ended, tail = rest.partition(last)
    if not is_begun or not is_ended:
        raise ValueError(f"{path} lacks the lines {first} and {last}")
    path.write_text(f"{head}{first}\n\n{figures}\n\n{last}{tail}", encoding="utf-8")


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
    parser.add_argument("--markdown", type=Path, metavar="DOC.md", help="write the figures into a document")
    asked = parser.parse_args(arguments)
    if unknown := sorted(set(asked.drills) - set(names())):
        parser.error(f"there is no drill {', '.join(unknown)}; there are {', '.join(names())}")
    document: dict[str, Any] = {
        "machine": machine(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "is_quick": asked.quick,
        "drills": {},
    }
    tables: dict[str, str] = {}
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
        tables[name] = report.table
        if asked.json:
            asked.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        print(lines[-1], flush=True)
    if asked.markdown:
        replace_figures(asked.markdown, markdown(document, tables))
    if len(lines) > 1:
        print(f"drills: {len(lines) - num_failed} of {len(lines)} passed", flush=True)
    return 1 if num_failed else 0


if __name__ == "__main__":
    sys.exit(main())
