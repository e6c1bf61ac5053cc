"""`recofuse info` and `convert`: which weights are meant, and what the published files become."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from recofuse_core import ModelConfig, build_model, load_checkpoint
from recofuse_core.networks import DenoiserConfig, FusionConfig, PaperAutoencoderConfig
from recofuse_core.published import OfficialFiles, official_names
from recofuse_core.sde import SDEConfig
from recofuse_host.waiting import sleep_while_waiting
from tests.service.command.calls import TINY, assert_one_line, run


def test_weights_resolve_from_the_environment(weights: Path) -> None:
    result = run("info", RECOFUSE_WEIGHTS=str(weights))
    assert result.exit_code == 0, result.output
    assert "tiny 3" in result.stdout
    assert f"{sum(p.numel() for p in build_model(TINY).parameters()):,}" in result.stdout
    assert "posterior, 2 steps" in result.stdout
    assert "provenance.data.pairs" in result.stdout
    assert torch.__version__ in result.stdout
    assert "device.auto" in result.stdout


def test_info_says_how_it_would_run_here(weights: Path) -> None:
    result = run("info", str(weights), COLUMNS="200")
    lines = [" ".join(line.strip("│ ").split("│")) for line in result.stdout.splitlines()]
    (threads,) = [line for line in lines if line.startswith("threads  ")]
    assert f"{len(os.sched_getaffinity(0))} allowed" in threads
    (waiting,) = [line for line in lines if line.startswith("threads that wait")]
    assert sleep_while_waiting().told() in waiting
    asked = run("info", str(weights), COLUMNS="200", RECOFUSE_ENGINE__NUM_THREADS="3").stdout
    assert "3 (as asked)" in asked
    divided = run("info", str(weights), COLUMNS="200", RECOFUSE_WORKER__PER_HOST="999").stdout
    assert "999 share them" in divided


def test_info_says_what_kernels_of_our_own_would_need(weights: Path) -> None:
    shown = run("info", str(weights), COLUMNS="200", RECOFUSE_ENGINE__KERNELS="eager", RECOFUSE_ENGINE__DEVICE="cpu")
    rows = dict(line.strip("│ ").split("│") for line in shown.stdout.splitlines() if "kernels." in line)
    found = {name.strip(): told.strip() for name, told in rows.items()}
    assert found["kernels.asked"] == "eager"
    assert found["kernels.used"] == "none, as asked"
    words = " ".join(shown.stdout.replace("│", " ").split())  # whether in one line or two
    assert "kernels.written for beginning, block, stacked block, fusion, end" in words
    assert "kernels.Triton" in found
    asked = run("info", str(weights), COLUMNS="200", RECOFUSE_ENGINE__DEVICE="cpu")
    assert "none: they are for a GPU" in asked.stdout


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
