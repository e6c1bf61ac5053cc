"""The two images by themselves: what is in them and what is not, and that they run: `make check-image`."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.deploy.compose import ROOT, image_health_check
from tests.image.conftest import Images, Note
from tests.image.podman import limits

pytestmark = [pytest.mark.image, pytest.mark.timeout(3000)]

# What compose file and manifests have in common, and no network either.
HARDENED = (
    "--rm", "--pull=never", "--network=none", "--read-only", "--read-only-tmpfs=false",
    "--tmpfs=/tmp:size=64m,mode=1777", "--cap-drop=ALL", "--security-opt=no-new-privileges", *limits({}),
    "--env=OMP_NUM_THREADS=1",  # threads that wait for each other take minutes on a busy machine
)  # fmt: skip
TARGETS = ("api", "worker")
MAX_API_MB, MAX_WORKER_MB = 350, 700
SHARED_LIBRARIES = "find /opt -name '*.so*' -type f | while read -r file; do echo $file; ldd $file 2>/dev/null; done"
SAMPLE = "recofuse sample /tmp/p && recofuse fuse --vis /tmp/p/vis.png --ir /tmp/p/ir.png -o /tmp/fused.png"


def name_of(images: Images, target: str) -> str:
    name: str = getattr(images, target)
    return name


def inside(images: Images, target: str, *words: str) -> str:
    """What a program says within a hardened container."""
    program, *arguments = words
    return images.podman("run", *HARDENED, f"--entrypoint={program}", name_of(images, target), *arguments)


def test_what_runs_the_model_is_in_the_worker_alone(images: Images) -> None:
    """And without torch where there is no GPU."""
    code = "import importlib.util as u; print(*(u.find_spec(name) is not None for name in ('onnxruntime', 'torch')))"
    assert inside(images, "api", "python", "-c", code) == "False False"
    assert inside(images, "worker", "python", "-c", code) == "True False"


@pytest.mark.parametrize("target", TARGETS)
def test_their_health_check_user_and_signal(images: Images, target: str) -> None:
    (image,) = json.loads(images.podman("image", "inspect", name_of(images, target)))
    config: dict[str, Any] = image["Config"]
    assert config["User"] == "10001:10001"
    assert image["HealthCheck" if "HealthCheck" in image else "Healthcheck"]["Test"][1:] == image_health_check(target)
    assert config["StopSignal"] in ("SIGTERM", "15")


@pytest.mark.parametrize("target", TARGETS)
def test_any_user_runs_this_trees_code(images: Images, target: str) -> None:
    """OpenShift's, for one. What it prints is what this tree documents."""
    said = images.podman("run", *HARDENED, "--user=1000720000:0", name_of(images, target), "settings")
    assert said.split() == (ROOT / "docs" / "settings.md").read_text("utf-8").split()


@pytest.mark.parametrize("target", TARGETS)
def test_no_shared_library_is_missing(images: Images, target: str) -> None:
    lines = inside(images, target, "sh", "-c", SHARED_LIBRARIES).splitlines()
    # What wheels bring along finds its like by way of the module that loads it.
    brought = {line.rpartition("/")[2] for line in lines if line.startswith("/opt/")}
    wanted = {line.split()[0] for line in lines if "=> not found" in line}
    assert len(lines) > 100
    assert not wanted - brought


def test_the_worker_fuses_with_its_own_weights(images: Images) -> None:
    """On a read-only root, with a /tmp of which nothing can be executed."""
    header = "import sys; sys.stdout.write(open('/tmp/fused.png', 'rb').read(4).hex())"
    assert inside(images, "worker", "sh", "-c", f'({SAMPLE}) >&2 && python -c "{header}"') == b"\x89PNG".hex()


def test_their_sizes(images: Images, note: Note) -> None:
    sizes = {}
    for name in (images.api, images.worker):
        sizes[name] = int(images.podman("image", "inspect", name, "--format={{.Size}}")) / 1e6
    note(", ".join(f"{name} {size:.0f} MB" for name, size in sizes.items()))
    assert sizes[images.api] <= MAX_API_MB
    assert sizes[images.worker] <= MAX_WORKER_MB
