"""The worker's image for GPUs, without one: `make check-image GPU=1`, as it fetches 3 GB and takes some 25 GB of disk.

What is in it, that Triton's compilers work where and as whom it runs, and what it says where no GPU can be used. With a
card it has not been tried.
"""

from __future__ import annotations

import os
import re
import sysconfig
from typing import Any

import pytest

from tests.deploy.compose import ROOT, compose_file
from tests.deploy.conftest import missing
from tests.image import build as builder
from tests.image.bases import load_bases
from tests.image.conftest import Note
from tests.image.podman import Podman, limits, tmpfs
from tests.image.test_built import SHARED_LIBRARIES

pytestmark = [
    pytest.mark.image,
    pytest.mark.timeout(9000),
    pytest.mark.skipif(
        os.environ.get("CHECK_IMAGE_GPU", "") in ("", "0"), reason="the image for GPUs is built on request"
    ),
]

MAX_MB = 7000
BUILT_S = 6000.0  # an hour on a busy machine
# The driver comes with a GPU from its host; the others are for plug-ins that join hosts (NVSHMEM, cuFile).
OF_THE_HOST = {"libcuda.so.1"} | {
    "libfabric.so.1", "libibverbs.so.1", "libmlx5.so.1", "libmpi.so.40", "liboshmem.so.40", "libpmix.so.2",
    "librdmacm.so.1", "libucp.so.0", "libucs.so.0",
}  # fmt: skip
CARDS = {"sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"}  # docs/operations.md
# Triton's own way to its driver module, with a driver that has its names alone.
DRIVER = r"""
import os, pathlib, re, subprocess, triton
from triton.backends import nvidia
folder = pathlib.Path(os.environ["TRITON_CACHE_DIR"]) / "driver"
folder.mkdir()
source = (pathlib.Path(nvidia.__file__).parent / "driver.c").read_text()
names = sorted(set(re.findall(r"\bcu[A-Z]\w+(?=\()", source)))
(folder / "cuda.c").write_text("".join(f"int {name}(void) {{ return 0; }}\n" for name in names))
words = ["-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "cuda.c", "-o", "libcuda.so.1"]
subprocess.run([os.environ["CC"], *words], cwd=folder, check=True)
os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
import ctypes
ctypes.CDLL(str(folder / "libcuda.so.1"), ctypes.RTLD_GLOBAL)
from triton.backends.nvidia.driver import CudaUtils
print(triton.__version__, CudaUtils().load_binary.__name__)
"""
KERNELS = """
import sys, types
sys.modules["benchmarks.runtimes"] = types.ModuleType("runtimes")  # compares with ONNX Runtime, which is not there
from benchmarks.compiled import compiled, told
from benchmarks.simulated_capture import small
print(told((9, 0), compiled(small("compact"), (9, 0), shapes=[(1, 480, 640)], wishes=[("fused",)]))[1])
"""
SAMPLE = "recofuse sample /tmp/p && recofuse fuse --vis /tmp/p/vis.png --ir /tmp/p/ir.png -o /tmp/fused.png"


@pytest.fixture(scope="module")
def service() -> dict[str, Any]:
    entry: dict[str, Any] = compose_file()["services"]["worker-gpu"]
    return entry


@pytest.fixture(scope="module")
def image(podman: Podman, service: dict[str, Any], note: Note) -> Podman:
    load_bases(podman)
    builder.build(podman, service, timeout_s=BUILT_S)
    size = int(podman("image", "inspect", service["image"], "--format={{.Size}}")) / 1e6
    note(f"{service['image']} {size:.0f} MB")
    assert size <= MAX_MB
    return podman


def attempt(podman: Podman, service: dict[str, Any], *words: str, more: tuple[str, ...] = ()) -> Any:
    """Run something as the compose file runs the worker, but for the GPU and the network."""
    flags = [
        "--rm", "--pull=never", "--network=none", "--read-only", "--read-only-tmpfs=false", "--cap-drop=ALL",
        "--security-opt=no-new-privileges", *limits({}), "--env=OMP_NUM_THREADS=1",
        *map(tmpfs, service["tmpfs"]),
        f"--env=TRITON_CACHE_DIR={service['environment']['TRITON_CACHE_DIR']}",
    ]  # fmt: skip
    return podman.attempt("run", *flags, *more, service["image"], *words, timeout_s=1800.0)


def inside(podman: Podman, service: dict[str, Any], *words: str, more: tuple[str, ...] = ()) -> str:
    program, *arguments = words
    done = attempt(podman, service, *arguments, more=(f"--entrypoint={program}", *more))
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    said: str = done.stdout.strip()
    return said


def headers(podman: Podman, service: dict[str, Any]) -> tuple[str, ...]:
    """Python's headers, which the published base image has and Debian's Python leaves to a package of its own."""
    code = "import sys, sysconfig; print(*sys.version_info[:2], sysconfig.get_paths()['include'])"
    *version, place = inside(podman, service, "python", "-c", code).split()
    if version != sysconfig.get_python_version().split("."):
        missing(f"headers of Python {'.'.join(version)}")
    return (f"--volume={sysconfig.get_paths()['include']}:{place}:ro",)


def test_it_holds_torch_for_cuda_and_all_that_kernels_need(image: Podman, service: dict[str, Any]) -> None:
    code = (
        "import importlib.util as u, torch, triton, ziglang; from recofuse_core import packaged_names;"
        "print(torch.version.cuda, u.find_spec('onnxruntime') is None, *torch._C._cuda_getArchFlags().split())"
    )
    cuda, is_alone, *architectures = inside(image, service, "python", "-c", code).split()
    assert (cuda, is_alone) == ("13.0", "True")
    assert set(architectures) >= CARDS


def test_no_shared_library_is_missing_but_the_drivers(image: Podman, service: dict[str, Any]) -> None:
    lines = inside(image, service, "sh", "-c", SHARED_LIBRARIES).splitlines()
    brought = {line.rpartition("/")[2] for line in lines if line.startswith("/opt/")}
    wanted = {line.split()[0] for line in lines if "=> not found" in line}
    assert len(lines) > 100
    assert wanted - brought <= OF_THE_HOST


def test_triton_makes_its_driver_module_there(image: Podman, service: dict[str, Any]) -> None:
    """On a read-only root, as another user, with the cache that the compose file gives it."""
    said = inside(image, service, "python", "-c", DRIVER, more=headers(image, service))
    assert re.fullmatch(r"3\.\d+\.\d+ load_binary", said), said


def test_a_cache_that_nothing_can_be_executed_from_is_named(image: Podman, service: dict[str, Any]) -> None:
    more = ("--env=TRITON_CACHE_DIR=/tmp/.triton",)
    code = "from recofuse_core.kernels.needs import look; print('; '.join(look().lacks))"
    assert "nothing can be executed from Triton's cache" in inside(image, service, "python", "-c", code, more=more)


def test_the_kernels_compile_there(image: Podman, service: dict[str, Any]) -> None:
    """With the Triton and the assembler of the image."""
    more = (f"--volume={ROOT / 'benchmarks'}:/opt/recofuse/benchmarks:ro", *headers(image, service))
    assert re.match(
        r"compute capability 9.0: \d\d compilations", inside(image, service, "python", "-c", KERNELS, more=more)
    )


def test_without_a_gpu_the_worker_ends_with_words(image: Podman, service: dict[str, Any]) -> None:
    more = ("--env=RECOFUSE_ENGINE__DEVICE=cuda", "--env=RECOFUSE_QUEUE__URL=redis://127.0.0.1:1")
    done = attempt(image, service, "worker", more=more)
    assert done.returncode != 0
    said = (done.stdout + done.stderr).strip()
    assert "Traceback" not in said
    assert "device cuda: there is no GPU here: no NVIDIA driver is loaded" in said.splitlines()[-1]


def test_a_gpu_that_cannot_be_used_is_no_silent_cpu(image: Podman, service: dict[str, Any]) -> None:
    more = ("--volume=/dev/null:/dev/nvidia0",)
    told = inside(image, service, "recofuse", "info", more=more)
    assert re.search(r"auto\W+cpu, since torch cannot use the GPU", told), told
    done = attempt(image, service, "-c", SAMPLE, more=("--entrypoint=sh", "--env=RECOFUSE_ENGINE__DEVICE=auto", *more))
    assert done.returncode == 0, done.stderr
    assert "the model runs on the CPU, since torch cannot use the GPU" in done.stdout + done.stderr


def test_without_a_gpu_auto_is_the_cpu_and_says_so_in_info(image: Podman, service: dict[str, Any]) -> None:
    told = inside(image, service, "recofuse", "info")
    assert re.search(r"auto\W+cpu\b(?!, since)", told), told
    assert "none: they are for a GPU" in told
    assert "/opt/model/bin/triton-cc" in told
