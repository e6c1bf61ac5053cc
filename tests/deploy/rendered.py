"""The manifests as kustomize builds them: every overlay with every combination of components that it lacks.

A combination is an overlay with components added in the order that they ask for: what turns others to TLS or to
Sentinel comes last. `kubectl` has kustomize built in; the program itself does as well.
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.deploy.conftest import missing

Manifest = dict[str, Any]

DEPLOY = Path(__file__).parents[2] / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
OVERLAYS = tuple(sorted(path.name for path in (KUBERNETES / "overlays").iterdir()))
ADDED = ("gpu", "keda", "keda-latency", "monitoring", "redis-exporter", "tracing", "ingress", "gateway")
REDIS = ("redis", "redis-tls", "redis-sentinel")  # one of them; after those that it changes
NEEDS = {"keda-latency": "keda"}
EXCLUDED = {("redis-exporter", "redis-sentinel"), ("ingress", "gateway")}

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the faster one, if there


@dataclass(frozen=True)
class Combination:
    """An overlay, and its components with those added."""

    overlay: str
    components: tuple[str, ...]

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.overlay}: {' '.join(self.components)}"

    @property
    def redis(self) -> str:
        """Which of REDIS it has."""
        (found,) = set(self.components) & set(REDIS)
        return found


def overlay_of(name: str) -> Manifest:
    """Its kustomization."""
    text = (KUBERNETES / "overlays" / name / "kustomization.yaml").read_text("utf-8")
    document: Manifest = yaml.safe_load(text)
    return document


def components_of(overlay: str) -> tuple[str, ...]:
    """Their names, in order."""
    return tuple(Path(path).name for path in overlay_of(overlay)["components"])


def is_possible(components: set[str]) -> bool:
    """Whether these may stand together."""
    if any(name in components and needed not in components for name, needed in NEEDS.items()):
        return False
    return not any(set(pair) <= components for pair in EXCLUDED)


def combinations() -> list[Combination]:
    """Every overlay with every possible set of further components; with none it is what is shipped."""
    found = []
    for overlay in OVERLAYS:
        own = components_of(overlay)
        others = [name for name in ADDED if name not in own and not (overlay == "cpu" and name == "gpu")]
        for number in range(len(others) + 1):
            for further in itertools.combinations(others, number):
                if is_possible({*own, *further}):
                    ordered = [name for name in ADDED if name in {*own, *further}]
                    found.append(Combination(overlay, (*ordered, *(name for name in own if name in REDIS))))
    return found


def build_all() -> dict[Combination, list[Manifest]]:
    """The documents of every combination. Skips where nothing can build them."""
    wanted = combinations()
    with (
        tempfile.TemporaryDirectory(prefix="recofuse-kustomize-") as folder,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        copy(Path(folder))
        places = [Path(folder) / "kubernetes" / "built" / str(number) for number in range(len(wanted))]
        return dict(zip(wanted, pool.map(_build_one, wanted, places), strict=True))


def copy(tree: Path) -> None:
    """What kustomize reads, into this folder."""
    shutil.copytree(KUBERNETES, tree / "kubernetes")
    shutil.copytree(DEPLOY / "grafana" / "dashboards", tree / "grafana" / "dashboards")


def build(place: Path) -> list[Manifest]:
    """The documents of the kustomization in this folder. Skips where nothing can build them."""
    builders = (["kustomize", "build"], ["kubectl", "kustomize"])
    command = next((words for words in builders if shutil.which(words[0])), None)
    if command is None:
        missing("kustomize or kubectl")
    assert command is not None
    done = subprocess.run([*command, str(place)], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return list(yaml.load_all(done.stdout, Loader=_LOADER))


def _build_one(combination: Combination, place: Path) -> list[Manifest]:
    document = overlay_of(combination.overlay)
    document["components"] = [f"../../components/{name}" for name in combination.components]
    place.mkdir(parents=True)  # as deep as an overlay, for its relative paths
    (place / "kustomization.yaml").write_text(yaml.safe_dump(document), "utf-8")
    example = KUBERNETES / "overlays" / combination.overlay / "redis.env.example"
    if example.exists():
        shutil.copy(example, place / "redis.env")
    return build(place)
