"""Published files convert both ways; those that do not fit are named, and no code in them runs."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recofuse_core import published as published_module
from recofuse_core.checkpoint import blank_model, load_checkpoint, read_header
from recofuse_core.errors import CheckpointError
from recofuse_core.model import PRESETS, ModelConfig
from recofuse_core.published import convert_official, export_official, official_names
from recofuse_core.sde import SDEConfig
from tests.core.states import GATED, PAPER, State, random_state, same


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
    assert published_module._infer_config(files, labels, SDEConfig()) == config


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
