"""The way from and to the authors' published .pth files.

The published parameter names appear in this module only. What a newcomer would get wrong: the published TIM head `_v`
weighs the *infrared* latent and `_i` the visible one, and published norm gains are (1, C, 1, 1) where ours are (C,).
"""

import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from recofuse_core.checkpoint import (
    CheckpointHeader,
    State,
    blank_model,
    list_differences,
    require_match,
    save_checkpoint,
    shapes_of,
)
from recofuse_core.errors import CheckpointError, ConfigError
from recofuse_core.model import PRESETS, ModelConfig
from recofuse_core.networks import DenoiserConfig, FusionConfig, PaperAutoencoderConfig
from recofuse_core.sde import SDEConfig
from recofuse_core.weights_file import StrPath, listed


class OfficialFiles(NamedTuple):
    """What the three published files hold, in order: ReCoFuse_G.pth, ReCoFuse_F.pth, latent-AE-XY.pth."""

    generator: State
    fusion: State
    autoencoder: State


class Pairing(NamedTuple):
    """One of our parameter names and where the release keeps that tensor: file (as in OfficialFiles) and name there."""

    ours: str
    file: str
    theirs: str


def convert_official(
    generator_path: StrPath | tuple[StrPath, StrPath],
    fusion_path: StrPath,
    autoencoder_path: StrPath,
    output_path: StrPath,
    *,
    sde: SDEConfig | None = None,
    expected: ModelConfig | None = None,
    name: str = "paper",
    version: str = "1",
    dtype: torch.dtype = torch.float32,
) -> CheckpointHeader:
    """Turn the authors' three .pth files (or their EMA or `module.` variants) into one checkpoint of ours.

    `generator_path` may be the pair of single-branch files (VIS.pth, IR.pth). The sizes are read from the tensors and
    must be those of `expected`, if it is given; the files say nothing about the schedule, which is `sde` (default: the
    published one). Files are read with `weights_only=True`: no code in them is run.

    Raises CheckpointError if a file is missing, truncated, not a state dict of tensors, of another network (naming the
    missing, unexpected and wrongly shaped entries), or if the files do not belong together.
    """
    branches = generator_path if isinstance(generator_path, tuple) else None
    sources: dict[str, Path] = {"fusion": Path(fusion_path), "autoencoder": Path(autoencoder_path)}
    if branches is None:
        sources["generator"] = Path(generator_path)  # type: ignore[arg-type]  # mypy does not narrow by `branches`
        generator = _read_published(sources["generator"])
        generator_label = str(generator_path)
    else:
        sources["vis"], sources["ir"] = Path(branches[0]), Path(branches[1])
        generator = {
            **_with_branch_prefix(_read_published(sources["vis"]), "vis_"),
            **_with_branch_prefix(_read_published(sources["ir"]), "ir_"),
        }
        generator_label = f"{branches[0]} (vis_) with {branches[1]} (ir_)"
    files = OfficialFiles(generator, _read_published(sources["fusion"]), _read_published(sources["autoencoder"]))
    labels = {"generator": generator_label, "fusion": str(fusion_path), "autoencoder": str(autoencoder_path)}

    config = _infer_config(files, labels, sde or SDEConfig())
    if expected is not None:
        for part in ("autoencoder", "denoiser", "fusion"):
            found, wanted = getattr(config, part), getattr(expected, part)
            if found != wanted:
                label = labels["generator" if part == "denoiser" else part]
                raise CheckpointError(f"{label} has the sizes {found}, expected were {wanted}")
    shapes = shapes_of(blank_model(config, "the published files"))
    pairings = list(official_names(config))
    for file, tensors in files._asdict().items():
        wanted_shapes = {p.theirs: _published_shape(p.theirs, shapes[p.ours]) for p in pairings if p.file == file}
        require_match(labels[file], wanted_shapes, {key: tuple(tensor.shape) for key, tensor in tensors.items()})
    by_file = files._asdict()
    state = {p.ours: by_file[p.file][p.theirs].reshape(shapes[p.ours]) for p in pairings}

    provenance = {
        "source": "published ReCoFuse weights, converted",
        "files": {part: {"name": path.name, "sha256": _file_digest(path)} for part, path in sorted(sources.items())},
    }
    return save_checkpoint(
        output_path,
        state,
        config,
        name=name,
        version=version,
        preset="paper" if config == PRESETS["paper"] else "",
        provenance=provenance,
        dtype=dtype,
    )


def export_official(state: Mapping[str, Tensor], config: ModelConfig) -> OfficialFiles:
    """Our state dict under the published names and shapes: what the authors' code would load.

    Raises CheckpointError if the config is not of the published kind or the state does not fit it.
    """
    shapes = shapes_of(blank_model(config))
    require_match("the state", shapes, {key: tuple(value.shape) for key, value in state.items()})
    files = OfficialFiles({}, {}, {})
    by_file = files._asdict()
    for ours, file, theirs in official_names(config):
        by_file[file][theirs] = state[ours].reshape(_published_shape(theirs, shapes[ours]))
    return files


def official_names(config: ModelConfig) -> Iterator[Pairing]:
    """Every parameter of a model of the published kind with its published place.

    Raises CheckpointError for configs that have no published counterpart: another autoencoder, or branches that predict
    the clean latent.
    """
    if not isinstance(config.autoencoder, PaperAutoencoderConfig) or config.denoiser.prediction != "noise":
        raise CheckpointError("only the published autoencoder with noise-predicting branches has published names")
    yield from (Pairing(f"autoencoder.{ours}", "autoencoder", theirs) for ours, theirs in _autoencoder_names())
    for branch in ("vis", "ir"):
        for ours, theirs in _branch_names(config.denoiser):
            yield Pairing(f"denoiser.{branch}.{ours}", "generator", f"{branch}_{theirs}")
    yield from (Pairing(f"fusion.{ours}", "fusion", theirs) for ours, theirs in _fusion_names())


def _both(ours: str, theirs: str) -> Iterator[tuple[str, str]]:
    yield f"{ours}.weight", f"{theirs}.weight"
    yield f"{ours}.bias", f"{theirs}.bias"


def _autoencoder_names() -> Iterator[tuple[str, str]]:
    yield from ((f"{conv}.weight",) * 2 for conv in ("init_conv", "latent_conv", "post_latent_conv"))
    yield from _both("final_conv", "final_conv")
    for level in range(4):
        for block in range(2):
            for conv in (1, 2):
                tail = f"{level}.{block}"
                yield f"encoder_blocks.{tail}.conv{conv}.weight", f"encoder.{tail}.block{conv}.proj.weight"
                yield f"decoder_blocks.{tail}.conv{conv}.weight", f"decoder.{tail}.block{conv}.proj.weight"
            yield f"decoder_blocks.{level}.{block}.skip.weight", f"decoder.{level}.{block}.res_conv.weight"
        if level < 3:
            yield from _both(f"downs.{level}", f"encoder.{level}.3")
            yield from _both(f"ups.{level}", f"decoder.{level}.3.1")
    yield "downs.3.weight", "encoder.3.3.weight"
    yield "ups.3.weight", "decoder.3.3.weight"
    for side, place in (("encoder", "encoder.3.2.fn"), ("decoder", "decoder.0.2.fn")):
        yield f"{side}_norm.gain", f"{place}.norm.g"
        yield f"{side}_attention.to_qkv.weight", f"{place}.fn.to_qkv.weight"
        yield from _both(f"{side}_attention.to_out", f"{place}.fn.to_out.0")
        yield f"{side}_attention.out_norm.gain", f"{place}.fn.to_out.1.g"


BLOCK_LAYERS = {
    "time_projection": "mlp.1",
    "expand1": "conv1",
    "depthwise": "conv2",
    "attention": "sca.1",
    "project1": "conv3",
    "expand2": "conv4",
    "project2": "conv5",
}


def _branch_names(config: DenoiserConfig) -> Iterator[tuple[str, str]]:
    yield from _both("time.expand", "time_mlp.1")
    yield from _both("time.project", "time_mlp.3")
    yield from _both("intro", "intro")
    yield from _both("ending", "ending")
    for level, num_blocks in enumerate(config.encoder_blocks):
        yield from _both(f"downs.{level}", f"downs.{level}")
        for block in range(num_blocks):
            yield from _block_names(f"encoders.{level}.{block}", f"encoders.{level}.{block}")
    for block in range(config.middle_blocks):
        yield from _block_names(f"middle.{block}", f"middle_blks.{block}")
    for level, num_blocks in enumerate(config.decoder_blocks):
        yield f"ups.{level}.weight", f"ups.{level}.0.weight"
        for block in range(num_blocks):
            yield from _block_names(f"decoders.{level}.{block}", f"decoders.{level}.{block}")


def _block_names(ours: str, theirs: str) -> Iterator[tuple[str, str]]:
    yield from ((f"{ours}.{gain}", f"{theirs}.{gain}") for gain in ("beta", "gamma"))
    yield from ((f"{ours}.{norm}.gain", f"{theirs}.{norm}.g") for norm in ("norm1", "norm2"))
    for layer, published in BLOCK_LAYERS.items():
        yield from _both(f"{ours}.{layer}", f"{theirs}.{published}")


def _fusion_names() -> Iterator[tuple[str, str]]:
    yield from _both("time.expand", "time_mlp.1")
    yield from _both("time.project", "time_mlp.3")
    yield from _both("intro", "inBlock")
    for modality, number in (("vis", 1), ("ir", 2)):
        for projection in ("query", "key", "value"):
            yield from _both(f"{modality}_attention.{projection}", f"cross_attn_{number}.{projection}")
    # Block 2 feeds the published head `_v`, whose output multiplies the infrared latent; block 3 feeds `_i`.
    for stage, number in (("shared", 1), ("ir_branch", 2), ("vis_branch", 3)):
        yield from _both(f"{stage}.0", f"middleBlock{number}.0")
        yield from _both(f"{stage}.2", f"middleBlock{number}.2")
        yield f"{stage}_attention.squeeze.weight", f"CBMA{number}.channel_attention.shared_MLP.0.weight"
        yield f"{stage}_attention.excite.weight", f"CBMA{number}.channel_attention.shared_MLP.2.weight"
        yield from _both(f"{stage}_attention.spatial", f"CBMA{number}.spatial_attention.conv2d")
    for head, published in (("ir_weight", "outBlock1_v"), ("vis_weight", "outBlock1_i")):
        yield from _both(f"{head}.0", f"{published}.0")
        yield from _both(f"{head}.2", f"{published}.2")


def _published_shape(theirs: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return (1, shape[0], 1, 1) if theirs.endswith(".g") else shape


# The entries from which sizes are read, with their number of axes; also how a file is told from the others.
ANCHORS: dict[str, dict[str, int]] = {
    "generator": {"vis_intro.weight": 4, "vis_time_mlp.1.weight": 2, "vis_time_mlp.3.weight": 2},
    "fusion": {"inBlock.weight": 4, "time_mlp.3.weight": 2},
    "autoencoder": {"init_conv.weight": 4, "latent_conv.weight": 4} | {f"encoder.{i}.3.weight": 4 for i in range(4)},
}
BRANCH_PARTS = ("encoders", "decoders", "intro", "ending", "middle_blks", "ups", "downs", "time_mlp")


def _infer_config(files: OfficialFiles, labels: Mapping[str, str], sde: SDEConfig) -> ModelConfig:
    """The sizes that the tensors imply; whether every tensor has them is for the caller to check."""
    for file, tensors in files._asdict().items():
        if not _is_network(file, tensors):
            _refuse(file, tensors, labels[file])
    generator, fusion, autoencoder = ({k: tuple(v.shape) for k, v in tensors.items()} for tensors in files)
    width = autoencoder["init_conv.weight"][0]
    first, second, third, fourth = (autoencoder[f"encoder.{i}.3.weight"][0] // max(width, 1) for i in range(4))
    num_levels = sum(re.fullmatch(r"vis_downs\.\d+\.weight", name) is not None for name in generator)

    def num_blocks(place: str) -> int:
        pattern = re.compile(rf"vis_{place}\.(\d+)\.beta")
        return sum(pattern.fullmatch(name) is not None for name in generator)

    latents = {
        "generator": generator["vis_intro.weight"][1] // 2,
        "fusion": fusion["inBlock.weight"][1] // 2,
        "autoencoder": autoencoder["latent_conv.weight"][0],
    }
    if len(set(latents.values())) != 1:
        told = ", ".join(f"{labels[file]} has {count}" for file, count in latents.items())
        raise CheckpointError(f"the files do not belong together, they differ in latent channels: {told}")
    try:
        return ModelConfig(
            PaperAutoencoderConfig(width, (first, second, third, fourth), latents["autoencoder"]),
            DenoiserConfig(
                latent_channels=latents["generator"],
                width=generator["vis_intro.weight"][0],
                encoder_blocks=tuple(num_blocks(rf"encoders\.{level}") for level in range(num_levels)),
                middle_blocks=num_blocks("middle_blks"),
                decoder_blocks=tuple(num_blocks(rf"decoders\.{level}") for level in range(num_levels)),
                sinusoid_dim=generator["vis_time_mlp.1.weight"][1],
                time_dim=generator["vis_time_mlp.3.weight"][0],
            ),
            FusionConfig(latents["fusion"], fusion["inBlock.weight"][0], fusion["time_mlp.3.weight"][0]),
            sde,
            sampler=PRESETS["paper"].sampler,
            steps=min(PRESETS["paper"].steps, sde.num_steps),
        )
    except ConfigError as error:
        raise CheckpointError(f"{labels['generator']}: {error}") from error


def _is_network(file: str, tensors: State) -> bool:
    """Whether the entries that tell the sizes of a network are there and can tell them."""
    return all(
        name in tensors and tensors[name].ndim == ndim and tensors[name].numel() > 0
        for name, ndim in ANCHORS[file].items()
    )


def _refuse(file: str, tensors: State, label: str) -> NoReturn:
    """Say what a file lacks to be the network it was given for, by name, and which one it looks like."""
    wanted = {pairing.theirs for pairing in official_names(PRESETS["paper"]) if pairing.file == file}
    useless = {name: tuple(tensors[name].shape) for name in sorted(ANCHORS[file].keys() & tensors.keys())}
    message = f"{label} is not the {file} network: "
    message += list_differences(dict.fromkeys(wanted, ()), dict.fromkeys(tensors, ())) or f"sizes cannot be {useless}"
    likely = [other for other in ANCHORS if _is_network(other, tensors)]
    if likely:
        message += f"; it looks like the {likely[0]}"
    elif {"intro.weight", "ending.weight"} <= tensors.keys():
        message += "; it looks like a single branch, of which vis and ir are given together"
    raise CheckpointError(message)


def _with_branch_prefix(tensors: State, prefix: str) -> State:
    """Entries of a single-branch file under the names of the file with both branches."""
    return {(prefix + name if name.startswith(BRANCH_PARTS) else name): value for name, value in tensors.items()}


def _read_published(path: Path) -> State:
    """A published state dict in float32 with any leading `module.` taken off. Raises CheckpointError."""
    if not path.is_file():
        raise CheckpointError(f"there is no weights file at {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged stream makes the unpickler fail in any way, even with struct.error
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} is no torch file of plain tensors, or is truncated: {reason}") from error
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"{path} holds no state dict but a {type(content).__name__}")
    strange = [str(key) for key, value in content.items() if not (isinstance(key, str) and isinstance(value, Tensor))]
    if strange:
        raise CheckpointError(f"{path} is no state dict, these entries are no tensors: {listed(strange)}")
    return {re.sub(r"^(module\.)+", "", key): value.detach().float() for key, value in content.items()}


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
