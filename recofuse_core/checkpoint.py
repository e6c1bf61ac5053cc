"""Weights on disk: one safetensors file of ours.

It holds the whole model's tensors in float16 or float32 under our parameter names, and in its metadata the format
version, the full config, what the model is called, how it was trained, and a SHA-256 over all of that and the tensors.
Nothing is ever downloaded: a name stands for a file inside the package, anything else is a path.
"""

import dataclasses
import json
import math
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from recofuse_core.config import model_config_from
from recofuse_core.errors import CheckpointError, ConfigError
from recofuse_core.model import ModelConfig, ReCoFuse
from recofuse_core.picture import ModelInfo
from recofuse_core.weights_file import (
    DTYPES,
    FORMAT,
    FORMAT_VERSION,
    Label,
    StrPath,
    checksum,
    listed,
    read_label,
    read_verified,
    resolve,
)

State = dict[str, Tensor]
Shapes = Mapping[str, tuple[int, ...]]


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
    if str(dtype).removeprefix("torch.") not in DTYPES.values():
        raise CheckpointError(f"{path}: weights are stored as float16 or float32, not as {dtype}")
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    require_match(str(path), shapes_of(blank_model(config)), shapes)
    stored = {key: value.detach().to("cpu", dtype).contiguous() for key, value in state.items()}
    broken = sorted(key for key, value in stored.items() if not bool(torch.isfinite(value).all()))
    if broken:
        raise CheckpointError(f"{path}: not finite as {dtype}: {listed(broken)}")
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
    metadata["checksum"] = checksum(metadata, {key: value.numpy() for key, value in stored.items()})
    _write_atomically(path, stored, metadata)
    return read_header(path)


def read_header(path: StrPath) -> CheckpointHeader:
    """What a checkpoint of ours says about itself, without its weights.

    Raises CheckpointError if the file is missing, truncated, no safetensors file, not ours, or of another version.
    """
    path = Path(path)
    return _header(path, read_label(path))


def load_checkpoint(path: StrPath) -> Checkpoint:
    """Config, float32 state dict and description of a checkpoint of ours, every byte verified.

    Raises CheckpointError as `read_header` does, and if tensors are missing, unexpected, wrongly shaped, or do not have
    the recorded checksum.
    """
    path = Path(path)
    header = read_header(path)
    require_match(str(path), shapes_of(blank_model(header.config, path)), header.shapes)
    return Checkpoint(header.config, load_state(path), header.info)


def load_state(path: StrPath) -> State:
    """The float32 tensors of a checkpoint of ours, every byte verified, whatever model they fit: to train on from.

    Raises CheckpointError if the file is missing, truncated, no safetensors file, not ours, of another version, or if
    its tensors do not have the recorded checksum.
    """
    _, stored = read_verified(Path(path))
    return {name: torch.from_numpy(array).to(torch.float32, copy=True) for name, array in stored.items()}


def load_pretrained(name_or_path: StrPath = "compact", *, device: str | torch.device = "cpu") -> ReCoFuse:
    """A model ready for `fuse`, from weights inside the package (a bare name) or from a file (anything else).

    Raises CheckpointError if there are no such weights or the file does not load.
    """
    config, state, info = load_checkpoint(resolve(name_or_path))
    model = blank_model(config)
    model.load_state_dict(state, assign=True)
    model.info = info
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # the fast layout everywhere
    return model.eval()


def pretrained_header(name_or_path: StrPath) -> CheckpointHeader:
    """`read_header` of what `load_pretrained` would load."""
    return read_header(resolve(name_or_path))


def blank_model(config: ModelConfig, origin: StrPath = "config") -> ReCoFuse:
    """A model whose parameters have shapes and no memory (meta device), to be filled with a state dict.

    Raises CheckpointError, naming `origin`, if no network can be built from the config.
    """
    try:
        with torch.device("meta"):
            return ReCoFuse(config)
    except (ConfigError, RuntimeError, ValueError, TypeError, ZeroDivisionError) as error:
        raise CheckpointError(f"{origin}: no model can be built from its sizes: {error}") from error


def _header(path: Path, label: Label) -> CheckpointHeader:
    try:
        config = model_config_from(label.config)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, ConfigError) as error:
        raise CheckpointError(f"{path}: the metadata are not understood: {error}") from error
    info = ModelInfo(
        name=label.about.name,
        version=label.about.version,
        preset=label.about.preset,
        default_steps=config.steps,
        default_sampler=config.sampler,
        num_parameters=sum(map(math.prod, label.shapes.values())),
        provenance=label.about.provenance,
    )
    return CheckpointHeader(config, info, label.checksum, label.shapes, label.dtypes)


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


def shapes_of(model: ReCoFuse) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter by its name."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def require_match(origin: str, expected: Shapes, found: Shapes) -> None:
    """CheckpointError that names what is missing, unexpected or wrongly shaped, if anything is."""
    differences = list_differences(expected, found)
    if differences:
        raise CheckpointError(f"{origin} does not fit the model: {differences}")


def list_differences(expected: Shapes, found: Shapes) -> str:
    """What is missing, unexpected or wrongly shaped, in words; empty if nothing is."""
    parts = []
    if missing := sorted(expected.keys() - found.keys()):
        parts.append(f"missing {listed(missing)}")
    if unexpected := sorted(found.keys() - expected.keys()):
        parts.append(f"unexpected {listed(unexpected)}")
    reshaped = [
        f"{name} is {found[name]} instead of {shape}"
        for name, shape in sorted(expected.items())
        if name in found and found[name] != shape
    ]
    if reshaped:
        parts.append(f"wrong shape of {listed(reshaped)}")
    return "; ".join(parts)
