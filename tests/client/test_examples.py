"""The examples run as they stand, against a real server."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from recofuse_rigs.rig import Rig, to_json
from tests.client.reach import CommandServer
from tests.client.test_pairing import moving_files
from tests.client.test_video import levels_of, make_video
from tests.fakes import pair

ROOT = Path(__file__).parents[2]


def run(name: str, *words: object, **environ: str) -> str:
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / name, *map(str, words)],
        capture_output=True, text=True, cwd=ROOT, timeout=120, check=False, env=os.environ | environ,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CommandServer]:
    server = CommandServer(tmp_path_factory.mktemp("server"))
    try:
        server.start("null")
        server.wait_until_ready()
        yield server
    finally:
        server.kill()


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    names = [tmp_path / "vis.png", tmp_path / "ir.png"]
    for name, data in zip(names, pair(), strict=True):
        name.write_bytes(data)
    return names


def test_fuse_pair(server: CommandServer, files: list[Path], tmp_path: Path) -> None:
    said = run("fuse_pair.py", *files, tmp_path / "out.png", "--url", f"http://{server.http}")
    for name in ("out.png", "out_vis.png", "out_ir.png"):
        assert f"wrote {tmp_path / name}" in said
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert said.splitlines()[-1].startswith("null 1 took ")


def test_stream_arrays(server: CommandServer) -> None:
    said = run("stream_arrays.py", "--frames", 12, "--url", f"grpc://{server.grpc}").splitlines()
    assert [line.split(":")[0] for line in said[:-1]] == [f"frame {number}" for number in range(12)]
    assert said[-1] == "12 of 12 frames fused, 0 failed"


@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_background_job(server: CommandServer, files: list[Path], tmp_path: Path, scheme: str) -> None:
    url = f"{scheme}://{getattr(server, scheme)}"
    assert f"wrote {tmp_path / 'out.png'}" in run("background_job.py", *files, tmp_path / "out.png", "--url", url)
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_video_file(server: CommandServer, tmp_path: Path) -> None:
    vis, ir = make_video(tmp_path / "vis.avi", 10), make_video(tmp_path / "ir.avi", 10)
    said = run("video_file.py", vis, ir, tmp_path / "out.mp4", "--url", f"grpc://{server.grpc}")
    assert "10 frames fused" in said
    assert len(levels_of(tmp_path / "out.mp4")) == 10


def test_two_cameras(server: CommandServer, tmp_path: Path) -> None:
    vis, ir = moving_files(tmp_path, 0.4)
    rig = Rig((96, 72), (96, 72), (0.9, 0.0, 4.0, 0.0, 0.9, 3.0, 0.0, 0.0, 1.0))
    (tmp_path / "roof.json").write_text(to_json(rig))
    words = [vis, ir, tmp_path / "out.mp4", "--rig", tmp_path / "roof.json", "--url", f"grpc://{server.grpc}"]
    said = run("two_cameras.py", *words)
    found = re.search(r"late by ([\d.]+) s\nwrote (\d+) frames", said)
    assert found is not None, said
    assert abs(float(found[1]) - 0.4) <= 0.025
    assert abs(int(found[2]) - 140) <= 1  # the last ten have no partner
    assert len(levels_of(tmp_path / "out.mp4")) == int(found[2])


def test_gstreamer_bridge(server: CommandServer) -> None:
    bindings = "/usr/lib/python3/dist-packages"  # Debian's python3-gst-1.0, which is on no package index
    probe = "import gi; gi.require_version('GstVideo', '1.0'); from gi.repository import GstVideo"
    paths = {"PYTHONPATH": f"{ROOT}:{bindings}"}
    probed = subprocess.run([sys.executable, "-c", probe], env=os.environ | paths, capture_output=True, check=False)
    if probed.returncode:
        pytest.skip("GStreamer's Python bindings (Debian's python3-gst-1.0) are not installed for this Python")
    words = ["--mode", "all", "--frames", 10, "--ir-format", "GRAY16_LE", "--url", f"grpc://{server.grpc}"]
    assert run("gstreamer_bridge.py", *words, **paths).splitlines()[-1] == "10 frames fused, 0 dropped, 0 failed"


def test_every_example_is_run_here() -> None:
    source = Path(__file__).read_text("utf-8")
    names = {path.name for path in (ROOT / "examples").glob("*.py")}
    assert len(names) >= 4
    assert all(f'run("{name}"' in source for name in names)


@pytest.mark.parametrize("document", ["README.md", "docs/client.md"])
def test_what_the_documents_import_is_there(document: str) -> None:
    text = (ROOT / document).read_text("utf-8")
    imports = re.findall(r"^from recofuse_client[.\w]* import .+$", text, re.MULTILINE)
    assert imports
    for line in imports:
        exec(line, {})
