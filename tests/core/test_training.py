"""Training: batches, updates, exact resumption, and a whole run from a configuration file."""

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Generator, Tensor, nn

from recofuse_core import PRESETS, load_pretrained
from recofuse_core.errors import CheckpointError, ConfigError, DatasetError
from recofuse_core.losses import FusionTargets, GradientTarget, chroma, fusion_loss, log_error, luma, strongest
from recofuse_core.networks import ToneConfig, ToneEstimator
from recofuse_core.sampler import Pair, Prediction
from recofuse_core.scenes.scene import make_scene
from recofuse_core.training import (
    DataConfig,
    Encoded,
    LatentSource,
    Lion,
    PairSource,
    RawPair,
    StageConfig,
    StageName,
    ToneSamples,
    TrainConfig,
    Trainer,
    Updates,
    Validation,
    WeightAverage,
    enhance_dark,
    learning_rate,
    read_config,
    read_images,
    tone_loss,
    train_from_config,
)

ROOT = Path(__file__).parents[2]
CROP = 32


def as_bytes(image: Tensor) -> np.ndarray:
    pixels: np.ndarray = (image * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    return pixels


def scenes() -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    for seed, name in enumerate(("street_a", "street_b", "other_c")):
        scene = make_scene(seed, 64, 80)
        yield name, as_bytes(scene.vis), as_bytes(scene.ir)[..., 0]


def stage(name: StageName, steps: int = 4, *, rollout: bool = False) -> StageConfig:
    return StageConfig(
        name=name, steps=steps, batch_size=2, crop=CROP, learning_rate=1e-3, rollout=rollout, num_frames=4
    )


def trainer(*stages: StageConfig, context: int = 0) -> Trainer:
    data = DataConfig(root="scenes", group_weights={"street": 0.9}, other_weight=0.1, context=context)
    config = TrainConfig(preset="compact", version="test", data=data, stages=stages)
    return Trainer(config, PairSource(data, scenes()))


def test_batches_depend_on_the_generator_alone_and_hold_valid_images() -> None:
    source = PairSource(DataConfig(root="scenes"), scenes())
    first, again = (source.draw(3, CROP, Generator().manual_seed(5)) for _ in range(2))
    other = source.draw(3, CROP, Generator().manual_seed(6))
    for image, same, different in zip(
        (*first.clean, *first.degraded), (*again.clean, *again.degraded), (*other.clean, *other.degraded), strict=True
    ):
        assert image.shape == (3, 3, CROP, CROP)
        assert float(image.min()) >= 0
        assert float(image.max()) <= 1
        assert torch.equal(image, same)
        assert not torch.equal(image, different)


def test_inputs_are_cut_from_the_frames_around_them() -> None:
    source = PairSource(DataConfig(root="scenes", context=48), scenes())
    batch = source.draw(4, CROP, Generator().manual_seed(3))
    assert batch.context is not None
    assert batch.context.vis.shape == (4, 3, 48, 48)
    assert batch.context.ir.shape == (4, 1, 48, 48)
    for image, frame in zip(batch.degraded.vis, batch.context.vis, strict=True):
        places = frame.unfold(1, CROP, 1).unfold(2, CROP, 1)  # (3, 17, 17, CROP, CROP)
        assert (places == image[:, None, None]).flatten(3).all(dim=3).all(dim=0).any()


def test_groups_are_drawn_by_weight_and_prefixes_are_left_out() -> None:
    dark, bright = np.full((40, 40, 3), 60, np.uint8), np.full((40, 40, 3), 200, np.uint8)
    ir = np.full((40, 40), 90, np.uint8)
    pairs = [("a_1", dark, ir), ("a_2", dark, ir), ("b_1", bright, ir), ("c_1", np.zeros_like(dark), ir)]
    config = DataConfig(root="x", exclude_prefixes=("c_",), group_weights={"a": 0.25}, other_weight=0.75)
    batch = PairSource(config, pairs).draw(200, CROP, Generator().manual_seed(0))
    share = float((batch.clean.vis.mean(dim=(1, 2, 3)) > 0.5).float().mean())
    assert 0.65 < share < 0.85
    assert float(batch.clean.vis.min()) > 0.2
    with pytest.raises(DatasetError, match="no training pair"):
        PairSource(DataConfig(root="x", exclude_prefixes=("a_",)), pairs[:1])


@pytest.mark.parametrize("with_ir", [True, False])
def test_files_that_are_degraded_already_are_inputs_as_they_are(with_ir: bool) -> None:
    (name, vis, ir), *_ = scenes()
    dark = (vis // 8).astype(np.uint8)  # so dark that it would be given another target, were it the clean file
    pair = RawPair(name, dark, ir, vis_degraded=255 - dark, ir_degraded=255 - ir if with_ir else None)
    config = DataConfig(root="x", vary_ir_probability=1.0, rescale_probability=0.0)
    batch = PairSource(config, [pair]).draw(6, CROP, Generator().manual_seed(4))
    assert torch.allclose(batch.clean.vis + batch.degraded.vis, torch.ones(()), atol=1e-6)
    assert float(batch.clean.vis.max()) <= 31.5 / 255
    both = batch.clean.ir + batch.degraded.ir
    assert torch.allclose(both, torch.ones(()), atol=1e-6) == with_ir


def test_folders_of_degraded_and_clean_files_are_read_and_scored(tmp_path: Path) -> None:
    for name, vis, ir in scenes():
        for quality, change in (("HQ", 1.0), ("LQ", 0.4)):
            for modality, image in (("vi", vis[..., ::-1]), ("ir", ir)):
                folder = tmp_path / "pairs" / "FMB" / modality / quality
                folder.mkdir(parents=True, exist_ok=True)
                cv2.imwrite(str(folder / f"{name}.png"), (image * change).astype(np.uint8))
    first, *_ = read_images(tmp_path / "pairs")
    assert (first.name, first.source) == ("other_c", "FMB")
    assert first.vis_degraded is not None
    assert first.ir_degraded is not None
    assert first.ir_degraded.shape == first.ir.shape
    assert abs(float(first.ir_degraded.mean()) - 0.4 * float(first.ir.mean())) < 1
    scores, _ = Validation(DataConfig(root="x"), tmp_path / "pairs")(load_pretrained("compact"))
    expected = [10 * math.log10(255**2 / float(((0.6 * vis.astype(float)) ** 2).mean())) for _, vis, _ in scenes()]
    assert scores["vis_degraded"] == pytest.approx(sum(expected) / len(expected), abs=0.2)


def test_groups_may_be_data_sets() -> None:
    bright, dark = np.full((40, 40, 3), 200, np.uint8), np.full((40, 40, 3), 60, np.uint8)
    ir = np.full((40, 40), 90, np.uint8)
    pairs = [RawPair("00001", bright, ir, source="FMB"), RawPair("00002", dark, ir, source="LLVIP")]
    batch = PairSource(DataConfig(root="x", exclude_prefixes=("LLVIP",)), pairs).draw(20, CROP, Generator())
    assert float(batch.clean.vis.min()) > 0.7
    weights = {"FMB": 0.0, "LLVIP": 1.0}
    batch = PairSource(DataConfig(root="x", group_weights=weights), pairs).draw(20, CROP, Generator())
    assert float(batch.clean.vis.max()) < 0.3


def test_only_dark_targets_are_lifted_and_stay_dark() -> None:
    rng = np.random.default_rng(0)
    bright = rng.integers(60, 255, (40, 50, 3), dtype=np.uint8)
    dark = rng.integers(0, 40, (40, 50, 3), dtype=np.uint8)
    assert enhance_dark(bright, 0.18) is bright
    lifted = enhance_dark(dark, 0.18)
    assert dark.mean() < lifted.mean() < 0.22 * 255
    assert lifted.shape == dark.shape


@pytest.mark.parametrize("is_dark", [True, False])
def test_only_dark_crops_are_varied_and_their_targets_alike(is_dark: bool) -> None:
    rng = np.random.default_rng(1)
    vis = rng.integers(5, 60, (CROP, CROP, 3), dtype=np.uint8) + (0 if is_dark else 120)
    pairs = [("night_1", vis.astype(np.uint8), rng.integers(0, 255, (CROP, CROP), dtype=np.uint8))]
    config = DataConfig(root="x", enhance_dark=False, dark_log_gamma=0.5, rescale_probability=0, clean_probability=1.0)
    batch = PairSource(config, pairs).draw(6, CROP, Generator().manual_seed(0))
    assert float((batch.clean.vis - batch.degraded.vis).abs().max()) <= 0.5 / 255 + 1e-6  # rounded to 8 bits
    means = batch.clean.vis.mean(dim=(1, 2, 3))
    spread = float(means.max() / means.min())
    assert spread > 1.2 if is_dark else spread == pytest.approx(1, abs=1e-4)


def test_frames_of_different_pairs_can_be_put_together() -> None:
    tone = ToneEstimator(ToneConfig(grid=8, num_quantiles=5, width=4))
    generator = Generator().manual_seed(2)
    vis, ir = torch.rand(3, 3, 20, 20, generator=generator), torch.rand(3, 1, 20, 20, generator=generator)
    cells = torch.cat([vis, ir], dim=1).flatten(2)
    samples = ToneSamples(tone.features(vis, ir), cells, cells + 1)
    order, where = torch.tensor([1, 2, 0]), torch.tensor([True, False, True])
    mixed = samples.with_infrared_of(samples.take(order), where, tone)
    wanted = torch.where(where[:, None, None, None], ir[order], ir)
    assert torch.equal(mixed.features, tone.features(vis, wanted))
    assert torch.equal(mixed.degraded, torch.cat([vis, wanted], dim=1).flatten(2))
    assert torch.equal(mixed.clean, mixed.degraded + 1)


def test_flat_curves_cost_more_with_a_spread_weight() -> None:
    tone = ToneEstimator(ToneConfig(grid=8, num_quantiles=5, width=4)).requires_grad_(False)  # the identity
    clean = torch.rand(2, 4, 50, generator=Generator().manual_seed(0)) * 0.5 + 0.25
    features = torch.zeros(2, len(tone.infrared_features()))
    flat = ToneSamples(features, clean * 0.5 + 0.25, clean)
    without, with_spread = (tone_loss(tone, flat, weight) for weight in (0.0, 2.0))
    for name, channels in (("vis", slice(3)), ("ir", slice(3, 4))):
        wanted = clean[:, channels].flatten(1).std(dim=1).mean()  # half of it is missing, and it counts twice
        assert float(with_spread[name] - without[name]) == pytest.approx(float(wanted), rel=1e-3)
    exact = ToneSamples(features, clean, clean)
    assert float(tone_loss(tone, exact, 2.0)["ir"]) == pytest.approx(float(tone_loss(tone, exact)["ir"]), abs=1e-3)


def test_lion_follows_its_formula() -> None:
    generator = Generator().manual_seed(0)
    start, gradients = torch.randn(7, generator=generator), torch.randn(3, 7, generator=generator)
    parameter = nn.Parameter(start.clone())
    optimizer = Lion([parameter], lr=0.1, betas=(0.9, 0.99), weight_decay=0.02)
    wanted, momentum = start.double().numpy(), np.zeros(7)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
        g = gradient.double().numpy()
        wanted = wanted * (1 - 0.1 * 0.02) - 0.1 * np.sign(0.9 * momentum + 0.1 * g)
        momentum = 0.99 * momentum + 0.01 * g
    np.testing.assert_allclose(parameter.detach().numpy(), wanted, rtol=1e-5)


def test_learning_rate_warms_up_and_ends_at_its_final_ratio() -> None:
    config = StageConfig("branches", 1000, 1, 32, 1e-3, warmup_steps=10, final_ratio=0.1)
    assert learning_rate(config, 0, 0.0) == pytest.approx(1e-4)
    assert learning_rate(config, 9, 0.0) == pytest.approx(1e-3)
    assert learning_rate(config, 1000, 1.0) == pytest.approx(1e-4)
    rates = [learning_rate(config, 10 + i, i / 100) for i in range(101)]
    assert rates == sorted(rates, reverse=True)


def test_average_follows_the_weights_and_starts_quickly() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    average = WeightAverage(model, 0.99)
    nn.init.ones_(model.weight)
    average.update(model)
    assert float(average.weights["weight"]) == pytest.approx(1 - 2 / 11)
    for _ in range(2000):
        average.update(model)
    assert float(average.weights["weight"]) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(
    ("name", "rollout", "still", "moving"),
    [
        ("tone", False, ("autoencoder.", "denoiser.", "fusion."), ("tone.layers", "tone.mean", "tone.std")),
        ("autoencoder", False, ("tone.", "denoiser.", "fusion."), ("autoencoder.stem", "autoencoder.head")),
        ("branches", False, ("tone.", "autoencoder."), ("denoiser.vis.", "denoiser.ir.", "fusion.")),
        ("coupled", False, ("tone.", "autoencoder."), ("denoiser.vis.", "denoiser.ir.", "fusion.")),
        (
            "coupled",
            True,
            ("tone.", "autoencoder.stem", "autoencoder.encoder", "autoencoder.down", "autoencoder.to_latent"),
            ("denoiser.vis.", "fusion.", "autoencoder.head", "autoencoder.skip_fusion"),
        ),
    ],
)
def test_each_stage_moves_its_own_networks_alone(
    name: StageName, rollout: bool, still: tuple[str, ...], moving: tuple[str, ...]
) -> None:
    run = trainer(stage(name, 2, rollout=rollout), context=64)
    before = {key: value.clone() for key, value in run.model.state_dict().items()}
    reports = list(run.run_stage())
    assert [report.step for report in reports] == [1, 2]
    assert all(math.isfinite(loss) for report in reports for loss in report.losses.values())
    changed = {key for key, value in run.model.state_dict().items() if not torch.equal(value, before[key])}
    assert not [key for key in changed if key.startswith(still)]
    for prefix in moving:
        assert [key for key in changed if key.startswith(prefix)], prefix


@pytest.mark.parametrize(
    "first_stage", [stage("autoencoder", 2), replace(stage("tone", 3), num_frames=6)], ids=lambda each: each.name
)
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, first_stage: StageConfig) -> None:
    stages = (first_stage, stage("coupled", 4, rollout=True))
    whole = trainer(*stages, context=64)
    list(whole.run_stage())
    whole.finish_stage()
    list(whole.run_stage())

    first = trainer(*stages, context=64)
    next(first.run_stage())
    first.save(tmp_path / "state.pt")
    second = trainer(*stages, context=64)
    second.resume(tmp_path / "state.pt")
    list(second.run_stage())
    second.finish_stage()
    reports = second.run_stage()
    next(reports)
    next(reports)
    second.save(tmp_path / "state.pt")
    second = trainer(*stages, context=64)
    second.resume(tmp_path / "state.pt")
    assert [report.step for report in second.run_stage()] == [3, 4]
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[key]), key
    for key, value in whole.average.weights.items():
        assert torch.equal(value, second.average.weights[key]), key


def moved_by_a_coupled_step(updates: Updates, steps: int = 1, **model: Any) -> tuple[set[str], list[dict[str, float]]]:
    """The networks that a coupled stage of so many steps moves, and the losses of each step."""
    data = DataConfig(root="scenes")
    config = TrainConfig("compact", "test", data, (replace(stage("coupled", steps), updates=updates),), model=model)
    run = Trainer(config, PairSource(data, scenes()))
    before = {key: value.clone() for key, value in run.model.state_dict().items()}
    losses = [report.losses for report in run.run_stage()]
    changed = {key for key, value in run.model.state_dict().items() if not torch.equal(value, before[key])}
    return {key.split(".")[0] for key in changed}, losses


@pytest.mark.parametrize(
    ("updates", "model", "moved", "terms"),
    [
        ("alternating", {}, {"denoiser", "fusion"}, 5),
        ("decoupled", {}, {"denoiser", "fusion"}, 5),
        ("joint", {}, {"denoiser", "fusion"}, 5),
        ("separated", {}, {"denoiser", "fusion"}, 2),
        ("alternating", {"coupling": "late"}, {"denoiser", "fusion"}, 5),
        ("alternating", {"coupling": "none"}, {"denoiser"}, 2),
    ],
)
def test_ablated_updates_move_what_they_say(
    updates: Updates, model: dict[str, Any], moved: set[str], terms: int
) -> None:
    networks, losses = moved_by_a_coupled_step(updates, **model)
    assert networks == moved
    assert len(losses[0]) == terms


def test_separated_updates_restore_first_and_fuse_later() -> None:
    _, losses = moved_by_a_coupled_step("separated", steps=4)
    assert [sorted(each) for each in losses] == [["ir", "vis"]] * 2 + [["colour", "gradient", "intensity"]] * 2


def gradients_of(run: Trainer, batch: Encoded, *, with_fusion: bool) -> dict[str, Tensor]:
    """What the last descent of one update left in `.grad`."""
    run.model.zero_grad(set_to_none=True)
    run.optimizer.step = lambda *_: None  # type: ignore[method-assign,assignment]  # the weights stay for the next look
    run.stage_index = int(with_fusion)
    run.generator.manual_seed(1)
    run._marginal_update(batch)
    return {name: p.grad.clone() for name, p in run.model.named_parameters() if p.grad is not None}


def test_joint_updates_bring_the_fusion_loss_to_the_branches() -> None:
    data = DataConfig(root="scenes")
    stages = (
        replace(stage("coupled"), updates="joint", fusion_weight=0.0),
        replace(stage("coupled"), updates="joint", fusion_weight=1.0),
    )
    run = Trainer(TrainConfig("compact", "test", data, stages, clip_norm=1e9), PairSource(data, scenes()))
    for parameter in run.model.denoiser.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=Generator().manual_seed(parameter.numel()))
    batch = LatentSource.encode(run.model, PairSource(data, scenes()), 2, CROP, Generator()).draw(2, Generator())
    without, both = (gradients_of(run, batch, with_fusion=with_fusion) for with_fusion in (False, True))
    assert any(not torch.allclose(both[name], without[name]) for name in both if name.startswith("denoiser.ir"))


def test_encoded_crops_come_back_as_they_were_kept() -> None:
    run = trainer(stage("coupled", 2))
    source = LatentSource.encode(run.model, PairSource(DataConfig(root="x"), scenes()), 5, CROP, Generator())
    assert len(source) == 5
    again = LatentSource(Encoded.from_tensors(source.crops.tensors()))
    batch, same = (each.draw(3, Generator().manual_seed(2)) for each in (source, again))
    assert batch.clean.vis.shape == (3, 16, CROP // 8, CROP // 8)
    assert batch.references.ir.shape == (3, 3, CROP, CROP)
    for name, tensor in batch.tensors().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, same.tensors()[name])
    run.source = source
    assert [report.step for report in run.run_stage()] == [1, 2]
    run.config = replace(run.config, stages=(stage("coupled", 2, rollout=True),))
    run.start_stage()
    with pytest.raises(ConfigError, match="encoded crops serve"):
        next(run.run_stage())


def test_fusion_targets_are_told_apart() -> None:
    vis, ir = torch.rand(2, 1, 3, 16, 16, generator=Generator().manual_seed(0))
    ir = ir[:, :1].expand(-1, 3, -1, -1)
    mean = fusion_loss((vis + ir) / 2, vis, ir, targets=FusionTargets(intensity="mean"))
    assert float(mean.intensity) == pytest.approx(0, abs=1e-6)
    usual = fusion_loss((vis + ir) / 2, vis, ir)
    assert float(usual.intensity) > 0.05
    assert float(mean.gradient) == float(usual.gradient)
    gentle = fusion_loss(torch.full_like(vis, 0.5), vis, ir, targets=FusionTargets(gradient="mean"))
    harsh = fusion_loss(torch.full_like(vis, 0.5), vis, ir)
    assert float(gentle.gradient) < float(harsh.gradient)  # a flat picture lacks the mean less than the maximum
    assert float(gentle.intensity) == float(harsh.intensity)


def test_signed_gradients_are_not_met_by_a_made_up_texture() -> None:
    generator = Generator().manual_seed(0)
    vis, other = 0.5 + 0.05 * torch.randn(2, 1, 1, 32, 32, generator=generator).expand(-1, -1, 3, -1, -1)
    ir = torch.full_like(vis, 0.5)
    flat = torch.full_like(vis, 0.5)

    def costs(gradient: GradientTarget) -> list[float]:
        targets = FusionTargets(gradient=gradient)
        return [float(fusion_loss(image, vis, ir, targets=targets).gradient) for image in (flat, other, vis)]

    # Texture of the right strength that is not the source's own: better than none by absolute values, worse by signs.
    smooth, made_up, true = costs("maximum")
    assert true < made_up < smooth
    smooth, made_up, true = costs("signed")
    assert true == 0 < smooth < made_up
    # The stronger source is followed, whichever it is.
    assert float(fusion_loss(vis, flat, vis, targets=FusionTargets(gradient="signed")).gradient) == 0


def test_the_log_error_gives_every_image_an_equal_say() -> None:
    target = torch.rand(2, 3, 16, 16, generator=Generator().manual_seed(0))
    image = target + torch.tensor([0.1, 0.01])[:, None, None, None]
    expected = (math.log10(0.1**2 + 1e-5) + math.log10(0.01**2 + 1e-5)) / 2
    assert float(log_error(image, target)) == pytest.approx(expected, abs=1e-4)


def test_the_strongest_picture_has_the_larger_luma_and_the_visible_chroma() -> None:
    vis, ir = torch.rand(2, 1, 3, 16, 16, generator=Generator().manual_seed(0))
    best = strongest(vis, ir)
    torch.testing.assert_close(luma(best), torch.maximum(luma(vis), luma(ir)))
    torch.testing.assert_close(chroma(best), chroma(vis))


def test_rollouts_take_the_steps_that_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(replace(stage("coupled", 12, rollout=True), rollout_steps=(1, 4)))
    timesteps: list[int] = []
    predict = run.model.predict

    def noted(state: Pair, mu: Pair, t: int) -> Prediction:
        timesteps.append(t)
        return predict(state, mu, t)

    monkeypatch.setattr(run.model, "predict", noted)
    seen = set()
    for _ in run.run_stage():
        seen.add(tuple(timesteps))
        timesteps.clear()
    assert seen == {run.model.plan(steps=steps).timesteps for steps in (1, 4)}


def test_the_fused_image_counts_by_its_logarithm_where_asked() -> None:
    (report,) = trainer(replace(stage("coupled", 1, rollout=True), fusion_log_weight=0.5)).run_stage()
    (without,) = trainer(stage("coupled", 1, rollout=True)).run_stage()
    assert set(report.losses) - set(without.losses) == {"fused"}
    assert report.losses["fused"] < 0


def test_a_model_differs_from_its_preset_where_the_configuration_says_so() -> None:
    data = DataConfig(root="x")
    model = {"coupling": "late", "fusion": {"uses_time": False, "width": 32, "time_dim": 128, "num_groups": 16}}
    config = TrainConfig("compact", "0", data, (stage("coupled"),), model=model).model_config
    assert (config.coupling, config.fusion.uses_time, config.fusion.width) == ("late", False, 32)
    assert config.denoiser == PRESETS["compact"].denoiser
    wrongs: tuple[dict[str, Any], ...]
    wrongs = ({"fusion": {"weight": 3}}, {"steps": "many"}, {"tonality": {}}, {"coupling": "sometimes"})
    for wrong in wrongs:
        with pytest.raises(ConfigError):
            _ = replace(TrainConfig("compact", "0", data, ()), model=wrong).model_config


@pytest.mark.parametrize(
    "change",
    [
        {"updates": "sometimes"},
        {"updates": "joint", "rollout": True},
        {"rollout_steps": (3,)},
        {"rollout": True, "rollout_steps": (3, 0)},
        {"name": "branches", "updates": "joint"},
        {"intensity_target": "minimum"},
    ],
)
def test_stages_that_make_no_sense_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        replace(stage("coupled"), **change)


def test_tone_curves_learn_to_undo_what_acts_on_whole_frames() -> None:
    run = trainer(replace(stage("tone", 150), batch_size=16, num_frames=60), context=64)
    losses = [sum(report.losses.values()) for report in run.run_stage()]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


def test_the_tone_stage_asks_for_frames_and_an_estimator() -> None:
    with pytest.raises(ConfigError, match="context must be at least 64"):
        next(trainer(stage("tone"), context=0).run_stage())
    run = trainer(stage("tone"), context=64)
    run.model.tone = None
    with pytest.raises(ConfigError, match="no tone estimator"):
        next(run.run_stage())


def test_a_stage_ends_when_the_score_no_longer_improves() -> None:
    run = trainer(stage("autoencoder", 100))
    run.config = replace(run.config, patience=2, ema_interval=1)
    best: dict[str, Tensor] = {}
    num_steps = 0
    for report in run.run_stage():
        num_steps = report.step
        if run.judge({1: 3.0, 2: 5.0}.get(report.step, 4.0)):
            best = {key: value.clone() for key, value in run.average.weights.items()}
    assert num_steps == 4
    run.finish_stage()
    for key, value in run.model.state_dict().items():
        assert torch.equal(value, best[key]), key


TOGETHER = """
import sys
from pathlib import Path
import torch
from recofuse_core.sampler import Pair, Prediction
from recofuse_core.scenes.scene import make_scene
from recofuse_core.training import DataConfig, PairSource, StageConfig, TrainConfig, Trainer

torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
levels = lambda image: (image * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
scene = make_scene(1, 64, 80)
data = DataConfig(root="scenes")
stage = StageConfig("coupled", 3, 2, 32, 1e-3, rollout=True)
source = PairSource(data, [("a", levels(scene.vis), levels(scene.ir)[..., 0])])
run = Trainer(TrainConfig("compact", "0", data, (stage,), ema_interval=1), source)
losses = [report.losses["vis"] for report in run.run_stage()]
run.save(Path(sys.argv[1]) / "state.pt")
torch.save({"losses": losses, "weights": run.model.state_dict()}, Path(sys.argv[1]) / f"{rank}.pt")
torch.distributed.destroy_process_group()
"""


def test_processes_that_train_together_keep_equal_weights_from_different_batches(tmp_path: Path) -> None:
    (tmp_path / "together.py").write_text(TOGETHER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run([*command, str(tmp_path / "together.py"), str(tmp_path)], check=True, env=environment, cwd=ROOT)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert first["losses"] != second["losses"]
    for key, value in first["weights"].items():
        assert torch.equal(value, second["weights"][key]), key
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert len(state["generators"]) == 2
    assert not torch.equal(*state["generators"])


def test_states_that_do_not_belong_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    trainer(stage("autoencoder", 2)).save(path)
    with pytest.raises(CheckpointError, match="another configuration"):
        trainer(stage("autoencoder", 3)).resume(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="not a training state"):
        trainer(stage("autoencoder", 2)).resume(path)


def test_weights_to_start_from_must_be_all_there() -> None:
    run, given = trainer(stage("branches")), trainer(stage("branches")).model.state_dict()
    name = next(name for name in given if name.startswith("tone."))
    lacking = {other: tensor + 1 for other, tensor in given.items() if other != name}
    run.start_from(lacking, ("fusion.", "denoiser."))
    for other, tensor in run.model.state_dict().items():
        assert torch.equal(tensor, given[other] + 1) is other.startswith(("fusion.", "denoiser."))
    with pytest.raises(CheckpointError, match=f"1 weights to start from are missing, such as {name}"):
        run.start_from(lacking)
    with pytest.raises(CheckpointError, match="1 weights to start from have another shape"):
        run.start_from({**given, name: given[name].flatten()[:1]})
    with pytest.raises(CheckpointError, match="no weights whose names start with fusoin"):
        run.start_from(given, ("fusoin.",))


CONFIG = """
preset = "compact"
version = "9"
ema_interval = 1
checkpoint_interval = 1
log_interval = 1
validation_interval = 2
[data]
root = "pairs"
validation_root = "pairs"
[[stages]]
name = "autoencoder"
steps = 2
batch_size = 2
crop = 32
learning_rate = 1e-3
[[stages]]
name = "coupled"
rollout = true
steps = 2
batch_size = 2
crop = 32
learning_rate = 1e-3
optimizer = "lion"
"""


def test_a_configuration_file_becomes_a_model_that_fuses(tmp_path: Path) -> None:
    for folder in ("vis", "ir"):
        (tmp_path / "pairs" / folder).mkdir(parents=True)
    for name, vis, ir in scenes():
        cv2.imwrite(str(tmp_path / "pairs" / "vis" / f"{name}.png"), vis[..., ::-1])
        cv2.imwrite(str(tmp_path / "pairs" / "ir" / f"{name}.png"), ir)
    (tmp_path / "config.toml").write_text(CONFIG)
    path = train_from_config(tmp_path / "config.toml", tmp_path / "run", quiet=True)
    model = load_pretrained(path)
    assert model.info.version == "9"
    assert model.info.provenance["stage"] == "coupled"
    output = model.fuse(torch.rand(1, 3, 40, 48), torch.rand(1, 1, 40, 48))
    assert output.fused is not None
    assert output.fused.shape == (1, 3, 40, 48)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        "autoencoder.safetensors",
        "best.safetensors",
        "coupled.safetensors",
        "model.safetensors",
        "state.pt",
        "tensorboard",
    ]
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    tags = events.Tags()
    assert {"autoencoder/clean", "coupled/vis", "coupled/learning_rate", "coupled/psnr_ir"} <= set(tags["scalars"])
    assert set(tags["images"]) == {f"coupled/{row}" for row in range(3)}  # degraded, restored and fused, one row a pair
    (row,) = events.Images("coupled/0")
    assert (row.height, row.width) == (64, 5 * 80)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("preset = ", "perset = "), "not a training configuration"),
        (('preset = "compact"', 'preset = "huge"'), "unknown preset"),
        (("steps = 2", "stepz = 2"), "not a training configuration"),
        (("steps = 2", 'steps = "2"'), r"stage 1\.steps cannot be '2'"),
        (("steps = 2", "steps = 2\nupdates = 'joint'"), "coupled stage without rollout"),
        (('optimizer = "lion"', 'optimizer = "adam"'), r"stage 2\.optimizer cannot be 'adam'"),
        (("[data]", "[data]\ngroup_weights = { a = 'b' }"), r"data\.group_weights"),
        (("[data]", "[model.fusion]\nwidth = 'wide'\n[data]"), r"fusion\.width cannot be 'wide'"),
        (("[data]", "[date]"), "not a training configuration"),
        (("[[stages]]", "[[stages"), "not a training configuration"),
    ],
)
def test_wrong_configurations_are_named(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    path = tmp_path / "config.toml"
    path.write_text(CONFIG.replace(*change))
    with pytest.raises(ConfigError, match=message):
        read_config(path)


def test_the_shipped_configuration_reads() -> None:
    config = read_config(Path(__file__).parents[2] / "configs" / "compact.toml")
    assert [s.name for s in config.stages] == ["exposure", "tone", "autoencoder", "branches", "coupled"]
    assert "llvip_" in config.data.exclude_prefixes
