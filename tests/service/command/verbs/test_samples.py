"""`recofuse sample` and `demo`: what they write, and that the service tried is the one that users have."""

from __future__ import annotations

import contextlib
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from recofuse_core.data import read_vis
from service.command.demo import SampleRecipe, copy_sample, write_sample
from service.terms.settings import CodecSettings, LimitSettings
from tests.fakes import file_of, picture
from tests.service.command.calls import assert_one_line, run


def test_a_sample_is_a_degraded_pair_that_its_options_decide(tmp_path: Path) -> None:
    options = ("--size", "96x64", "--seed", 2)
    for folder, more in (("a", ()), ("b", ()), ("c", ("--vis", "haze", "--ir", "stripes"))):
        result = run("sample", tmp_path / folder, *options, *more)
        assert result.exit_code == 0, result.output
    read = {folder: read_vis(tmp_path / folder / "vis.png") for folder in "abc"}
    assert read["a"].shape == (3, 64, 96)
    assert torch.equal(read["a"], read["b"])
    assert not torch.equal(read["a"], read["c"])
    assert_one_line(run("sample", tmp_path / "d", "--vis", "hail"), "hail is none of", "haze")
    assert_one_line(run("sample", tmp_path / "d", "--size", "640"), "size", "got 640")
    assert_one_line(run("sample", tmp_path / "d", "--size", "8x8"), "64 px")
    assert not (tmp_path / "d").exists()


def test_the_shipped_sample_is_what_sample_writes(tmp_path: Path) -> None:
    own = tmp_path / "shipped"
    own.mkdir()
    write_sample(tmp_path, SampleRecipe(), CodecSettings())
    shipped, _, clean = copy_sample(own, LimitSettings())
    assert run("sample", tmp_path / "plain").exit_code == 0
    assert (tmp_path / "plain/ir.png").read_bytes() == (own / "ir.png").read_bytes()
    for name in ("vis", "ir"):
        assert torch.equal(read_vis(shipped.with_name(f"{name}.png")), read_vis(tmp_path / f"{name}.png"))
    assert [picture.shape for _, picture in clean] == [(480, 640, 3), (480, 640)]


def test_demo_serves_fuses_and_stops(tmp_path: Path, weights: Path) -> None:
    folder = tmp_path / "demo"
    result = run("demo", "-o", folder, "--weights", weights)
    assert result.exit_code == 0, result.output
    assert "tiny 3" in result.stdout
    assert read_vis(folder / "fused.png").shape == (3, 480, 640)
    sheet = read_vis(folder / "sheet.png")
    assert sheet.shape[1] > 2 * 480
    assert sheet.shape[2] > 3 * 640
    assert "worker has stopped" in (folder / "server.log").read_text()
    again = folder / "again.png"
    run("fuse", "--vis", folder / "vis.png", "--ir", folder / "ir.png", "-o", again, "--weights", weights)
    assert again.read_bytes() == (folder / "fused.png").read_bytes()  # the server and the shell give the same picture


def test_demo_tells_what_the_server_said(pairs: Path, weights: Path) -> None:
    (pairs / "broken.png").write_bytes(b"no picture")
    own = ("--vis", pairs / "broken.png", "--ir", pairs / "ir/a.png")
    assert_one_line(run("demo", *own, "-o", pairs / "demo", "--weights", weights), "415", "not a readable image")
    assert_one_line(run("demo", *own[:2], "-o", pairs / "demo"), "--ir")


class _TellingServer(http.server.BaseHTTPRequestHandler):
    """Answers any fusion with a picture, and with the headers of one whose infrared file carried raw values."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        for name, value in (
            ("Server-Timing", "model;dur=1.0"), ("X-Model-Name", "told"), ("X-Model-Version", "1"),
            ("X-Infrared-Source", "raw"), ("X-Warning", "vis: dark%2C very"), ("X-Warning", "second"),
        ):  # fmt: skip
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(file_of(picture()))

    def log_message(self, *_: object) -> None:
        """Silent."""


def test_demo_tells_what_the_server_says_of_the_pair(pairs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def telling(options: object, log: object) -> Iterator[str]:
        with http.server.HTTPServer(("127.0.0.1", 0), _TellingServer) as server:
            threading.Thread(target=server.serve_forever).start()
            try:
                yield f"http://127.0.0.1:{server.server_port}"
            finally:
                server.shutdown()

    monkeypatch.setattr("service.command.demo.server_process", telling)
    own = ("--vis", pairs / "vis/a.png", "--ir", pairs / "ir/a.png")
    result = run("demo", *own, "-o", pairs / "demo")
    assert result.exit_code == 0, result.output
    assert "the camera's own values in the file" in " ".join(result.stdout.split())
    assert [line for line in result.stderr.splitlines() if line.startswith("recofuse: ")] == [
        "recofuse: vis: dark, very", "recofuse: second",
    ]  # fmt: skip
