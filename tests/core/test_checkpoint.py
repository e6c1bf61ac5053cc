"""Weights on disk: what goes in comes out, damage and mismatches are named, published files convert both ways."""

import dataclasses
import importlib.resources
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
from torch import Generator, Tensor

from recofuse_core import checkpoint as checkpoint_module
from recofuse_core.checkpoint import (
    Checkpoint,
    blank_model,
    convert_official,
    export_official,
    load_checkpoint,
    load_pretrained,
    official_names,
    packaged_names,
    read_header,
    save_checkpoint,
)
from recofuse_core.errors import CheckpointError
from recofuse_core.model import PRESETS, ModelConfig, ReCoFuse
from recofuse_core.networks import DenoiserConfig, FusionConfig, GatedAutoencoderConfig, PaperAutoencoderConfig
from recofuse_core.sde import SDEConfig

State = dict[str, Tensor]

FUSION = FusionConfig(latent_channels=2, width=32, time_dim=128)
BRANCH = DenoiserConfig(2, 4, (1, 2), 1, (2, 1), sinusoid_dim=4, time_dim=16)
PAPER = ModelConfig(
    PaperAutoencoderConfig(2, (2, 2, 3, 4), 2), BRANCH, FUSION, SDEConfig(num_steps=20), sampler="ode1", steps=20
)
GATED = ModelConfig(
    GatedAutoencoderConfig(4, 4, (1, 1), (1, 1), 2),
    dataclasses.replace(BRANCH, prediction="clean"),
    FUSION,
    SDEConfig(num_steps=50, max_sigma=30, schedule="linear", eps=0.01),
    sampler="ode2",
    steps=4,
)


def random_state(config: ModelConfig, seed: int = 0) -> State:
    generator = Generator().manual_seed(seed)
    shapes = {name: value.shape for name, value in blank_model(config).state_dict().items()}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def write(path: Path, config: ModelConfig = GATED, dtype: torch.dtype = torch.float16) -> State:
    state = random_state(config)
    save_checkpoint(path, state, config, name="tiny", version="3", preset="test", provenance={"seed": 7}, dtype=dtype)
    return state


def same(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- our format -------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_survive_as_json(preset: str) -> None:
    config = PRESETS[preset]
    assert checkpoint_module.model_config_from(json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_settings_added_later_take_their_default() -> None:
    values = json.loads(json.dumps(dataclasses.asdict(PAPER)))
    del values["sde"]["eps"]
    assert checkpoint_module.model_config_from(values) == PAPER


# --- writing ----------------------------------------------------------------------------------------------------------


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


# --- damage and strangers ---------------------------------------------------------------------------------------------


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


# --- names ------------------------------------------------------------------------------------------------------------


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
    monkeypatch.setattr(importlib.resources, "files", lambda package: tmp_path)
    assert packaged_names() == ("tiny",)
    assert load_pretrained("tiny").info.name == "tiny"


@pytest.mark.parametrize("name", packaged_names())
def test_packaged_weights_are_sound(name: str) -> None:
    loaded = load_checkpoint(Path(checkpoint_module.__file__).with_name("weights") / f"{name}.safetensors")
    assert loaded.info.name == name
    assert loaded.info.provenance


# --- the published files ----------------------------------------------------------------------------------------------


def write_published(directory: Path, config: ModelConfig = PAPER, prefix: str = "") -> tuple[Path, Path, Path]:
    """The three published files of a random model, as the authors' training writes them."""
    paths = (directory / "G.pth", directory / "F.pth", directory / "L.pth")
    for path, tensors in zip(paths, export_official(random_state(config), config), strict=True):
        torch.save({prefix + name: value for name, value in tensors.items()}, path)
    return paths


def change_published(path: Path, change: Callable[[State], object]) -> None:
    tensors = torch.load(path, weights_only=True)
    change(tensors)
    torch.save(tensors, path)


@pytest.mark.parametrize("prefix", ["", "module.", "module.module."])
def test_published_files_round_trip(tmp_path: Path, prefix: str) -> None:
    output = tmp_path / "paper.safetensors"
    header = convert_official(*write_published(tmp_path, prefix=prefix), output, sde=PAPER.sde, name="own", version="2")
    assert header.config == PAPER
    assert header == read_header(output)
    loaded = load_checkpoint(output)
    assert same(loaded.state, random_state(PAPER))
    assert (loaded.info.name, loaded.info.version, loaded.info.preset) == ("own", "2", "")
    assert (loaded.info.default_steps, loaded.info.default_sampler) == (20, "ode1")
    sources = loaded.info.provenance["files"]
    assert isinstance(sources, dict)
    assert {part: about["name"] for part, about in sources.items()} == {
        "generator": "G.pth",
        "fusion": "F.pth",
        "autoencoder": "L.pth",
    }


def test_single_branches_convert_together(tmp_path: Path) -> None:
    generator, fusion, autoencoder = write_published(tmp_path)
    tensors = torch.load(generator, weights_only=True)
    branches = (tmp_path / "VIS.pth", tmp_path / "IR.pth")
    for path, prefix in zip(branches, ("vis_", "ir_"), strict=True):
        torch.save(
            {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}, path
        )
    output = tmp_path / "paper.safetensors"
    convert_official(branches, fusion, autoencoder, output)
    assert same(load_checkpoint(output).state, random_state(PAPER))
    with pytest.raises(CheckpointError, match=r"VIS\.pth is not the generator network.*looks like a single branch"):
        convert_official(branches[0], fusion, autoencoder, output)
    change_published(branches[1], lambda state: state.pop("intro.weight"))
    with pytest.raises(CheckpointError, match=r"IR\.pth.*missing ir_intro\.weight"):
        convert_official(branches, fusion, autoencoder, output)


def test_half_precision_and_ema_files_convert(tmp_path: Path) -> None:
    generator, fusion, autoencoder = write_published(tmp_path)
    average = generator.with_name("lastest_EMA.pth")
    tensors = torch.load(generator, weights_only=True)
    torch.save({name: value.half() for name, value in tensors.items()}, average)
    output = tmp_path / "paper.safetensors"
    header = convert_official(average, fusion, autoencoder, output, dtype=torch.float16)
    assert set(header.dtypes.values()) == {"F16"}
    assert same(load_checkpoint(output).state, {k: v.half().float() for k, v in random_state(PAPER).items()})


def test_the_published_sizes_are_the_paper_preset(tmp_path: Path) -> None:
    """Inference of sizes on shapes alone: views of one number stand for half a gigabyte of weights."""
    config = PRESETS["paper"]
    shapes = {name: value.shape for name, value in blank_model(config).state_dict().items()}
    files = export_official({name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}, config)
    assert [len(tensors) for tensors in files] == [1336, 50, 69]
    labels = {part: part for part in files._fields}
    assert checkpoint_module._infer_config(files, labels, SDEConfig()) == config


def test_every_parameter_has_one_published_name() -> None:
    names = list(official_names(PAPER))
    assert {pairing.ours for pairing in names} == blank_model(PAPER).state_dict().keys()
    assert len({(pairing.file, pairing.theirs) for pairing in names}) == len(names)


# Spot checks of the published names, the crossed heads of TIM above all.
@pytest.mark.parametrize(
    ("ours", "file", "theirs"),
    [
        ("fusion.ir_weight.2.weight", "fusion", "outBlock1_v.2.weight"),
        ("fusion.vis_weight.2.weight", "fusion", "outBlock1_i.2.weight"),
        ("fusion.ir_branch.0.weight", "fusion", "middleBlock2.0.weight"),
        ("fusion.vis_branch.2.bias", "fusion", "middleBlock3.2.bias"),
        ("fusion.ir_branch_attention.spatial.weight", "fusion", "CBMA2.spatial_attention.conv2d.weight"),
        ("fusion.vis_branch_attention.squeeze.weight", "fusion", "CBMA3.channel_attention.shared_MLP.0.weight"),
        ("fusion.vis_attention.query.weight", "fusion", "cross_attn_1.query.weight"),
        ("fusion.time.expand.weight", "fusion", "time_mlp.1.weight"),
        ("denoiser.vis.time.project.bias", "generator", "vis_time_mlp.3.bias"),
        ("denoiser.ir.encoders.1.1.attention.weight", "generator", "ir_encoders.1.1.sca.1.weight"),
        ("denoiser.ir.middle.0.norm2.gain", "generator", "ir_middle_blks.0.norm2.g"),
        ("denoiser.vis.decoders.0.1.project2.weight", "generator", "vis_decoders.0.1.conv5.weight"),
        ("denoiser.vis.decoders.0.1.project1.weight", "generator", "vis_decoders.0.1.conv3.weight"),
        ("denoiser.vis.ups.1.weight", "generator", "vis_ups.1.0.weight"),
        ("autoencoder.downs.3.weight", "autoencoder", "encoder.3.3.weight"),
        ("autoencoder.ups.1.bias", "autoencoder", "decoder.1.3.1.bias"),
        ("autoencoder.decoder_attention.out_norm.gain", "autoencoder", "decoder.0.2.fn.fn.to_out.1.g"),
        ("autoencoder.decoder_blocks.2.1.skip.weight", "autoencoder", "decoder.2.1.res_conv.weight"),
    ],
)
def test_published_places(ours: str, file: str, theirs: str) -> None:
    assert (ours, file, theirs) in set(official_names(PAPER))


def test_compact_models_have_no_published_form() -> None:
    with pytest.raises(CheckpointError, match="only the published autoencoder"):
        export_official(random_state(GATED), GATED)
    clean = dataclasses.replace(PAPER, denoiser=GATED.denoiser)
    with pytest.raises(CheckpointError, match="noise-predicting"):
        export_official(random_state(clean), clean)
    with pytest.raises(CheckpointError, match=r"the state does not fit the model: missing fusion\.intro\.bias"):
        export_official({k: v for k, v in random_state(PAPER).items() if k != "fusion.intro.bias"}, PAPER)


def test_mixed_up_files_are_told(tmp_path: Path) -> None:
    generator, fusion, autoencoder = write_published(tmp_path)
    output = tmp_path / "x.safetensors"
    with pytest.raises(CheckpointError, match=r"F\.pth is not the generator.*missing 1336: ir_.*looks like the fusion"):
        convert_official(fusion, generator, autoencoder, output)
    with pytest.raises(CheckpointError, match=r"L\.pth is not the fusion.*unexpected 69: .*looks like the autoencoder"):
        convert_official(generator, autoencoder, fusion, output)
    assert not output.exists()


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (0, lambda s: s.pop("ir_ending.bias"), r"G\.pth does not fit the model: missing ir_ending\.bias"),
        (0, lambda s: s.update(vis_more=torch.zeros(1)), r"G\.pth.*unexpected vis_more"),
        (
            0,
            lambda s: s.update({"ir_ups.0.0.weight": torch.zeros(2, 2, 1, 1)}),
            r"ir_ups\.0\.0\.weight is \(2, 2, 1, 1\)",
        ),
        (0, lambda s: s.pop("vis_intro.weight"), r"G\.pth is not the generator network"),
        (0, lambda s: s.update({"vis_encoders.0.7.beta": torch.zeros(1)}), r"G\.pth.*missing.*unexpected"),
        (1, lambda s: s.pop("CBMA2.spatial_attention.conv2d.bias"), r"F\.pth.*missing CBMA2\.spatial_attention"),
        (
            1,
            lambda s: s.update({"inBlock.weight": torch.zeros(32)}),
            r"F\.pth is not the fusion network: sizes cannot be .*inBlock\.weight': \(32,\)",
        ),
        (1, lambda s: s.update({"time_mlp.3.weight": torch.zeros(3, 3)}), "no model can be built"),
        (
            1,
            lambda s: s.update({"inBlock.weight": torch.zeros(32, 6, 3, 3)}),
            r"differ in latent channels.*F\.pth has 3",
        ),
        (2, lambda s: s.pop("encoder.3.2.fn.norm.g"), r"L\.pth.*missing encoder\.3\.2\.fn\.norm\.g"),
        (
            2,
            lambda s: s.update({"init_conv.weight": torch.zeros(0, 3, 3, 3)}),
            r"L\.pth is not the autoencoder.*init_conv\.weight': \(0, 3, 3, 3\)",
        ),
    ],
)
def test_published_files_that_do_not_fit(
    tmp_path: Path, index: int, change: Callable[[State], object], message: str
) -> None:
    paths = write_published(tmp_path)
    change_published(paths[index], change)
    with pytest.raises(CheckpointError, match=message):
        convert_official(*paths, tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


def test_sizes_may_be_demanded(tmp_path: Path) -> None:
    paths, output = write_published(tmp_path), tmp_path / "x.safetensors"
    assert convert_official(*paths, output, sde=PAPER.sde, expected=PAPER).config == PAPER
    with pytest.raises(CheckpointError, match=r"L\.pth has the sizes .*width=2.*expected were .*width=8"):
        convert_official(*paths, output, expected=PRESETS["paper"])


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    return write_published(tmp_path_factory.mktemp("published"))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@settings(deadline=None, max_examples=20)
@given(st.data())
def test_truncated_published_files(published: tuple[Path, Path, Path], zipped: bool, data: st.DataObject) -> None:
    _, fusion, autoencoder = published
    short = fusion.with_name("short.pth")
    torch.save(torch.load(fusion, weights_only=True), short, _use_new_zipfile_serialization=zipped)
    content = short.read_bytes()
    short.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(CheckpointError, match=r"short\.pth is no torch file of plain tensors, or is truncated"):
        convert_official(short, fusion, autoencoder, fusion.with_name("x.safetensors"))


class Payload:
    """Pickles into a call of os.mkdir, as a hostile file would."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_no_code_of_a_published_file_runs(tmp_path: Path) -> None:
    generator, fusion, autoencoder = write_published(tmp_path)
    torch.save({"inBlock.weight": Payload(tmp_path / "pwned")}, fusion)
    with pytest.raises(CheckpointError, match="no torch file of plain tensors"):
        convert_official(generator, fusion, autoencoder, tmp_path / "x.safetensors")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"epoch": 3, "iter": 7}, "no state dict, these entries are no tensors: 2: epoch, iter"),
        ([torch.zeros(1)], "no state dict but a list"),
        ({}, "no state dict but a dict"),
        (torch.zeros(3), "no state dict but a Tensor"),
    ],
    ids=["training state", "list", "empty", "tensor"],
)
def test_other_torch_files(tmp_path: Path, content: object, message: str) -> None:
    generator, fusion, autoencoder = write_published(tmp_path)
    torch.save(content, autoencoder)
    with pytest.raises(CheckpointError, match=rf"L\.pth (is|holds) {message}"):
        convert_official(generator, fusion, autoencoder, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"no weights file at .*absent\.pth"):
        convert_official(tmp_path / "absent.pth", fusion, autoencoder, tmp_path / "x.safetensors")
