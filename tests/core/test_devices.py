"""Which device is chosen, from facts that no test machine has, and what is seen of the machine that runs the tests."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from recofuse_core import devices
from recofuse_core.devices import Card, Choice, Sight, choose, has_kernels, named_device, observe, told
from recofuse_core.errors import DeviceError

KERNELS = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120")
T4, V100 = Card("Tesla T4", (7, 5)), Card("Tesla V100", (7, 0))
GOOD = Sight("2.13.0+cu130", "13.0", KERNELS, (T4,), "580.95.05", has_device_files=True)
NONE = Sight("2.13.0+cu130", "13.0", KERNELS)
OLD_DRIVER = replace(GOOD, cards=(), driver="550.54.15", complaint="CUDA initialization: too old")
CPU_BUILD = Sight("2.13.0+cpu", driver="580.95.05", has_device_files=True)

# What is seen, what is said of it, and whether auto has to say it, too.
OBSTACLES = {
    "no GPU": (NONE, "there is no GPU here: no NVIDIA driver is loaded", False),
    "CPU build": (CPU_BUILD, "torch 2.13.0+cpu, a build for the CPU", True),
    "CPU build, no GPU": (Sight("2.13.0+cpu"), "torch 2.13.0+cpu, a build for the CPU", False),
    "driver too old": (
        OLD_DRIVER,
        "CUDA 13.0, needs an NVIDIA driver of 580 or newer, and 550.54.15 is",
        True,
    ),
    "driver too old, in a container without GPU": (replace(OLD_DRIVER, has_device_files=False), "580 or newer", True),
    "no GPU given": (replace(NONE, driver="580.95.05"), "580.95.05 is loaded, but no GPU is given to this", True),
    "driver in trouble": (
        replace(GOOD, cards=(), complaint="Error 802: system not yet initialized"),
        "torch cannot use the GPU (driver 580.95.05): Error 802: system not yet initialized",
        True,
    ),
    "WSL": (replace(NONE, has_device_files=True), "torch cannot use the GPU: it does not say why", True),
    "card too old": (
        replace(GOOD, cards=(V100,)),
        "Tesla V100 (compute capability 7.0) has no kernels in torch 2.13.0+cu130, built for CUDA 13.0, "
        "which has them for 7.5, 8.0, 8.6, 9.0, 10.0, 12.0",
        True,
    ),
    "hidden": (replace(GOOD, cards=(), is_hidden=True), "CUDA_VISIBLE_DEVICES hides every GPU", False),
}


@pytest.mark.parametrize(("sight", "words", "is_told"), OBSTACLES.values(), ids=OBSTACLES)
def test_what_stands_in_the_way_is_said_in_one_line(sight: Sight, words: str, is_told: bool) -> None:
    with pytest.raises(DeviceError) as refused:
        choose("cuda", sight)
    said = str(refused.value)
    assert said.startswith("device cuda: ")
    assert words in said
    assert "\n" not in said
    choice = choose("auto", sight)
    assert choice.device == "cpu"
    assert (words in choice.doubt) if is_told else not choice.doubt
    assert choose("cpu", sight) == Choice("cpu")
    assert told(sight)["auto"].startswith("cpu")


def test_a_gpu_that_can_be_used_is_taken() -> None:
    two = replace(GOOD, cards=(T4, Card("NVIDIA H100", (9, 0))))
    for asked, device in (("auto", "cuda"), ("cuda", "cuda"), ("cuda:0", "cuda:0"), ("cuda:1", "cuda:1")):
        assert choose(asked, two) == Choice(device)
    with pytest.raises(DeviceError, match="cuda:0 is Tesla T4, cuda:1 is NVIDIA H100"):
        choose("cuda:2", two)
    assert told(two) == {
        "torch": "2.13.0+cu130, built for CUDA 13.0",
        "driver": "580.95.05",
        "cuda:0": "Tesla T4 (compute capability 7.5)",
        "cuda:1": "NVIDIA H100 (compute capability 9.0)",
        "auto": "cuda",
    }


def test_the_card_that_is_asked_for_is_the_one_that_is_judged() -> None:
    mixed = replace(GOOD, cards=(T4, V100))
    assert choose("cuda", mixed) == Choice("cuda")
    with pytest.raises(DeviceError, match=r"device cuda:1: Tesla V100 .* has no kernels"):
        choose("cuda:1", mixed)


def test_an_older_driver_that_torch_can_use_is_no_obstacle() -> None:
    """NVIDIA's compatibility packages let an older driver of a data centre run newer builds."""
    assert choose("cuda", replace(GOOD, driver="550.54.15")) == Choice("cuda")


@pytest.mark.parametrize("asked", ["gpu", "cuda:", "cuda:-1", "cuda:x", "", "CUDA", "cuda:1 ", "mps"])
def test_what_is_no_device_is_refused(asked: str) -> None:
    with pytest.raises(DeviceError, match="must be auto, cpu, cuda or cuda:N"):
        choose(asked, GOOD)


@pytest.mark.parametrize(
    ("architectures", "capability", "expected"),
    [
        (KERNELS, (7, 5), True),
        (KERNELS, (8, 9), True),  # a later one of the same major version
        (KERNELS, (10, 3), True),
        (KERNELS, (12, 1), True),
        (KERNELS, (7, 0), False),
        (KERNELS, (6, 1), False),
        (KERNELS, (11, 0), False),
        (("sm_90", "compute_90"), (12, 0), True),  # compiled on the card
        (("sm_90", "compute_90"), (8, 6), False),
        (("sm_90a",), (9, 0), True),
        (("sm_100a",), (10, 3), False),
        (("sm_100f",), (10, 3), True),
        (("compute_100f",), (12, 0), False),
        ((), (7, 0), True),
        (("gfx90a",), (9, 0), True),  # another maker's
    ],
)
def test_cards_run_what_was_compiled_for_them(
    architectures: tuple[str, ...], capability: tuple[int, int], expected: bool
) -> None:
    assert has_kernels(architectures, capability) is expected


# looking


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The files of a system with a driver and a GPU, as Linux shows them."""
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "nvidiactl").touch()
    (tmp_path / "proc/driver/nvidia").mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize(
    ("line", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024", "550.54.15"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build  (root@x)", "580.95.05"),
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  1000.10  Tue Mar  5 22:23:56 UTC 2030", "1000.10"),
        ("NVRM version: something else", ""),
    ],
)
def test_the_driver_is_found(root: Path, line: str, version: str) -> None:
    (root / "proc/driver/nvidia/version").write_text(f"{line}\nGCC version:  gcc version 12.2.0 (Debian 12.2.0-14)\n")
    assert observe(root).driver == version


def test_device_files_are_found(root: Path) -> None:
    assert not observe(root).has_device_files  # there is a driver, but no GPU was given
    (root / "dev" / "nvidia0").touch()
    assert observe(root).has_device_files


def test_what_torch_warns_of_is_kept(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def warn() -> bool:
        import warnings

        warnings.warn("CUDA initialization: Error 802\n(Triggered internally)", UserWarning, stacklevel=1)
        return False

    def fail(index: int) -> Card:
        raise RuntimeError("CUDA error: device is busy\nCompile with ...")

    monkeypatch.setattr(torch.cuda, "is_available", warn)
    assert observe(root).complaint == "CUDA initialization: Error 802"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(devices, "_card", fail)
    assert observe(root).complaint == "CUDA error: device is busy"
    assert not observe(root).cards


def test_hidden_gpus_are_known_to_be_hidden() -> None:
    code = "from recofuse_core.devices import observe; print(observe().is_hidden)"
    for value, expected in (("", "True"), ("-1", "True"), (None, "False"), ("0", "False")):
        environ = {name: text for name, text in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
        environ |= {} if value is None else {"CUDA_VISIBLE_DEVICES": value}
        done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == expected, value


def test_a_gpu_that_is_passed_over_is_told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(devices, "observe", lambda: OLD_DRIVER)
    with caplog.at_level(logging.WARNING):
        assert named_device("auto") == "cpu"
    (record,) = caplog.records
    assert "runs on the CPU, since torch 2.13.0+cu130" in record.getMessage()
    assert "550.54.15" in record.getMessage()
    caplog.clear()
    assert named_device("cpu") == "cpu"
    monkeypatch.setattr(devices, "observe", lambda: NONE)
    assert named_device("auto") == "cpu"
    monkeypatch.setattr(devices, "observe", lambda: GOOD)
    assert named_device("auto") == "cuda"
    assert not caplog.records


def test_nothing_asks_torch_past_this() -> None:
    """Who asks torch itself whether there is a GPU falls back in silence."""
    root = Path(__file__).parents[2]
    asking = {
        path.relative_to(root).as_posix()
        for package in ("recofuse_core", "service")
        for path in (root / package).rglob("*.py")
        if "cuda.is_available" in path.read_text("utf-8")
    }
    assert asking == {"recofuse_core/devices.py"}
