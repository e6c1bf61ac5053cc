"""The file that weights lie in, by itself: what it says, its tensors, and whether every byte of it is right.

A safetensors file of ours holds tensors in float16 or float32 under parameter names, and in its metadata the format
version, the configuration, what the model is called, how it was trained, and a SHA-256 over all of that and the
tensors. `checkpoint` makes torch models of it, and the graphs beside it read their weights from it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from recofuse_core.errors import CheckpointError

FORMAT = "recofuse"
FORMAT_VERSION = 1
SUFFIX = ".safetensors"
DTYPES = {"F16": "float16", "F32": "float32"}

StrPath = str | os.PathLike[str]


class About(NamedTuple):
    """What a model is called, and how its weights came to be."""

    name: str
    version: str
    preset: str
    provenance: dict[str, object]


@dataclass(frozen=True)
class Label:
    """What a file says about itself; reading it touches no weights. shapes, dtypes: by parameter name."""

    config: Any  # as JSON has it
    about: About
    checksum: str
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]


def weights_folder() -> Path:
    """Where the weights inside the package are, without torch."""
    spec = importlib.util.find_spec("recofuse_core")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0]) / "weights"


def packaged_names() -> tuple[str, ...]:
    """Names of the weights that ship inside the package."""
    return tuple(sorted(file.stem for file in weights_folder().glob(f"*{SUFFIX}")))


def resolve(name_or_path: StrPath) -> Path:
    """The file of weights inside the package (a bare name), or a path as it is.

    Raises CheckpointError for a name that is neither.
    """
    given = os.fspath(name_or_path)
    is_name = re.fullmatch(r"[\w-]+", given) is not None
    inside = weights_folder() / f"{given}{SUFFIX}"
    if is_name and inside.is_file():
        return inside
    if is_name and not Path(given).exists():
        known = ", ".join(packaged_names()) or "none"
        raise CheckpointError(
            f"no weights are called {given!r} (in the package: {known}) and there is no such file; "
            "published weights become a file with `recofuse convert`"
        )
    return Path(given)


def read_label(path: Path) -> Label:
    """What a file of ours says about itself, without its weights.

    Raises CheckpointError if the file is missing, truncated, no safetensors file, not ours, or of another version.
    """
    with _opened(path) as file:
        return _label(path, file)


def read_verified(path: Path) -> tuple[Label, dict[str, NDArray[Any]]]:
    """The label and the tensors as they are stored.

    Raises CheckpointError as `read_label` does, and if the content does not have the recorded checksum.
    """
    with _opened(path) as file:
        label = _label(path, file)
        stored = {name: file.get_tensor(name) for name in label.shapes}
        if checksum(file.metadata(), stored) != label.checksum:
            raise CheckpointError(f"{path} is damaged: its content does not have the recorded checksum")
    return label, stored


def checksum(metadata: Mapping[str, str], tensors: Mapping[str, NDArray[Any]]) -> str:
    """SHA-256 over the other metadata and over names, dtypes, shapes and bytes of the tensors, both in sorted order."""
    digest = hashlib.sha256()
    for key in sorted(metadata.keys() - {"checksum"}):
        digest.update(f"{key}\0{metadata[key]}\0".encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}\0torch.{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)
    return f"sha256:{digest.hexdigest()}"


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file opened for reading, its failures told in our words."""
    if not path.is_file():
        raise CheckpointError(f"there is no weights file at {path}")
    try:
        handle = safe_open(path, framework="np")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is no safetensors file, or is truncated: {error}") from error
    with handle as file:
        yield file


def _label(path: Path, file: Any) -> Label:
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
        config = json.loads(metadata["config"])
        info = json.loads(metadata["info"])
        name, version, preset = (str(info[key]) for key in ("name", "version", "preset"))
        about = About(name, version, preset, dict(info["provenance"]))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: the metadata are not understood: {error}") from error
    slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    dtypes = {key: str(piece.get_dtype()) for key, piece in slices.items()}
    strange = sorted(key for key, dtype in dtypes.items() if dtype not in DTYPES)
    if strange:
        raise CheckpointError(f"{path}: neither float16 nor float32: {listed(strange)}")
    shapes = {key: tuple(piece.get_shape()) for key, piece in slices.items()}
    return Label(config, about, metadata["checksum"], shapes, dtypes)


def listed(names: list[str], most: int = 8) -> str:
    """The names, their number first if there are several, shortened if there are many."""
    shown = ", ".join(names[:most])
    count = f"{len(names)}: " if len(names) > 1 else ""
    return f"{count}{shown}{', ...' if len(names) > most else ''}"
