"""The model beside other work: `recofuse bench neighbours`.

Each way to run is a process of its own that loads the model once and then fuses one 640x480 pair whenever it is told
to. Windows alternate: every way once on the host as it is, then every way once beside as many busy processes as there
are processors; so whatever else the host does meets all of them. Ratios are of medians, a way's beside the busy
processes to its own without them.

- `command`: the engine of torch as `recofuse fuse` and the workers load it, with the number of threads that it chooses.
- `library`: `Runtime.fuse` in a script that imports torch before recofuse_core.
- `graphs`: the engine of ONNX Runtime, which `recofuse fuse` and the workers take on most processors, likewise.
- `one thread`: the engine with one thread.
- `spinning`: what OpenMP does when nobody tells it anything, for comparison; slow, so only with --spinning.

Where a cgroup can be made (as root, version 1 or 2), the engine also runs in one that may use one processor, beside the
same with `--threads 1` and with a thread for each processor of the host.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from signal import SIGCONT, SIGSTOP

from benchmarks.processes import ROOT, clean_environ, machine
from recofuse_host.cgroups import Group, groups
from recofuse_host.processors import read_processors
from recofuse_host.waiting import VARIABLES

MAX_CPU_RATIO, MAX_CLOCK_RATIO = 1.2, 2.5  # beside the busy processes to without them
MAX_QUOTA_RATIO = 1.1  # in a cgroup of one processor, to one thread; a tenth for what two runs of one thing differ
SETTLE_S = 0.3
PERIOD_US = 100_000

BUSY = "while True: pass"
WINDOWS = """
fuse()
print("ready", flush=True)
for _ in sys.stdin:
    clock_s, cpu_s = time.perf_counter(), time.process_time()
    fuse()
    print(time.perf_counter() - clock_s, time.process_time() - cpu_s, flush=True)
"""  # the end of a program that fuses whenever it is told to
FUSER = (
    """
import sys, time
{imports}
import numpy as np
from service.terms.jobs import Part
from service.terms.settings import EngineSettings
from service.work.engine import PassOptions
from service.work.{module} import {engine}

generator = np.random.default_rng(0)
vis = generator.integers(0, 256, (1, 480, 640, 3), np.uint8)
ir = generator.integers(0, 256, (1, 480, 640), np.uint8)
{load}
"""
    + WINDOWS
)
ENGINE = """
engine = {engine}(EngineSettings(device="cpu", num_threads={threads}))
engine.load()
options = PassOptions(engine.info.default_steps, engine.info.default_sampler, (Part.FUSED,), "as_shot")
def fuse():
    engine.fuse(vis, ir, options, [0])
"""
TORCH = {"module": "torch_engine", "engine": "TorchEngine"}
GRAPHS = {"module": "graph_engine", "engine": "GraphEngine"}
LIBRARY = """
runtime = Runtime(load_pretrained("compact"))
pair = torch.from_numpy(vis).permute(0, 3, 1, 2), torch.from_numpy(ir).unsqueeze(1)
def fuse():
    runtime.fuse(*pair, seeds=0, outputs=("fused",), exposure="as_shot")
"""
EARLY = "from recofuse_host.waiting import sleep_while_waiting\nsleep_while_waiting()"
LATE = "import torch\nfrom recofuse_core import Runtime, load_pretrained"
SPINNING = "import os, torch\nos.environ['OMP_WAIT_POLICY'] = 'ACTIVE' # too late for OpenMP, but recofuse sees it"


class NeighbourError(RuntimeError):
    """A measured process ended early. The message carries what it said."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one pair, in seconds."""

    clock_s: float
    cpu_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Medians of one way to run. busy: beside busy processes; None where that was not measured."""

    name: str
    alone: Cost
    busy: Cost | None = None

    @property
    def cpu_ratio(self) -> float:
        """Processor time beside the busy processes to that without them."""
        return self.busy.cpu_s / self.alone.cpu_s if self.busy else float("nan")

    @property
    def clock_ratio(self) -> float:
        """The same on the clock."""
        return self.busy.clock_s / self.alone.clock_s if self.busy else float("nan")

    def text(self) -> str:
        """A line of the table."""
        line = f"{self.name:<24} {self.alone.cpu_s:7.2f} {self.alone.clock_s:7.2f}"
        if self.busy:
            line += (
                f"   {self.busy.cpu_s:7.2f} {self.busy.clock_s:7.2f}   {self.cpu_ratio:6.2f} {self.clock_ratio:6.2f}"
            )
        return line


HEADING = f"{'s a pair':<24} {'cpu':>7} {'clock':>7}   {'cpu':>7} {'clock':>7}   {'cpu':>6} {'clock':>6}"


@dataclass(frozen=True, slots=True)
class Outcome:
    """All rows, those within the cgroup apart, and why there are none of those if there are none."""

    rows: tuple[Row, ...]
    in_cgroup: tuple[Row, ...]
    left_out: str = ""

    def figures(self) -> dict[str, tuple[float, float]]:
        """What is judged: a figure and its bound by name."""
        found = {}
        for row in self.rows:
            if row.name in JUDGED:
                found[f"{row.name}, processor time"] = (row.cpu_ratio, MAX_CPU_RATIO)
                found[f"{row.name}, clock"] = (row.clock_ratio, MAX_CLOCK_RATIO)
        if self.in_cgroup:
            chosen, one, *_ = self.in_cgroup
            found["one processor of the host, clock"] = (chosen.alone.clock_s / one.alone.clock_s, MAX_QUOTA_RATIO)
        return found

    @property
    def all_met(self) -> bool:
        """Whether every figure is within its bound."""
        return all(figure <= bound for figure, bound in self.figures().values())

    @property
    def line(self) -> str:
        """The figures beside their bounds, in one line."""
        parts = [
            f"{name} {figure:.2f} (<={bound:g}{'' if figure <= bound else ', MISSED'})"
            for name, (figure, bound) in self.figures().items()
        ]
        return "ratios: " + "; ".join(parts)


class Fuser:
    """A process that fuses a pair when asked. files: where its id is written before it starts, such as a cgroup's."""

    def __init__(self, code: str, files: Sequence[Path] = ()) -> None:
        environ = {name: value for name, value in clean_environ({}).items() if name not in VARIABLES}
        joining = "".join(f"open({str(path)!r}, 'w').write(str(os.getpid()))\n" for path in files)
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"import os\n{joining}{code}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environ,
        )

    def wait_ready(self) -> None:
        """Raises NeighbourError if it does not start."""
        self._line()

    def fuse(self) -> Cost:
        """Fuse once. Raises NeighbourError if it ended."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        clock_s, cpu_s = map(float, self._line().split())
        return Cost(clock_s, cpu_s)

    def end(self) -> None:
        """Kill it."""
        self._process.kill()
        self._process.communicate()

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise NeighbourError(f"a measured process ended with status {self._process.wait()}")
        return line


def engine_code(threads: int = 0, kind: dict[str, str] = TORCH, imports: str = EARLY) -> str:
    """A process that runs an engine of the service."""
    return FUSER.format(imports=imports, load=ENGINE.format(threads=threads, **kind), **kind)


WAYS = {
    "command": engine_code(),
    "graphs": engine_code(kind=GRAPHS),
    "library": FUSER.format(imports=LATE, load=LIBRARY, **TORCH),
    "one thread": engine_code(1),
    "spinning": engine_code(imports=SPINNING),
}
JUDGED = ("command", "graphs", "library")
IN_CGROUP = {"as it chooses": 0, "--threads 1": 1}


def run(
    *,
    repeats: int = 5,
    num_busy: int = 0,
    with_spinning: bool = False,
    json_path: Path | None = None,
    say: Callable[[str], None] = print,
) -> Outcome:
    """Measure and print; num_busy 0: as many busy processes as processors may be used."""
    processors = read_processors()
    num_busy = num_busy or processors.usable
    where = machine()
    say(f"{where['cpu']}, {processors.told()}, load average {where['load_average']} before")
    names = [name for name in WAYS if with_spinning or name != "spinning"]
    rows = beside_others({name: WAYS[name] for name in names}, repeats, num_busy)
    say(f"{'':<24} {'as it is':^15}   {f'{num_busy} busy':^15}   {'ratio':^13}")
    say(HEADING)
    for row in rows:
        say(row.text())
    in_cgroup, left_out = _within_cgroup(repeats, processors.allowed)
    say(f"in a cgroup of one processor: {left_out}" if left_out else "in a cgroup of one processor:")
    for row in in_cgroup:
        say(row.text())
    torchs, graphs = (next(row for row in rows if row.name == name) for name in ("command", "graphs"))
    say(f"graphs to torch, processor time: {graphs.alone.cpu_s / torchs.alone.cpu_s:.2f} as it is")
    outcome = Outcome(tuple(rows), tuple(in_cgroup), left_out)
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        figures = {name: {"ratio": figure, "bound": bound} for name, (figure, bound) in outcome.figures().items()}
        content = {"machine": where, "num_busy": num_busy, "repeats": repeats, "figures": figures, **asdict(outcome)}
        json_path.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    say(outcome.line)
    return outcome


def beside_others(ways: dict[str, str], repeats: int, num_busy: int) -> list[Row]:
    """Each way's medians, in windows that alternate with and without that many busy processes."""
    with _fusers(ways) as fusers, _busy(num_busy) as tell:
        alone: dict[str, list[Cost]] = {name: [] for name in ways}
        busy: dict[str, list[Cost]] = {name: [] for name in ways}
        for _ in range(repeats):
            for costs, word in ((alone, SIGSTOP), (busy, SIGCONT)):
                tell(word)
                time.sleep(SETTLE_S)
                for name, fuser in fusers.items():
                    costs[name].append(fuser.fuse())
    return [Row(name=name, alone=_median(alone[name]), busy=_median(busy[name])) for name in ways]


def _within_cgroup(repeats: int, num_processors: int) -> tuple[list[Row], str]:
    """The engine where one processor's worth of time is given, or why that could not be measured."""
    if num_processors < 2:
        return [], "not measured: there is one processor"
    ways = {**IN_CGROUP, f"--threads {num_processors}": num_processors}
    costs: dict[str, list[Cost]] = {name: [] for name in ways}
    try:
        with _cgroup() as join, _fusers({name: engine_code(count) for name, count in ways.items()}, join) as fusers:
            for _ in range(repeats):
                for name, fuser in fusers.items():
                    costs[name].append(fuser.fuse())
                    time.sleep(SETTLE_S)  # a fresh quota for the next
    except OSError as error:
        return [], f"not measured: no cgroup can be made here ({error})"
    return [Row(name=name, alone=_median(costs[name])) for name in ways], ""


def _median(costs: Sequence[Cost]) -> Cost:
    return Cost(statistics.median(c.clock_s for c in costs), statistics.median(c.cpu_s for c in costs))


@contextlib.contextmanager
def _fusers(codes: dict[str, str], join: Sequence[Path] = ()) -> Iterator[dict[str, Fuser]]:
    """Processes that are ready, by name."""
    with contextlib.ExitStack() as stack:
        fusers = {}
        for name, code in codes.items():
            fusers[name] = Fuser(code, join)
            stack.callback(fusers[name].end)
            fusers[name].wait_ready()
        yield fusers


@contextlib.contextmanager
def _busy(count: int) -> Iterator[Callable[[int], None]]:
    """Processes that do nothing but compute, stopped; yields what sends all of them a signal."""
    processes: list[subprocess.Popen[bytes]] = []

    def tell(word: int) -> None:
        for process in processes:
            process.send_signal(word)

    try:
        processes.extend(subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(count))
        tell(SIGSTOP)
        yield tell
    finally:
        for process in processes:
            process.kill()
            process.wait()


@contextlib.contextmanager
def _cgroup() -> Iterator[list[Path]]:
    """A group below this process's own that may use one processor; yields where a process joins it. Raises OSError."""
    for group in groups("cpu"):
        if group.version == 1 or "cpu" in (group.folder / "cgroup.subtree_control").read_text("ascii").split():
            break
    else:
        raise OSError("none has the controller of processors")
    folder = group.folder / f"recofuse-bench-{os.getpid()}"
    folder.mkdir()
    try:
        _limit(Group(group.version, folder))
        yield [folder / "cgroup.procs"]
    finally:
        for _ in range(50):  # it is empty a moment after its last process ended
            with contextlib.suppress(OSError):
                folder.rmdir()
                break
            time.sleep(0.1)


def _limit(group: Group) -> None:
    if group.version == 2:
        (group.folder / "cpu.max").write_text(f"{PERIOD_US} {PERIOD_US}")
    else:
        (group.folder / "cpu.cfs_period_us").write_text(str(PERIOD_US))
        (group.folder / "cpu.cfs_quota_us").write_text(str(PERIOD_US))
