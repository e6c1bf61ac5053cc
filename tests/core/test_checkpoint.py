"""Weights on disk: what goes in comes out, damage and mismatches are named."""

import dataclasses
import json
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from recofuse_core import checkpoint as checkpoint_module
from recofuse_core import weights_file
from recofuse_core.checkpoint import (
    Checkpoint,
    load_checkpoint,
    load_pretrained,
    read_header,
    save_checkpoint,
)
from recofuse_core.errors import CheckpointError
from recofuse_core.model import ModelConfig, ReCoFuse
from recofuse_core.weights_file import packaged_names
from tests.core.states import GATED, PAPER, State, random_state, same


def write(path: Path, config: ModelConfig = GATED, dtype: torch.dtype = torch.float16) -> State:
    state = random_state(config)
    save_checkpoint(path, state, config, name="tiny", version="3", preset="test", provenance={"seed": 7}, dtype=dtype)
    return state


@pytest.mark.parametrize("config", [PAPER, GATED], ids=["paper", "gated"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_what_goes_in_comes_out(tmp_path: Path, config: ModelConfig, dtype: torch.dtype) -> None:
    path = tmp_path / "tiny.safetensors"
    state = write(path, config, dtype)
    loaded = load_checkpoint(path)
    assert loaded.config == config
    assert all(tensor.dtype == torch.float32 for tensor in loaded.state.values())
    assert same(loaded.state, {name: value.to(dtype).float() for name, value in state.items()})
    info = loaded.info
    assert (info.name, info.version, info.preset, info.provenance) == ("tiny", "3", "test", {"seed": 7})
    assert (info.default_steps, info.default_sampler) == (config.steps, config.sampler)
    assert info.num_parameters == sum(value.numel() for value in state.values())


def test_header_says_all_but_the_weights(tmp_path: Path) -> None:
    path = tmp_path / "tiny.safetensors"
    state = write(path)
    header = read_header(path)
    assert header.config == GATED
    assert header.info == load_checkpoint(path).info
    assert header.shapes == {name: tuple(value.shape) for name, value in state.items()}
    assert set(header.dtypes.values()) == {"F16"}
    assert re.fullmatch("sha256:[0-9a-f]{64}", header.checksum)


def test_loaded_weights_do_not_hang_on_the_file(tmp_path: Path) -> None:
    path = tmp_path / "tiny.safetensors"
    write(path, dtype=torch.float32)
    loaded = load_checkpoint(path)
    before = {name: value.clone() for name, value in loaded.state.items()}
    with path.open("r+b") as file:
        file.seek(-4096, os.SEEK_END)
        file.write(bytes(4096))
    assert same(loaded.state, before)


def test_load_pretrained_gives_a_model_that_fuses(tmp_path: Path) -> None:
    path = tmp_path / "tiny.safetensors"
    reference = ReCoFuse(GATED).eval()
    save_checkpoint(path, reference.state_dict(), GATED, name="tiny", version="1", dtype=torch.float32)
    model = load_pretrained(path)
    assert model.info == read_header(path).info
    assert not model.training
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert same(dict(model.state_dict()), dict(reference.state_dict()))
    vis, ir = torch.rand(1, 3, 33, 40), torch.rand(1, 1, 33, 40)
    ours, theirs = model.fuse(vis, ir, seeds=5).fused, reference.fuse(vis, ir, seeds=5).fused
    assert ours is not None
    assert theirs is not None
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_loading_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    path = tmp_path / "tiny.safetensors"
    write(path)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load_pretrained(path)
    assert torch.equal(torch.rand(3), expected)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tiny.safetensors"
    write(path)
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"tiny\.safetensors cannot be written.*No space left"):
        write(path, PAPER)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["tiny.safetensors"]


def test_a_missing_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be written"):
        write(tmp_path / "absent" / "tiny.safetensors")


def test_files_are_readable_by_others(tmp_path: Path) -> None:
    path, plain = tmp_path / "tiny.safetensors", tmp_path / "plain"
    write(path)
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("fusion.intro.bias"), r"missing fusion\.intro\.bias"),
        (lambda state: state.update({"extra.weight": torch.zeros(2)}), r"unexpected extra\.weight"),
        (
            lambda state: state.update({"fusion.intro.bias": torch.zeros(3)}),
            r"fusion\.intro\.bias is \(3,\) instead of \(32,\)",
        ),
        (lambda state: state["fusion.intro.bias"].fill_(float("nan")), r"not finite as torch\.float16: fusion\.intro"),
        (lambda state: state["fusion.intro.bias"].fill_(7e4), r"not finite as torch\.float16: fusion\.intro"),
    ],
    ids=["missing", "unexpected", "shape", "nan", "overflow"],
)
def test_a_state_that_does_not_fit_is_not_written(
    tmp_path: Path, change: Callable[[State], object], message: str
) -> None:
    state = random_state(GATED)
    change(state)
    with pytest.raises(CheckpointError, match=message):
        save_checkpoint(tmp_path / "x.safetensors", state, GATED, name="x", version="1")
    assert os.listdir(tmp_path) == []


def test_only_two_dtypes_and_json_provenance(tmp_path: Path) -> None:
    state = random_state(GATED)
    with pytest.raises(CheckpointError, match=r"float16 or float32, not as torch\.bfloat16"):
        save_checkpoint(tmp_path / "x", state, GATED, name="x", version="1", dtype=torch.bfloat16)
    for provenance in ({"when": object()}, {"loss": float("nan")}):
        with pytest.raises(CheckpointError, match="provenance is not JSON"):
            save_checkpoint(tmp_path / "x", state, GATED, name="x", version="1", provenance=provenance)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, Checkpoint]:
    path = tmp_path_factory.mktemp("sound") / "tiny.safetensors"
    write(path)
    return path, path.read_bytes(), load_checkpoint(path)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_flipped_byte_goes_unnoticed(sound: tuple[Path, bytes, Checkpoint], data: st.DataObject) -> None:
    path, content, expected = sound
    header_end = 8 + struct.unpack("<Q", content[:8])[0]
    # Half of the flips into the header, where the file says what it is.
    position = data.draw(st.one_of(st.integers(0, header_end - 1), st.integers(header_end, len(content) - 1)))
    damaged = bytearray(content)
    damaged[position] ^= data.draw(st.integers(1, 255))
    other = path.with_name("damaged.safetensors")
    other.write_bytes(damaged)
    try:
        loaded = load_checkpoint(other)
    except CheckpointError:
        return
    # A space turned into a tab, or the like.
    assert (loaded.config, loaded.info) == (expected.config, expected.info)
    assert same(loaded.state, expected.state)


@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_truncated_files(sound: tuple[Path, bytes, Checkpoint], data: st.DataObject) -> None:
    path, content, _ = sound
    short = path.with_name("short.safetensors")
    short.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    for read in (read_header, load_checkpoint):
        with pytest.raises(CheckpointError, match=r"short\.safetensors is no safetensors file, or is truncated"):
            read(short)


def test_other_files_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(CheckpointError, match=r"no weights file at .*x\.safetensors"):
        read_header(path)
    with pytest.raises(CheckpointError, match="no weights file at"):
        read_header(tmp_path)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    with pytest.raises(CheckpointError, match="no safetensors file"):
        read_header(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="no recofuse checkpoint"):
        read_header(path)


def rewrite(path: Path, tensors: State | None = None, **metadata: str) -> None:
    """A checkpoint with some tensors or metadata exchanged; the checksum stays as it was."""
    header = read_header(path)
    about = {key: getattr(header.info, key) for key in ("name", "version", "preset", "provenance")}
    original = {
        "format": "recofuse",
        "format_version": "1",
        "config": json.dumps(dataclasses.asdict(header.config), sort_keys=True),
        "info": json.dumps(about, sort_keys=True),
        "checksum": header.checksum,
    }
    save_file(load_file(path) if tensors is None else tensors, path, original | metadata)


def test_exchanged_parts_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write(path)
    rewrite(path)
    load_checkpoint(path)  # what `rewrite` keeps is still sound

    def refused(message: str) -> None:
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(path)
        write(path)

    state = load_file(path)
    missing = {name: value for name, value in state.items() if not name.startswith("denoiser.vis.intro")}
    rewrite(path, missing)
    refused(r"x\.safetensors does not fit the model: missing 2: denoiser\.vis\.intro\.bias, denoiser\.vis\.intro\.w")
    rewrite(path, state | {"other": torch.zeros(1)})
    refused("unexpected other")
    rewrite(path, state | {"fusion.intro.bias": torch.zeros(31)})
    refused(r"fusion\.intro\.bias is \(31,\) instead of \(32,\)")
    rewrite(path, state | {"fusion.intro.bias": torch.zeros(32, dtype=torch.float64)})
    refused(r"neither float16 nor float32: fusion\.intro\.bias")
    rewrite(path, state | {"fusion.intro.bias": torch.zeros(32)})
    refused("does not have the recorded checksum")
    rewrite(path, checksum="sha256:0")
    refused("does not have the recorded checksum")
    rewrite(path, format_version="2")
    refused("format version 2; this release reads version 1")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["fusion"].update(colour=3), "fusion has settings this release does not know: colour"),
        (lambda c: c.update(autopilot=True), "config has settings this release does not know: autopilot"),
        (lambda c: c["autoencoder"].update(kind="vq"), "unknown kind of autoencoder 'vq'; known: paper, gated"),
        (lambda c: c["denoiser"].update(width="48"), r"denoiser\.width cannot be '48'"),
        (lambda c: c["denoiser"].update(width=True), r"denoiser\.width cannot be True"),
        (lambda c: c["denoiser"].update(width=4.5), r"denoiser\.width cannot be 4\.5"),
        (lambda c: c["denoiser"].update(encoder_blocks=[1, "x"]), "denoiser.encoder_blocks cannot be"),
        (lambda c: c["autoencoder"].update(decoder_blocks=[1, 2, 3]), "autoencoder.decoder_blocks cannot be"),
        (lambda c: c["denoiser"].update(prediction="guess"), r"denoiser\.prediction cannot be 'guess'"),
        (lambda c: c.update(sampler="magic"), r"config\.sampler cannot be 'magic'"),
        (lambda c: c["sde"].update(eps=2.0), "0 < eps < 1"),
        (lambda c: c.update(steps=1000), "default steps"),
        (lambda c: c["fusion"].update(latent_channels=3), "disagree on the number of latent channels"),
        (lambda c: c.pop("sde"), "'sde'"),
        (lambda c: c["fusion"].update(num_groups=5), "no model can be built from its sizes"),
        (lambda c: c["denoiser"].update(width=-4), "no model can be built from its sizes"),
    ],
)
def test_configs_that_make_no_sense(
    tmp_path: Path, change: Callable[[dict[str, dict[str, object]]], object], message: str
) -> None:
    path = tmp_path / "x.safetensors"
    write(path)
    config = json.loads(json.dumps(dataclasses.asdict(GATED)))
    change(config)
    rewrite(path, config=json.dumps(config))
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(path)
    assert "x.safetensors" in str(caught.value)


@pytest.mark.parametrize("field", ["config", "info"])
@pytest.mark.parametrize("value", ["", "{", "[]", "null", "7", '"text"', "{}", "[" * 100_000])
def test_metadata_that_are_no_metadata(tmp_path: Path, field: str, value: str) -> None:
    path = tmp_path / "x.safetensors"
    write(path)
    rewrite(path, None, **{field: value})
    with pytest.raises(CheckpointError, match="the metadata are not understood"):
        read_header(path)


def test_unknown_names_say_what_there_is() -> None:
    with pytest.raises(CheckpointError, match=r"no weights are called 'giant' \(in the package: .*recofuse convert"):
        load_pretrained("giant")


def test_paths_are_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "tiny.safetensors")
    monkeypatch.chdir(tmp_path)
    assert load_pretrained("tiny.safetensors").info.name == "tiny"
    assert load_pretrained(str(tmp_path / "tiny.safetensors")).info.name == "tiny"
    (tmp_path / "bare").write_bytes((tmp_path / "tiny.safetensors").read_bytes())
    assert load_pretrained("bare").info.name == "tiny"
    with pytest.raises(CheckpointError, match=r"no weights file at \./absent\.safetensors|at absent\.safetensors"):
        load_pretrained("./absent.safetensors")


def test_names_stand_for_packaged_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "weights").mkdir()
    write(tmp_path / "weights" / "tiny.safetensors")
    monkeypatch.setattr(weights_file, "weights_folder", lambda: tmp_path / "weights")
    assert packaged_names() == ("tiny",)
    assert load_pretrained("tiny").info.name == "tiny"


@pytest.mark.parametrize("name", packaged_names())
def test_packaged_weights_are_sound(name: str) -> None:
    loaded = load_checkpoint(Path(checkpoint_module.__file__).with_name("weights") / f"{name}.safetensors")
    assert loaded.info.name == name
    assert loaded.info.provenance
