"""The assembled model: items are independent, sizes come back, only what is asked is computed, wrong input is named."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from recofuse_core.errors import ConfigError, NumericsError, ShapeError
from recofuse_core.model import ModelConfig, ReCoFuse, TorchNetworks, noise_like
from recofuse_core.picture import ALL_OUTPUTS, OutputName
from recofuse_core.sampler import SAMPLERS, Pair, Prediction, SamplerName
from recofuse_core.tiling import TilingConfig
from tests.core.tiny import GATED, PUBLISHED, images_of, largest_difference, pairs, tiny_model

GATED_MODEL, PUBLISHED_MODEL = tiny_model(), tiny_model(PUBLISHED)
MODELS = pytest.mark.parametrize("model", [GATED_MODEL, PUBLISHED_MODEL], ids=["gated", "published"])


@MODELS
@settings(deadline=None, max_examples=4)
@given(st.integers(32, 70), st.integers(32, 70))
def test_odd_sizes_come_back(model: ReCoFuse, height: int, width: int) -> None:
    output = model.fuse(*pairs(1, height, width), steps=1)
    assert output.fused is not None
    assert output.vis is not None
    assert output.ir is not None
    assert output.fused.shape == output.vis.shape == (1, 3, height, width)
    assert output.ir.shape == (1, 1, height, width)
    assert all(0 <= float(image.min()) <= float(image.max()) <= 1 for image in images_of(output))
    assert all(image.dtype == torch.float32 for image in images_of(output))


@MODELS
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_batch_equals_its_items_one_by_one(model: ReCoFuse, sampler: SamplerName) -> None:
    vis, ir = pairs(3, 40, 56)
    seeds = [5, 0, 123]
    together = model.fuse(vis, ir, sampler=sampler, steps=3, seeds=seeds)
    for i, seed in enumerate(seeds):
        alone = model.fuse(vis[i : i + 1], ir[i : i + 1], sampler=sampler, steps=3, seeds=seed)
        for batch, item in zip(images_of(together), images_of(alone), strict=True):
            # A noise predictor's early estimates magnify rounding, which differs between batch sizes.
            torch.testing.assert_close(batch[i : i + 1], item, rtol=0, atol=1e-3)
            assert float((batch[i - 1] - item[0]).abs().max()) > 1e-2


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_seed_decides_the_picture(sampler: SamplerName) -> None:
    vis, ir = pairs(1, 32, 48)
    one, again, other = (GATED_MODEL.fuse(vis, ir, sampler=sampler, seeds=seed) for seed in (7, 7, 8))
    assert largest_difference(one, again) == 0
    assert largest_difference(one, other) > 1e-4


def test_one_seed_stands_for_all() -> None:
    vis, ir = pairs(1, 32, 32)
    both = GATED_MODEL.fuse(vis.expand(2, -1, -1, -1), ir.expand(2, -1, -1, -1), seeds=3)
    assert all(torch.allclose(image[0], image[1], atol=1e-6) for image in images_of(both))


@MODELS
@pytest.mark.parametrize("outputs", [("fused",), ("vis",), ("ir",), ("ir", "fused")])
def test_only_what_is_asked_is_decoded(
    model: ReCoFuse, outputs: tuple[OutputName, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    vis, ir = pairs(1, 32, 48)
    whole = model.fuse(vis, ir)
    num_decoded = 0
    decode = model.autoencoder.decode

    def counted(*args: object) -> Tensor:
        nonlocal num_decoded
        num_decoded += 1
        return decode(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(model.autoencoder, "decode", counted)
    part = model.fuse(vis, ir, outputs=outputs)
    assert num_decoded == len(outputs)
    for name in ALL_OUTPUTS:
        expected = getattr(whole, name) if name in outputs else None
        actual = getattr(part, name)
        assert (actual is None) == (expected is None)
        assert actual is None or (expected is not None and torch.equal(actual, expected))


@MODELS
def test_levels_go_in_and_come_out(model: ReCoFuse) -> None:
    vis, ir = ((image * 255).round().byte() for image in pairs(2, 33, 50))
    levels = model.fuse(vis, ir, seeds=4)
    images = model.fuse(vis.float() / 255, ir.float() / 255, seeds=4)
    for level, image in zip(images_of(levels), images_of(images), strict=True):
        assert level.dtype == torch.uint8
        assert torch.equal(level, (image * 255).round().byte())


def test_without_coupling_the_branches_see_only_their_own_image() -> None:
    vis, ir = pairs(1, 32, 48)
    other_vis, other_ir = pairs(1, 32, 48, seed=9)
    base = GATED_MODEL.fuse(vis, ir, coupled=False)
    assert torch.equal(GATED_MODEL.fuse(vis, other_ir, coupled=False).vis, base.vis)  # type: ignore[arg-type]
    assert torch.equal(GATED_MODEL.fuse(other_vis, ir, coupled=False).ir, base.ir)  # type: ignore[arg-type]
    coupled = GATED_MODEL.fuse(vis, other_ir).vis, GATED_MODEL.fuse(vis, ir).vis
    assert not torch.equal(*coupled)  # type: ignore[arg-type]


def test_predictions_start_from_the_fused_state_or_from_their_own() -> None:
    shape = GATED_MODEL.latent_shape(2, 32, 48)
    vis, ir, vis_mu, ir_mu = torch.randn(4, *shape)
    coupled = GATED_MODEL.predict(Pair(vis, ir), Pair(vis_mu, ir_mu), 50)
    assert torch.equal(coupled.start.vis, GATED_MODEL.fusion(vis, ir, torch.tensor([50])))
    assert coupled.start.vis is coupled.start.ir
    apart = GATED_MODEL.predict(Pair(vis, ir), Pair(vis_mu, ir_mu), 50, coupled=False)
    assert apart.start == Pair(vis, ir)


def ablated(config: ModelConfig) -> ReCoFuse:
    """The same weights in a model of another config."""
    model = tiny_model(config)
    model.load_state_dict(GATED_MODEL.state_dict())
    return model


def test_a_model_without_coupling_never_couples_and_fuses_late_or_not_at_all() -> None:
    vis, ir = pairs(1, 32, 48)
    apart = GATED_MODEL.fuse(vis, ir, coupled=False)
    late = ablated(replace(GATED, coupling="late")).fuse(vis, ir)
    for image, expected in zip(images_of(late), images_of(apart), strict=True):
        assert torch.equal(image, expected)
    without = ablated(replace(GATED, coupling="none"))
    fused = without.fuse(vis, ir)
    assert torch.equal(fused.vis, apart.vis)  # type: ignore[arg-type]
    assert not torch.equal(fused.fused, apart.fused)  # type: ignore[arg-type]
    latents = Pair(*torch.randn(2, *without.latent_shape(1, 32, 48)))
    assert torch.allclose(without.final_fusion(latents), (latents.vis + latents.ir) / 2)


def test_fusion_without_time_takes_every_step_alike() -> None:
    timeless = ablated(replace(GATED, fusion=replace(GATED.fusion, uses_time=False))).fusion
    vis, ir = torch.randn(2, 1, 4, 4, 6)
    early, late = (timeless(vis, ir, torch.tensor([t])) for t in (3, 90))
    assert torch.equal(early, late)
    assert torch.equal(early, GATED_MODEL.fusion(vis, ir, torch.tensor([0])))
    assert not torch.equal(*(GATED_MODEL.fusion(vis, ir, torch.tensor([t])) for t in (3, 90)))


def test_a_step_per_item_is_that_step_for_that_item() -> None:
    """Training gives every item its own step: the path whose modulation is not folded into the norms."""
    shape = PUBLISHED_MODEL.latent_shape(2, 32, 48)
    vis, ir, vis_mu, ir_mu = torch.randn(4, *shape)
    together = PUBLISHED_MODEL.predict(Pair(vis, ir), Pair(vis_mu, ir_mu), torch.tensor([90, 3]))
    for i, t in enumerate((90, 3)):
        one = slice(i, i + 1)
        alone = PUBLISHED_MODEL.predict(Pair(vis[one], ir[one]), Pair(vis_mu[one], ir_mu[one]), t)
        for batch, item in zip((*together.start, *together.output), (*alone.start, *alone.output), strict=True):
            torch.testing.assert_close(batch[one], item, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("vis", "ir", "message"),
    [
        (torch.zeros(1, 3, 40), torch.zeros(1, 1, 40, 40), r"vis must be \(B, 3, H, W\)"),
        (torch.zeros(1, 1, 40, 40), torch.zeros(1, 1, 40, 40), r"vis must be \(B, 3, H, W\)"),
        (torch.zeros(1, 3, 40, 40), torch.zeros(1, 3, 40, 40), r"ir must be \(B, 1, H, W\)"),
        (torch.zeros(1, 3, 40, 40), torch.zeros(1, 1, 40, 41), "of the size of vis"),
        (torch.zeros(2, 3, 40, 40), torch.zeros(1, 1, 40, 40), "of the size of vis"),
        (torch.zeros(1, 3, 40, 40, dtype=torch.int32), torch.zeros(1, 1, 40, 40), "floating point"),
        (torch.zeros(1, 3, 40, 40, dtype=torch.uint8), torch.zeros(1, 1, 40, 40), "both uint8"),
        (torch.zeros(1, 3, 31, 40), torch.zeros(1, 1, 31, 40), "at least 32 px, got 40x31"),
        (torch.zeros(0, 3, 40, 40), torch.zeros(0, 1, 40, 40), "at least 32 px"),
    ],
)
def test_wrong_tensors_are_refused(vis: Tensor, ir: Tensor, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        GATED_MODEL.fuse(vis, ir)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"seeds": [1, 2, 3]}, ShapeError, "2 pairs need 2 seeds or one, got 3"),
        ({"sampler": "heun"}, ConfigError, "unknown sampler 'heun'"),
        ({"steps": 0}, ConfigError, "within 1..100, got 0"),
        ({"steps": 101}, ConfigError, "within 1..100, got 101"),
        ({"outputs": ()}, ConfigError, "outputs must be some of fused, vis, ir"),
        ({"outputs": ("fused", "depth")}, ConfigError, "depth"),
    ],
)
def test_wrong_options_are_refused(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        GATED_MODEL.fuse(*pairs(2, 32, 32), **arguments)  # type: ignore[arg-type]


def test_a_result_that_is_not_finite_is_an_error() -> None:
    vis, ir = pairs(1, 32, 32)
    vis[0, 0, 5, 5] = float("nan")
    with pytest.raises(NumericsError, match="not finite"):
        GATED_MODEL.fuse(vis, ir)


def test_networks_must_agree_on_the_latent() -> None:
    with pytest.raises(ConfigError, match="latent channels"):
        replace(GATED, fusion=replace(GATED.fusion, latent_channels=5))
    with pytest.raises(ConfigError, match="default steps"):
        replace(GATED, steps=101)


@pytest.mark.parametrize(
    ("config", "batch"), [(GATED, 1), (GATED, 2), (PUBLISHED, 1)], ids=["gated", "two", "published"]
)
@pytest.mark.parametrize("coupled", [True, False])
def test_tiles_together_are_tiles_one_by_one(
    monkeypatch: pytest.MonkeyPatch, config: ModelConfig, batch: int, coupled: bool
) -> None:
    """Six tiles, four pairs of them at most in a batch: three and three, or two and two and two."""
    model = tiny_model(config)
    vis, ir = pairs(batch, 80, 112)
    tiling = TilingConfig(max_pixels=32 * 32, tile=48, overlap=16)
    options: dict[str, Any] = {"tiling": tiling, "coupled": coupled, "steps": 2, "sampler": "ode2"}
    one_by_one = model.fuse(vis, ir, **options)
    batches: list[int] = []
    monkeypatch.setattr(TorchNetworks, "tile_batch", 4)
    encode = model.autoencoder.encode

    def counted(image: Tensor) -> Any:
        batches.append(len(image))
        return encode(image)

    monkeypatch.setattr(model.autoencoder, "encode", counted)
    assert largest_difference(model.fuse(vis, ir, **options), one_by_one) < 2e-5
    assert batches == ([3, 3] if batch == 1 else [4, 4, 4]) * 2


def test_tiling_reaches_the_model() -> None:
    vis, ir = pairs(1, 160, 200)
    whole = GATED_MODEL.fuse(vis, ir)
    tiled = GATED_MODEL.fuse(vis, ir, tiling=TilingConfig(max_pixels=64 * 64, tile=128, overlap=64))
    assert largest_difference(whole, tiled) > 0
    assert [image.shape for image in images_of(tiled)] == [image.shape for image in images_of(whole)]


def test_noise_predictors_begin_late_but_for_euler_steps() -> None:
    """At T their clean latent would magnify errors a thousand times; Euler steps read none."""
    model = tiny_model(PUBLISHED)

    def first(model: ReCoFuse, sampler: SamplerName, steps: int, start: int | None = None) -> int:
        return model.plan(sampler=sampler, steps=steps, start=start).timesteps[0]

    assert first(model, "euler", 20) == 100
    for sampler in ("ode1", "ode2", "posterior"):
        assert first(model, sampler, 3) == first(model, sampler, 60) == 60
        assert first(model, sampler, 80) == 80  # so many steps want room
        assert first(model, sampler, 3, start=100) == 100
        assert first(GATED_MODEL, sampler, 3) == 100
    with pytest.raises(ConfigError, match="steps must be within"):
        model.plan(sampler="ode1", steps=101)


def test_a_warm_start_at_the_last_step_is_a_cold_one() -> None:
    """There the marginal has forgotten all but eps = 0.005 of what it started from."""
    before, frame = pairs(1, 32, 48, seed=1), pairs(1, 32, 48)
    earlier = GATED_MODEL.fuse(*before).latents
    cold = GATED_MODEL.fuse(*frame, steps=2)
    warm = GATED_MODEL.fuse(*frame, steps=2, previous=earlier, start=GATED_MODEL.sde.num_steps)
    late = GATED_MODEL.fuse(*frame, steps=2, previous=earlier, start=20)
    assert largest_difference(cold, warm) < 0.2 * largest_difference(cold, late)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_warm_start_is_the_marginal_of_the_earlier_latents(sampler: SamplerName) -> None:
    seen: list[tuple[Pair, Pair, int]] = []
    model = tiny_model()
    predict = model.predict

    def spy(state: Pair, mu: Pair, t: int, **options: Any) -> Prediction:
        seen.append((state, mu, t))
        return predict(state, mu, t, **options)

    model.predict = spy  # type: ignore[assignment, method-assign]
    before, frame = pairs(2, 40, 56, seed=1), pairs(2, 40, 56)
    earlier = model.fuse(*before, seeds=[7, 8]).latents
    assert earlier is not None
    seen.clear()
    warm = model.fuse(*frame, sampler=sampler, steps=2, seeds=[7, 8], previous=earlier, start=30)
    state, mu, t = seen[0]
    assert (t, len(seen)) == (30, 2)
    draw = noise_like([7, 8], mu.vis)()
    for x, clean, m, n in zip(state, earlier, mu, draw, strict=True):
        expected = m + (clean - m) * model.sde.alpha[30] + model.sde.sigma_bar[30] * n
        torch.testing.assert_close(x, expected)
    seen.clear()
    model.fuse(*frame, sampler=sampler, steps=1, seeds=[7, 8], start=30)  # without earlier latents: from mu
    for x, m, n in zip(seen[0][0], mu, draw, strict=True):
        torch.testing.assert_close(x, m + model.sde.sigma_bar[30] * n)
    alone = Pair(earlier.vis[1:], earlier.ir[1:])
    item = model.fuse(frame[0][1:], frame[1][1:], sampler=sampler, steps=2, seeds=8, previous=alone, start=30)
    for batch, one in zip(images_of(warm), images_of(item), strict=True):
        torch.testing.assert_close(batch[1:], one, rtol=0, atol=1e-4)


def test_a_warm_start_must_be_possible() -> None:
    latents = GATED_MODEL.fuse(*pairs(1, 32, 48)).latents
    for options, error in (
        ({"start": 0}, ConfigError),
        ({"previous": latents, "start": GATED_MODEL.sde.num_steps + 1}, ConfigError),
        ({"previous": latents, "start": 2, "steps": 3}, ConfigError),
    ):
        with pytest.raises(error):
            GATED_MODEL.fuse(*pairs(1, 32, 48), **options)
    with pytest.raises(ShapeError):
        GATED_MODEL.fuse(*pairs(1, 48, 48), previous=latents)
