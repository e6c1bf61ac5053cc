"""`recofuse train-cues`: networks that calibration can look through come out, and what is wrong is told first."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from recofuse_core.likeness import network
from recofuse_images.writer import png_bytes
from recofuse_rigs.learned import network_of
from service.command.verbs import cues
from tests.rigs.scenes import scene
from tests.service.command.calls import assert_one_line, run

FILES = ("cues_vis.onnx", "cues_ir.onnx")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A pair of the set day that lies, and one of the set night that is of two scenes."""
    for side in ("vis", "ir"):
        (tmp_path / "pairs" / side).mkdir(parents=True)
    for name, (seed, ir_seed) in {"day_1": (0, 0), "night_1": (1, 2)}.items():
        (tmp_path / "pairs" / "vis" / f"{name}.png").write_bytes(png_bytes(scene(seed)[0]))
        (tmp_path / "pairs" / "ir" / f"{name}.png").write_bytes(png_bytes(scene(ir_seed)[1]))
    return tmp_path / "pairs"


def test_networks_are_made_of_pairs_and_streets(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Path] = []

    def write_graphs(made: network.CueNetwork, into: Path) -> list[Path]:
        written.append(into)
        return given(made, into)

    given = network.write_graphs
    monkeypatch.setattr(network, "write_graphs", write_graphs)
    monkeypatch.setattr(cues, "WRITTEN_EVERY", 2)
    output = tmp_path / "cues"
    arguments = ("train-cues", "--pairs", folder, "--streets", 1, "--steps", 3, "--threads", 1, "-o")
    done = run(*arguments, output)
    assert done.exit_code == 0, done.output
    assert "day: 1 own, 0 set, 0 unsure" in done.stderr
    assert "night: 0 own, 0 set, 1 unsure" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("step 3: search ")
    assert done.stdout.strip() == f"wrote {output / FILES[0]} and {output / FILES[1]}"
    assert written == [output] * 2  # after two steps, and at the end
    grey = np.random.default_rng(0).uniform(0, 255, (1, 1, 48, 64)).astype(np.float32)
    maps = []
    for name in FILES:
        made = network_of(output / name)
        made.setInput(grey)
        maps.append(made.forward())
    assert np.abs(maps[0] - maps[1]).max() > 1e-3

    again = run(*arguments, tmp_path / "again")
    other = run(*arguments, tmp_path / "other", "--seed", 1)
    assert (again.exit_code, other.exit_code) == (0, 0)
    for name in FILES:
        assert (tmp_path / "again" / name).read_bytes() == (output / name).read_bytes()
        assert (tmp_path / "other" / name).read_bytes() != (output / name).read_bytes()


def test_what_is_wrong_is_told(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "cues"

    def told(*arguments: object) -> tuple[object, ...]:
        return ("train-cues", "--steps", 1, "-o", output, *arguments)

    assert_one_line(run(*told("--streets", 0)), "--pairs, --streets or both")
    assert_one_line(run(*told("--exclude", "day")), "there are no --pairs")
    for minutes in (0, -1, "nan"):
        assert_one_line(run(*told("--minutes", minutes)), "minutes: must be more than 0")
    assert_one_line(run(*told("--pairs", tmp_path / "none")), "there is no file or folder", "none")
    assert_one_line(run(*told("--pairs", folder, "--exclude", "dusk")), "dusk", "day, night")
    assert_one_line(run(*told("--pairs", folder, "--exclude", "day", "--streets", 0)), "nothing to learn from")
    (folder / "ir" / "day_1.png").write_bytes(b"no picture")
    assert_one_line(run(*told("--pairs", folder)), "day_1.png")
    assert not any(output.glob("*"))
    (tmp_path / "file").write_bytes(b"")
    assert_one_line(run("train-cues", "--steps", 1, "-o", tmp_path / "file"), "is no folder")
