"""The drills' own machinery: their order, their report, and that a broken promise is not passed over."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.drills import (
    Report,
    __main__,
    bad_day,
    cameras,
    drain,
    hostile,
    kill,
    overhead,
    soak,
    stall,
    stream_kill,
)
from benchmarks.load import Load, ask, fuse_request, get_request, picture_pair, scrape
from benchmarks.processes import Stack, all_in_one
from benchmarks.service import Measurement, judge, markdown
from service.command.cameras import CameraPlan, CameraReport, Tally
from service.watch.metrics import FlowMode

MODULES = {
    "bad_day": bad_day, "cameras": cameras, "drain": drain, "hostile": hostile, "kill": kill, "overhead": overhead,
    "soak": soak, "stall": stall, "stream_kill": stream_kill,
}  # fmt: skip


def measurement(**changes: object) -> Measurement:
    values: dict[str, object] = {
        "topology": "all-in-one", "engine": "null", "codec": "ready", "concurrency": 16, "images_s": 300.0,
        "p50_ms": 1.0, "p95_ms": 2.0, "p99_ms": 3.0, "cpu_ms": 1.5, "cpu_ms_by_process": {}, "client_cpu_ms": 0.1,
        "rss_mib": 100.0, "peak_rss_mib": 150.0, "num_answers": 300, "num_failed": 0,
    }  # fmt: skip
    return Measurement(**{**values, **changes})  # type: ignore[arg-type]


def test_all_drills_run_and_the_one_that_is_timed_comes_first() -> None:
    assert sorted(__main__.names()) == sorted(MODULES)
    assert __main__.names()[0] == "overhead"


def test_a_failed_drill_fails_the_run_and_the_others_run_all_the_same(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(drain, "run", lambda *, is_quick, say: Report(True, f"quick {is_quick} | fine", {"number": 1}))
    monkeypatch.setattr(kill, "run", lambda *, is_quick, say: 1 / 0)
    document, out = tmp_path / "doc.md", tmp_path / "out.json"
    document.write_text("before\n<!-- figures -->\nold\n<!-- end of figures -->\nafter\n")
    arguments = ["kill", "drain", "--quick", "--json", str(out), "--markdown", str(document)]
    assert __main__.main(arguments) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("kill      FAILED")
    assert "ZeroDivisionError" in said[0]
    assert said[1].startswith("drain     passed")
    assert said[2] == "drills: 1 of 2 passed"
    written = json.loads(out.read_text())
    assert written["drills"]["drain"]["number"] == 1
    assert not written["drills"]["kill"]["passed"]
    text = document.read_text()
    assert text.startswith("before\n<!-- figures -->\n\nMachine: ")
    assert text.endswith("<!-- end of figures -->\nafter\n")
    assert "old" not in text
    assert "| `kill` | **failed** |" in text
    assert "quick True ; fine |" in text  # a bar would end the table's cell


def test_all_passed_is_status_0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drain, "run", lambda *, is_quick, say: Report(True, "fine"))
    assert __main__.main(["drain"]) == 0


def test_a_document_without_marks_is_not_touched(tmp_path: Path) -> None:
    document = tmp_path / "doc.md"
    document.write_text("nothing")
    with pytest.raises(ValueError, match="lacks the lines"):
        __main__.replace_figures(document, "figures")
    assert document.read_text() == "nothing"


def test_the_document_of_the_figures_has_its_marks() -> None:
    text = (Path(__file__).parents[2] / "docs/reliability.md").read_text("utf-8")
    assert text.count(__main__.MARKS[0]) == text.count(__main__.MARKS[1]) == 1
    for name in MODULES:
        assert f"`{name}`" in text


def test_targets_are_held_against_the_worst_figure() -> None:
    rows = [measurement(cpu_ms=1.0), measurement(cpu_ms=4.0, concurrency=1), measurement(engine="fixed", images_s=90.0)]
    ratios = {check.name: check.ratio for check in judge(rows, lone_ms=22.0)}
    assert ratios["cpu all-in-one"] == 0.75
    assert ratios["fixed@16"] == 0.5
    assert ratios["memory"] == 3.0
    assert markdown(rows).count("\n") == 4


def cameras_report(mode: FlowMode, **counts: int) -> CameraReport:
    """Of two cameras that sent 100 frames each, 10 a second; counts: of the first."""
    tallies = [
        Tally(
            num_sent=100,
            num_fused=100,
            ages_s=[0.2] * 100,
            latencies_s=[0.3] * 100,
            arrivals_s=[0.1 * number for number in range(1, 101)],
        )
        for _ in range(2)
    ]
    for name, value in counts.items():
        setattr(tallies[0], name, value)
    tallies[1].num_resumed = 1
    plan = CameraPlan(num_streams=2, fps=10, seconds=10, mode=mode)
    return CameraReport(plan, tallies, 10.5)


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ({}, ""),
        ({"num_out_of_order": 1}, "num_out_of_order"),
        ({"num_gaps_unreported": 1}, "num_gaps_unreported"),
        ({"num_failed": 1}, "num_failed"),
        ({"num_unanswered": 1}, "open"),
        ({"num_fused": 99}, "fused"),
        ({"arrivals_s": [1.0, 2.0]}, "did not go on"),
    ],
)
def test_a_stream_that_suffers_fails_the_drill(counts: dict[str, int], words: str) -> None:
    everything, latest = cameras_report(FlowMode.ALL, **counts), cameras_report(FlowMode.LATEST)
    report = stream_kill._report(everything, latest, ((3.0, "worker-1"), (6.0, "api-1")))
    assert report.is_passed is not bool(words)
    assert words in report.line


def test_figures_of_cameras() -> None:
    report = cameras_report(FlowMode.LATEST, num_fused=80)
    assert report.unfairness == pytest.approx(1 / 9)
    assert report.fused_per_s == pytest.approx(20.0, abs=0.3)
    assert (report.latency_s(0.99), report.max_age_s) == (0.3, 0.2)
    assert cameras._median_ages(report) == (0.2, 0.2)
    assert "2 cameras" in report.line


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    values: dict[str, dict[str, object]] = {
        "engine": {"kind": "null"},
        "codec": {"kind": "ready"},
        "grpc": {"port": -1},
        "log": {"level": "ERROR"},
    }
    with all_in_one(values) as running:
        yield running


async def test_the_load_generator_counts_what_it_is_told(stack: Stack) -> None:
    vis, ir = picture_pair(64, 48)
    load = Load(stack.addresses, [fuse_request(vis, ir), fuse_request(vis, b"no picture")], concurrency=2)
    await load.start()
    while load.tally.num_answers < 20:  # noqa: ASYNC110 - it has no event to wait for
        await asyncio.sleep(0.01)
    await load.stop()
    assert set(load.tally.statuses) == {200, 415}
    assert load.tally.num_failed == load.tally.statuses[415] > 0
    assert len(load.tally.latencies_s) == load.tally.statuses[200]
    assert load.tally.num_broken == 0
    figures = await scrape(stack.address)
    served = 'recofuse_requests_total{method="POST",protocol="http",route="/v1/fuse",status="200"}'
    assert figures[served] == load.tally.statuses[200]


async def test_one_question_one_answer(stack: Stack) -> None:
    answer = await ask(stack.address, get_request("/health/live"))
    assert (answer.status, json.loads(answer.body)["status"]) == (200, "live")
    assert answer.headers["content-type"] == "application/json"


async def test_half_an_answer_is_none() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    address = ("127.0.0.1", server.sockets[0].getsockname()[1])
    try:
        with pytest.raises(ConnectionError, match="before the answer"):
            await ask(address, get_request("/"))
    finally:
        server.close()
        await server.wait_closed()
    with pytest.raises(ConnectionError, match="no connection"):
        await ask(address, get_request("/"))


def test_what_a_process_costs_and_leaves_is_seen(stack: Stack) -> None:
    (process,) = stack.processes.values()
    assert process.left_behind() == [process.pid]
    assert process.cpu_s() > 0
    assert 10 << 20 < process.rss_bytes() <= process.peak_rss_bytes()
    assert process.num_fds() > 5
