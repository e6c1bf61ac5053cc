"""The Dockerfile's front end without Docker: its own COPY and RUN lines in a folder, and what they made, started.

`make check-deploy` runs this; it installs some fifty packages into a fresh environment and so needs a package index. Of
the worker for GPUs it tries the compiler alone.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from packaging.utils import canonicalize_name

from tests.deploy.compose import ROOT, Container
from tests.deploy.conftest import missing
from tests.deploy.test_locked import listed
from tests.service.redis_server import RedisServer, find_redis, free_port

pytestmark = [pytest.mark.stack, pytest.mark.timeout(600)]

OFFLINE = ("connection", "timed out", "resolution", "unreachable")


def _lines_of(stages: tuple[str, ...]) -> list[str]:
    """The instructions of these stages, in order."""
    text = (ROOT / "Dockerfile").read_text("utf-8").replace("\\\n", " ")
    parts = re.split(r"^FROM \S+ AS (\S+)$", text, flags=re.MULTILINE)
    by_stage = dict(zip(parts[1::2], parts[2::2], strict=True))
    return [line for stage in stages for line in by_stage[stage].splitlines()]


@pytest.fixture(scope="module")
def image() -> Iterator[Path]:
    """A folder in the place of `/`, as the stages of the target `api` leave it."""
    with tempfile.TemporaryDirectory(prefix="rq-") as folder:
        root = Path(folder)
        build = root / "build"
        build.mkdir()
        environ = {
            name: value for name, value in os.environ.items() if not name.startswith(("RECOFUSE_", "PYTHONPATH"))
        }
        for line in _lines_of(("installer", "api-packages", "application")):
            verb, _, rest = line.partition(" ")
            if verb == "COPY":
                *sources, target = rest.split()
                for source in sources:
                    _copy(ROOT / source, build / target if (ROOT / source).is_dir() else build / Path(source).name)
            elif verb == "RUN":
                command = rest.replace("/opt/", f"{root}/opt/")
                command = re.sub(r"(^|&& )python ", rf"\1{sys.executable} ", command)
                done = subprocess.run(
                    command, shell=True, cwd=build, env=environ, capture_output=True, text=True, check=False
                )
                if done.returncode and any(word in done.stderr.lower() for word in OFFLINE):
                    missing("a package index")
                assert done.returncode == 0, f"{command}\n{done.stderr[-3000:]}"
        yield root


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copy(source, target)


def test_the_front_ends_image_serves_without_torch(image: Path) -> None:
    if find_redis() is None:
        missing("redis-server")
    bins = [str(image / "opt" / part / "bin") for part in ("recofuse", "packages")]
    runtime = "\n".join(_lines_of(("runtime",)))
    assert "PATH=/opt/recofuse/bin:/opt/packages/bin:" in runtime
    assert "PYTHONPATH=/opt/recofuse" in runtime
    assert 'ENTRYPOINT ["recofuse"]' in runtime
    http, grpc = free_port(), free_port()
    environ = {
        "PATH": os.pathsep.join([*bins, "/usr/bin", "/bin"]),
        "PYTHONPATH": str(image / "opt" / "recofuse"),
        "HOME": str(image),
        "RECOFUSE_HTTP__PORT": str(http),
        "RECOFUSE_GRPC__PORT": str(grpc),
    }
    code = "import importlib.metadata as m; print(*(f'{d.name}=={d.version}' for d in m.distributions()))"
    done = subprocess.run(["python", "-c", code], env=environ, capture_output=True, text=True, check=True)
    pins = (pin.split("==") for pin in done.stdout.split())
    found: dict[str, str] = {canonicalize_name(name): version for name, version in pins}
    assert found.pop("recofuse")
    assert found == {name: pin.version for name, pin in listed("api").items()}
    assert not found.keys() & {"torch", "pip", "setuptools", "wheel"}
    with tempfile.TemporaryDirectory(prefix="rq-") as folder:
        redis = RedisServer(Path(folder), port=free_port())
        redis.start()
        environ["RECOFUSE_QUEUE__URL"] = f"redis://127.0.0.1:{redis.port}"
        recofuse = shutil.which("recofuse", path=environ["PATH"])
        assert recofuse is not None
        api = Container("api", "127.0.0.1", [recofuse, "api"], environ, Path(folder))
        api.start()
        try:
            for port in (http, grpc):
                api.wait_healthy(port)
            live = httpx.get(f"http://127.0.0.1:{http}/health/live", trust_env=False)
            assert live.json()["status"] == "live"
            assert api.stop() == 0, api.log.read_text()
        finally:
            api.stop()
            redis.kill()


def test_the_gpu_images_compiler_makes_what_triton_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's own source, by the wheel and the lines of the image, against a driver that has its names alone."""
    build = pytest.importorskip("triton.runtime.build", reason="Triton is not installed")
    driver = Path(build.__file__).parents[1] / "backends" / "nvidia"
    (entry,) = re.findall(
        r"^ziglang==(?:.*\\\n)*.*\n", (ROOT / "deploy/requirements-runtime-cu130.txt").read_text("utf-8"), re.M
    )
    (tmp_path / "list.txt").write_text(entry)
    model = tmp_path / "opt" / "model"
    (model / "bin").mkdir(parents=True)
    words = ["install", "--only-binary", ":all:", "--no-deps", "--require-hashes", "--target", str(model)]
    done = subprocess.run(
        [sys.executable, "-m", "pip", *words, "-r", "list.txt"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode and any(word in done.stderr.lower() for word in OFFLINE):
        missing("a package index")
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in _lines_of(("worker-packages",)) if "ziglang" in line and line.startswith("RUN")]
    subprocess.run(line.removeprefix("RUN ").replace("/opt/", f"{tmp_path}/opt/"), shell=True, check=True)
    (compiler,) = re.findall(r"\bCC=/(\S+)", "\n".join(_lines_of(("worker",))))
    monkeypatch.setenv("CC", str(tmp_path / compiler))
    monkeypatch.setenv("HOME", str(tmp_path))
    source = (driver / "driver.c").read_text()
    (tmp_path / "cuda.c").write_text(
        "".join(
            f"int {name}(void) {{ return 0; }}\n" for name in sorted(set(re.findall(r"\bcu[A-Z]\w+(?=\()", source)))
        )
    )
    cuda = tmp_path / "libcuda.so.1"
    words = ["-shared", "-fPIC", f"-Wl,-soname,{cuda.name}", "cuda.c", "-o", cuda.name]
    subprocess.run([tmp_path / compiler, *words], cwd=tmp_path, check=True)
    made = build._build(
        "cuda_utils",
        str(driver / "driver.c"),
        str(tmp_path),
        [str(tmp_path)],
        [str(driver / "include")],
        [cuda.name],
        [],
    )
    code = (
        "import ctypes, importlib.util as u, sys; ctypes.CDLL(sys.argv[1], ctypes.RTLD_GLOBAL);"
        "spec = u.spec_from_file_location('cuda_utils', sys.argv[2]); module = u.module_from_spec(spec);"
        "spec.loader.exec_module(module); print(module.load_binary)"
    )
    said = subprocess.run([sys.executable, "-c", code, cuda, made], capture_output=True, text=True, check=True).stdout
    assert "load_binary" in said
