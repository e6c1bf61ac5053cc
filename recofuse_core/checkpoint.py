"""Weights on disk: one safetensors file of ours.

It holds the whole model's tensors in float16 or float32 under our parameter names, and in its metadata the format
version, the full config, what the model is called, how it was trained, and a SHA-256 over all of that and the tensors.
Nothing is ever downloaded: a name stands for a file inside the package, anything else is a path.
"""

import dataclasses
import hashlib
import json
import os
import re
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from recofuse_core.config import model_config_from
from recofuse_core.errors import CheckpointError, ConfigError
from recofuse_core.model import ModelConfig, ReCoFuse
from recofuse_core.picture import ModelInfo

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
        require_match(str(path), shapes_of(blank_model(header.config, path)), header.shapes)
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
        raise CheckpointError(f"{path}: neither float16 nor float32: {listed(strange)}")
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


def listed(names: list[str], most: int = 8) -> str:
    """The names, their number first if there are several, shortened if there are many."""
    shown = ", ".join(names[:most])
    count = f"{len(names)}: " if len(names) > 1 else ""
    return f"{count}{shown}{', ...' if len(names) > most else ''}"
