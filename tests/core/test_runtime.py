"""The runtime computes what the model computes: frozen, in half precision, and on a GPU."""

import copy
import gc
import re
import weakref

import pytest
import torch

from recofuse_core import load_pretrained, precision
from recofuse_core.errors import ConfigError
from recofuse_core.model import ModelConfig
from recofuse_core.precision import DTYPES, choose_dtype, frozen_copy, measure, native_dtypes, trial_frames
from recofuse_core.runtime import Runtime
from recofuse_core.sampler import SAMPLERS, SamplerName
from recofuse_core.scenes.scene import make_scene
from recofuse_core.supplies import ScheduleCache
from tests.core.tiny import CONFIGS, PUBLISHED, images_of, largest_difference, pairs, tiny_model

CPU = torch.device("cpu")


@CONFIGS
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_frozen_model_gives_the_same_picture(config: ModelConfig, sampler: SamplerName) -> None:
    model = tiny_model(config)
    vis, ir = pairs(2, 40, 50)
    runtime = Runtime(model, precision="float32")
    for _ in range(2):  # the second time every schedule is there already
        output = runtime.fuse(vis, ir, sampler=sampler, steps=3, seeds=[1, 2])
        assert largest_difference(output, model.fuse(vis, ir, sampler=sampler, steps=3, seeds=[1, 2])) == 0
    assert runtime.info == model.info
    assert not runtime.records


def test_the_runtime_keeps_the_weights_it_was_given() -> None:
    model = tiny_model()
    vis, ir = pairs(1, 32, 32)
    before = copy.deepcopy(model.state_dict())
    runtime = Runtime(model, precision="bfloat16", stacked=True)
    first = runtime.fuse(vis, ir)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    for parameter in model.parameters():
        parameter.data.zero_()
    assert largest_difference(runtime.fuse(vis, ir), first) == 0


def test_the_model_that_was_given_is_let_go_of() -> None:
    model = tiny_model()
    gone = weakref.ref(model)
    runtime = Runtime(model, precision="bfloat16", graphs=True, stacked=True)
    del model
    gc.collect()  # modules refer to each other
    assert gone() is None
    assert runtime.model is not None


@CONFIGS
def test_half_precision_keeps_the_picture(config: ModelConfig) -> None:
    """Random weights magnify rounding more than trained ones, and by how much varies from run to run."""
    model = tiny_model(config)
    vis, ir = pairs(1, 64, 80)
    exact = model.fuse(vis, ir, sampler="ode2", steps=3)
    half = Runtime(model, precision="bfloat16").fuse(vis, ir, sampler="ode2", steps=3)
    assert largest_difference(exact, half) > 0
    for a, b in zip(images_of(exact), images_of(half), strict=True):
        assert b.dtype == torch.float32
        assert float((a - b).square().mean().sqrt()) < 0.05


def test_half_precision_costs_the_shipped_weights_less_than_a_level() -> None:
    model, scene = load_pretrained("compact"), make_scene(2, 192, 256)
    exact = model.fuse(scene.vis[None], scene.ir[None])
    half = Runtime(model, precision="bfloat16").fuse(scene.vis[None], scene.ir[None])
    for a, b in zip(images_of(exact), images_of(half), strict=True):
        assert 0 < float((a - b).square().mean().sqrt()) < 1 / 255


def test_what_stays_in_float32() -> None:
    model = frozen_copy(tiny_model(PUBLISHED), torch.bfloat16, stacked=False)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert dtypes["autoencoder.init_conv.weight"] == torch.float32
    assert dtypes["autoencoder.final_conv.weight"] == torch.float32
    assert dtypes["denoiser.vis.time.expand.weight"] == torch.float32
    assert dtypes["denoiser.vis.encoders.0.0.time_projection.weight"] == torch.float32
    assert dtypes["denoiser.vis.encoders.0.0.expand1.weight"] == torch.bfloat16
    assert dtypes["autoencoder.latent_conv.weight"] == torch.bfloat16
    assert dtypes["fusion.intro.weight"] == torch.float32  # on a CPU
    assert not any(parameter.requires_grad for parameter in model.parameters())


@CONFIGS
def test_latents_cross_every_border_in_float32(config: ModelConfig) -> None:
    model = frozen_copy(tiny_model(config), torch.bfloat16, stacked=False)
    vis, _ = pairs(1, 32, 48)
    latent, skips = model.autoencoder.encode(vis)
    assert latent.dtype == torch.float32
    assert model.autoencoder.decode(latent, skips, (32, 48)).dtype == torch.float32
    prediction = model.denoiser.denoise(latent, latent, latent, latent, model.condition(9).denoiser)
    assert all(output.dtype == torch.float32 for output in prediction)
    assert model.fusion(latent, latent, torch.tensor([3])).dtype == torch.float32


def test_precision_by_name() -> None:
    model = tiny_model()
    for name, dtype in DTYPES.items():
        assert choose_dtype(model, name, stacked=False) == (dtype, "as asked")  # type: ignore[arg-type]
    dtype, _ = choose_dtype(model, "auto", stacked=False)
    assert dtype == (native_dtypes(CPU) or (torch.float32,))[0]
    with pytest.raises(ConfigError, match="precision must be auto, float32, bfloat16, float16, got 'int8'"):
        Runtime(model, precision="int8")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ((9, 0), (torch.float16, torch.bfloat16)),
        ((8, 0), (torch.float16, torch.bfloat16)),
        ((7, 5), (torch.float16,)),
        ((6, 1), ()),
    ],
    ids=str,
)
def test_what_a_card_computes_in(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: tuple[torch.dtype, ...]
) -> None:
    asked: list[torch.device] = []

    def told(device: torch.device) -> tuple[int, int]:
        asked.append(device)
        return capability

    monkeypatch.setattr(torch.cuda, "get_device_capability", told)
    assert native_dtypes(torch.device("cuda:1")) == expected
    assert asked == [torch.device("cuda:1")]  # and not of the current one


def test_the_half_precision_that_is_closer_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "TRIAL_SIZE", (32, 48))
    dtype, why = precision.closest_dtype(tiny_model(), (torch.bfloat16, torch.float16), stacked=True)
    assert dtype == torch.float16
    assert re.fullmatch(r"bfloat16 is off by [\d.]+ levels, .*; float16 is off by [\d.]+ levels, .*", why)


@pytest.mark.parametrize(
    ("dtype", "error", "largest", "expected"),
    [
        (torch.float16, 0.1 / 255, 65504 / 16, True),
        (torch.float16, 0.1 / 255, 65504 / 15, False),
        (torch.bfloat16, 0.1 / 255, 65504.0, True),
        (torch.bfloat16, 1.9 / 255, 1.0, True),
        (torch.bfloat16, 2.1 / 255, 1.0, False),
        (torch.float16, float("inf"), 1.0, False),
    ],
)
def test_a_half_precision_is_close_and_values_may_grow_sixteen_times_in_it(
    dtype: torch.dtype, error: float, largest: float, expected: bool
) -> None:
    """What was tried are a few frames; others may hold larger values."""
    assert precision.Trial(dtype, error, largest).is_sound is expected


def test_weights_too_large_for_float16_do_not_run_in_it() -> None:
    model = tiny_model()
    for parameter in model.denoiser.vis.intro.parameters():
        parameter.data *= 8000
    dtype, why = precision.closest_dtype(model, (torch.float16,), stacked=False)
    assert dtype == torch.float32
    assert "too narrow for these weights: float16 is off by" in why


def test_a_card_without_bfloat16_refuses_it_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    card = torch.device("cuda")
    with pytest.raises(ConfigError, match=r"precision=bfloat16: this GPU .* take float16 or auto"):
        precision.named_dtype("bfloat16", card)
    assert precision.named_dtype("float16", card) == torch.float16
    assert precision.named_dtype("bfloat16", CPU) == torch.bfloat16


def test_the_shipped_weights_have_room_in_float16_and_are_closer_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every network in half precision, as on a GPU, where none is left out."""
    monkeypatch.setattr("recofuse_core.model._is_nothing", lambda share: False)
    half, brain = measure(
        load_pretrained("compact"), (torch.float16, torch.bfloat16), stacked=True, size=(48, 64), everywhere=True
    )
    assert half.is_sound
    assert half.largest < torch.finfo(torch.float16).max / 500
    assert half.error < 0.1 / 255
    assert half.error < brain.error / 4
    assert brain.is_sound


def test_frames_to_try_a_model_on_use_the_whole_range() -> None:
    vis, ir = trial_frames((48, 64))
    assert (vis.shape, ir.shape) == ((3, 3, 48, 64), (3, 1, 48, 64))
    for frames in (vis, ir):
        assert float(frames.min()) >= 0
        assert float(frames.max()) <= 1
    assert float(vis[1].mean()) < 0.15
    assert set(vis[2].flatten().tolist()) == {0.0, 1.0}


def test_a_schedule_is_made_once() -> None:
    model = tiny_model()
    cache = ScheduleCache(model)
    assert cache(5) is cache(5)
    assert cache(5) is not cache(6)


@pytest.mark.gpu
@pytest.mark.parametrize("stacked", [False, True])
def test_a_gpu_gives_the_picture_of_a_cpu(stacked: bool) -> None:
    model = tiny_model()
    vis, ir = pairs(2, 64, 80)
    expected = model.fuse(vis, ir, seeds=[3, 4])
    runtime = Runtime(copy.deepcopy(model).cuda(), precision="float32", stacked=stacked)
    for _ in range(3):
        assert largest_difference(runtime.fuse(vis, ir, seeds=[3, 4]), expected) < 1e-3
