"""Videos in and out: real files, a real address, a real browser's request, and the command on a real server."""

from __future__ import annotations

import asyncio
import functools
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import cv2
import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recofuse_client import Frame, FrameResult, Fusion, Timings, live
from recofuse_client.video import Recorder, VideoError, Viewer, is_live, read_pairs
from recofuse_rigs.rig import Rig, to_json
from tests.client.conftest import served
from tests.client.reach import CommandServer
from tests.fakes import TellingCodec, picture
from tests.service.conftest import Serving

ROOT = Path(__file__).parents[2]


def level(number: int) -> int:
    """The brightness that tells a frame's number, far enough apart for a lossy codec."""
    return 20 + 10 * (number % 20)


def make_video(path: Path, num_frames: int, fps: float = 25.0, size: tuple[int, int] = (64, 48)) -> Path:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), fps, size)
    assert writer.isOpened()
    for number in range(num_frames):
        writer.write(np.full((size[1], size[0], 3), level(number), np.uint8))
    writer.release()
    return path


def levels_of(path: Path) -> list[int]:
    capture = cv2.VideoCapture(str(path))
    found: list[int] = []
    while True:
        is_there, frame = capture.read()
        if not is_there:
            return found
        found.append(int(frame.mean()))


def brightness(image: object) -> float:
    return float(np.asarray(image).mean())


def test_files_are_read_in_step(tmp_path: Path) -> None:
    vis, ir = make_video(tmp_path / "vis.avi", 12), make_video(tmp_path / "ir.avi", 10)
    pairs, fps = read_pairs(str(vis), str(ir))
    seen = list(pairs)
    assert fps == 25
    assert len(seen) == 10  # of the shorter one
    for number, frame in enumerate(seen):
        assert isinstance(frame, Frame)
        assert np.asarray(frame.vis).shape == (48, 64, 3)
        assert np.asarray(frame.ir).shape == (48, 64)
        assert frame.bgr
        assert frame.timestamp_ns == number * 40_000_000
        for image in (frame.vis, frame.ir):
            assert abs(brightness(image) - level(number)) < 3


@pytest.mark.parametrize(("vis_fps", "ir_fps"), [(30, 10), (10, 30), (25, 9), (30, 29.97)])
def test_rates_that_differ_are_paired_by_time(tmp_path: Path, vis_fps: float, ir_fps: float) -> None:
    vis = make_video(tmp_path / "vis.avi", int(vis_fps), vis_fps)
    ir = make_video(tmp_path / "ir.avi", int(ir_fps), ir_fps)
    pairs, _ = read_pairs(str(vis), str(ir))
    num = 0
    for number, frame in enumerate(pairs):
        nearest = int(number / vis_fps * ir_fps + 0.5)
        assert abs(brightness(frame.ir) - level(nearest)) < 3, number
        num += 1
    assert num >= int(vis_fps) - 2


def test_files_can_play_as_cameras_do(tmp_path: Path) -> None:
    vis, ir = make_video(tmp_path / "vis.avi", 20, 50.0), make_video(tmp_path / "ir.avi", 20, 50.0)
    started_s = time.monotonic()
    pairs, fps = read_pairs(str(vis), str(ir), realtime=True)
    stamps = [frame.timestamp_ns for frame in pairs]
    assert fps == 50
    assert time.monotonic() - started_s >= 19 / 50
    assert stamps == sorted(stamps)
    assert 1 <= len(stamps) <= 20


def test_a_live_source_that_is_left_is_released(tmp_path: Path) -> None:
    vis, ir = make_video(tmp_path / "vis.avi", 2000, 100.0), make_video(tmp_path / "ir.avi", 2000, 100.0)

    def num_readers() -> int:
        return sum(thread.name.startswith(("recofuse-vis", "recofuse-ir")) for thread in threading.enumerate())

    before = num_readers()
    pairs, _ = read_pairs(str(vis), str(ir), realtime=True)
    next(pairs)
    assert num_readers() == before + 2
    pairs.close()
    assert num_readers() == before


def test_an_address_is_a_live_source(tmp_path: Path) -> None:
    make_video(tmp_path / "vis.avi", 5)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    handler.log_message = lambda *_: None  # type: ignore[attr-defined]
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}/vis.avi"
        pairs, _ = read_pairs(address, address)
        seen = list(pairs)
        server.shutdown()
    assert 1 <= len(seen) <= 5
    for frame in seen:  # which of them come is a matter of time
        assert min(abs(brightness(frame.vis) - level(number)) for number in range(5)) < 6


def test_what_is_no_video_says_so(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    vis = make_video(tmp_path / "vis.avi", 2)
    (tmp_path / "text.avi").write_text("no video")
    with pytest.raises(VideoError, match="ir: there is no file"):
        read_pairs(str(vis), str(tmp_path / "none.avi"))
    with pytest.raises(VideoError, match=r"vis: .*cannot be opened"):
        read_pairs(str(tmp_path / "text.avi"), str(vis))
    with pytest.raises(VideoError, match="device 99 cannot be opened"):
        read_pairs("99", str(vis))
    assert is_live("0")
    assert is_live("rtsp://camera/1")
    assert not is_live("C0.avi")
    capfd.readouterr()  # OpenCV's own complaints


@settings(deadline=None, max_examples=25)
@given(gaps=st.lists(st.integers(1, 6), min_size=1, max_size=12), suffix=st.sampled_from([".avi", ".mkv", ".mp4"]))
def test_a_recording_plays_at_the_true_speed(
    gaps: list[int], suffix: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("recording") / f"out{suffix}"
    recorder, moment = Recorder(path, 20.0), 0
    expected: list[int] = []
    for number, gap in enumerate(gaps):
        moment += gap if number else 0
        expected += [level(number - 1)] * (moment - len(expected)) + [level(number)]
        recorder.write(np.full((48, 64, 3), level(number), np.uint8), 7_000_000_000 + moment * 50_000_000)
    recorder.close()
    found = levels_of(path)
    assert len(found) == moment + 1 == recorder.num_frames
    for shown, meant in zip(found, expected, strict=True):
        assert abs(shown - meant) < 5  # half of the distance between two levels


def test_recordings_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match=r"\.mp4"):
        Recorder(tmp_path / "out.txt", 25)
    with pytest.raises(VideoError, match="no folder"):
        Recorder(tmp_path / "none" / "out.mp4", 25)
    recorder = Recorder(tmp_path / "out.mp4", 25)
    recorder.write(picture(), 0)
    with pytest.raises(VideoError, match="came after"):
        recorder.write(picture(32, 48), 40_000_000)
    recorder.close()
    Recorder(tmp_path / "never.mp4", 25).close()
    assert not (tmp_path / "never.mp4").exists()


def test_a_browser_is_shown_the_pictures() -> None:
    viewer = Viewer()
    page = httpx.get(viewer.url, trust_env=False)
    assert 'src="/pictures"' in page.text
    assert "http" not in page.text.replace(viewer.url, "")  # no other place is asked for anything
    assert httpx.get(f"{viewer.url}nothing", trust_env=False).status_code == 404
    for host, status in (("localhost:9", 200), ("evil.example", 421), ("127.0.0.1.evil.example:80", 421), ("[", 421)):
        for path in ("", "nothing"):
            answer = httpx.get(f"{viewer.url}{path}", headers={"Host": host}, trust_env=False)
            assert answer.status_code == (404 if path and status == 200 else status)
    shown = picture()
    viewer.write(shown, 0)
    with httpx.stream("GET", f"{viewer.url}pictures", trust_env=False, timeout=20) as answer:
        assert answer.headers["content-type"] == "multipart/x-mixed-replace; boundary=picture"
        received = b""
        for chunk in answer.iter_bytes():
            received += chunk
            if b"\xff\xd9" in received:
                break
    jpeg = received[received.index(b"\xff\xd8") : received.rindex(b"\xff\xd9") + 2]
    decoded = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR_RGB)
    assert decoded is not None
    assert np.abs(decoded.astype(int) - shown).mean() < 6
    viewer.close()
    with pytest.raises(httpx.ConnectError):
        httpx.get(viewer.url, trust_env=False)


# the command


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "service", "stream", *map(str, words)]


@pytest.fixture
def null_server(command_server: CommandServer) -> CommandServer:
    command_server.start("null")
    command_server.wait_until_ready()
    return command_server


def test_the_command_records_what_two_files_show(null_server: CommandServer, tmp_path: Path) -> None:
    vis, ir = make_video(tmp_path / "vis.avi", 15), make_video(tmp_path / "ir.avi", 15)
    words = ["--vis", vis, "--ir", ir, "--target", null_server.grpc, "-o", tmp_path / "out.mp4"]
    done = subprocess.run(
        command(*words, "--json", tmp_path / "figures.json"), capture_output=True, text=True, cwd=ROOT, timeout=120,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("15 frames fused, 0 failed, 0 dropped, 0 lost; ")
    found = levels_of(tmp_path / "out.mp4")
    assert len(found) == 15
    assert all(abs(value - level(number)) < 8 for number, value in enumerate(found))
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert (figures["fused"], figures["offered"], figures["is_interrupted"]) == (15, 15, False)
    assert 0 < figures["latency_p50_s"] <= figures["latency_p99_s"]

    def refused(*words: object) -> str:
        done = subprocess.run(command(*words), capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        return done.stderr.splitlines()[-1]

    assert "no file" in refused("--vis", "none.avi", "--ir", ir)
    assert "mode" in refused("--vis", vis, "--ir", ir, "--mode", "some")
    assert "offset: accepted are auto" in refused("--vis", vis, "--ir", ir, "--offset", "soon")
    assert "give it in seconds" in refused("--vis", vis, "--ir", ir, "--offset", "auto")
    assert ".mp4" in refused("--vis", vis, "--ir", ir, "-o", "out.gif", "--target", null_server.grpc)


def test_the_command_takes_off_an_offset(null_server: CommandServer, tmp_path: Path) -> None:
    vis, ir, told = make_video(tmp_path / "vis.avi", 12), make_video(tmp_path / "ir.avi", 12), tmp_path / "told.json"
    words = ["--vis", vis, "--ir", ir, "--target", null_server.grpc, "--part", "ir", "-o", tmp_path / "out.mkv"]
    words += ["--offset", 0.16, "--tolerance", 0.01, "--json", told, "--ir-range", 0, 255]
    done = subprocess.run(command(*words), capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(told.read_text("utf-8"))["offset_s"] == 0.16
    expected = [level(number + 4) for number in range(8)]
    assert np.abs(np.array(levels_of(tmp_path / "out.mkv")) - expected).max() < 8


def test_the_command_fixes_both_scales(null_server: CommandServer, tmp_path: Path) -> None:
    vis, ir = make_video(tmp_path / "vis.avi", 10), make_video(tmp_path / "ir.avi", 10)
    for part, low, high in (("vis", 0, 510), ("ir", -255, 255)):
        out = tmp_path / f"{part}.mkv"
        words = ["--vis", vis, "--ir", ir, "--target", null_server.grpc, "-o", out, "--part", part]
        words += [f"--{part}-range", str(low), str(high)]
        done = subprocess.run(command(*words), capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        assert "infrared read" not in done.stdout
        expected = [(level(number) - low) / (high - low) * 255 for number in range(10)]
        assert np.abs(np.array(levels_of(out)) - expected).max() < 8


def test_the_command_streams_in_colours(null_server: CommandServer, tmp_path: Path) -> None:
    vis, ir, out = make_video(tmp_path / "vis.avi", 4), make_video(tmp_path / "ir.avi", 4), tmp_path / "out.avi"
    words = ["--vis", vis, "--ir", ir, "--target", null_server.grpc, "-o", out, "--colour", "iron"]
    done = subprocess.run(
        command(*words, "--colour-range", 0, 1), capture_output=True, text=True, cwd=ROOT, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert min(levels_of(out)) > 250  # all is hotter than that, and iron ends in white
    done = subprocess.run(
        command(*words[:-1], "purple"), capture_output=True, text=True, cwd=ROOT, timeout=120, check=False
    )
    assert done.returncode == 2
    assert "colour: purple is none of natural, grey" in done.stderr


def test_the_command_counts_the_frames_with_an_alarm(null_server: CommandServer, tmp_path: Path) -> None:
    vis, ir, told = make_video(tmp_path / "vis.avi", 4), make_video(tmp_path / "ir.avi", 4), tmp_path / "told.json"
    threshold = (level(1) + level(2)) / 2
    words = ["--vis", vis, "--ir", ir, "--target", null_server.grpc, "--json", told, "--outline", "--alarm"]
    done = subprocess.run(
        command(*words, f"{threshold}"), capture_output=True, text=True, cwd=ROOT, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    num_hot = sum(level(number) > threshold for number in range(4))
    assert 0 < num_hot < 4
    assert json.loads(told.read_text("utf-8"))["num_alarms"] == num_hot
    assert f"{num_hot} with an alarm" in done.stdout


def test_the_command_streams_by_a_rig(null_server: CommandServer, tmp_path: Path) -> None:
    vis, ir = make_video(tmp_path / "vis.avi", 4), make_video(tmp_path / "ir.avi", 4, size=(80, 80))
    rig = Rig((64, 48), (80, 80), (0.4, 0.0, 16.0, 0.0, 0.4, 8.0, 0.0, 0.0, 1.0), is_sure=False)
    (tmp_path / "roof.json").write_text(to_json(rig))
    (tmp_path / "broken.json").write_text("{}")

    def streamed(given: object, *more: str) -> tuple[int, str]:
        words = ["--vis", vis, "--ir", ir, "--target", null_server.grpc, "--rig", given, *more]
        done = subprocess.run(command(*words), capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)
        assert "Traceback" not in done.stderr
        return done.returncode, done.stdout + done.stderr

    status, told = streamed(tmp_path / "roof.json")
    assert status == 0, told
    assert "4 frames fused, 0 failed" in told
    assert "rig: its calibration was unsure" in told
    status, told = streamed(tmp_path / "roof.json", "--align", "refine")
    assert status == 0, told
    assert "4 frames fused, 0 failed" in told
    assert "infrared moved by 0.0 px" in told
    status, told = streamed("cellar")
    assert status == 1
    assert "there is no rig cellar" in told
    status, told = streamed(tmp_path / "broken.json")
    assert status == 2
    assert "the file is no rig" in told


async def test_a_live_stream_tells_each_warning_once(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    vis, grey, odd = picture(), picture(channels=1, seed=1), picture(channels=1, seed=2)
    told: list[str] = []
    TellingCodec.serve(monkeypatch, {odd.tobytes(): ("palette", ("ir: in colour", "ir: dim"))})
    async with served(serving) as running:
        client = running.reach.client("grpc").client
        sent = [(vis, grey), (vis, odd), (vis, odd), (vis, grey), (vis, odd)]
        report = await asyncio.to_thread(live.run, client, sent, [], mode="all", options={}, warn=told.append)
    assert report.stats.fused == 5
    assert told == ["ir: in colour", "ir: dim"]
    assert (report.figures["ir_source"], report.figures["warnings"]) == ("palette", told)


def test_a_report_remembers_few_warnings() -> None:
    report = live.LiveReport()
    for number in range(0, 90, 3):
        fusion = Fusion(
            pictures={}, model_name="", model_version="", timings=Timings(), job_id="", request_id="",
            warnings=tuple(f"warning {number + more}" for more in range(3)),
        )  # fmt: skip
        report.add(
            FrameResult(
                sequence=number, timestamp_ns=0, fusion=fusion, error=None, num_missed=0, age_s=0.0, latency_s=0.0
            ),
            0.0,
        )
    assert report.warnings == [f"warning {number}" for number in range(live.MAX_WARNINGS)]


def test_the_command_ends_in_order_when_it_is_interrupted(null_server: CommandServer, tmp_path: Path) -> None:
    vis, ir = make_video(tmp_path / "vis.avi", 3000, 50.0), make_video(tmp_path / "ir.avi", 3000, 50.0)
    words = ["--vis", vis, "--ir", ir, "--realtime", "--target", null_server.grpc, "-o", tmp_path / "out.mkv", "--show"]
    running = subprocess.Popen(
        command(*words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=dict(os.environ)
    )
    try:
        while null_server.metric("recofuse_jobs_accepted_total") < 10:
            assert running.poll() is None, running.communicate()
            time.sleep(0.05)
        running.send_signal(signal.SIGINT)
        out, complaints = running.communicate(timeout=60)
    finally:
        if running.poll() is None:
            running.kill()
            running.communicate()
    assert running.returncode == 0, complaints
    assert "Traceback" not in complaints
    assert "showing on http://127.0.0.1:" in complaints
    assert out.startswith("stopped; ")
    assert f"wrote {tmp_path / 'out.mkv'}" in out.replace("\n", "")
    assert len(levels_of(tmp_path / "out.mkv")) >= 5


def test_the_command_starts_a_server_of_its_own(tmp_path: Path) -> None:
    vis, ir = make_video(tmp_path / "vis.avi", 5), make_video(tmp_path / "ir.avi", 5)
    done = subprocess.run(
        command("--vis", vis, "--ir", ir, "--engine", "null", "--frames", 3),
        capture_output=True, text=True, cwd=ROOT, timeout=160, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "starting a server" in done.stderr
    assert "0 failed" in done.stdout
