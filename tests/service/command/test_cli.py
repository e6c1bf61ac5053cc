"""The `recofuse` command as its users meet it: files in, files out, one line for what they can mend."""

import contextlib
import http.server
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import httpx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from recofuse_core import ModelConfig, build_model, load_checkpoint, save_checkpoint
from recofuse_core.data import read_vis, write_image
from recofuse_core.networks import DenoiserConfig, FusionConfig, GatedAutoencoderConfig, PaperAutoencoderConfig
from recofuse_core.published import OfficialFiles, official_names
from recofuse_core.scenes.scene import make_scene
from recofuse_core.sde import SDEConfig
from recofuse_images.reader import Pair
from service.command.cli import app
from service.command.files import contact_sheet
from service.terms import images
from service.terms.settings import Settings
from tests.fakes import file_of, picture

ROOT = Path(__file__).parents[3]
TINY = ModelConfig(
    GatedAutoencoderConfig(8, 8, encoder_blocks=(1, 1), decoder_blocks=(1, 1), latent_channels=4),
    DenoiserConfig(4, 8, encoder_blocks=(1,), decoder_blocks=(1,), sinusoid_dim=8, time_dim=16, prediction="clean"),
    FusionConfig(4, 32, time_dim=128, num_groups=8),
    SDEConfig(),
    sampler="posterior",
    steps=2,
)


def run(*arguments: object, **environment: str) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env=environment)


def assert_one_line(result: Result, *words: str) -> None:
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("recofuse: ")]
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in lines[0]


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("RECOFUSE_"):
            monkeypatch.delenv(name)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    state = build_model(TINY).state_dict()
    save_checkpoint(path, state, TINY, name="tiny", version="3", provenance={"data": {"pairs": 17}})
    return path


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Two folders with the pairs a and b of 48x64."""
    for seed, name in enumerate("ab"):
        scene = make_scene(seed, 48, 64)
        write_image(tmp_path / "vis" / f"{name}.png", scene.vis)
        write_image(tmp_path / "ir" / f"{name}.png", scene.ir)
    return tmp_path


# fuse


def test_fuse_writes_the_picture_on_the_vis_grid(pairs: Path, weights: Path) -> None:
    output = pairs / "new" / "fused.png"
    result = run("fuse", "--vis", pairs / "vis/a.png", "--ir", pairs / "ir/a.png", "-o", output, "--weights", weights)
    assert result.exit_code == 0, result.output
    assert read_vis(output).shape == (3, 48, 64)
    assert "processor time" in result.stdout
    assert not list(output.parent.glob("*_vis.png"))


def test_all_and_sheet_write_what_they_promise(pairs: Path, weights: Path) -> None:
    pair = ("--vis", pairs / "vis/a.png", "--ir", pairs / "ir/a.png", "--weights", weights)
    result = run("fuse", *pair, "-o", pairs / "out.png", "--all", "--sheet", pairs / "sheet.png")
    assert result.exit_code == 0, result.output
    assert {path.name for path in pairs.glob("*.png")} == {"out.png", "out_vis.png", "out_ir.png", "sheet.png"}
    assert np.asarray(cv2.imread(str(pairs / "out_ir.png"), cv2.IMREAD_UNCHANGED)).shape == (48, 64)
    sheet = read_vis(pairs / "sheet.png")
    assert sheet.shape[2] > 5 * 64  # five pictures side by side
    fused = read_vis(pairs / "out.png")
    assert any(torch.equal(sheet[:, y : y + 48, -64 - x : -x], fused) for y in range(1, 48) for x in range(1, 16))


def test_equal_seeds_give_equal_files_and_others_do_not(pairs: Path, weights: Path) -> None:
    pair = ("--vis", pairs / "vis/a.png", "--ir", pairs / "ir/a.png", "--weights", weights)
    for name, seed in (("one", 5), ("again", 5), ("other", 6)):
        assert run("fuse", *pair, "-o", pairs / f"{name}.png", "--seed", seed, "--steps", 3).exit_code == 0
    one, again, other = ((pairs / f"{name}.png").read_bytes() for name in ("one", "again", "other"))
    assert one == again
    assert one != other


def test_a_range_of_visible_values_reaches_the_model(pairs: Path, weights: Path) -> None:
    plain = cv2.imread(str(pairs / "vis/a.png"))
    assert plain is not None
    cv2.imwrite(str(pairs / "deep.png"), plain.astype(np.uint16) * 16)
    rest = ("--ir", pairs / "ir/a.png", "--weights", weights)
    for name, vis, options in (
        ("plain", "vis/a.png", ()), ("deep", "deep.png", ()), ("scaled", "deep.png", ("--vis-range", 0, 4080))
    ):  # fmt: skip
        result = run("fuse", "--vis", pairs / vis, *rest, "-o", pairs / f"{name}-out.png", *options)
        assert result.exit_code == 0, result.output
    plain_out, deep, scaled = ((pairs / f"{name}-out.png").read_bytes() for name in ("plain", "deep", "scaled"))
    assert scaled == plain_out
    assert deep != plain_out


def test_fuse_tells_what_was_read_of_the_infrared_files(
    pairs: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a decoder that says of one file what the service's own may say."""
    decode, told = images.decode_pair, (pairs / "ir/b.png").read_bytes()

    def telling(vis: bytes, ir: bytes, *arguments: Any, **options: Any) -> Pair:
        pair = decode(vis, ir, *arguments, **options)
        if ir != told:
            return pair
        return replace(pair, ir_source="palette", warnings=("ir: in colour", "ir: \x1b[31m second"))

    monkeypatch.setattr(images, "decode_pair", telling)
    call = ("fuse", "--vis", pairs / "vis", "--ir", pairs / "ir", "-o", pairs / "out", "--weights", weights)
    result = run(*call)
    assert result.exit_code == 0, result.output
    said = [line for line in result.stderr.splitlines() if line.startswith("recofuse: ")]
    assert said == ["recofuse: b: ir: in colour", "recofuse: b: ir: ?[31m second"]
    assert "infrared read: a false-colour picture, turned back into intensity (1 of 2); grey values (1 of 2)" in (
        result.stdout
    )
    single = run(
        "fuse", "--vis", pairs / "vis/a.png", "--ir", pairs / "ir/a.png", "-o", pairs / "a.png", "--weights", weights
    )
    assert single.exit_code == 0, single.output
    assert "infrared read" not in single.stdout


def test_folders_are_matched_by_name_and_equal_single_fusions(pairs: Path, weights: Path) -> None:
    (pairs / "ir/lonely.png").write_bytes((pairs / "ir/a.png").read_bytes())
    (pairs / "ir/notes.txt").write_text("not an image")
    result = run("fuse", "--vis", pairs / "vis", "--ir", pairs / "ir", "-o", pairs / "out", "--weights", weights)
    assert result.exit_code == 0, result.output
    assert "lonely" in result.stderr
    assert "2 fused" in result.stdout
    assert {path.name for path in (pairs / "out").iterdir()} == {"a.png", "b.png"}
    single = pairs / "b.png"
    run("fuse", "--vis", pairs / "vis/b.png", "--ir", pairs / "ir/b.png", "-o", single, "--weights", weights)
    assert single.read_bytes() == (pairs / "out/b.png").read_bytes()


def test_one_folder_for_both_sides(pairs: Path, weights: Path) -> None:
    both = pairs / "both"
    for name in "ab":
        for role in ("vis", "ir"):
            (both / "day").mkdir(parents=True, exist_ok=True)
            (pairs / role / f"{name}.png").rename(both / "day" / f"{name}_{role}.png")
    (both / "c_vis.png").write_bytes(b"lonely")
    (both / "notes.txt").write_text("not an image")
    call = ("fuse", "--vis", both, "--ir", both, "-o", both / "fused", "--weights", weights)
    for _ in range(2):  # what the first run has written is no input of the second
        result = run(*call, "--all")
        assert result.exit_code == 0, result.output
        assert "2 fused" in result.stdout
        assert "no partner: both/c_vis.png; not an image: both/notes.txt" in result.stderr
        written = {path.relative_to(both).as_posix() for path in (both / "fused").rglob("*.png")}
        assert written == {f"fused/day/{name}{part}.png" for name in "ab" for part in ("", "_vis", "_ir")}


def test_one_file_is_not_fused_with_itself(pairs: Path, weights: Path) -> None:
    for other in ("vis/a.png", "link.png"):
        if not (pairs / other).exists():
            (pairs / other).symlink_to(pairs / "vis/a.png")
        call = (
            "fuse",
            "--vis",
            pairs / "vis/a.png",
            "--ir",
            pairs / other,
            "-o",
            pairs / "x.png",
            "--weights",
            weights,
        )
        assert_one_line(run(*call), "one file")
    folder = ("fuse", "--vis", pairs / "vis", "--ir", pairs / "vis", "-o", pairs / "out", "--weights", weights)
    assert_one_line(run(*folder), "given for both sides", "0001_vis.png", "a.png, b.png")


def test_no_picture_is_written_over_another(pairs: Path, weights: Path) -> None:
    both = pairs / "both"
    for source, target in (
        ("vis/a", "1_vis"),
        ("ir/a", "1_ir"),
        ("vis/b", "1"),
        ("vis/b", "1_vis_vis"),
        ("ir/b", "1_vis_ir"),
    ):
        both.mkdir(exist_ok=True)
        (both / f"{target}.png").write_bytes((pairs / f"{source}.png").read_bytes())
    call = ("fuse", "--vis", both, "--ir", both, "--weights", weights)
    assert_one_line(run(*call, "-o", both), "1.png would destroy an input")  # in no pair, and yet the user's
    assert_one_line(run(*call, "-o", pairs / "out", "--all"), "two pictures would be written to", "1_vis.png")


def test_a_bad_pair_in_a_folder_does_not_stop_the_others(pairs: Path, weights: Path) -> None:
    (pairs / "vis/a.png").write_bytes(b"no picture")
    result = run("fuse", "--vis", pairs / "vis", "--ir", pairs / "ir", "-o", pairs / "out", "--weights", weights)
    assert result.exit_code == 2
    assert "recofuse: a: vis: not a readable image" in result.stderr
    assert "1 of 2 pairs" in result.stderr
    assert {path.name for path in (pairs / "out").iterdir()} == {"b.png"}


BAD_CALLS: dict[str, tuple[dict[str, str], str]] = {
    "missing file": ({"--vis": "vis/none.png"}, "none.png"),
    "file beside folder": ({"--vis": "vis"}, "two files or two folders"),
    "no picture": ({"--vis": "broken.png"}, "damaged or cut short"),
    "mismatched aspect": ({"--ir": "wide.png"}, "64x48 and ir is 200x48"),
    "unknown suffix": ({"-o": "out.xyz"}, ".png"),
    "sheet without suffix": ({"--sheet": "sheet"}, ".png"),
    "overwriting an input": ({"-o": "ir/a.png"}, "destroy"),
    "unknown sampler": ({"--sampler": "magic"}, "sampler"),
    "upside-down vis range": ({"--vis-range": "9 3"}, "vis_range takes two numbers, the lower one first"),
    "upside-down range": ({"--ir-range": "9 3"}, "lower one first"),
    "unknown weights": ({"--weights": "nothing"}, "nothing"),
    "no checkpoint": ({"--weights": "vis/a.png"}, "safetensors"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_input_is_one_line(case: str, pairs: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(pairs)
    Path("broken.png").write_bytes(b"\x89PNG\r\n\x1a\n but no more")
    cv2.imwrite("wide.png", np.zeros((48, 200), np.uint8))
    changes, word = BAD_CALLS[case]
    options = {"--vis": "vis/a.png", "--ir": "ir/a.png", "-o": "out.png", "--weights": str(weights)} | changes
    before = Path("ir/a.png").read_bytes()
    result = run("fuse", *itertools.chain.from_iterable((name, *value.split()) for name, value in options.items()))
    assert_one_line(result, word)
    assert not Path("out.png").exists()
    assert Path("ir/a.png").read_bytes() == before


def test_folders_without_a_common_name_or_with_a_name_twice(pairs: Path, weights: Path) -> None:
    folders = ("--vis", pairs / "vis", "--ir", pairs / "ir", "-o", pairs / "out", "--weights", weights)
    (pairs / "vis/a.jpg").write_bytes(b"")
    assert_one_line(run("fuse", *folders), "a.jpg and a.png")
    for path in (pairs / "vis").iterdir():
        path.unlink()
    assert_one_line(run("fuse", *folders), "no file name in common")


def test_a_misspelt_setting_stops_every_verb_that_reads_settings(pairs: Path) -> None:
    call = ("fuse", "--vis", pairs / "vis", "--ir", pairs / "ir", "-o", pairs / "out")
    assert_one_line(run(*call, RECOFUSE_LIMITS__MAX_SIDES="64"), "RECOFUSE_LIMITS__MAX_SIDE?)")


# weights


def test_weights_resolve_from_the_environment(weights: Path) -> None:
    result = run("info", RECOFUSE_WEIGHTS=str(weights))
    assert result.exit_code == 0, result.output
    assert "tiny 3" in result.stdout
    assert f"{sum(p.numel() for p in build_model(TINY).parameters()):,}" in result.stdout
    assert "posterior, 2 steps" in result.stdout
    assert "provenance.data.pairs" in result.stdout


def test_an_argument_wins_over_the_environment(weights: Path) -> None:
    assert_one_line(run("info", "elsewhere.bin", RECOFUSE_WEIGHTS=str(weights)), "elsewhere.bin")


def test_a_card_is_only_for_packaged_weights(weights: Path) -> None:
    assert_one_line(run("info", "--card", weights), "no model card")


def test_convert_writes_a_checkpoint_from_published_files(tmp_path: Path) -> None:
    config = ModelConfig(
        PaperAutoencoderConfig(4, (2, 2, 2, 2), 4),
        DenoiserConfig(4, 8, (1, 1), 1, (1, 1)),
        FusionConfig(4),
        SDEConfig(),
    )
    model = build_model(config)
    files: dict[str, dict[str, torch.Tensor]] = {name: {} for name in OfficialFiles._fields}
    state = model.state_dict()
    for pairing in official_names(config):
        tensor = state[pairing.ours]
        is_gain = pairing.theirs.endswith(".g")
        files[pairing.file][pairing.theirs] = tensor.view(1, -1, 1, 1) if is_gain else tensor
    for name, tensors in files.items():
        torch.save(tensors, tmp_path / f"{name}.pth")
    parts = [f"--{name}={tmp_path / name}.pth" for name in files]
    result = run("convert", *parts, "-o", tmp_path / "ours.safetensors", "--name", "mine")
    assert result.exit_code == 0, result.output
    read = load_checkpoint(tmp_path / "ours.safetensors")
    assert read.info.name == "mine"
    assert all(torch.equal(tensor, state[name]) for name, tensor in read.state.items())

    swapped = [f"--generator={tmp_path / 'fusion'}.pth", *parts[1:]]
    assert_one_line(run("convert", *swapped, "-o", tmp_path / "x.safetensors"), "fusion.pth", "missing")


def test_convert_wants_one_source_of_branches(tmp_path: Path) -> None:
    call = ("convert", "--fusion", "f.pth", "--autoencoder", "a.pth", "-o", tmp_path / "x.safetensors")
    assert_one_line(run(*call), "--generator or --branches")


def test_train_tells_what_is_wrong_with_a_configuration(tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    config.write_text("preset = 'compact'\nsurprise = 1\n[data]\nroot = '.'\n[[stages]]\n")
    assert_one_line(run("train", config, "-o", tmp_path / "run"), "run.toml")
    assert_one_line(run("train", config, "-o", tmp_path / "run", "--first-stage", "fourth"), "coupled")


# real processes


def recofuse_process(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "service", *map(str, arguments)]


def test_the_module_is_the_command() -> None:
    done = subprocess.run(recofuse_process("--version"), check=True, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.startswith("recofuse ")


@pytest.fixture
def null_server(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`recofuse serve` with a stand-in engine on a port that it picked: the process and its address."""
    command = recofuse_process("serve", "--port", "0", "--grpc-port", "-1", "--engine", "null")
    with (tmp_path / "log").open("w+") as log:
        server = subprocess.Popen(command, stderr=log, text=True, cwd=ROOT)
        try:
            yield server, _announced(server, tmp_path / "log")
        finally:
            if server.poll() is None:
                server.kill()
            server.wait()


def _announced(server: subprocess.Popen[str], log: Path) -> str:
    end_s = time.monotonic() + 60
    while time.monotonic() < end_s and server.poll() is None:
        for line in log.read_text().splitlines():
            if line.startswith("serving on "):
                return line.split()[2]
        time.sleep(0.05)
    raise AssertionError(log.read_text())


def test_serve_answers_and_ends_in_order(null_server: tuple[subprocess.Popen[str], str], pairs: Path) -> None:
    server, address = null_server
    assert httpx.get(f"{address}/health/ready", trust_env=False).status_code == 200
    files = {"vis": (pairs / "vis/a.png").read_bytes(), "ir": (pairs / "ir/a.png").read_bytes()}
    answer = httpx.post(f"{address}/v1/fuse", files=files, trust_env=False)
    assert answer.headers["content-type"] == "image/png"
    server.send_signal(signal.SIGTERM)
    assert server.wait(30) == 0


def test_serve_refuses_bad_settings_in_one_line(weights: Path) -> None:
    assert_one_line(run("serve", "--engine", "magic"), "engine.kind")
    for options, word in ((("--weights", "nothing"), "nothing"), (("--host", "203.0.113.1"), "cannot listen")):
        command = recofuse_process("serve", "--port", "0", "--grpc-port", "-1", *options)
        done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT, timeout=60)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        assert word in done.stderr.splitlines()[-1]


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


# sheets and documents


@settings(deadline=None, max_examples=20)
@given(st.lists(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40), st.booleans()), min_size=1), min_size=1))
def test_a_sheet_holds_every_picture_whole(shapes: list[list[tuple[int, int, bool]]]) -> None:
    shapes = [row[:4] for row in shapes[:4]]
    rows = [
        [
            ("", np.full((height, width) if is_grey else (height, width, 3), 255, np.uint8))
            for height, width, is_grey in row
        ]
        for row in shapes
    ]
    sheet = contact_sheet(rows)
    num_white = int((sheet == 255).all(axis=2).sum())
    assert num_white == sum(height * width for row in shapes for height, width, _ in row)


def test_every_setting_is_in_the_documents() -> None:
    assert Settings.table() in (ROOT / "docs/settings.md").read_text("utf-8"), "run `make docs` and commit the result"
    assert "docs/settings.md" in (ROOT / "README.md").read_text("utf-8")
