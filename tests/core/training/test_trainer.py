"""The loop: what each stage and each kind of update moves, exact resumption, and when a stage ends."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from recofuse_core.errors import CheckpointError
from recofuse_core.sampler import Pair, Prediction
from recofuse_core.training.config import DataConfig, StageConfig, StageName, TrainConfig, Updates
from recofuse_core.training.latents import Encoded, LatentSource
from recofuse_core.training.pairs import PairSource
from recofuse_core.training.trainer import FROM_THE_START, Trainer
from tests.core.training.small import CROP, scenes, stage, trainer


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
    "stages",
    [
        (stage("autoencoder", 2), stage("coupled", 2, rollout=True)),
        (replace(stage("tone", 3), num_frames=6), stage("coupled", 2)),
    ],
    ids=lambda each: each[0].name,
)
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, stages: tuple[StageConfig, ...]) -> None:
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
    next(second.run_stage())
    second.save(tmp_path / "state.pt")
    second = trainer(*stages, context=64)
    second.resume(tmp_path / "state.pt")
    assert [report.step for report in second.run_stage()] == [2]
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


def test_rollouts_take_the_steps_that_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(replace(stage("coupled", 5, rollout=True), rollout_steps=(1, 4)))
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


def test_a_network_that_changed_begins_anew_if_its_stage_is_to_come(caplog: pytest.LogCaptureFixture) -> None:
    run = trainer(stage("tone"), stage("branches"))
    fresh = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    lacking, reshaped = [name for name in fresh if name.startswith("tone.layers.")][:2]
    earlier = {name: tensor + 1 for name, tensor in fresh.items() if name != lacking}
    earlier[reshaped] = earlier[reshaped].flatten()[:1]
    run.start_from(earlier)
    for name, tensor in run.model.state_dict().items():
        assert torch.equal(tensor, fresh[name] if name in (lacking, reshaped) else fresh[name] + 1), name
    (record,) = caplog.records
    assert record.getMessage() == f"weights to start from do not fit and begin anew: 2: {lacking}, {reshaped}"
    run.skip_to("branches")
    with pytest.raises(CheckpointError, match=f"1 weights to start from are missing, such as {lacking}"):
        run.start_from(earlier)
    with pytest.raises(CheckpointError, match="none of the weights to start from fits"):
        trainer(stage("tone")).start_from({}, ("tone.",))


def test_what_rain_and_snow_tell_begins_anew_by_itself_in_a_veil_estimator_of_before(
    caplog: pytest.LogCaptureFixture,
) -> None:
    run = trainer(stage("veil"), stage("veil_fall"))
    fresh = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    earlier = {name: tensor + 1 for name, tensor in fresh.items() if not name.startswith("veil.of_fall.")}
    run.skip_to("veil_fall")
    run.start_from(earlier)
    for name, tensor in run.model.state_dict().items():
        assert torch.equal(tensor, fresh[name] + 1 if name in earlier else fresh[name]), name
    assert "begin anew: 6: veil.of_fall." in caplog.text
    with pytest.raises(CheckpointError, match=r"6 weights to start from are missing, such as veil\.of_fall\."):
        trainer(stage("veil")).start_from(earlier)


def test_every_network_has_a_stage_that_trains_it_from_the_start() -> None:
    names = list(trainer(stage("branches")).model.state_dict())
    assert {name.partition(".")[0] for name in names} == {part.partition(".")[0] for part in FROM_THE_START}
    assert all(any(name.startswith(f"{part}.") for name in names) for part in FROM_THE_START)
