"""Recorded runs compute what the model computes.

The recorder of these tests runs everything again instead of replaying a graph: the cache, the static buffers, the
filling of batches and the order of transfers are the same as on a GPU. What only a GPU can show is marked `gpu`.
"""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from recofuse_core import load_pretrained
from recofuse_core.errors import ConfigError, NumericsError, ShapeError
from recofuse_core.model import PRESETS, ModelConfig, ReCoFuse, build_model
from recofuse_core.recording import EagerRecorder, Results
from recofuse_core.runtime import Runtime
from recofuse_core.sampler import SAMPLERS, SamplerName
from recofuse_core.tiling import TilingConfig
from tests.core.tiny import CONFIGS, images_of, largest_difference, pairs, tiny_model


class CountingRecorder(EagerRecorder):
    """Says what was done, in order, and hands out poisoned buffers, so that a stale read shows."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.num_recorded = 0

    def record(self, function: Callable[[], Results]) -> tuple[Callable[[], None], Results]:
        self.num_recorded += 1
        return super().record(function)

    def host_buffer(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        fill = float("nan") if dtype.is_floating_point else 77
        return super().host_buffer(shape, dtype).fill_(fill)

    def upload(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        self.events.append("upload")
        super().upload(pairs)

    def run(self, replay: Callable[[], None]) -> None:
        self.events.append("run")
        super().run(replay)

    def download(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        self.events.append("download")
        for target, result in pairs:
            target.copy_(result)


def recording(model: ReCoFuse, **options: object) -> tuple[Runtime, CountingRecorder]:
    recorder = CountingRecorder()
    runtime = Runtime(model, precision="float32", graphs=True, recorder=recorder, **options)  # type: ignore[arg-type]
    return runtime, recorder


@CONFIGS
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("shape", [(1, 32, 32), (2, 40, 50), (1, 33, 64)], ids=str)
def test_recorded_equals_eager_for_every_seed(
    config: ModelConfig, sampler: SamplerName, shape: tuple[int, int, int]
) -> None:
    model = tiny_model(config)
    runtime, recorder = recording(model)
    runtime.record([shape], sampler=sampler, steps=2)
    for seed in (0, 7, 123456):
        vis, ir = pairs(*shape, seed=seed)  # other images each time: what was recorded must not come back
        recorded = runtime.fuse(vis, ir, sampler=sampler, steps=2, seeds=seed)
        assert largest_difference(recorded, model.fuse(vis, ir, sampler=sampler, steps=2, seeds=seed)) == 0
    assert recorder.num_recorded == 1
    assert recorder.events == ["upload", "run", "download"] * 4


def test_results_outlive_the_next_run() -> None:
    runtime, _ = recording(tiny_model())
    runtime.record([(1, 32, 32)])
    first = runtime.fuse(*pairs(1, 32, 32))
    kept = [image.clone() for image in images_of(first)]
    runtime.fuse(*pairs(1, 32, 32, seed=4))
    assert all(torch.equal(image, copied) for image, copied in zip(images_of(first), kept, strict=True))


def test_a_shape_is_recorded_when_it_comes_again() -> None:
    runtime, recorder = recording(tiny_model())
    vis, ir = pairs(1, 32, 48)
    outputs = [runtime.fuse(vis, ir, seeds=3)]
    assert (runtime.num_recorded, recorder.num_recorded) == (0, 0)
    outputs += [runtime.fuse(vis, ir, seeds=3) for _ in range(3)]
    assert (runtime.num_recorded, recorder.num_recorded) == (1, 1)
    assert all(largest_difference(outputs[0], output) == 0 for output in outputs)


def test_the_program_used_longest_ago_goes() -> None:
    model = tiny_model()
    runtime, recorder = recording(model, max_graphs=2)
    sizes = [(1, 32, 32), (1, 32, 48), (1, 48, 32)]
    runtime.record(sizes[:2])
    runtime.fuse(*pairs(*sizes[0]))  # used last, so the second goes
    runtime.record(sizes[2:])
    assert (runtime.num_recorded, recorder.num_recorded) == (2, 3)
    runtime.record(sizes[:1])
    assert recorder.num_recorded == 3
    runtime.record(sizes[1:2])
    assert (runtime.num_recorded, recorder.num_recorded) == (2, 4)
    vis, ir = pairs(*sizes[1])
    assert largest_difference(runtime.fuse(vis, ir), model.fuse(vis, ir)) == 0


def test_a_program_is_for_one_request_shape() -> None:
    model = tiny_model()
    runtime, recorder = recording(model)
    vis, ir = pairs(1, 32, 32)
    runtime.record([(1, 32, 32)])
    levels = ((vis * 255).round().byte(), (ir * 255).round().byte())
    others: list[dict[str, object]] = [{"steps": 2}, {"sampler": "ode1"}, {"outputs": ("ir",)}, {"coupled": False}]
    for options in others:
        for _ in range(2):
            output = runtime.fuse(vis, ir, **options)  # type: ignore[arg-type]
        assert largest_difference(output, model.fuse(vis, ir, **options)) == 0  # type: ignore[arg-type]
    for _ in range(2):
        output = runtime.fuse(*levels)
    assert largest_difference(output, model.fuse(*levels)) == 0
    assert recorder.num_recorded == 2 + len(others)


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 6])
def test_batches_are_filled_up_to_the_next_recorded_size(batch: int) -> None:
    model = tiny_model()
    runtime, recorder = recording(model, batch_sizes=(4, 1, 5))
    shapes = [(1, 32, 32), (4, 32, 32), (5, 32, 32)]
    runtime.record(shapes)
    vis, ir = pairs(batch, 32, 32)
    seeds = list(range(batch))
    output = runtime.fuse(vis, ir, seeds=seeds)
    assert all(len(image) == batch for image in images_of(output))
    assert largest_difference(output, model.fuse(vis, ir, seeds=seeds)) < 2e-5
    assert recorder.num_recorded == 3  # 6 is above all sizes: it ran eagerly


def test_tiled_frames_and_long_runs_are_not_recorded() -> None:
    runtime, recorder = recording(tiny_model())
    vis, ir = pairs(1, 64, 96)
    tiling = TilingConfig(max_pixels=32 * 32, tile=64, overlap=32)
    for _ in range(3):
        runtime.fuse(vis, ir, tiling=tiling)
        runtime.fuse(vis, ir, sampler="euler", steps=40)
    assert recorder.num_recorded == 0


def test_a_recorded_run_reports_what_is_not_finite_and_recovers() -> None:
    model = tiny_model()
    runtime, _ = recording(model)
    runtime.record([(1, 32, 32)])
    vis, ir = pairs(1, 32, 32)
    broken = vis.clone()
    broken[0, 1, 3, 3] = float("inf")
    with pytest.raises(NumericsError, match="not finite"):
        runtime.fuse(broken, ir)
    assert largest_difference(runtime.fuse(vis, ir), model.fuse(vis, ir)) == 0


def test_wrong_arguments_are_refused_before_anything_runs() -> None:
    runtime, recorder = recording(tiny_model())
    vis, ir = pairs(2, 32, 32)
    with pytest.raises(ShapeError, match="seeds"):
        runtime.fuse(vis, ir, seeds=[1])
    with pytest.raises(ShapeError, match="ir must be"):
        runtime.fuse(vis, ir[:1])
    with pytest.raises(ConfigError, match="unknown sampler"):
        runtime.fuse(vis, ir, sampler="none")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="max_graphs"):
        Runtime(tiny_model(), graphs=True, max_graphs=0)
    assert recorder.events == []


@pytest.mark.gpu
@CONFIGS
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(1, 64, 80), (2, 96, 64), (4, 70, 90)], ids=str)
def test_captured_sampling_equals_eager(precision: str, shape: tuple[int, int, int], config: ModelConfig) -> None:
    model = tiny_model(config).cuda()
    eager = Runtime(model, precision=precision, graphs=False)  # type: ignore[arg-type]
    captured = Runtime(model, precision=precision, graphs=True)  # type: ignore[arg-type]
    captured.record([shape])
    tolerance = 1e-4 if precision == "float32" else 2e-2
    for seed in (0, 1, 99):
        vis, ir = pairs(*shape, seed=seed)
        assert largest_difference(captured.fuse(vis, ir, seeds=seed), eager.fuse(vis, ir, seeds=seed)) < tolerance
        on_device = captured.fuse(vis.cuda(), ir.cuda(), seeds=seed)
        assert images_of(on_device)[0].is_cuda
    assert captured.num_recorded == 1


@pytest.mark.gpu
@pytest.mark.parametrize("preset", ["compact", "paper"])
@pytest.mark.parametrize("shape", [(1, 256, 320), (2, 480, 640), (8, 128, 160)], ids=str)
def test_captured_presets_equal_eager(preset: str, shape: tuple[int, int, int]) -> None:
    """Whole presets as they are served; the weights of `paper` are random."""
    torch.manual_seed(0)
    model = load_pretrained("compact") if preset == "compact" else build_model(PRESETS[preset]).eval()
    eager = Runtime(model.cuda(), graphs=False)
    captured = Runtime(model, graphs=True, batch_sizes=(shape[0],))
    captured.record([shape], steps=4)
    for seed in (0, 1, 99):
        vis, ir = pairs(*shape, seed=seed)
        one, other = (r.fuse(vis, ir, steps=4, seeds=seed) for r in (captured, eager))
        # Algorithms chosen by trial may round otherwise than those of an eager run.
        for a, b in zip(images_of(one), images_of(other), strict=True):
            assert float((a - b).square().mean().sqrt()) < 1e-2
    assert captured.num_recorded == 1


@pytest.mark.gpu
def test_the_only_program_makes_room_for_the_next() -> None:
    model = tiny_model().cuda()
    runtime = Runtime(model, precision="float32", max_graphs=1)
    eager = Runtime(model, precision="float32", graphs=False)
    for _ in range(2):
        for shape in ((1, 64, 80), (2, 48, 48)):
            runtime.record([shape])
            assert runtime.num_recorded == 1
            vis, ir = pairs(*shape)
            assert largest_difference(runtime.fuse(vis, ir), eager.fuse(vis, ir)) < 1e-4


@pytest.mark.gpu
def test_captured_programs_of_one_pool_do_not_disturb_each_other() -> None:
    model = tiny_model().cuda()
    runtime = Runtime(model, precision="float32")
    shapes = [(1, 64, 80), (2, 96, 64), (1, 48, 48)]
    runtime.record(shapes)
    inputs = [pairs(*shape) for shape in shapes]
    first = [runtime.fuse(*pair) for pair in inputs]
    for _ in range(2):
        for index in (2, 0, 1):
            assert largest_difference(runtime.fuse(*inputs[index]), first[index]) == 0
