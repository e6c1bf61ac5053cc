"""The demonstration behind `make demo`: a real server process, one pair over HTTP, the picture and a sheet on disk.

It is a client like any other: it starts the command that users start, asks the address that users ask, and stops the
server with the signal that operators use.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from urllib.parse import unquote

import httpx
import numpy as np
from numpy.typing import NDArray

from service.command.files import contact_sheet, write_picture
from service.terms import images
from service.terms.errors import InvalidInputError, UnavailableError
from service.terms.settings import CodecSettings, LimitSettings, Settings

READY_TIMEOUT_S = 300.0  # of torch on a cold disk, and beside a GPU of compiling, trying and recording
STOP_TIMEOUT_S = 30.0
ANSWER_TIMEOUT_S = 300.0

CLEAN_VIS, CLEAN_IR = "visible, as it was before", "infrared, as it was before"

Pixels = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class SampleRecipe:
    """A generated street and what is done to it. The defaults are the demonstration's, so that it is one picture."""

    scene_seed: int = 7
    degradation_seed: int = 3
    vis_kinds: tuple[str, ...] = ("low_light", "gaussian_noise")
    ir_kinds: tuple[str, ...] = ("low_contrast", "stripes", "gaussian_noise")
    width: int = 640
    height: int = 480


@dataclass(frozen=True, slots=True)
class DemoResult:
    """What a demonstration wrote and what it saw. server_timing: the answer's own account of its time.

    ir_source, warnings: what the server read of the infrared file, and what it found odd about the pair.
    """

    fused: Path
    sheet: Path
    server_log: Path
    model: str
    server_timing: str
    ir_source: str
    warnings: tuple[str, ...]


def run_demo(folder: Path, weights: str, settings: Settings, own_pair: tuple[Path, Path] | None) -> DemoResult:
    """Fuse own_pair (vis, ir), or a generated degraded street, through a server of its own; write into `folder`.

    Raises InvalidInputError with the server's words if it refuses the pair, UnavailableError if it does not start, and
    OSError for files that cannot be read or written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    clean: list[tuple[str, Pixels]] = []
    if own_pair is None:
        vis_path, ir_path, clean = copy_sample(folder, settings.limits)
    else:
        vis_path, ir_path = own_pair
    vis, ir = vis_path.read_bytes(), ir_path.read_bytes()
    log = folder / "server.log"
    with server_process(["--grpc-port", "-1", "--weights", weights], log) as address:
        answer = httpx.post(
            f"{address}/v1/fuse", files={"vis": vis, "ir": ir}, timeout=ANSWER_TIMEOUT_S, trust_env=False
        )
    if answer.is_error:
        raise InvalidInputError(f"the server answered {answer.status_code}: {answer.json()['detail']}")
    fused_path, sheet_path = folder / "fused.png", folder / "sheet.png"
    fused_path.write_bytes(answer.content)
    inputs = images.decode_pair(vis, ir, settings.limits)
    fused = images.decode_pair(answer.content, ir, settings.limits).vis
    label = "" if own_pair else ", degraded"
    rows = [[(f"visible{label}", inputs.vis), (f"infrared{label}", inputs.ir), ("restored and fused", fused)]]
    write_picture(sheet_path, contact_sheet([*rows, clean] if clean else rows), settings.codec)
    return DemoResult(
        fused=fused_path,
        sheet=sheet_path,
        server_log=log,
        model=f"{answer.headers['x-model-name']} {answer.headers['x-model-version']}",
        server_timing=answer.headers["server-timing"],
        ir_source=answer.headers.get("x-infrared-source", ""),
        warnings=tuple(unquote(line) for line in answer.headers.get_list("x-warning", split_commas=True)),
    )


def copy_sample(folder: Path, limits: LimitSettings) -> tuple[Path, Path, list[tuple[str, Pixels]]]:
    """The shipped sample, which is `write_sample` with the default recipe, without what that needs."""
    shipped = resources.files("service.command") / "sample"
    paths = [folder / "vis.png", folder / "ir.png"]
    for path in paths:
        path.write_bytes((shipped / path.name).read_bytes())
    clean = images.decode_pair(
        (shipped / "clean-vis.webp").read_bytes(), (shipped / "clean-ir.webp").read_bytes(), limits
    )
    return paths[0], paths[1], [(CLEAN_VIS, clean.vis), (CLEAN_IR, clean.ir)]


def write_sample(
    folder: Path, recipe: SampleRecipe, codec: CodecSettings
) -> tuple[Path, Path, list[tuple[str, Pixels]]]:
    """A generated street: degraded vis and ir as files, and the labelled clean pictures that they were made from.

    Raises recofuse_core's ConfigError for unknown kinds and ShapeError for sides that are too small.
    """
    from torch import Generator, Tensor

    from recofuse_core.degradations.recipes import degrade_ir, degrade_vis
    from recofuse_core.scenes.scene import make_scene

    def pixels(image: Tensor) -> Pixels:
        levels = (image.permute(1, 2, 0) * 255).round().byte().numpy()
        return np.ascontiguousarray(levels[..., 0] if levels.shape[2] == 1 else levels)

    scene = make_scene(recipe.scene_seed, recipe.height, recipe.width)
    generator = Generator().manual_seed(recipe.degradation_seed)
    vis = degrade_vis(scene.vis, generator, kinds=recipe.vis_kinds).image
    ir = degrade_ir(scene.ir, generator, kinds=recipe.ir_kinds).image
    vis_path, ir_path = folder / "vis.png", folder / "ir.png"
    write_picture(vis_path, pixels(vis), codec)
    write_picture(ir_path, pixels(ir), codec)
    clean = [(CLEAN_VIS, pixels(scene.vis)), (CLEAN_IR, pixels(scene.ir))]
    return vis_path, ir_path, clean


@contextmanager
def server_process(options: Sequence[str], log: Path) -> Iterator[str]:
    """A `recofuse serve` on a free loopback port, ready; yields its HTTP address, and stops it in any case.

    Raises UnavailableError if it does not start.
    """
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "service", "serve", "--host", "127.0.0.1", "--port", str(port), *options]
    with log.open("wb") as stream:
        server = subprocess.Popen(command, stdout=stream, stderr=stream)
        try:
            _wait_until_ready(server, address, log)
            yield address
        finally:
            server.terminate()
            try:
                server.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def free_port() -> int:
    """A loopback port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_until_ready(server: subprocess.Popen[bytes], address: str, log: Path) -> None:
    end_s = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < end_s:
        if server.poll() is not None:
            lines = log.read_text("utf-8", "replace").strip().splitlines()
            raise UnavailableError(f"the server ended with status {server.returncode}: {lines[-1] if lines else ''}")
        try:
            if httpx.get(f"{address}/health/ready", timeout=2.0, trust_env=False).is_success:
                return
        except httpx.TransportError:
            pass  # not listening yet
        time.sleep(0.1)
    raise UnavailableError(f"the server was not ready after {READY_TIMEOUT_S:.0f} s; its log is {log}")
