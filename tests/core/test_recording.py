"""Recorded runs compute what the model computes.

The recorder of these tests runs everything again instead of replaying a graph: the cache, the static buffers, the
filling of batches and the order of transfers are the same as on a GPU. What only a GPU can show is marked `gpu`.
"""

import gc
import math
import weakref
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from recofuse_core import load_pretrained, supplies
from recofuse_core import model as module_of_model
from recofuse_core.errors import ConfigError, NumericsError, ShapeError
from recofuse_core.model import PRESETS, ModelConfig, ReCoFuse, build_model, noise_like
from recofuse_core.picture import OutputName
from recofuse_core.program_cache import ProgramCache
from recofuse_core.programs import MAX_UNROLLED_STEPS
from recofuse_core.recording import EagerRecorder, Results
from recofuse_core.runtime import Runtime
from recofuse_core.sampler import SAMPLERS, NoiseSource, SamplerName
from recofuse_core.supplies import NoiseCache
from recofuse_core.tiling import Ramps, TilingConfig
from tests.core.tiny import CONFIGS, PUBLISHED, images_of, largest_difference, pairs, rms_difference, tiny_model


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

    def run(self, work: Callable[[], None]) -> None:
        self.events.append("run")
        super().run(work)

    def download(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Callable[[], None]:
        self.events.append("download")
        return super().download(pairs)


def recording(model: ReCoFuse, **options: object) -> tuple[Runtime, CountingRecorder]:
    recorder = CountingRecorder()
    runtime = Runtime(model, precision="float32", graphs=True, recorder=recorder, **options)  # type: ignore[arg-type]
    return runtime, recorder


class BrokenRecorder(CountingRecorder):
    """Fails to record batches of some sizes."""

    def __init__(self, error: Exception, *batches: int) -> None:
        super().__init__()
        self.error = error
        self.batches = batches
        self.num_tried = 0

    def record(self, function: Callable[[], Results]) -> tuple[Callable[[], None], Results]:
        self.num_tried += 1
        replay, results = super().record(function)
        if results and len(results[0]) in self.batches:
            raise self.error
        return replay, results


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


def test_a_batch_takes_new_seeds_item_by_item() -> None:
    model = tiny_model()
    runtime, _ = recording(model)
    vis, ir = pairs(2, 32, 48)
    runtime.record([(2, 32, 48)])
    for seeds in ([1, 2], [1, 3], [4, 3], [4, 3], [3, 4]):
        assert largest_difference(runtime.fuse(vis, ir, seeds=seeds), model.fuse(vis, ir, seeds=seeds)) == 0


def test_noise_is_drawn_once_a_seed_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []

    def counted(seeds: Sequence[int], like: Tensor) -> NoiseSource:
        drawn.extend(seeds)
        return noise_like(seeds, like)

    monkeypatch.setattr(supplies, "noise_like", counted)
    shape = (4, 4, 6)
    size = 2 * 2 * 4 * 4 * 6 * 4  # two draws of both modalities, float32
    noise = NoiseCache(torch.device("cpu"), max_bytes=2 * size)
    first = noise(5, 2, shape)
    assert first.nbytes == size
    draw = noise_like([5], torch.empty(1, *shape))
    for vis, ir in first:
        expected = draw()
        assert torch.equal(vis, expected.vis[0])
        assert torch.equal(ir, expected.ir[0])
    assert noise(5, 2, shape) is first
    for seed in (6, 5, 7, 5, 6):  # 7 takes the place of 6, and 6 that of 7
        noise(seed, 2, shape)
    assert drawn == [5, 6, 7, 6]


def test_levels_come_back_as_files_have_them() -> None:
    runtime, _ = recording(tiny_model())
    vis, ir = ((255 * image).byte() for image in pairs(2, 40, 50))
    runtime.record([(2, 40, 50)], levels=True)
    for image in images_of(runtime.fuse(vis, ir)):
        assert image.permute(0, 2, 3, 1).is_contiguous()


@pytest.mark.parametrize("is_recorded", [True, False])
def test_frames_need_not_be_stacked(is_recorded: bool) -> None:
    model = tiny_model()
    runtime = Runtime(model, precision="float32", graphs=is_recorded, batch_sizes=(4,))
    vis, ir = ((255 * images).byte() for images in pairs(3, 32, 48))
    if is_recorded:
        runtime.record([(4, 32, 48)], levels=True)
    colour = [np.ascontiguousarray(picture.permute(1, 2, 0)) for picture in vis]
    for frame in colour:
        frame.flags.writeable = False  # as of what was received
    grey = [picture[0].numpy() for picture in ir]
    output = runtime.fuse(colour, grey, seeds=[1, 2, 3])
    assert largest_difference(output, runtime.fuse(vis, ir, seeds=[1, 2, 3])) == 0
    assert largest_difference(output, model.fuse(vis, ir, seeds=[1, 2, 3])) <= 1
    assert runtime.activity.recorded_runs == 3 * is_recorded
    wrong_ones: list[list[Any]] = [
        [*colour[:2], colour[2][:20]],
        [*colour[:2], colour[2][:, :40]],
        [frame.astype(np.float32) for frame in colour],
        colour[:2],
        [frame[..., 0] for frame in colour],
    ]
    for wrong in wrong_ones:
        with pytest.raises(ShapeError):
            runtime.fuse(wrong, grey)


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


@CONFIGS
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_long_run_is_one_step_recorded_and_replayed(config: ModelConfig, sampler: SamplerName) -> None:
    """One recording serves any number of steps; pictures and noise are the eager run's, but for rounding."""
    model = tiny_model(config)
    runtime, recorder = recording(model)
    runtime.record([(2, 32, 40)], sampler=sampler, steps=30)
    for steps, seeds in ((10, [5, 6]), (9, [7, 5])):
        vis, ir = pairs(2, 32, 40, seed=steps)
        options: dict[str, Any] = {"sampler": sampler, "steps": steps, "seeds": seeds}
        output = runtime.fuse(vis, ir, **options)
        # Random weights that predict noise blow up what rounding leaves; another draw of noise would be 0.1.
        assert rms_difference(output, model.fuse(vis, ir, **options)) < (1e-3 if config is PUBLISHED else 1e-5)
    assert largest_difference(output, runtime.fuse(vis, ir, **options)) == 0  # nothing is left of the run before
    assert (runtime.num_recorded, recorder.num_recorded) == (1, 3)


def test_branches_that_are_not_coupled_are_stepped_apart() -> None:
    model = tiny_model(PUBLISHED)
    runtime, _ = recording(model)
    vis, ir = pairs(1, 32, 32)
    options: dict[str, Any] = {"sampler": "ode1", "steps": MAX_UNROLLED_STEPS + 1, "coupled": False}
    for _ in range(2):
        output = runtime.fuse(vis, ir, **options)
    assert runtime.num_recorded == 1
    assert largest_difference(output, model.fuse(vis, ir, **options)) < 1e-4


def test_the_published_hundred_steps_are_recorded() -> None:
    model = tiny_model(PUBLISHED)
    runtime, recorder = recording(model)
    runtime.record([(1, 32, 32)], sampler="euler", steps=20)
    vis, ir = pairs(1, 32, 32)
    eager = model.fuse(vis, ir, sampler="euler", steps=100, seeds=3)
    assert rms_difference(runtime.fuse(vis, ir, sampler="euler", steps=100, seeds=3), eager) < 1e-3
    assert recorder.num_recorded == 3  # a beginning, a step, an end


@pytest.mark.parametrize("steps", [MAX_UNROLLED_STEPS - 1, MAX_UNROLLED_STEPS + 1])
def test_large_frames_are_recorded(steps: int) -> None:
    model = tiny_model()
    runtime, recorder = recording(model)
    vis, ir = pairs(1, 64, 96)
    tiling = TilingConfig(max_pixels=32 * 32, tile=64, overlap=32)
    for _ in range(3):
        output = runtime.fuse(vis, ir, tiling=tiling, steps=steps)
    assert largest_difference(output, model.fuse(vis, ir, tiling=tiling, steps=steps)) < 2e-5
    assert recorder.num_recorded == (3 if steps > MAX_UNROLLED_STEPS else 1)


def test_what_a_recorded_run_reads_lives_as_long_as_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph knows addresses alone: what tiles are weighed by may not go because others have come to a cache."""
    made: list[weakref.ref[Tensor]] = []
    make = module_of_model._ramps_on.__wrapped__

    def noted(*arguments: Any) -> Ramps:
        ramps: Ramps = make(*arguments)
        made.extend(weakref.ref(ramp) for ramp in ramps.values())
        return ramps

    monkeypatch.setattr(module_of_model, "_ramps_on", noted)
    runtime, _ = recording(tiny_model())
    tiling = TilingConfig(max_pixels=32 * 32, tile=64, overlap=32)
    for is_recorded in (False, True):
        made.clear()
        runtime.fuse(*pairs(1, 64, 96), tiling=tiling)
        gc.collect()
        assert made
        assert [ramp() is not None for ramp in made] == [is_recorded] * len(made)
    del runtime
    gc.collect()
    assert all(ramp() is None for ramp in made)


class SlowRecorder(CountingRecorder):
    """A device that has not begun with a run when the next is uploaded: what is waited for is done then, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.queue: list[Callable[[], None]] = []

    def run(self, work: Callable[[], None]) -> None:
        self.queue.append(lambda: super(SlowRecorder, self).run(work))

    def download(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Callable[[], None]:
        is_done = []

        def copy() -> None:
            super(SlowRecorder, self).download(pairs)
            is_done.append(True)

        def wait() -> None:
            while not is_done:
                self.queue.pop(0)()

        self.queue.append(copy)
        return wait


@pytest.mark.parametrize("steps", [2, MAX_UNROLLED_STEPS + 1])
def test_a_batch_is_brought_while_another_runs(steps: int) -> None:
    model, recorder = tiny_model(), SlowRecorder()
    runtime = Runtime(model, precision="float32", graphs=True, recorder=recorder)
    runtime.record([(2, 32, 48)], sampler="posterior", steps=steps)
    recorder.events.clear()
    options: dict[str, Any] = {"sampler": "posterior", "steps": steps}
    started = []
    for seed in range(5):
        vis, ir = pairs(2, 32, 48, seed=seed)
        started.append((runtime.submit(vis, ir, seeds=[seed, seed + 1], **options), vis.clone(), ir.clone(), seed))
        vis.fill_(77)  # what was handed in is the caller's again
        ir.fill_(77)
        if seed == 1:
            assert recorder.events == ["upload", "upload"]  # neither has begun
    for pending, vis, ir, seed in (started[index] for index in (4, 0, 2, 1, 3)):
        expected = model.fuse(vis, ir, seeds=[seed, seed + 1], **options)
        assert largest_difference(pending.result(), expected) < (2e-4 if steps > MAX_UNROLLED_STEPS else 1e-6)
    assert recorder.queue == []


def test_a_run_that_failed_says_so_to_whoever_asks_for_it_alone() -> None:
    model, recorder = tiny_model(), SlowRecorder()
    runtime = Runtime(model, precision="float32", graphs=True, recorder=recorder)
    runtime.record([(1, 32, 32)])
    vis, ir = pairs(1, 32, 32)
    broken = vis.clone()
    broken[0, 1, 3, 3] = float("inf")
    pending = [runtime.submit(image, ir) for image in (broken, vis, vis, broken)]
    for number, one in enumerate(pending):
        if number in (0, 3):
            with pytest.raises(NumericsError, match="not finite"):
                one.result()
        else:
            assert largest_difference(one.result(), model.fuse(vis, ir)) == 0
    with pytest.raises(RuntimeError, match="asked for twice"):
        pending[1].result()


def test_noise_of_long_runs_is_drawn_by_step_and_one_seed_of_a_batch_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []

    def counted(seeds: Sequence[int], like: Tensor) -> NoiseSource:
        draw = noise_like(seeds, like)

        def count() -> Any:
            drawn.extend(seeds)
            return draw()

        return count

    monkeypatch.setattr(supplies, "noise_like", counted)
    noise = NoiseCache(torch.device("cpu"))
    shape = (4, 2, 3)
    first = noise.one_by_one([7, 8, 7], 3, shape)
    next(first)
    assert drawn == [7, 8]
    steps = [next(first), next(first)]
    assert list(first) == []
    assert drawn == [7, 8] * 3
    again = list(noise.one_by_one([8, 7], 3, shape))
    assert drawn == [7, 8] * 3 + [8] * 3
    for one, other in zip(steps, again[1:], strict=True):
        assert all(torch.equal(one[seed], other[seed]) for seed in (7, 8))
    assert torch.equal(noise(8, 3, shape), torch.stack([step[8] for step in again]))
    assert len(drawn) == 9
    small = NoiseCache(torch.device("cpu"), max_bytes=4 * 3 * 2 * 24 - 1)
    for _ in range(2):
        list(small.one_by_one([7], 3, shape))
    assert len(drawn) == 9 + 6  # too much to be kept


@pytest.mark.parametrize(
    "words", ["CUDA error: operation not permitted when stream is capturing", "CUDA out of memory", "no such algorithm"]
)
def test_a_shape_that_cannot_be_recorded_stays_eager(words: str, caplog: pytest.LogCaptureFixture) -> None:
    model, recorder = tiny_model(), BrokenRecorder(RuntimeError(words), 2)
    runtime = Runtime(model, precision="float32", graphs=True, recorder=recorder)
    runtime.record([(1, 32, 32), (2, 32, 32)])
    tried = recorder.num_tried
    for seed in range(4):
        vis, ir = pairs(2, 32, 32, seed=seed)
        assert largest_difference(runtime.fuse(vis, ir, seeds=seed), model.fuse(vis, ir, seeds=seed)) == 0
    assert recorder.num_tried == tried == 2
    assert [record.message for record in caplog.records] == ["a run cannot be recorded and stays eager"]
    assert recorder.events == ["upload", "run", "download"]  # of the other shape, when it was made ready


def test_recording_is_given_up_where_nothing_can_be_recorded(caplog: pytest.LogCaptureFixture) -> None:
    recorder = BrokenRecorder(RuntimeError("CUDA error: operation not permitted when stream is capturing"), 1)
    runtime = Runtime(tiny_model(), precision="float32", graphs=True, recorder=recorder)
    for width in (32, 40, 48, 56, 64):
        for _ in range(3):
            runtime.fuse(*pairs(1, 32, width))
    assert recorder.num_tried == ProgramCache.MAX_FAILED_CAPTURES
    assert caplog.records[-1].message == "recording is given up: all runs are eager from now on"


def test_too_little_memory_for_some_shapes_does_not_end_recording() -> None:
    recorder = BrokenRecorder(torch.OutOfMemoryError("CUDA out of memory"), 2)
    runtime = Runtime(tiny_model(), precision="float32", graphs=True, recorder=recorder)
    runtime.record([(2, 32, width) for width in (32, 40, 48, 56)])
    runtime.record([(1, 32, 32)])
    assert runtime.num_recorded == 1


class Latents:
    """Stands for what a run has on the device."""


def test_a_pair_that_does_not_fit_beside_recorded_runs_takes_their_room(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, recorder = tiny_model(), SlowRecorder()
    runtime = Runtime(model, precision="float32", graphs=True, recorder=recorder)
    runtime.record([(1, 32, 32), (2, 32, 32)])
    run = runtime._eager
    held: list[weakref.ref[Latents]] = []

    def tight(*arguments: Any, **options: Any) -> Any:
        latents = Latents()
        assert all(other() is None for other in held), "the failed run is still in memory"
        held.append(weakref.ref(latents))
        if runtime.num_recorded:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(*arguments, **options)

    vis, ir = pairs(1, 32, 32)
    under_way = runtime.submit(vis, ir)
    assert runtime._programs is not None
    clear = runtime._programs.clear

    def cleared() -> None:
        assert held[-1]() is None, "what the allocator is to give back is still held"
        clear()

    monkeypatch.setattr(runtime._programs, "clear", cleared)
    monkeypatch.setattr(runtime, "_eager", tight)
    with pytest.raises(torch.OutOfMemoryError):
        runtime.fuse(*pairs(2, 32, 48))  # its halves may fit
    assert runtime.num_recorded == 2
    held.clear()
    large = pairs(1, 48, 64)
    assert largest_difference(runtime.fuse(*large), model.fuse(*large)) == 0
    assert [record.message for record in caplog.records] == [
        "recorded runs are given up for a pair that does not fit beside them"
    ]
    told = runtime.activity
    assert (len(held), told.programs, told.evictions, told.eager_runs) == (2, 0, 2, 2)
    assert largest_difference(under_way.result(), model.fuse(vis, ir)) == 0


def test_recorded_runs_are_given_up_for_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime, _ = recording(tiny_model())
    runtime.record([(1, 32, 32)])

    def broken(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("no such algorithm")

    monkeypatch.setattr(runtime, "_eager", broken)
    with pytest.raises(RuntimeError, match="no such algorithm"):
        runtime.fuse(*pairs(1, 48, 64))
    assert runtime.num_recorded == 1


def test_a_lost_device_is_not_taken_for_a_shape_that_cannot_be_recorded() -> None:
    recorder = BrokenRecorder(RuntimeError("CUDA error: an illegal memory access was encountered"), 1)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        Runtime(tiny_model(), precision="float32", graphs=True, recorder=recorder).record([(1, 32, 32)])


def test_a_deferred_runtime_records_when_told() -> None:
    model, recorder = tiny_model(), CountingRecorder()
    runtime = Runtime(model, precision="float32", graphs=True, recorder=recorder, defers_recording=True)
    vis, ir = pairs(1, 32, 32)
    due_in_s = [runtime.due_in_s]
    for _ in range(5):
        runtime.fuse(vis, ir)
    assert recorder.num_recorded == 0
    due_in_s.append(runtime.due_in_s)
    assert due_in_s == [None, 0.0]
    assert runtime.record_due()
    assert recorder.num_recorded == 1
    assert not runtime.record_due()
    assert largest_difference(runtime.fuse(vis, ir), model.fuse(vis, ir)) == 0
    assert recorder.events == ["upload", "run", "download"]


def test_what_may_wait_is_recorded_when_told() -> None:
    runtime, recorder = recording(tiny_model(), defers_recording=True, max_graphs=2)
    fused: tuple[OutputName, ...] = ("fused",)
    runtime.record([(1, 32, 32)], outputs=fused)
    runtime.record([(1, 32, 32), (2, 32, 32)], later=True)
    assert runtime.num_recorded == 1
    assert runtime.due_in_s  # it is too soon
    assert runtime._programs is not None
    runtime._programs._clock = lambda: math.inf
    assert runtime.due_in_s == 0.0
    assert runtime.record_due()
    assert (runtime.num_recorded, recorder.num_recorded) == (2, 2)
    assert not runtime.record_due()  # the other is vouched for no more than those that have the room
    runtime.fuse(*pairs(1, 32, 32), outputs=fused)
    runtime.fuse(*pairs(1, 32, 32))
    assert (runtime.activity.recorded_runs, runtime.activity.evictions) == (3, 0)


def test_a_runtime_tells_what_it_does() -> None:
    model, recorder = tiny_model(), BrokenRecorder(RuntimeError("no such algorithm"), 2)
    runtime = Runtime(model, precision="float32", graphs=True, recorder=recorder, max_graphs=1, defers_recording=True)
    runtime.record([(1, 32, 32), (2, 32, 32)])
    told = runtime.activity
    assert (told.recordings, told.failed_recordings, told.programs, told.evictions) == (1, 1, 0, 1)
    assert (told.recorded_runs, told.eager_runs) == (1, 1)
    runtime.record([(1, 32, 48)])
    for _ in range(3):
        runtime.fuse(*pairs(1, 32, 48))
    told = runtime.activity
    assert (told.recordings, told.programs, told.recorded_runs, told.eager_runs) == (2, 1, 5, 1)
    assert told.recording_s > 0
    assert told.program_bytes > 4 * 4 * 32 * 48 * 8
    assert Runtime(model, precision="float32").activity.programs == 0


class Shelf:
    """A cache of programs that are but a size; a recording takes ten seconds. recorded: their keys in order."""

    def __init__(self, max_programs: int = 4, size_bytes: int = 10, **options: Any) -> None:
        self.now_s = 0.0
        self.recorded: list[Any] = []
        self.size_bytes = size_bytes
        self.cache = ProgramCache(max_programs, self.build, clock=lambda: self.now_s, **options)

    def build(self, key: Any) -> Any:
        self.now_s += 10.0
        self.recorded.append(key)
        return SimpleNamespace(size_bytes=self.size_bytes)

    def get(self, key: Any, times: int = 1, **options: Any) -> None:
        for _ in range(times):
            self.cache.get(key, **options)

    def held(self, keys: Sequence[Any]) -> list[Any]:
        return [key for key in keys if key in self.cache]


def test_more_shapes_in_turn_than_there_is_room_for_are_not_recorded_round_after_round() -> None:
    shelf = Shelf(4)
    for _ in range(50):
        for key in range(5):
            shelf.get(key)
    assert sorted(shelf.recorded) == [0, 1, 2, 3]


def test_a_shape_used_more_takes_the_place_of_the_one_used_least() -> None:
    shelf = Shelf(3)
    for key, times in (("a", 9), ("b", 3), ("c", 9), ("d", 4)):
        shelf.get(key, times)
    assert shelf.held("abcd") == ["a", "b", "c"]
    shelf.get("d")
    assert shelf.held("abcd") == ["a", "c", "d"]
    shelf.get("e", 5)
    assert shelf.held("acde") == ["a", "c", "d"]


def test_what_was_vouched_for_gives_way_to_what_is_used_after_a_time() -> None:
    shelf = Shelf(1)
    shelf.get("warm", record=True)
    shelf.get("used", ProgramCache.VOUCHED + 1)
    assert shelf.held(["warm", "used"]) == ["warm"]
    shelf.get("used")
    assert shelf.held(["warm", "used"]) == ["used"]
    shelf.get("once", 3 * ProgramCache.HALF_LIFE)
    shelf.get("used", 2)
    assert shelf.held(["once"]) == ["once"]


def test_programs_are_bounded_by_bytes() -> None:
    shelf = Shelf(64, size_bytes=10, max_bytes=35)
    for key in range(9):
        shelf.get(key, record=True)
        assert shelf.cache.size_bytes <= 35
    assert len(shelf.cache) == 3
    shelf.size_bytes = 50
    shelf.get("huge", record=True)
    assert (shelf.held(["huge"]), len(shelf.cache)) == (["huge"], 1)


def test_recording_takes_a_tenth_of_the_time_at_most_whatever_is_asked_for() -> None:
    """A client that varies its options, twice each, for an hour; the server is idle every second second."""
    shelf = Shelf(1000, is_deferred=True)
    for number in range(1800):
        shelf.get(number, 2)
        shelf.now_s += 2.0
        if shelf.cache.due_in_s == 0:
            assert shelf.cache.record_due()
    assert 0.08 < 10.0 * len(shelf.recorded) / shelf.now_s <= 0.11


def test_a_cache_tells_when_it_may_record_again() -> None:
    shelf = Shelf(is_deferred=True)
    shelf.get("a", 2)
    shelf.get("b", 2)
    assert (shelf.cache.due_in_s, shelf.cache.record_due()) == (0.0, True)
    assert shelf.cache.due_in_s == pytest.approx(90.0)
    shelf.now_s += 91.0
    assert (shelf.cache.due_in_s, shelf.cache.record_due()) == (0.0, True)
    assert shelf.cache.due_in_s is None


def test_a_busy_server_records_in_the_end() -> None:
    shelf = Shelf(4, is_deferred=True)
    shelf.get("a", ProgramCache.OVERDUE - 1)
    assert shelf.recorded == []
    shelf.get("a")
    assert shelf.recorded == ["a"]


def test_the_shape_used_most_is_recorded_first() -> None:
    shelf = Shelf(4, is_deferred=True)
    for key, times in (("a", 2), ("b", 5), ("c", 3), ("d", 1)):
        shelf.get(key, times)
    while shelf.cache.record_due():
        shelf.now_s += 100.0
    assert shelf.recorded == ["b", "c", "a"]


def test_bytes_of_a_program_are_its_own_or_what_the_pool_grew_by() -> None:
    class Growing(CountingRecorder):
        reserved = 0

        def record(self, function: Callable[[], Results]) -> tuple[Callable[[], None], Results]:
            self.reserved += 1 << 30
            return super().record(function)

        def reserved_bytes(self) -> int:
            return self.reserved

    sizes = []
    for recorder in (CountingRecorder(), Growing()):
        runtime = Runtime(tiny_model(), precision="float32", graphs=True, recorder=recorder)
        runtime.record([(1, 32, 32)])
        assert runtime._programs is not None
        sizes.append(runtime._programs.size_bytes)
    draws = 2 * 4 * 4 * 4 * 4  # one draw for both modalities, four channels of 4x4, float32
    frames = 4 * 32 * 32 * 4
    images = frames + 4 * 32 * 32 * (3 + 3 + 1) + 1  # the flag is a byte
    # What the run sees, two sets of it on the device, and the frames of both on the host.
    assert sizes[0] == 3 * images + 2 * frames + draws
    assert sizes[1] == 2 * images + 2 * frames + (1 << 30)


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
    # Algorithms chosen by trial round otherwise, and in bfloat16 single values then differ by many of its coarse steps.
    distance, tolerance = (largest_difference, 1e-4) if precision == "float32" else (rms_difference, 2e-2)
    for seed in (0, 1, 99):
        vis, ir = pairs(*shape, seed=seed)
        assert distance(captured.fuse(vis, ir, seeds=seed), eager.fuse(vis, ir, seeds=seed)) < tolerance
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
        assert rms_difference(one, other) < 1e-2
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
