"""Weights on disk: one safetensors file of ours, and the way from and to the authors' published .pth files.

A file of ours holds the whole model's tensors in float16 or float32 under our parameter names, and in its metadata the
format version, the full config, what the model is called, how it was trained, and a SHA-256 over all of that and the
tensors. Nothing is ever downloaded: a name stands for a file inside the package, anything else is a path.

The published parameter names appear in this module only. What a newcomer would get wrong: the published TIM head `_v`
weighs the *infrared* latent and `_i` the visible one, and published norm gains are (1, C, 1, 1) where ours are (C,).
"""

import dataclasses
import hashlib
import json
import os
import re
import types
import typing
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from recofuse_core.errors import CheckpointError, ConfigError
from recofuse_core.exposure import ExposureConfig
from recofuse_core.model import PRESETS, ModelConfig, ModelInfo, ReCoFuse
from recofuse_core.networks import (
    DenoiserConfig,
    FusionConfig,
    GatedAutoencoderConfig,
    PaperAutoencoderConfig,
    ToneConfig,
)
from recofuse_core.sde import SDEConfig

FORMAT = "recofuse"
FORMAT_VERSION = 1
SUFFIX = ".safetensors"
STORAGE_DTYPES = {"F16": torch.float16, "F32": torch.float32}

State = dict[str, Tensor]
Shapes = Mapping[str, tuple[int, ...]]
StrPath = str | os.PathLike[str]


@dataclass(frozen=True)
class CheckpointHeader:
    """What a file says about itself; reading it touches no weights. `shapes` and `dtypes` are by parameter name."""

    config: ModelConfig
    info: ModelInfo
    checksum: str
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]


class Checkpoint(NamedTuple):
    """A file's content: the config, the state dict in float32 on the CPU, and what the model is."""

    config: ModelConfig
    state: State
    info: ModelInfo


# --- our format -------------------------------------------------------------------------------------------------------


def save_checkpoint(
    path: StrPath,
    state: Mapping[str, Tensor],
    config: ModelConfig,
    *,
    name: str,
    version: str,
    preset: str = "",
    provenance: Mapping[str, object] | None = None,
    dtype: torch.dtype = torch.float16,
) -> CheckpointHeader:
    """Write a model's state dict; an existing file is replaced in one step or left as it was.

    `dtype` is float16 or float32. `provenance` says how the weights came to be and must be JSON.
    Raises CheckpointError if the state does not fit the config, holds numbers that are not finite in `dtype`, or the
    file cannot be written.
    """
    path = Path(path)
    if dtype not in STORAGE_DTYPES.values():
        raise CheckpointError(f"{path}: weights are stored as float16 or float32, not as {dtype}")
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    _require_match(str(path), _shapes_of(blank_model(config)), shapes)
    stored = {key: value.detach().to("cpu", dtype).contiguous() for key, value in state.items()}
    broken = sorted(key for key, value in stored.items() if not bool(torch.isfinite(value).all()))
    if broken:
        raise CheckpointError(f"{path}: not finite as {dtype}: {_listed(broken)}")
    try:
        about = json.dumps(
            {"name": name, "version": version, "preset": preset, "provenance": dict(provenance or {})},
            allow_nan=False,
            sort_keys=True,
        )
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: the provenance is not JSON: {error}") from error
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "config": json.dumps(dataclasses.asdict(config), sort_keys=True),
        "info": about,
    }
    metadata["checksum"] = _checksum(metadata, stored)
    _write_atomically(path, stored, metadata)
    return read_header(path)


def read_header(path: StrPath) -> CheckpointHeader:
    """What a checkpoint of ours says about itself, without its weights.

    Raises CheckpointError if the file is missing, truncated, no safetensors file, not ours, or of another version.
    """
    path = Path(path)
    with _opened(path) as file:
        return _header(path, file)


def load_checkpoint(path: StrPath) -> Checkpoint:
    """Config, float32 state dict and description of a checkpoint of ours, every byte verified.

    Raises CheckpointError as `read_header` does, and if tensors are missing, unexpected, wrongly shaped, or do not have
    the recorded checksum.
    """
    path = Path(path)
    with _opened(path) as file:
        header = _header(path, file)
        _require_match(str(path), _shapes_of(blank_model(header.config, path)), header.shapes)
        stored = {name: file.get_tensor(name) for name in header.shapes}
        if _checksum(file.metadata(), stored) != header.checksum:
            raise CheckpointError(f"{path} is damaged: its content does not have the recorded checksum")
        state = {name: tensor.to(torch.float32, copy=True) for name, tensor in stored.items()}
    return Checkpoint(header.config, state, header.info)


def load_pretrained(name_or_path: StrPath = "compact", *, device: str | torch.device = "cpu") -> ReCoFuse:
    """A model ready for `fuse`, from weights inside the package (a bare name) or from a file (anything else).

    Raises CheckpointError if there are no such weights or the file does not load.
    """
    with resources.as_file(resources.files("recofuse_core") / "weights") as packaged:
        config, state, info = load_checkpoint(_resolve(name_or_path, packaged))
    model = blank_model(config)
    model.load_state_dict(state, assign=True)
    model.info = info
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # the fast layout everywhere
    return model.eval()


def pretrained_header(name_or_path: StrPath) -> CheckpointHeader:
    """`read_header` of what `load_pretrained` would load."""
    with resources.as_file(resources.files("recofuse_core") / "weights") as packaged:
        return read_header(_resolve(name_or_path, packaged))


def packaged_names() -> tuple[str, ...]:
    """Names of the weights that ship inside the package."""
    with resources.as_file(resources.files("recofuse_core") / "weights") as packaged:
        return _names_in(packaged)


def blank_model(config: ModelConfig, origin: StrPath = "config") -> ReCoFuse:
    """A model whose parameters have shapes and no memory (meta device), to be filled with a state dict.

    Raises CheckpointError, naming `origin`, if no network can be built from the config.
    """
    try:
        with torch.device("meta"):
            return ReCoFuse(config)
    except (ConfigError, RuntimeError, ValueError, TypeError, ZeroDivisionError) as error:
        raise CheckpointError(f"{origin}: no model can be built from its sizes: {error}") from error


def _resolve(name_or_path: StrPath, packaged: Path) -> Path:
    given = os.fspath(name_or_path)
    is_name = re.fullmatch(r"[\w-]+", given) is not None
    if is_name and (packaged / f"{given}{SUFFIX}").is_file():
        return packaged / f"{given}{SUFFIX}"
    if is_name and not Path(given).exists():
        known = ", ".join(_names_in(packaged)) or "none"
        raise CheckpointError(
            f"no weights are called {given!r} (in the package: {known}) and there is no such file; "
            "published weights become a file with `recofuse convert`"
        )
    return Path(given)


def _names_in(packaged: Path) -> tuple[str, ...]:
    return tuple(sorted(file.stem for file in packaged.glob(f"*{SUFFIX}")))


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file opened for reading, its failures told in our words."""
    if not path.is_file():
        raise CheckpointError(f"there is no weights file at {path}")
    try:
        handle = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is no safetensors file, or is truncated: {error}") from error
    with handle as file:
        yield file


def _header(path: Path, file: Any) -> CheckpointHeader:
    metadata: dict[str, str] = file.metadata() or {}
    if metadata.get("format") != FORMAT:
        raise CheckpointError(f"{path} is a safetensors file, but no recofuse checkpoint")
    if metadata.get("format_version") != str(FORMAT_VERSION):
        found = metadata.get("format_version", "none")
        raise CheckpointError(f"{path} has format version {found}; this release reads version {FORMAT_VERSION}")
    absent = sorted({"config", "info", "checksum"} - metadata.keys())
    if absent:
        raise CheckpointError(f"{path}: the metadata lack {', '.join(absent)}")
    try:
        config = model_config_from(json.loads(metadata["config"]))
        about = json.loads(metadata["info"])
        provenance = dict(about["provenance"])
        name, version, preset = (str(about[key]) for key in ("name", "version", "preset"))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, ConfigError) as error:
        raise CheckpointError(f"{path}: the metadata are not understood: {error}") from error
    slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    dtypes = {key: str(piece.get_dtype()) for key, piece in slices.items()}
    strange = sorted(key for key, dtype in dtypes.items() if dtype not in STORAGE_DTYPES)
    if strange:
        raise CheckpointError(f"{path}: neither float16 nor float32: {_listed(strange)}")
    shapes = {key: tuple(piece.get_shape()) for key, piece in slices.items()}
    info = ModelInfo(
        name=name,
        version=version,
        preset=preset,
        default_steps=config.steps,
        default_sampler=config.sampler,
        num_parameters=sum(torch.Size(shape).numel() for shape in shapes.values()),
        provenance=provenance,
    )
    return CheckpointHeader(config, info, metadata["checksum"], shapes, dtypes)


def _checksum(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the other metadata and over names, dtypes, shapes and bytes of the tensors, both in sorted order."""
    digest = hashlib.sha256()
    for key in sorted(metadata.keys() - {"checksum"}):
        digest.update(f"{key}\0{metadata[key]}\0".encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return f"sha256:{digest.hexdigest()}"


def _write_atomically(path: Path, tensors: State, metadata: dict[str, str]) -> None:
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with partial.open("wb") as file:  # not by save_file, whose files only their owner may read
            file.write(save(tensors, metadata))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be written: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


# --- config as JSON ---------------------------------------------------------------------------------------------------

AUTOENCODERS: dict[str, type] = {"paper": PaperAutoencoderConfig, "gated": GatedAutoencoderConfig}


def model_config_from(values: Any) -> ModelConfig:
    """The config that `dataclasses.asdict` wrote. Raises ConfigError, TypeError or KeyError for anything else."""
    values = dict(values)
    kind = values["autoencoder"]["kind"]
    if kind not in AUTOENCODERS:
        raise ConfigError(f"unknown kind of autoencoder {kind!r}; known: {', '.join(AUTOENCODERS)}")
    sections: dict[str, type] = {
        "autoencoder": AUTOENCODERS[kind],
        "denoiser": DenoiserConfig,
        "fusion": FusionConfig,
        "sde": SDEConfig,
    }
    for name, section in (("tone", ToneConfig), ("exposure", ExposureConfig)):
        if values.get(name) is not None:
            sections[name] = section
    values.update({key: build_config(section, values[key], key) for key, section in sections.items()})
    config: ModelConfig = build_config(ModelConfig, values, "config")
    return config


def build_config(section: type, values: Mapping[str, Any], where: str) -> Any:
    """A config dataclass from JSON or TOML values, each checked against its annotation.

    An absent field takes its default, so that a setting added later, whose default is the old behaviour, does not make
    older files unreadable; an unknown field means that a newer release wrote the file.
    Raises ConfigError for an unknown field or a value that does not fit, TypeError for a missing one.
    """
    hints = typing.get_type_hints(section)
    unknown = sorted(values.keys() - hints.keys())
    if unknown:
        raise ConfigError(f"{where} has settings this release does not know: {', '.join(unknown)}")
    arguments = {key: _frozen(value) for key, value in values.items()}
    for key, value in arguments.items():
        if not _is_a(value, hints[key]):
            raise ConfigError(f"{where}.{key} cannot be {value!r}")
    return section(**arguments)


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value


def _is_a(value: Any, hint: Any) -> bool:
    """Whether a JSON value fits one of the annotations that the configs use."""
    if hint is Any:
        return True
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return value in arguments
    if origin in (typing.Union, types.UnionType):
        return any(_is_a(value, option) for option in arguments)
    if origin is dict:
        return isinstance(value, dict) and all(
            _is_a(k, arguments[0]) and _is_a(v, arguments[1]) for k, v in value.items()
        )
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
        return len(kinds) == len(value) and all(map(_is_a, value, kinds))
    if isinstance(value, bool) and hint is not bool:
        return False  # bool is an int to Python, not to a config
    return isinstance(value, (int, float) if hint is float else hint)


# --- what differs -----------------------------------------------------------------------------------------------------


def _shapes_of(model: ReCoFuse) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _require_match(origin: str, expected: Shapes, found: Shapes) -> None:
    """CheckpointError that names what is missing, unexpected or wrongly shaped, if anything is."""
    differences = _differences(expected, found)
    if differences:
        raise CheckpointError(f"{origin} does not fit the model: {differences}")


def _differences(expected: Shapes, found: Shapes) -> str:
    parts = []
    if missing := sorted(expected.keys() - found.keys()):
        parts.append(f"missing {_listed(missing)}")
    if unexpected := sorted(found.keys() - expected.keys()):
        parts.append(f"unexpected {_listed(unexpected)}")
    reshaped = [
        f"{name} is {found[name]} instead of {shape}"
        for name, shape in sorted(expected.items())
        if name in found and found[name] != shape
    ]
    if reshaped:
        parts.append(f"wrong shape of {_listed(reshaped)}")
    return "; ".join(parts)


def _listed(names: list[str], most: int = 8) -> str:
    """The names, their number first if there are several, shortened if there are many."""
    shown = ", ".join(names[:most])
    count = f"{len(names)}: " if len(names) > 1 else ""
    return f"{count}{shown}{', ...' if len(names) > most else ''}"


# --- the published files ----------------------------------------------------------------------------------------------


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
    shapes = _shapes_of(blank_model(config, "the published files"))
    pairings = list(official_names(config))
    for file, tensors in files._asdict().items():
        wanted_shapes = {p.theirs: _published_shape(p.theirs, shapes[p.ours]) for p in pairings if p.file == file}
        _require_match(labels[file], wanted_shapes, {key: tuple(tensor.shape) for key, tensor in tensors.items()})
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
    shapes = _shapes_of(blank_model(config))
    _require_match("the state", shapes, {key: tuple(value.shape) for key, value in state.items()})
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
    message += _differences(dict.fromkeys(wanted, ()), dict.fromkeys(tensors, ())) or f"sizes cannot be {useless}"
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
        raise CheckpointError(f"{path} is no state dict, these entries are no tensors: {_listed(strange)}")
    return {re.sub(r"^(module\.)+", "", key): value.detach().float() for key, value in content.items()}


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
