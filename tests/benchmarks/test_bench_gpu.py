"""`make check-gpu` where there is no GPU, and its report; what the service keeps, on real processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import gpu, kept


def test_without_a_gpu_nothing_counts_as_checked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "has_gpu", lambda: False)
    assert gpu.main([]) == gpu.NO_GPU
    assert capsys.readouterr().out == "gpu: NOT CHECKED: torch sees no GPU here\n"


def test_one_failure_fails_the_check_and_the_rest_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(gpu, "has_gpu", lambda: True)
    monkeypatch.setattr(gpu, "run_tests", lambda: (True, "9 passed"))
    monkeypatch.setattr(gpu, "run_engine", lambda: 1 / 0)
    monkeypatch.setattr(gpu, "run_kept", lambda: (True, "kept 99 %"))
    assert gpu.main(["--json", str(tmp_path / "out.json")]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("gpu: tests passed: 9 passed | engine FAILED: ZeroDivisionError: ")
    assert last.endswith(" | kept passed: kept 99 %")
    written = json.loads((tmp_path / "out.json").read_text())
    assert [part["passed"] for part in written["parts"]] == [True, False, True]
    monkeypatch.setattr(gpu, "run_engine", lambda: (True, "fast"))
    assert gpu.main([]) == 0


@pytest.mark.slow
def test_the_service_is_measured_beside_the_engine(tmp_path: Path) -> None:
    """How much is kept is for a quiet machine to say; here, that both were measured on the same work."""
    said: list[str] = []
    outcome = kept.run(num_images=2, num_clients=2, device="cpu", json_path=tmp_path / "out.json", say=said.append)
    assert outcome.engine_s > 10 * outcome.codec_s > 0
    assert outcome.kept == pytest.approx(outcome.engine_s / outcome.service_s)
    assert said[-1] == outcome.line
    assert json.loads((tmp_path / "out.json").read_text())["batch"] == 1


@pytest.mark.parametrize(
    ("engine_s", "num_processors", "expected"),
    [(0.1, 2, 0.1), (0.002, 2, 0.014), (0.002, 5, 0.0035), (0.002, 64, kept.REQUEST_S), (0.002, 1, 0.014)],
)
def test_a_fast_engine_is_judged_by_what_the_processors_allow(
    engine_s: float, num_processors: int, expected: float
) -> None:
    assert kept.slowest_s(engine_s, 0.014, num_processors) == pytest.approx(expected)
