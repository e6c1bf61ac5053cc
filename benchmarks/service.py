"""What the service itself costs: `recofuse bench service`.

Real server processes with stand-in engines are loaded over loopback sockets by a closed loop of clients that posts a
640x480 PNG pair and gets a PNG back. Varied: engine (null; fixed: 20 ms + 2 ms an item, batches of 8), codec (image
files, or ready bytes in their place), everything in one process or split over Redis, and 1, 8, 16 and 32 clients.

Processor time is that of all server processes (Redis included) divided by the answers of the same window; the load
generator's own is stated apart, because on a small machine it competes with the servers. Memory is resident memory of
all server processes together, at its highest.

The baseline is a bare FastAPI batcher (`benchmarks/bare.py`) that parses the same body and answers with the same file,
in one process and over Redis. It and the service with the null engine and ready bytes (all in one; split over Redis;
split with a folder beside Redis that its processes share) take turns in short windows, so that whatever else the
machine does meets both; a ratio is the median over the rounds of a round's ratio.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import uvloop

from benchmarks.load import Load, Tally, fuse_request, picture_pair
from benchmarks.processes import Stack, all_in_one, bare, can_split, machine, memory_folder, split

Engine = Literal["null", "fixed"]
Codec = Literal["files", "ready"]
Topology = Literal["all-in-one", "split", "folder"]
Baseline = Literal["bare", "bare over Redis"]

SPLIT: frozenset[Topology] = frozenset({"split", "folder"})
CONCURRENCIES = (1, 8, 16, 32)
MAX_BATCH, MAX_WAIT_S = 8, 0.005
BATCH_S, ITEM_S = 0.020, 0.002
LONE_WAIT_S = 0.5  # far above a lone request's latency, so that waiting for it could not be overlooked

# What the project asks of itself on an otherwise idle machine of two cores that carry the load generator too.
MAX_CPU_MS: dict[Topology, float] = {"all-in-one": 3.0, "split": 6.0}  # codec off, null engine, best concurrency
MIN_IMAGES_S = {16: 180.0, 32: 200.0}  # fixed engine, all in one, codec off
MAX_RSS_MIB = 450.0
# Processor time to that of a bare server: one process to one process, over Redis to either.
MAX_TO_BARE: dict[tuple[Topology, Baseline], float] = {
    ("all-in-one", "bare"): 1.3,
    ("split", "bare over Redis"): 2.0,
    ("split", "bare"): 2.0,
    ("folder", "bare"): 2.0,
}
TO_BARE_CLIENTS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One row. Times of one request in ms; cpu_ms: processor time of all server processes per answer."""

    topology: Topology
    engine: Engine
    codec: Codec
    concurrency: int
    images_s: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    cpu_ms: float
    cpu_ms_by_process: dict[str, float]
    client_cpu_ms: float
    rss_mib: float
    peak_rss_mib: float
    num_answers: int
    num_failed: int

    def row(self) -> str:
        """A line of the table."""
        return (
            f"{self.topology:10}  {self.engine:5}  {self.codec:5}  {self.concurrency:7}  {self.images_s:8.1f}"
            f"  {self.p50_ms:7.1f}  {self.p95_ms:7.1f}  {self.p99_ms:7.1f}  {self.cpu_ms:6.2f}"
            f"  {self.client_cpu_ms:6.2f}  {self.peak_rss_mib:7.0f}  {self.num_failed:6}"
        )


HEADING = (
    f"{'topology':10}  {'engine':5}  {'codec':5}  {'clients':>7}  {'images/s':>8}  {'p50 ms':>7}  {'p95 ms':>7}"
    f"  {'p99 ms':>7}  {'cpu ms':>6}  {'client':>6}  {'mem MiB':>7}  {'failed':>6}"
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """All figures. document: the same for programs; line: the last line that was said."""

    rows: list[Measurement]
    checks: list[Check]
    document: dict[str, Any]
    line: str

    @property
    def num_failed(self) -> int:
        """Requests that were not answered with 200."""
        return sum(row.num_failed for row in self.rows)


def run(
    *,
    window_s: float,
    warm_up_s: float,
    json_path: Path | None = None,
    concurrencies: Sequence[int] = CONCURRENCIES,
    engines: Sequence[Engine] = ("null", "fixed"),
    codecs: Sequence[Codec] = ("ready", "files"),
    topologies: Sequence[Topology] = ("all-in-one", "split"),
    num_rounds: int = 20,
    say: Callable[[str], None] = print,
) -> Outcome:
    """Measure; say one row at a time, and a summary as the last line.

    num_rounds: of windows in which the bare server and the service take turns. json_path: where all figures go.
    """
    where = machine()
    vis, ir = picture_pair()
    request = fuse_request(vis, ir)
    why_not = can_split() if set(topologies) & SPLIT else ""
    say(
        f"{where['cpu']}, {where['num_cpus']} cores, load average {where['load_average']}; "
        f"vis {len(vis) // 1000} kB and ir {len(ir) // 1000} kB a request"
    )
    say(HEADING)
    rows: list[Measurement] = []
    for topology in topologies:
        if topology in SPLIT and why_not:
            say(f"{topology:10}  skipped: {why_not}")
            continue
        for engine in engines:
            for codec in codecs:
                with _stack(topology, engine, codec, MAX_WAIT_S) as stack:
                    for concurrency in concurrencies:
                        window = measure(stack, request, concurrency, warm_up_s, window_s)
                        rows.append(_measurement(topology, engine, codec, concurrency, window))
                        say(rows[-1].row())
    lone_ms = _lone_latency_ms(request, warm_up_s, window_s)
    wanted: list[Topology] = [*topologies, "folder"] if "split" in topologies else [*topologies]
    beside = [topology for topology in dict.fromkeys(wanted) if topology not in SPLIT or not why_not]
    compared = _beside_bare(request, beside, num_rounds)
    for comparison in compared:
        say(comparison.text())
    checks = judge(rows, lone_ms, compared)
    document = {
        "machine": where,
        "window_s": window_s,
        "request_bytes": len(request),
        "rows": [asdict(row) for row in rows],
        "lone_request_p99_ms": lone_ms,
        "to_bare": [
            {"name": comparison.name, **asdict(comparison), "ratio": comparison.ratio} for comparison in compared
        ],
        "split_skipped": why_not,
        "targets": [asdict(check) for check in checks],
    }
    if json_path is not None:
        json_path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    line = summary(checks, sum(row.num_failed for row in rows), why_not, where["load_average"])
    say(line)
    return Outcome(rows, checks, document, line)


@dataclass(frozen=True, slots=True)
class Check:
    """A figure beside its target. ratio: above 1 is better than asked."""

    name: str
    value: float
    target: float
    unit: str
    ratio: float

    def text(self) -> str:
        """For the last line."""
        sign = "<=" if self.unit != "/s" else ">="
        return f"{self.name} {self.value:.4g}{self.unit} ({sign}{self.target:g}, x{self.ratio:.2f})"


@dataclass(frozen=True, slots=True)
class Comparison:
    """The service beside a bare server: processor ms of a request in each round."""

    topology: Topology
    baseline: Baseline
    cpu_ms: list[float]
    baseline_ms: list[float]

    @property
    def name(self) -> str:
        """What is compared."""
        return f"{self.topology} to {self.baseline}"

    @property
    def ratio(self) -> float:
        """Median over the rounds, whose windows met the same neighbours."""
        return statistics.median(ours / theirs for ours, theirs in zip(self.cpu_ms, self.baseline_ms, strict=True))

    def text(self) -> str:
        """A line of its own."""
        ours, theirs = statistics.median(self.cpu_ms), statistics.median(self.baseline_ms)
        return (
            f"{self.name}, {TO_BARE_CLIENTS} clients, {len(self.cpu_ms)} rounds: {ours:.2f} ms to {theirs:.2f} ms of "
            f"processor time, ratio {self.ratio:.2f}"
        )


def judge(rows: Sequence[Measurement], lone_ms: float, compared: Sequence[Comparison] = ()) -> list[Check]:
    """Every target for which there is a figure."""
    checks = []
    for comparison in compared:
        most, ratio = MAX_TO_BARE[comparison.topology, comparison.baseline], comparison.ratio
        checks.append(Check(comparison.name, ratio, most, "", most / ratio))
    for topology, most in MAX_CPU_MS.items():
        costs = [r.cpu_ms for r in rows if (r.topology, r.engine, r.codec) == (topology, "null", "ready")]
        if costs:  # the most expensive concurrency counts
            checks.append(Check(f"cpu {topology}", max(costs), most, " ms", most / max(costs)))
    for concurrency, least in MIN_IMAGES_S.items():
        for row in rows:
            if (row.topology, row.engine, row.codec, row.concurrency) == ("all-in-one", "fixed", "ready", concurrency):
                checks.append(Check(f"fixed@{concurrency}", row.images_s, least, "/s", row.images_s / least))
    if rows:
        memory = max(row.peak_rss_mib for row in rows)
        checks.append(Check("memory", memory, MAX_RSS_MIB, " MiB", MAX_RSS_MIB / memory))
    most = 1e3 * (BATCH_S + ITEM_S + LONE_WAIT_S)
    checks.append(Check("lone request with a 500 ms window, p99", lone_ms, most, " ms", most / lone_ms))
    return checks


def markdown(rows: Sequence[Measurement]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| Topology | Engine | Codec | Clients | Images/s | p50 ms | p95 ms | p99 ms | Processor ms | Memory MiB |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        figures = (row.images_s, row.p50_ms, row.p95_ms, row.p99_ms)
        lines.append(
            f"| {row.topology} | {row.engine} | {row.codec} | {row.concurrency} | "
            f"{' | '.join(f'{figure:.1f}' for figure in figures)} | {row.cpu_ms:.2f} | {row.peak_rss_mib:.0f} |"
        )
    return "\n".join(lines)


def summary(checks: Sequence[Check], num_failed: int, why_not: str, load_average: float) -> str:
    """The last line."""
    parts = [check.text() for check in checks]
    parts.append("nothing failed" if not num_failed else f"{num_failed} REQUESTS FAILED")
    if why_not:
        parts.append(f"split skipped: {why_not}")
    if load_average > 0.5:
        parts.append(f"the machine was busy (load average {load_average}), so this is only indicative")
    return "service: " + "; ".join(parts)


@contextmanager
def _stack(topology: Topology, engine: Engine, codec: Codec, max_wait_s: float) -> Iterator[Stack]:
    values: dict[str, dict[str, Any]] = {
        "engine": {"kind": engine, "fixed_batch_s": BATCH_S, "fixed_item_s": ITEM_S},
        "codec": {"kind": codec},
        "grpc": {"port": -1},
        "batch": {"max_batch": MAX_BATCH, "max_wait_s": max_wait_s},
        "log": {"level": "WARNING"},
    }
    with ExitStack() as running:
        if topology == "folder":
            folder = running.enter_context(tempfile.TemporaryDirectory(prefix="recofuse-frames-", dir=memory_folder()))
            values["queue"] = {"shared_folder": folder}
        yield running.enter_context(all_in_one(values) if topology == "all-in-one" else split(values))


@dataclass(frozen=True, slots=True)
class Window:
    """What happened between two looks at the clock. cpu_s: by server process."""

    tally: Tally
    seconds: float
    cpu_s: dict[str, float]
    client_cpu_s: float
    rss_bytes: int
    peak_rss_bytes: int


def measure(stack: Stack, request: bytes, concurrency: int, warm_up_s: float, window_s: float) -> Window:
    """Load the stack, let it settle, and measure one window."""

    async def load() -> Window:
        clients = Load(stack.addresses, [request], concurrency)
        await clients.start()
        await asyncio.sleep(warm_up_s)
        before, client_before, started = stack.cpu_s(), time.process_time(), time.perf_counter()
        clients.tally = Tally()
        await asyncio.sleep(window_s)
        tally, seconds, after = clients.tally, time.perf_counter() - started, stack.cpu_s()
        clients.tally = Tally()
        client_cpu_s = time.process_time() - client_before
        rss = sum(stack.rss_bytes().values())
        await clients.stop()
        return Window(
            tally=tally,
            seconds=seconds,
            cpu_s={name: after[name] - before[name] for name in after},
            client_cpu_s=client_cpu_s,
            rss_bytes=rss,
            peak_rss_bytes=sum(process.peak_rss_bytes() for process in stack.processes.values()),
        )

    return uvloop.run(load())


def _beside_bare(request: bytes, topologies: Sequence[Topology], num_rounds: int) -> list[Comparison]:
    """The bare servers and these stacks, all running, in alternating windows of a second."""
    with ExitStack() as running:
        stacks: dict[str, Stack] = {"bare": running.enter_context(bare())}
        if "split" in topologies:
            stacks["bare over Redis"] = running.enter_context(bare(over_redis=True))
        for topology in topologies:
            stacks[topology] = running.enter_context(_stack(topology, "null", "ready", MAX_WAIT_S))
        for stack in stacks.values():
            measure(stack, request, TO_BARE_CLIENTS, 0.0, 1.0)  # the first requests pay for what is made once
        rounds = [
            {name: _cpu_ms(measure(stack, request, TO_BARE_CLIENTS, 0.3, 1.0)) for name, stack in stacks.items()}
            for _ in range(num_rounds)
        ]
    return comparisons(rounds)


def comparisons(rounds: Sequence[Mapping[str, float]]) -> list[Comparison]:
    """What the rounds tell. rounds: processor ms of a request by stack; those that were not measured are left out."""
    measured = set.intersection(*map(set, rounds)) if rounds else set()
    return [
        Comparison(topology, baseline, [costs[topology] for costs in rounds], [costs[baseline] for costs in rounds])
        for topology, baseline in MAX_TO_BARE
        if {topology, baseline} <= measured
    ]


def _cpu_ms(window: Window) -> float:
    return 1e3 * sum(window.cpu_s.values()) / max(1, window.tally.num_answers)


def _measurement(topology: Topology, engine: Engine, codec: Codec, concurrency: int, window: Window) -> Measurement:
    tally, answers = window.tally, max(1, window.tally.num_answers)
    return Measurement(
        topology=topology,
        engine=engine,
        codec=codec,
        concurrency=concurrency,
        images_s=tally.statuses[200] / window.seconds,
        p50_ms=tally.percentile_ms(0.50),
        p95_ms=tally.percentile_ms(0.95),
        p99_ms=tally.percentile_ms(0.99),
        cpu_ms=_cpu_ms(window),
        cpu_ms_by_process={name: 1e3 * seconds / answers for name, seconds in window.cpu_s.items()},
        client_cpu_ms=1e3 * window.client_cpu_s / answers,
        rss_mib=window.rss_bytes / 2**20,
        peak_rss_mib=window.peak_rss_bytes / 2**20,
        num_answers=tally.num_answers,
        num_failed=tally.num_failed,
    )


def _lone_latency_ms(request: bytes, warm_up_s: float, window_s: float) -> float:
    """p99 of one client on an idle service whose batch window is far longer than the work: it must not wait for it."""
    with _stack("all-in-one", "fixed", "ready", LONE_WAIT_S) as stack:
        return measure(stack, request, 1, warm_up_s, window_s).tally.percentile_ms(0.99)
