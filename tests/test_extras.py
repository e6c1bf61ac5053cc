"""What README.md says that an installation can do, it can, with the packages of its extras and no others.

`make check-package` shows the same for the light ones in environments of their own.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.client.reach import free_ports
from tests.extras import distributions, modules_without, named, project, recofuse, run_with
from tests.fakes import pair


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    names = [tmp_path / "vis.png", tmp_path / "ir.png"]
    for name, data in zip(names, pair(), strict=True):
        name.write_bytes(data)
    return list(map(str, names))


def test_the_sets_of_packages_are_told_apart() -> None:
    assert {"torch", "fastapi", "opencv-python-headless"}.isdisjoint(distributions())
    assert {"rich", "markdown-it-py", "mdurl"} <= distributions()  # what a dependency depends on
    assert {"hiredis", "starlette"} <= distributions("server")  # an extra of another package
    assert {"cv2", "PIL", "torch", "fastapi", "pytest"} <= set(modules_without())
    assert {"numpy", "grpc", "google", "recofuse_client"}.isdisjoint(modules_without())
    assert "cv2" not in modules_without("torch")
    done = run_with("import numpy\nimport cv2\n")
    assert "ModuleNotFoundError" in done.stderr
    assert "cv2" in done.stderr


def test_all_is_all() -> None:
    extras = set(project()["optional-dependencies"]) - {"all", "dev"}
    assert named("all").keys() == named(*extras).keys()
    assert named("train").keys() > named("torch").keys() > named("images").keys() > named().keys()


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["settings"]], ids=" ".join)
def test_the_command_needs_no_extra(words: list[str]) -> None:
    done = run_with(recofuse(words))
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.parametrize("name", ["Runtime", "load_pretrained"])
def test_the_library_names_its_extra(name: str) -> None:
    done = run_with(f"from recofuse_core import {name}")
    assert (
        done.stderr.splitlines()[-1] == "ModuleNotFoundError: recofuse_core needs torch: pip install 'recofuse[torch]'"
    )


def test_what_the_graphs_share_with_the_library_needs_no_torch() -> None:
    done = run_with("import recofuse_core.picture\nfrom recofuse_core import ShapeError, TilingConfig")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("code", "package"),
    [
        ("import recofuse_client.video", "cv2"),
        ("import recofuse_images.writer", "cv2"),
        (
            "from recofuse_client.pictures import *; decoded(png_of(np.zeros((9, 9), 'u1'), ''), 'image/png')",
            "imagecodecs",
        ),
    ],
    ids=["video", "writer", "decoded"],
)
def test_pictures_name_their_extra(code: str, package: str) -> None:
    done = run_with(code)
    said = f"ModuleNotFoundError: pictures and videos need {package}: pip install 'recofuse[images]'"
    assert done.stderr.splitlines()[-1] == said
    again = run_with(code, "images")
    assert again.returncode == 0, again.stderr


def test_a_codec_that_is_none_is_no_missing_package() -> None:
    from recofuse_images import codecs

    with pytest.raises(AttributeError, match="no attribute 'cv3'"):
        getattr(codecs, "cv3")  # noqa: B009 - mypy knows that it is not there


def test_a_front_end_needs_server_only() -> None:
    done = run_with(recofuse(["api", "--queue", "redis://"]), "server")
    assert done.returncode == 2
    assert "host is missing" in done.stderr  # it came as far as reading the queue's address
    assert "import" not in done.stderr


def test_fusing_files_needs_torch_only(files: list[str], tmp_path: Path) -> None:
    words = ["fuse", "--vis", files[0], "--ir", files[1], "-o", str(tmp_path / "fused.png"), "--steps", "1"]
    done = run_with(recofuse(words), "torch")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "fused.png").read_bytes().startswith(b"\x89PNG")


def test_the_library_needs_torch_only() -> None:
    code = (
        "import json, torch\n"
        "from recofuse_core import load_pretrained\n"
        "result = load_pretrained('compact').fuse(torch.rand(1, 3, 32, 40), torch.rand(1, 1, 32, 40), steps=1)\n"
        "print(json.dumps(list(result.fused.shape)))\n"
    )
    done = run_with(code, "torch")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [1, 3, 32, 40]


def test_training_needs_train_only() -> None:
    done = run_with(
        "import recofuse_core.training\nfrom torch.utils.tensorboard import SummaryWriter\nimport tqdm", "train"
    )
    assert done.returncode == 0, done.stderr


def test_teaching_the_maps_of_rigs_needs_export_only(tmp_path: Path) -> None:
    words = ["train-cues", "--streets", "1", "--steps", "1", "-o", str(tmp_path)]
    done = run_with(recofuse(words), "torch")
    assert done.returncode == 2, done.stderr
    assert "onnx, which is not installed" in done.stderr
    done = run_with(recofuse(words), "export")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cues_ir.onnx", "cues_vis.onnx"]


ASK_AND_END = """
import os, signal, threading, time
from pathlib import Path
import recofuse_client as rc
import recofuse_client.http, recofuse_client.rpc  # not while the other thread imports

PATIENT = rc.Retry(max_attempts=1000, first_pause_s=0.2, max_pause_s=0.5)

def ask():
    try:
        for url in ("http://127.0.0.1:{http}", "grpc://127.0.0.1:{grpc}"):
            with rc.Client(url, timeout_s=150, retry=PATIENT) as client:
                print(client.fuse({vis!r}, {ir!r}, steps=1).fused.shape)
    finally:
        os.kill(os.getpid(), signal.SIGTERM)

threading.Thread(target=ask).start()
"""


def test_a_server_needs_server_and_torch_only(files: list[str]) -> None:
    http, grpc = free_ports(2)
    ask = ASK_AND_END.format(http=http, grpc=grpc, vis=files[0], ir=files[1])
    serve = recofuse(["serve", "--port", str(http), "--grpc-port", str(grpc)])
    done = run_with(ask + serve, "server", "torch", timeout_s=170)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["(48, 64, 3)"] * 2, done.stderr
