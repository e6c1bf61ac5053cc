"""Which extra of recofuse brings a package that is not installed.

The base install is the client and the command; a verb that needs more imports it when it is called, and whoever lacks
it reads what to install. Which extra holds a package is read from the metadata of the installed recofuse, so that
pyproject.toml stays the only list. The table here says only which distribution a module is of where their names differ.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from collections import defaultdict
from collections.abc import Iterable

# Distributions of modules that are named otherwise; a dotted name decides over the one that it lies in.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "cv2": "opencv-python-headless",
    "google.protobuf": "protobuf",
    "google.rpc": "googleapis-common-protos",
    "grpc": "grpcio",
    "grpc_health": "grpcio-health-checking",
    "grpc_reflection": "grpcio-reflection",
    "opentelemetry": "opentelemetry-sdk",  # which brings the API
    "opentelemetry.exporter": "opentelemetry-exporter-otlp-proto-http",
    "pydantic_core": "pydantic",
    "pynvml": "nvidia-ml-py",
    "starlette": "fastapi",  # which brings it
}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_EXTRA = re.compile(r"""\bextra\s*==\s*["']([^"']+)["']""")


def require(module: str) -> None:
    """Raises ModuleNotFoundError, as importing the module would, without the time that an import takes."""
    if importlib.util.find_spec(module) is None:
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)


def requirements() -> list[str]:
    """What the installed recofuse requires, with the markers of its extras; nothing in a bare source tree."""
    try:
        return importlib.metadata.requires("recofuse") or []
    except importlib.metadata.PackageNotFoundError:
        return []


def advice(module: str, requirements: Iterable[str]) -> str | None:
    """What to install for a module that is not there, by requirements such as `torch>=2.6; extra == 'torch'`.

    None if no extra brings it: then a caller could mend nothing, and it is a fault of ours. Of several extras that
    bring it the smallest is named.
    """
    distribution = distribution_of(module)
    brought: defaultdict[str, set[str]] = defaultdict(set)
    for line in requirements:
        name, _, marker = line.partition(";")
        for extra in _EXTRA.findall(marker):
            brought[extra].add(name_of(name))
    extras = sorted((len(names), extra) for extra, names in brought.items() if distribution in names)
    if not extras:
        return None
    return f"this needs {distribution}, which is not installed: pip install 'recofuse[{extras[0][1]}]'"


def distribution_of(module: str) -> str:
    """The distribution that a module comes in, its name as `name_of` writes it."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        if (known := DISTRIBUTIONS.get(".".join(parts[:length]))) is not None:
            return known
    return name_of(parts[0])


def name_of(requirement: str) -> str:
    """The distribution that a requirement names, in the one spelling in which names compare."""
    found = _NAME.match(requirement.strip())
    return re.sub(r"[-_.]+", "-", found[0]).lower() if found else ""
