"""The model as graphs gives the pictures that torch gives, and says what is wrong with its files."""

from __future__ import annotations

import itertools
import resource
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Generator, Tensor

from recofuse_core import Runtime, load_checkpoint, load_pretrained, save_checkpoint
from recofuse_core.degradations.recipes import degrade_vis
from recofuse_core.errors import CheckpointError, NumericsError, ShapeError
from recofuse_core.graphs.runtime import VERSION_KEY, GraphRuntime, graph_path, has_graphs
from recofuse_core.picture import FusionOutput
from recofuse_core.sampler import Pair
from recofuse_core.scenes.scene import make_scene
from recofuse_core.tiling import TilingConfig
from recofuse_core.weights_file import weights_folder
from tests.core.tiny import pairs

COMPACT = weights_folder() / "compact.safetensors"


@pytest.fixture(scope="module")
def graphs() -> GraphRuntime:
    return GraphRuntime("compact", num_threads=1)


@pytest.fixture(scope="module")
def model() -> Runtime:
    return Runtime(load_pretrained("compact"), precision="float32")


def fused(graphs: GraphRuntime, model: Runtime, images: Sequence[Tensor], **options: Any) -> float:
    """The largest difference between both pictures of a pair, over all that were asked for."""
    given = [image.numpy() for image in images]
    mine, torchs = graphs.fuse(given[0], given[1], **options), model.fuse(images[0], images[1], **options)
    differences = []
    for name in ("fused", "vis", "ir"):
        picture, expected = getattr(mine, name), getattr(torchs, name)
        assert (picture is None) == (expected is None), name
        if picture is not None:
            assert picture.shape == tuple(expected.shape)
            assert picture.dtype == expected.numpy().dtype
            differences.append(np.abs(picture.astype(float) - expected.numpy().astype(float)).max())
    return float(max(differences))


def pictures_of(output: FusionOutput) -> list[Any]:
    """Those that were asked for."""
    return [picture for picture in (output.fused, output.vis, output.ir) if picture is not None]


SIZES = [(32, 32), (48, 64), (67, 90), (48, 1300)]  # the last attends to larger squares


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_pictures_are_those_of_torch(graphs: GraphRuntime, model: Runtime, batch: int, size: tuple[int, int]) -> None:
    images = pairs(batch, *size)
    assert fused(graphs, model, images, seeds=range(5, 5 + batch)) < 1e-4
    levels = [(image * 255).byte() for image in images]
    assert fused(graphs, model, levels) <= 1


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 1},
        {"steps": 5, "sampler": "euler"},
        {"steps": 4, "sampler": "posterior"},
        {"steps": 3, "sampler": "ode1", "outputs": ["fused"]},
        {"outputs": ["ir", "vis"]},
        {"tiling": TilingConfig(max_pixels=64 * 64, tile=64, overlap=16)},
    ],
    ids=str,
)
def test_so_are_those_of_every_option(graphs: GraphRuntime, model: Runtime, options: dict[str, Any]) -> None:
    assert fused(graphs, model, pairs(2, 90, 130), **options) < 1e-4


def test_lighting_is_that_of_torch(graphs: GraphRuntime, model: Runtime) -> None:
    assert graphs.can_light
    assert fused(graphs, model, pairs(2, 75, 101), exposure="lit") < 1e-3  # highlights are ratios of small numbers


def test_weather_comes_off_as_with_torch(graphs: GraphRuntime, model: Runtime) -> None:
    scene = make_scene(0, 150, 190)  # sides that are padded
    vis = degrade_vis(scene.vis, Generator().manual_seed(0), "strong", ["downpour"]).image[None]
    images = vis, scene.ir[None, :1]
    cleared = model.model.clear(Pair(*images)).vis
    assert float((cleared - vis).abs().mean()) > 0.01
    assert fused(graphs, model, images) < 1e-4


def test_a_veil_is_lifted_as_with_torch(graphs: GraphRuntime, model: Runtime) -> None:
    """One frame of a batch has a veil, the other one has none; sides are odd."""
    scene = make_scene(0, 151, 189)
    foggy = degrade_vis(scene.vis, Generator().manual_seed(0), "strong", ["fog"]).image
    images = torch.stack([foggy, scene.vis]), scene.ir[None, :1].expand(2, -1, -1, -1)
    cleared = model.model.clear(Pair(*images))
    toned = model.model.normalise(cleared)
    change = (model.model.lift(toned, cleared).vis - toned.vis).abs().mean(dim=(1, 2, 3))
    assert change[0] > 0.01
    assert change[1] == 0
    for exposure in ("as_shot", "lit"):
        assert fused(graphs, model, images, exposure=exposure) < 1e-3


def test_a_night_that_curves_freed_of_haze_is_lit_as_with_torch(graphs: GraphRuntime, model: Runtime) -> None:
    """No veil is judged, yet the toned frame is what is lit; the other one of the batch is lit as it came."""
    scene = make_scene(2, 151, 189)
    hazy = 0.6 * scene.vis**4.5 + 0.4 * 0.45
    images = torch.stack([hazy, scene.vis]), scene.ir[None, :1].expand(2, -1, -1, -1)
    frames = model.model.clear(Pair(*images))
    toned = model.model.normalise(frames)
    assert model.model.veil is not None
    veil = model.model.veil(*toned, frames.vis)
    assert torch.equal(veil.share, torch.zeros(2))
    assert veil.darkened is not None
    assert veil.darkened[0] > 0.9
    assert veil.darkened[1] == 0
    for exposure in ("as_shot", "lit"):
        assert fused(graphs, model, images, exposure=exposure) < 1e-3


def test_a_night_under_dark_infrared_is_as_with_torch(graphs: GraphRuntime, model: Runtime) -> None:
    """Infrared is brightened for the fused picture, and restored as it was."""
    scene = make_scene(2, 151, 189)
    images = 0.08 * scene.vis[None], scene.ir[None, :1] ** 3
    _, brightened_by = model.model.levelled(model.model.clear(Pair(*images)), "lit")
    assert brightened_by is not None
    assert float(brightened_by.amount) > 0.3
    assert fused(graphs, model, images, exposure="lit") < 1e-3


def test_a_partly_covered_frame_is_that_of_torch(graphs: GraphRuntime, model: Runtime) -> None:
    shares = np.linspace(0, 1.4, 130).clip(0, 1)[None, None, :, None] * [255, 511]
    overlap = np.broadcast_to(shares.clip(0, 255).astype(np.uint8), (2, 90, 130, 2))
    assert fused(graphs, model, pairs(2, 90, 130), overlap=overlap) < 1e-4
    tiling = TilingConfig(max_pixels=64 * 64, tile=64, overlap=16)
    assert fused(graphs, model, pairs(2, 90, 130), overlap=overlap, outputs=["fused"], tiling=tiling) < 1e-4
    with pytest.raises(ShapeError, match="overlap"):
        graphs.fuse(*(image.numpy() for image in pairs(1, 90, 130)), overlap=overlap)


def test_it_says_what_the_model_is(graphs: GraphRuntime, model: Runtime) -> None:
    assert graphs.info == model.info


def test_an_item_is_the_same_alone_and_in_a_batch(graphs: GraphRuntime) -> None:
    vis, ir = (image.numpy() for image in pairs(3, 48, 64))
    together: FusionOutput = graphs.fuse(vis, ir, seeds=[1, 2, 3])
    alone = graphs.fuse(vis[1:2], ir[1:2], seeds=2)
    assert together.fused is not None
    assert alone.fused is not None
    assert np.abs(together.fused[1] - alone.fused[0]).max() < 1e-5


@pytest.mark.parametrize(
    "tiling", [None, TilingConfig(max_pixels=64 * 64, tile=64, overlap=16)], ids=["whole", "tiled"]
)
@pytest.mark.parametrize("size", [(96, 128), (90, 130)], ids=str)  # the latter is padded
@pytest.mark.parametrize("is_levels", [False, True], ids=["floats", "levels"])
def test_pictures_are_the_callers_own(
    graphs: GraphRuntime, tiling: TilingConfig | None, size: tuple[int, int], is_levels: bool
) -> None:
    """Neither what was given nor what was returned changes with later pairs, whatever memory these take."""

    def given(seed: int) -> list[Any]:
        images = [image.numpy() for image in pairs(1, *size, seed=seed)]
        return [(image * 255).astype(np.uint8) for image in images] if is_levels else images

    images = given(0)
    kept = [image.copy() for image in images]
    pictures = pictures_of(graphs.fuse(*images, tiling=tiling))
    copies = [picture.copy() for picture in pictures]
    others = pictures_of(graphs.fuse(*given(1), tiling=tiling))
    for one, copy in zip([*pictures, *images], [*copies, *kept], strict=True):
        np.testing.assert_array_equal(one, copy)
    arrays = [*pictures, *others, *images]
    assert not any(np.shares_memory(one, other) for one, other in itertools.combinations(arrays, 2))
    others[0][:] = 0  # and it may be written to
    again = pictures_of(graphs.fuse(*images, tiling=tiling))
    for one, copy in zip(again, copies, strict=True):
        np.testing.assert_array_equal(one, copy)


def test_arrays_of_whole_frames_come_from_memory_that_was_used_before(graphs: GraphRuntime) -> None:
    """The system clears no pages for them: glibc would give an array of this size, 128 MiB, back."""
    shape = (1, 64, 1088, 480)

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        whole = graphs._networks.zeros(shape, np.empty(0, np.float32))
        assert whole.shape == shape
        assert not whole.any()
        whole += 1
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    faults()
    assert min(faults() for _ in range(3)) < 50  # of 32,640 pages; 1,900 faults in arrays of numpy, with large pages


def test_bad_images_are_refused(graphs: GraphRuntime) -> None:
    vis, ir = (image.numpy() for image in pairs(1, 48, 64))
    flat = (vis[..., :16, :], ir[..., :16, :])
    for wrong in ((vis[:, :2], ir), (vis, ir[..., :-1]), flat, (vis, ir.astype(np.int16))):
        with pytest.raises(ShapeError):
            graphs.fuse(*wrong)
    with pytest.raises(ShapeError, match="seeds"):
        graphs.fuse(vis, ir, seeds=[1, 2])
    with pytest.raises(NumericsError):
        graphs.fuse(np.full_like(vis, np.nan), ir)


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A copy of the shipped weights and their graphs."""
    for file in weights_folder().glob("compact.*"):
        shutil.copy(file, tmp_path)
    return tmp_path / COMPACT.name


def test_files_that_are_not_right_are_told(copied: Path) -> None:
    assert has_graphs(copied)
    encode = graph_path(copied, "encode")
    content = encode.read_bytes()
    encode.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"encode\.onnx does not load"):
        GraphRuntime(copied, num_threads=1)
    encode.unlink()
    with pytest.raises(CheckpointError, match="there is no graph"):
        GraphRuntime(copied, num_threads=1)
    encode.write_bytes(content)
    damaged = bytearray(copied.read_bytes())
    damaged[-1] ^= 1
    copied.write_bytes(damaged)
    with pytest.raises(CheckpointError, match="damaged"):
        GraphRuntime(copied, num_threads=1)
    with pytest.raises(CheckpointError, match="no weights file"):
        GraphRuntime(copied.with_name("none.safetensors"))


def test_graphs_of_other_weights_are_refused(copied: Path) -> None:
    config, state, info = load_checkpoint(copied)
    save_checkpoint(copied, state, config, name=info.name, version="next", preset=info.preset)
    with pytest.raises(CheckpointError, match="was written for other weights"):
        GraphRuntime(copied, num_threads=1)


def test_graphs_of_another_release_are_refused_before_a_frame_comes(copied: Path) -> None:
    lift = graph_path(copied, "lift")
    graph = onnx.load(lift, load_external_data=False)
    for entry in graph.metadata_props:
        if entry.key == VERSION_KEY:
            entry.value = "1"
    lift.write_bytes(graph.SerializeToString())
    with pytest.raises(CheckpointError, match="write the graphs again"):
        GraphRuntime(copied, num_threads=1)


def test_the_graphs_of_the_package_are_small() -> None:
    """The weights are not in them."""
    sizes = [file.stat().st_size for file in weights_folder().glob("compact.*.onnx")]
    assert len(sizes) == 16
    assert sum(sizes) < 2e6
