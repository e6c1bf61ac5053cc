"""The losses of the stages that train the autoencoder, the branches and TIM, and what they are taken on."""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from recofuse_core.losses import FusionTargets, FusionTerms, fusion_loss, matching_loss
from recofuse_core.model import ReCoFuse
from recofuse_core.networks import Skips
from recofuse_core.sampler import SAMPLERS, NoiseSource, Pair, Prediction, clean_latents
from recofuse_core.training.config import StageConfig
from recofuse_core.training.pairs import Batch


def autoencoder_loss(model: ReCoFuse, batch: Batch, stage: StageConfig) -> dict[str, Tensor]:
    """Two terms of feature reorganisation: a latent decoded with degraded skips gives the image it belongs to."""
    clean, degraded = torch.cat(batch.clean), torch.cat(batch.degraded)
    size = (clean.shape[-2], clean.shape[-1])
    latents, skips = model.autoencoder.encode(torch.cat([clean, degraded]))
    clean_latent, degraded_latent = latents.chunk(2)
    degraded_skips: Skips = tuple(skip.chunk(2)[1] for skip in skips)
    restored = model.autoencoder.decode(clean_latent, degraded_skips, size).float()
    repeated = model.autoencoder.decode(degraded_latent, degraded_skips, size).float()
    power = clean_latent.float().square().mean(dim=(0, 2, 3))
    return {
        "clean": F.l1_loss(restored, clean),
        "degraded": stage.degraded_weight * F.l1_loss(repeated, degraded),
        "unit": stage.unit_weight * (power - 1).square().mean(),
    }


@torch.no_grad()
def reconstruct(model: ReCoFuse, clean: Pair, skips: tuple[Skips, Skips], like: Pair) -> Pair:
    """Clean latents decoded with degraded skips, in the size of `like`: references of the published fusion update."""
    size = (like.vis.shape[-2], like.vis.shape[-1])
    return Pair(*(model.autoencoder.decode(z, skip, size).float() for z, skip in zip(clean, skips, strict=True)))


@torch.no_grad()
def encode_pair(model: ReCoFuse, images: Pair) -> tuple[Pair, Skips, Skips]:
    """Latents (float32) and the skips of both modalities, without gradient: the encoder is frozen after its stage."""
    latent, skips = model.autoencoder.encode(torch.cat(images))
    halves = [skip.chunk(2) for skip in skips]
    return Pair(*latent.float().chunk(2)), tuple(h[0] for h in halves), tuple(h[1] for h in halves)


def predict_marginal(model: ReCoFuse, clean: Pair, mu: Pair, timesteps: Tensor, noise: Pair) -> tuple[Pair, Prediction]:
    """States of the marginal at the steps (B,), and the model's evaluation of them; all pairs are (B, C, h, w)."""
    states = []
    for x0, m, eps in zip(clean, mu, noise, strict=True):
        mean, std = model.sde.marginal(x0, m, timesteps)
        states.append(mean + std * eps)
    state = Pair(*states)
    return state, model.predict(state, mu, timesteps)


def restoration_loss(model: ReCoFuse, clean: Pair, mu: Pair, timesteps: Tensor, noise: Pair) -> tuple[Tensor, Tensor]:
    """Losses of both modalities at random steps of the marginal (docs/model.md, 7).

    clean, mu, noise: (B, C, h, w) pairs; timesteps (B,). "noise" denoisers are compared at the optimum step of the own
    state, "clean" ones at x_0.
    """
    state, prediction = predict_marginal(model, clean, mu, timesteps, noise)
    return prediction_losses(model, state, prediction, clean, mu, timesteps)


def prediction_losses(
    model: ReCoFuse, state: Pair, prediction: Prediction, clean: Pair, mu: Pair, timesteps: Tensor
) -> tuple[Tensor, Tensor]:
    """`restoration_loss` of an evaluation that is made already."""
    losses = []
    for start, output, x, x0, m in zip(prediction.start, prediction.output, state, clean, mu, strict=True):
        if prediction.kind == "clean":
            losses.append(matching_loss(m + output.float(), x0))
        else:
            estimate = model.sde.reverse_mean(start, m, output, timesteps)
            losses.append(matching_loss(estimate, model.sde.optimum_step(x, x0, m, timesteps)))
    return losses[0], losses[1]


def rollout(model: ReCoFuse, mu: Pair, draw: NoiseSource, steps: int | None = None) -> tuple[Pair, list[Pair]]:
    """The model's default sampler with gradients. Returns its result and the clean estimate of every evaluation.

    `steps` is the model's own number if None.
    """
    estimates: list[Pair] = []

    def predict(state: Pair, mu: Pair, t: int) -> Prediction:
        prediction = model.predict(state, mu, t)
        output = Pair(prediction.output.vis.float(), prediction.output.ir.float())
        prediction = replace(prediction, output=output)
        estimates.append(clean_latents(model.sde, prediction, state, mu, t))
        return prediction

    noise = draw()
    state = Pair(*(model.sde.noise_state(m, n) for m, n in zip(mu, noise, strict=True)))
    plan = model.plan(steps=steps)
    result = SAMPLERS[plan.sampler](predict, model.sde, state, mu, draw, plan.timesteps)
    return result, estimates


def final_fusion_loss(
    model: ReCoFuse,
    clean: Pair,
    skips: tuple[Skips, Skips],
    references: Pair,
    targets: FusionTargets | None = None,
) -> tuple[FusionTerms, Tensor]:
    """Fusion update: TIM at step 0 on clean latents, decoded with the fused skips. Returns the terms and the image."""
    size = (references.vis.shape[-2], references.vis.shape[-1])
    image = model.autoencoder.decode(model.final_fusion(clean), model.autoencoder.fuse_skips(*skips), size).float()
    return fusion_loss(image, references.vis, references.ir, targets=targets), image
