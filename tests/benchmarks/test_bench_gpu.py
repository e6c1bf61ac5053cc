"""`make check-gpu` where there is no GPU, and its report; what the service keeps, on real processes."""

from __future__ import annotations

import itertools
import json
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import pytest
from torch import Tensor

from benchmarks import gpu, gpu_drills, kept
from recofuse_core.kernels import needs
from recofuse_core.program_cache import ProgramCache
from recofuse_core.runtime import Runtime
from service.terms.settings import EngineSettings
from tests.core.tiny import tiny_model
from tests.fakes import FakeEngine
from tests.service.work.devices import MeteredDevice, MeteredEngine, MeteredRuntime, cuda_error


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
    for part in ("precision", "attention", "forms", "drills", "sanitizer"):
        monkeypatch.setattr(gpu, f"run_{part}", lambda: (True, "well"))
    monkeypatch.setattr(gpu, "run_engine", lambda: 1 / 0)
    monkeypatch.setattr(gpu, "run_kept", lambda: (True, "kept 99 %"))
    assert gpu.main(["--json", str(tmp_path / "out.json")]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(
        "gpu: tests passed: 9 passed | precision passed: well | attention passed: well | forms passed: well | "
    )
    assert " | engine FAILED: ZeroDivisionError: " in last
    assert re.search(r" \| kept passed: kept 99 % \| time passed: \d+ s of 600$", last)
    written = json.loads((tmp_path / "out.json").read_text())
    assert [part["passed"] for part in written["parts"]] == [True, True, True, True, True, True, False, True, True]
    monkeypatch.setattr(gpu, "run_engine", lambda: (True, "fast"))
    assert gpu.main([]) == 0
    monkeypatch.setattr(gpu, "LONGEST_S", 0.0)
    assert gpu.main([]) == 1
    assert " | time FAILED: " in capsys.readouterr().out


@pytest.mark.parametrize(("room", "passed"), [(11, True), (100, False), (2, False)])
def test_the_drill_of_memory_wants_batches_to_be_halved_and_all_jobs_answered(room: int, passed: bool) -> None:
    found, line = gpu_drills.drill_memory(MeteredEngine(MeteredRuntime(MeteredDevice(room))))
    assert found is passed, line


def test_the_drill_of_a_lost_device_wants_the_worker_to_end_and_no_job_to_fail() -> None:
    broken = threading.Event()
    runtime = MeteredRuntime(
        MeteredDevice(1000), faults=lambda _: cuda_error("device-side assert triggered") if broken.is_set() else None
    )
    engine = gpu_drills.DyingEngine(EngineSettings(), broken.set)
    engine._runtime = cast(Runtime, runtime)
    engine.load = engine.warm_up = lambda: None  # type: ignore[method-assign]
    passed, line = gpu_drills.drill_lost(engine)
    assert passed, line
    assert re.fullmatch(r"\d+ of 28 jobs answered before, 0 failed, \d+ wait; the worker ended", line)


@pytest.mark.parametrize("engine", [FakeEngine(), FakeEngine(poison_seeds=frozenset({12}))], ids=["sound", "failing"])
def test_the_drill_of_a_lost_device_sees_an_engine_that_goes_on(engine: FakeEngine) -> None:
    passed, line = gpu_drills.drill_lost(engine)
    assert not passed
    assert line.endswith("the worker went on")


def test_ways_to_run_the_branches_must_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    passed, line = gpu.run_forms("cpu", size=(64, 48), repeats=1)
    assert passed, line
    assert all(f"{way} " in line for way in ("apart", "stacked", "apart, kernels that win"))
    monkeypatch.setattr(gpu, "MAX_DIFFERENCE", -1.0)
    assert not gpu.run_forms("cpu", size=(64, 48), repeats=1)[0]


@pytest.mark.parametrize(("slowest", "passed"), [(1.2, True), (1.4, False)])
def test_the_attention_that_torch_picks_is_to_be_near_the_fastest(slowest: float, passed: bool) -> None:
    """torch has two of its kinds on a CPU; times are given here."""
    times: Iterator[float] = itertools.cycle([slowest, 1.0, 3.0])

    def timed(attend: Callable[[], Tensor]) -> float:
        assert attend().shape[2:] == (48, 16)
        return next(times)

    found, line = gpu.run_attention(timed, device="cpu", names=("FLASH_ATTENTION", "MATH"), positions=48)
    assert found is passed
    assert f"paper batch 8: {slowest:.3f} ms (flash_attention 1.000, math 3.000)" in line


def test_an_attention_that_is_not_there_is_left_out() -> None:
    passed, line = gpu.run_attention(lambda attend: float(len(attend())), device="cpu", positions=48)
    assert passed
    assert "flash_attention 2.000)" in line
    assert "cudnn" not in line


def test_compute_sanitizer_is_used_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu.run_sanitizer() == (True, "compute-sanitizer is not installed: NOT RUN")
    tool = tmp_path / "compute-sanitizer"
    tool.write_text('#!/bin/sh\necho "$@"\nexit $WITH\n')
    tool.chmod(0o755)
    for status, passed in (("0", True), ("9", False)):
        monkeypatch.setenv("WITH", status)
        found, line = gpu.run_sanitizer()
        assert found is passed
        assert line.startswith("--tool memcheck --error-exitcode 9 ")
        assert line.endswith("-m benchmarks.gpu_drills replays")


def test_what_is_looked_into_are_recorded_runs_short_and_long_on_both_sorts_of_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Here both are torch's, since an interpreter would take minutes, and the model is a small one."""
    asked: list[str] = []
    monkeypatch.setattr("recofuse_core.checkpoint.load_pretrained", lambda name, device: tiny_model())
    monkeypatch.setattr(needs, "look", lambda: needs.Host("3", "gcc", None, ()))

    def noted(model: object, kernels: str) -> str:
        asked.append(kernels)
        return kernels

    monkeypatch.setattr("recofuse_core.runtime.use_kernels", noted)
    passed, line = gpu_drills.replays("cpu", precision="float32", size=(48, 32), num=1)
    assert passed
    assert (asked, line) == (["eager", "triton"], "4 recorded runs on eager; 4 recorded runs on triton")
    monkeypatch.setattr(needs, "look", lambda: needs.Host("3", "", None, ("there is no C compiler (gcc or clang)",)))
    passed, line = gpu_drills.replays("cpu", precision="float32", size=(48, 32), num=1)
    assert (passed, line) == (True, "4 recorded runs on eager; there is no C compiler (gcc or clang)")
    monkeypatch.setattr(ProgramCache, "get", lambda *arguments, **options: None)
    assert not gpu_drills.replays("cpu", kinds=("eager",), precision="float32", size=(48, 32), num=1)[0]


def test_a_part_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "PROCESS_TIMEOUT_S", 0.2)
    assert gpu._in_process(["sleep", "30"]) == (False, "has not ended after 0 s")


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
