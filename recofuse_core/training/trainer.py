"""The loop: a model under training, one stage after the other, and its state on disk."""

import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from recofuse_core.errors import CheckpointError, ConfigError, NumericsError
from recofuse_core.exposure import ExposureEstimator
from recofuse_core.losses import FusionTargets, fusion_loss, image_loss, log_error, log_errors, matching_loss, strongest
from recofuse_core.model import ReCoFuse
from recofuse_core.networks import Skips
from recofuse_core.picture import LATENT_FACTOR, OutputName
from recofuse_core.sampler import Pair, clean_latents
from recofuse_core.training.config import StageConfig, StageName, TrainConfig
from recofuse_core.training.delivered import DeliveredSource
from recofuse_core.training.exposure import FrameSource, LightSamples, lighting_loss
from recofuse_core.training.latents import Encoded, LatentSource
from recofuse_core.training.objectives import (
    autoencoder_loss,
    encode_pair,
    final_fusion_loss,
    predict_marginal,
    prediction_losses,
    reconstruct,
    restoration_loss,
    rollout,
)
from recofuse_core.training.optimisation import WeightAverage, build_optimizer, learning_rate
from recofuse_core.training.pairs import Batch, PairSource
from recofuse_core.training.processes import ProcessGroup
from recofuse_core.training.tone import ToneSamples, ToneSource, tone_loss
from recofuse_core.training.veil import VeilSamples, VeilSource, veil_loss
from recofuse_core.training.weather import (
    EVEN_ODDS,
    OddsSamples,
    WeatherFrame,
    WeatherSource,
    odds_loss,
    weather_loss,
)
from recofuse_core.veil import VeilEstimator
from recofuse_core.weather import WeatherEstimator
from recofuse_core.weights_file import listed

logger = logging.getLogger(__name__)

FROM_THE_START: dict[str, StageName] = {  # the stage that trains a network which knows nothing yet
    "weather": "weather",
    "exposure": "exposure",
    "tone": "tone",
    "veil": "veil",
    "veil.of_fall": "veil_fall",
    "autoencoder": "autoencoder",
    "denoiser": "branches",
    "fusion": "branches",
    "detail": "detail",
}


@dataclass(frozen=True)
class StepReport:
    """What one step gave: losses by name, the rate, and how far the stage is."""

    stage: StageName
    step: int
    progress: float
    learning_rate: float
    losses: dict[str, float]


@dataclass(frozen=True)
class BestWeights:
    """The averaged weights of the best validation of a stage."""

    score: float
    weights: dict[str, Tensor]


class Trainer:
    """A model under training, with everything that a resumed run needs to go on exactly."""

    def __init__(
        self,
        config: TrainConfig,
        source: PairSource | LatentSource,
        device: torch.device | str = "cpu",
        frames: FrameSource | None = None,
    ) -> None:
        self.config = config
        self.source = source
        self.frames = frames  # what the exposure stage, lit pairs and the weather stage are drawn from
        self.device = torch.device(device)
        self.group = ProcessGroup()
        torch.manual_seed(config.seed)  # initial weights; everything later draws from self.generator
        self.model = ReCoFuse(config.model_config).to(self.device)
        self.generator = Generator().manual_seed(config.seed + 1_000_003 * self.group.rank)
        self.stage_index = 0
        self.start_stage()

    @property
    def stage(self) -> StageConfig:
        """The present stage."""
        return self.config.stages[self.stage_index]

    def start_stage(self) -> None:
        """Fresh optimizer and average for the present stage."""
        self.step = 0
        self.elapsed_s = 0.0
        autoencoder, others = self.model.autoencoder, [self.model.denoiser, self.model.fusion]
        decoder = [p for name, p in autoencoder.named_parameters() if _is_decoder(name)]
        judges = [] if self.model.weather is None else self.model.weather.judges()

        def weights(prefix: str) -> list[nn.Parameter]:
            return [parameter for name, parameter in self.model.named_parameters() if name.startswith(prefix)]

        trained = {
            "weather": weights("weather."),
            "weather_odds": judges,
            "exposure": weights("exposure."),
            "veil": weights("veil."),
            "veil_fall": weights("veil.of_fall."),
            "tone": weights("tone."),
            "autoencoder": list(autoencoder.parameters()),
            "branches": [p for m in others for p in m.parameters()],
            "coupled": [p for m in others for p in m.parameters()] + (decoder if self.stage.rollout else []),
            "detail": weights("detail."),
        }[self.stage.name]
        if not trained:
            raise ConfigError(f"preset {self.config.preset!r} has no {self.stage.name} estimator to train")
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
        self.parameters = trained
        # The published fusion update moves TIM alone; after rollouts the decoder must also learn the fused latents.
        fusion = list(self.model.fusion.parameters()) + (decoder if self.stage.rollout else [])
        self.fusion_parameters = fusion
        self.optimizer = build_optimizer(self.stage, trained)
        self.best: BestWeights | None = None
        self.num_without_gain = 0
        self.tone_samples: ToneSamples | None = None
        self.light_samples: LightSamples | None = None
        self.odds_samples: OddsSamples | None = None
        self.veil_samples: VeilSamples | None = None
        self.average = WeightAverage(self.model, self.config.ema_decay)

    def run_stage(self) -> Iterator[StepReport]:
        """Train the present stage to its end, one report a step; `judge` may end it early.

        Raises ConfigError if the model lacks the stage's part, NumericsError for a loss that is not finite.
        """
        if self.stage.name == "tone":
            self._draw_tone_samples()
        if self.stage.name == "exposure":
            self._draw_light_samples()
        if self.stage.name == "weather_odds" and self.model.weather is not None:
            self._draw_odds_samples(self.model.weather)
        if self.stage.name in ("veil", "veil_fall"):
            self._draw_veil_samples()
        started = time.monotonic() - self.elapsed_s
        while (progress := self._progress()) < 1 and not self.is_exhausted:
            rate = learning_rate(self.stage, self.step, progress)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            losses = self._update()
            if not all(math.isfinite(loss) for loss in losses.values()):
                raise NumericsError(f"a loss of step {self.step} of stage {self.stage.name} is not finite: {losses}")
            self.step += 1
            self.elapsed_s = self.group.of_first(time.monotonic() - started, self.device)
            if self.step % self.config.ema_interval == 0:
                self.average.update(self.model)
            yield StepReport(self.stage.name, self.step, self._progress(), rate, losses)

    @property
    def is_exhausted(self) -> bool:
        """Whether the score has not improved for `patience` validations."""
        return 0 < self.config.patience <= self.num_without_gain

    def judge(self, score: float) -> bool:
        """Take the score of the averaged weights (more is better). True if it is the stage's best so far."""
        if self.best is not None and score <= self.best.score:
            self.num_without_gain += 1
            return False
        self.num_without_gain = 0
        self.best = BestWeights(score, {name: tensor.clone() for name, tensor in self.average.weights.items()})
        return True

    def _progress(self) -> float:
        by_time = self.elapsed_s / (60 * self.stage.max_minutes) if self.stage.max_minutes else 0.0
        return max(self.step / self.stage.steps, by_time)

    def _draw_tone_samples(self) -> None:
        """The stage's frames, from a generator of their own: a resumed run draws the same again."""
        tone = self.model.tone
        if tone is None:
            raise ConfigError(f"preset {self.config.preset!r} has no tone estimator to train")
        if isinstance(self.source, LatentSource):
            raise ConfigError("the tone stage needs frames, not encoded crops")
        generator = Generator().manual_seed(self.config.seed + 1)
        source = ToneSource(
            self.source,
            self.frames.photos if self.frames else (),
            self.frames.thermal if self.frames else (),
            self.stage.photo_probability,
            self.stage.thermal_probability,
        )
        samples = ToneSamples.draw(tone, source, self.stage.num_frames, generator)
        self.tone_samples = samples.to(self.device)
        if self.step == 0:
            tone.calibrate(self.tone_samples.features)
            self.average = WeightAverage(self.model, self.config.ema_decay)

    def _draw_light_samples(self) -> None:
        """The stage's frames, from a generator of their own, as those of the tone stage."""
        estimator = self.model.exposure
        if estimator is None:
            raise ConfigError(f"preset {self.config.preset!r} has no exposure estimator to train")
        if self.frames is None:
            raise ConfigError("the exposure stage needs frames, from pairs and from data.references")
        generator = Generator().manual_seed(self.config.seed + 2)
        samples = LightSamples.draw(estimator, self.frames, self.stage.num_frames, self.stage.crop, generator)
        self.light_samples = samples.to(self.device)
        if self.step == 0:
            estimator.calibrate(self.light_samples.features)
            self.average = WeightAverage(self.model, self.config.ema_decay)

    def _delivered_source(self, pairs: PairSource) -> DeliveredSource:
        """Pairs as the estimators deliver them, of which some come lit and some in weather."""
        if self.model.exposure is None or self.frames is None:
            raise ConfigError("lit pairs need an exposure estimator, and frames from pairs and from data.references")
        return DeliveredSource(
            pairs,
            self.frames,
            self.model,
            self.model.exposure,
            lit_probability=self.stage.lit_probability,
            weather_probability=self.stage.weather_probability,
            photo_probability=self.stage.photo_probability,
            for_detail=self.stage.name == "detail",
        )

    def _weather_source(self, probability: float | None = None) -> WeatherSource:
        """Frames of which some, or a share of `probability`, have weather in front of them."""
        if isinstance(self.source, LatentSource):
            raise ConfigError("the weather stages need frames, not encoded crops")
        return WeatherSource(self.source, self.frames.photos if self.frames else (), probability)

    def _draw_odds_samples(self, estimator: WeatherEstimator) -> None:
        """The stage's frames, from a generator of their own, as those of the tone stage."""
        generator = Generator().manual_seed(self.config.seed + 3)
        source = self._weather_source(EVEN_ODDS)
        self.odds_samples = OddsSamples.draw(estimator, source, self.stage.num_frames, self.stage.crop, generator)

    def _draw_veil_samples(self) -> None:
        """The stage's frames, from a generator of their own, as those of the tone stage."""
        if self.frames is None:
            raise ConfigError("the veil stage needs frames, from pairs and from data.references")
        generator = Generator().manual_seed(self.config.seed + 4)
        source = VeilSource(self.frames, through_fall=self.stage.name == "veil_fall")
        self.veil_samples = VeilSamples.draw(self.model, source, self.stage.num_frames, self.stage.crop, generator)

    def _veil_update(self, samples: VeilSamples, estimator: VeilEstimator) -> dict[str, float]:
        """One step of the veil estimator."""
        chosen = torch.randint(len(samples.squared), (self.stage.batch_size,), generator=self.generator)
        batch = samples.take(chosen.to(self.device))
        if float(torch.rand((), generator=self.generator)) < 0.5:
            batch = batch.flipped()
        terms = veil_loss(estimator, batch)
        self._descend(_sum(terms), self.parameters)
        return _reported(terms)

    def _weather_update(self, estimator: WeatherEstimator) -> dict[str, float]:
        """One step of either stage of the weather estimator."""
        stage = self.stage
        if self.odds_samples is not None:
            chosen = torch.randint(len(self.odds_samples.present), (stage.batch_size,), generator=self.generator)
            terms = odds_loss(estimator, self.odds_samples.take(chosen.to(self.device)))
        else:
            batch = self._weather_source().draw(stage.batch_size, stage.crop, self.generator)
            terms = weather_loss(estimator, WeatherFrame(*(part.to(self.device) for part in batch)))
        self._descend(_sum(terms), self.parameters)
        return _reported(terms)

    def _exposure_update(self, samples: LightSamples, estimator: ExposureEstimator) -> dict[str, float]:
        """One step on frames of all kinds, some of which meet the infrared frame of another scene."""
        stage, count = self.stage, len(samples.features)
        chosen, partners = (torch.randint(count, (stage.batch_size,), generator=self.generator) for _ in range(2))
        is_swapped = torch.rand(stage.batch_size, generator=self.generator) < stage.swap_probability
        batch, others = samples.take(chosen.to(self.device)), samples.take(partners.to(self.device))
        batch = batch.with_infrared_of(others, is_swapped.to(self.device), estimator)
        if float(torch.rand((), generator=self.generator)) < 0.5:
            batch = batch.flipped()
        terms = lighting_loss(estimator, batch)
        self._descend(_sum(terms), self.parameters)
        return _reported(terms)

    def _update(self) -> dict[str, float]:
        stage = self.stage
        if stage.name in ("weather", "weather_odds") and self.model.weather is not None:
            return self._weather_update(self.model.weather)
        if self.veil_samples is not None and self.model.veil is not None:
            return self._veil_update(self.veil_samples, self.model.veil)
        if self.light_samples is not None and self.model.exposure is not None:
            return self._exposure_update(self.light_samples, self.model.exposure)
        if self.tone_samples is not None and self.model.tone is not None:
            tone, count = self.model.tone, len(self.tone_samples.features)
            chosen = torch.randint(count, (stage.batch_size,), generator=self.generator)
            samples = self.tone_samples.take(chosen.to(self.device))
            if stage.swap_probability > 0:
                where = torch.rand(stage.batch_size, generator=self.generator) < stage.swap_probability
                partners = torch.randint(count, (stage.batch_size,), generator=self.generator)
                others = self.tone_samples.take(partners.to(self.device))
                samples = samples.with_infrared_of(others, where.to(self.device), tone)
            terms = tone_loss(tone, samples, stage.spread_weight)
            self._descend(_sum(terms), self.parameters)
            return _reported(terms)
        if isinstance(self.source, LatentSource):
            if stage.name in ("autoencoder", "detail") or stage.rollout:
                raise ConfigError("encoded crops serve the branches and the coupled stage without rollout")
            with self._autocast():
                return self._marginal_update(self.source.draw(stage.batch_size, self.generator).to(self.device))
        source = self._delivered_source(self.source) if stage.lit_probability else self.source
        batch = source.draw(stage.batch_size, stage.crop, self.generator).to(self.device)
        if stage.name == "autoencoder":
            with self._autocast():
                terms = autoencoder_loss(self.model, batch, stage)
            self._descend(_sum(terms), self.parameters)
            return _reported(terms)
        degraded = batch.degraded
        if isinstance(source, PairSource):
            with torch.no_grad():
                degraded = self.model.normalise(degraded, batch.frame)
        with self._autocast():
            mu, vis_skips, ir_skips = encode_pair(self.model, degraded)
            if stage.name == "detail":
                return self._detail_update(batch.clean, degraded, mu, (vis_skips, ir_skips))
            clean, _, _ = encode_pair(self.model, batch.clean)
            if stage.rollout:
                return self._rollout_update(batch, clean, mu, (vis_skips, ir_skips))
            references = batch.clean  # nobody asks for them in the branch stage
            if stage.name == "coupled":
                references = reconstruct(self.model, clean, (vis_skips, ir_skips), batch.clean)
            return self._marginal_update(Encoded(clean, mu, (vis_skips, ir_skips), references))

    def _marginal_update(self, batch: Encoded) -> dict[str, float]:
        """Random steps of the marginal: restoration of both modalities, and in the coupled stage the fusion loss."""
        clean, mu = batch.clean, batch.mu
        timesteps = torch.randint(1, self.model.sde.num_steps + 1, (len(clean.vis),), generator=self.generator)
        timesteps = timesteps.to(self.device)
        noise = Pair(self._noise(mu.vis), self._noise(mu.ir))
        if self.stage.name == "coupled" and self.model.config.coupling != "none":
            return self._coupled_update(batch, timesteps, noise)
        vis_loss, ir_loss = restoration_loss(self.model, clean, mu, timesteps, noise)
        self._descend(vis_loss + ir_loss, self.parameters)
        return {"vis": float(vis_loss.detach()), "ir": float(ir_loss.detach())}

    def _coupled_update(self, batch: Encoded, timesteps: Tensor, noise: Pair) -> dict[str, float]:
        """Restoration and fusion loss, each moving what `updates` says.

        "alternating" is published: restoration moves both branches and TIM, then fusion moves TIM. "decoupled": each
        task its own, restoration the branches and fusion TIM. "joint": one step of everything down the sum, with the
        fusion loss on the branches' own estimates, so that it reaches them too. "separated": restoration alone for the
        first half of the stage, then fusion alone, of TIM, with the branches at rest.
        """
        updates = self.stage.updates
        losses: dict[str, float] = {}
        if updates != "separated" or self._progress() < 0.5:
            state, prediction = predict_marginal(self.model, batch.clean, batch.mu, timesteps, noise)
            vis_loss, ir_loss = prediction_losses(self.model, state, prediction, batch.clean, batch.mu, timesteps)
            losses = {"vis": float(vis_loss.detach()), "ir": float(ir_loss.detach())}
            if updates == "joint":
                estimates = clean_latents(self.model.sde, prediction, state, batch.mu, timesteps)
                fusion = self._fusion_losses(estimates, batch.skips, batch.references)
                self._descend(vis_loss + ir_loss + _sum(fusion), self.parameters)
                return losses | _reported(fusion)
            branches = list(self.model.denoiser.parameters())
            self._descend(vis_loss + ir_loss, branches if updates == "decoupled" else self.parameters)
            if updates == "separated":
                return losses
        return losses | self._fusion_update(batch.clean, batch.skips, batch.references)

    def _rollout_update(self, batch: Batch, clean: Pair, mu: Pair, skips: tuple[Skips, Skips]) -> dict[str, float]:
        """Restoration through the sampler's own trajectory to the image, then the fusion update on its result."""
        stage = self.stage
        size = (batch.clean.vis.shape[-2], batch.clean.vis.shape[-1])
        steps = None
        if stage.rollout_steps:
            pick = float(torch.rand(1, generator=self.generator))
            steps = stage.rollout_steps[int(pick * len(stage.rollout_steps))]
        result, estimates = rollout(self.model, mu, lambda: Pair(self._noise(mu.vis), self._noise(mu.ir)), steps)
        losses: dict[str, Tensor] = {}
        for name, index in (("vis", 0), ("ir", 1)):
            image = self.model.autoencoder.decode(result[index], skips[index], size).float()
            losses[name] = stage.image_weight * image_loss(image, batch.clean[index], stage.log_weight)
            latent = sum(matching_loss(estimate[index], clean[index]) for estimate in estimates) / len(estimates)
            losses[f"{name}_latent"] = stage.latent_weight * torch.as_tensor(latent)
        self._descend(_sum(losses), self.parameters)
        detached = Pair(result.vis.detach(), result.ir.detach())
        return _reported(losses) | self._fusion_update(detached, skips, batch.clean)

    def _detail_update(self, clean: Pair, shown: Pair, mu: Pair, skips: tuple[Skips, Skips]) -> dict[str, float]:
        """One step of the gates, each on its own picture; every fused one has an equal say, as every image has."""
        stage, detail = self.stage, self.model.detail
        assert detail is not None
        frames = Pair(shown.vis, shown.ir[:, :1])
        decoded = self._decoded(mu, skips)
        vis, ir, fused = (detail(name, decoded[name].float(), frames) for name in decoded)
        targets = FusionTargets(stage.intensity_target, stage.gradient_target)
        totals = [
            fusion_loss(*images, targets=targets).total
            for images in zip(fused.split(1), clean.vis.split(1), clean.ir.split(1), strict=True)
        ]
        rises = log_errors(vis, clean.vis) - log_errors(decoded["vis"], clean.vis)
        losses = {
            "vis": stage.image_weight * image_loss(vis, clean.vis, stage.log_weight),
            "ir": stage.image_weight * image_loss(ir, clean.ir, stage.log_weight),
            "rise": stage.rise_weight * rises.relu().mean(),
            "fusion": stage.fusion_weight * torch.log10(torch.stack(totals)).mean(),
            "fused": stage.fusion_log_weight * log_error(fused, strongest(clean.vis, clean.ir)),
        }
        self._descend(_sum(losses), self.parameters)
        return _reported(losses)

    @torch.no_grad()
    def _decoded(self, mu: Pair, skips: tuple[Skips, Skips]) -> dict[OutputName, Tensor]:
        """All pictures as the model decodes what its own sampler makes of degraded latents."""
        model, decode = self.model, self.model.autoencoder.decode
        restored, _ = rollout(model, mu, lambda: Pair(self._noise(mu.vis), self._noise(mu.ir)))
        size = tuple(LATENT_FACTOR * side for side in mu.vis.shape[-2:])
        fused = decode(model.final_fusion(restored), model.autoencoder.fuse_skips(*skips), size)
        return {"vis": decode(restored.vis, skips[0], size), "ir": decode(restored.ir, skips[1], size), "fused": fused}

    def _fusion_update(self, clean: Pair, skips: tuple[Skips, Skips], references: Pair) -> dict[str, float]:
        losses = self._fusion_losses(clean, skips, references)
        self._descend(_sum(losses), self.fusion_parameters)
        return _reported(losses)

    def _fusion_losses(self, clean: Pair, skips: tuple[Skips, Skips], references: Pair) -> dict[str, Tensor]:
        """The stage's fusion losses on the first `fusion_batch` items."""
        stage, count = self.stage, self.stage.fusion_batch or len(clean.vis)
        vis_skips, ir_skips = (tuple(skip[:count] for skip in part) for part in skips)
        latents, images = (Pair(pair.vis[:count], pair.ir[:count]) for pair in (clean, references))
        targets = FusionTargets(stage.intensity_target, stage.gradient_target)
        terms, image = final_fusion_loss(self.model, latents, (vis_skips, ir_skips), images, targets)
        losses = {name: stage.fusion_weight * getattr(terms, name) for name in ("intensity", "gradient", "colour")}
        if stage.fusion_log_weight > 0:
            losses["fused"] = stage.fusion_log_weight * log_error(image, strongest(images.vis, images.ir))
        return losses

    def _descend(self, loss: Tensor, parameters: list[nn.Parameter]) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        moved = {id(parameter) for parameter in parameters}
        for parameter in self.parameters:
            if id(parameter) not in moved:
                parameter.grad = None
        self.group.average([parameter.grad for parameter in parameters if parameter.grad is not None])
        nn.utils.clip_grad_norm_(parameters, self.config.clip_norm)
        self.optimizer.step()

    def _noise(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self.generator).to(self.device)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16")

    def finish_stage(self) -> bool:
        """Take the averaged weights over (after an early end the best ones), go to the next stage. False: none left."""
        self.average.update(self.model)
        ended_early = self.best is not None and self.is_exhausted
        self.model.load_state_dict(self.best.weights if ended_early and self.best else self.average.weights)
        if self.stage_index + 1 == len(self.config.stages):
            return False
        self.stage_index += 1
        self.start_stage()
        return True

    def start_from(self, weights: Mapping[str, Tensor], parts: tuple[str, ...] = ("",)) -> None:
        """Begin the present stage with given weights instead of random ones, or with those that start with `parts`.

        What does not fit in name or shape, as after a change of a network, begins anew if the stage that trains that
        network from the start is still to come. Weights from before there was an exposure estimator leave it as the
        identity. Raises CheckpointError if another weight of the model that is asked for is not among them or has
        another shape, or if none fits.
        """
        own = self.model.state_dict()
        has_exposure = any(name.startswith("exposure.") for name in weights)
        asked = [name for name in own if name.startswith(parts) and (has_exposure or not name.startswith("exposure."))]
        if not asked:
            raise CheckpointError(f"the model has no weights whose names start with {' or '.join(parts)}")
        fitting = [name for name in asked if name in weights and weights[name].shape == own[name].shape]
        to_come = {stage.name for stage in self.config.stages[self.stage_index :]}
        others = [name for name in asked if name not in fitting]
        anew = [name for name in others if _first_stage_of(name) in to_come]
        required = [name for name in others if name not in anew]
        if missing := [name for name in required if name not in weights]:
            raise CheckpointError(f"{len(missing)} weights to start from are missing, such as {missing[0]}")
        if required:
            shapes = f"{tuple(weights[required[0]].shape)}, not {tuple(own[required[0]].shape)}"
            raise CheckpointError(
                f"{len(required)} weights to start from have another shape: {required[0]} has {shapes}"
            )
        if not fitting:
            raise CheckpointError("none of the weights to start from fits the model")
        if anew:
            logger.warning("weights to start from do not fit and begin anew: %s", listed(anew))
        self.model.load_state_dict(own | {name: weights[name] for name in fitting})
        self.start_stage()

    def skip_to(self, name: StageName) -> None:
        """Begin with a later stage. Raises ConfigError if the configuration has none of that name."""
        names = [stage.name for stage in self.config.stages]
        if name not in names:
            raise ConfigError(f"no stage {name!r} in this configuration; it has {', '.join(names)}")
        self.stage_index = names.index(name)
        self.start_stage()

    @contextmanager
    def averaged(self) -> Iterator[ReCoFuse]:
        """The model with its averaged weights, put back afterwards."""
        own = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.model.load_state_dict(self.average.weights)
        try:
            yield self.model
        finally:
            self.model.load_state_dict(own)

    def save(self, path: Path) -> None:
        """Write the whole state, atomically; every process of a group must call it."""
        state = {
            "config": json.dumps(asdict(self.config)),
            "stage_index": self.stage_index,
            "step": self.step,
            "elapsed_s": self.elapsed_s,
            "model": self.model.state_dict(),
            "average": self.average.weights,
            "average_updates": self.average.num_updates,
            "optimizer": self.optimizer.state_dict(),
            "generators": self.group.gather(self.generator.get_state()),
            "best_score": None if self.best is None else self.best.score,
            "best_weights": None if self.best is None else self.best.weights,
            "num_without_gain": self.num_without_gain,
        }
        if not self.group.is_first:
            return
        temporary = path.with_suffix(".partial")
        torch.save(state, temporary)
        os.replace(temporary, path)

    def resume(self, path: Path) -> None:
        """Go on from a saved state. Raises CheckpointError if it is unreadable or of another configuration."""
        try:
            state: dict[str, Any] = torch.load(path, weights_only=True, map_location=self.device)
            if state["config"] != json.dumps(asdict(self.config)):
                raise CheckpointError(f"{path} was written with another configuration; remove it to start anew")
            self.stage_index = state["stage_index"]
            self.start_stage()
            self.step, self.elapsed_s = state["step"], state["elapsed_s"]
            self.model.load_state_dict(state["model"])
            self.average.weights, self.average.num_updates = state["average"], state["average_updates"]
            self.optimizer.load_state_dict(state["optimizer"])
            if len(state["generators"]) != self.group.size:
                raise CheckpointError(
                    f"{path} was written by {len(state['generators'])} processes, this run has {self.group.size}"
                )
            self.generator.set_state(state["generators"][self.group.rank].cpu())
            if state["best_score"] is not None:
                self.best = BestWeights(state["best_score"], state["best_weights"])
            self.num_without_gain = state["num_without_gain"]
        except (OSError, RuntimeError, KeyError, ValueError) as error:
            raise CheckpointError(f"{path} is not a training state: {error}") from error


def _sum(losses: Mapping[str, Tensor]) -> Tensor:
    return sum(losses.values(), torch.zeros(()))


def _reported(losses: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: float(loss.detach()) for name, loss in losses.items()}


def _first_stage_of(name: str) -> StageName:
    """The stage that trains a weight which knows nothing yet."""
    network, _, rest = name.partition(".")
    return FROM_THE_START.get(f"{network}.{rest.partition('.')[0]}", FROM_THE_START[network])


def _is_decoder(name: str) -> bool:
    """Whether a parameter of the compact autoencoder lies behind the latent or the skips."""
    return not name.startswith(("stem", "encoder", "down", "to_latent"))
