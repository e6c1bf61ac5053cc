"""One step of any sampler as a function of numbers that lie in a buffer, so that one recording serves every step.

The samplers of sampler.py write a step in the words of the paper, with numbers of Python that a recording would keep.
All of them are linear in what they know, though: a step takes its state, the degraded latent mu, what the networks said
and noise, each times a number. Here these numbers are a row, one a step, and both modalities are one tensor
(2, B, C, h, w). Results differ from those of sampler.py by rounding.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recofuse_core.picture import PredictionKind
from recofuse_core.sampler import Prediction, SamplerName, jumps
from recofuse_core.sde import MeanRevertingSDE


class Numbers(NamedTuple):
    """A row: of a step's update x' = base x + to_mu mu + drive d + previous p + draw n, and of what leads to d.

    d is the estimated clean latent, and p that of the step before. `euler` with predicted noise is the exception: there
    d is that noise, and x the state that the branches started from. spread is of the start state, mu + spread n.
    The clean latent of predicted noise is mu + of_start (start - mu) + of_noise noise + of_state (x - mu).
    """

    spread: Any
    base: Any
    to_mu: Any
    drive: Any
    previous: Any = 0.0
    draw: Any = 0.0
    of_start: Any = 0.0
    of_noise: Any = 0.0
    of_state: Any = 0.0


def table(
    sde: MeanRevertingSDE,
    sampler: SamplerName,
    kind: PredictionKind,
    timesteps: tuple[int, ...],
    dtype: type[np.floating[Any]] = np.float32,
) -> NDArray[np.floating[Any]]:
    """(steps, numbers): the row of every step of a run."""
    spread = sde.lam if timesteps[0] == sde.num_steps else float(sde.sigma_bar[timesteps[0]])
    rows = []
    previous_span = math.inf
    for t, end in jumps(timesteps):
        if sampler == "euler":
            row = _euler(sde, kind, t, end, spread)
        elif sampler == "posterior":
            row = _posterior(sde, t, end, spread)
        else:
            row = _ode(sde, t, end, spread, previous_span if sampler == "ode2" else math.inf)
            previous_span = float(sde.log_snr[end] - sde.log_snr[t])
        if kind == "noise" and sampler != "euler":
            row = row._replace(**_estimate(sde, t))
        rows.append(row)
    return np.array(rows, dtype)


def _euler(sde: MeanRevertingSDE, kind: PredictionKind, t: int, end: int, spread: float) -> Numbers:
    """See MeanRevertingSDE.reverse_jump; a predicted clean latent says which noise led to x (`noise_of`)."""
    pull = float(sde.theta[end + 1 : t + 1].sum()) * sde.dt
    std, alpha = float(sde.sigma_bar[t]), float(sde.alpha[t])
    push = 2 * sde.lam**2 * pull / std
    draw = -sde.lam * math.sqrt(2 * pull)
    if kind == "noise":
        return Numbers(spread, 1 + pull, -pull, -push, draw=draw)
    return Numbers(spread, 1 + pull - push / std, push * (1 - alpha) / std - pull, push * alpha / std, draw=draw)


def _posterior(sde: MeanRevertingSDE, t: int, end: int, spread: float) -> Numbers:
    """See MeanRevertingSDE.ancestral_jump."""
    decay = float(sde.alpha[t] / sde.alpha[end])
    shrunk = float(sde.sigma_bar[end] / sde.sigma_bar[t])
    kept = shrunk**2 * decay
    gained = float(sde.alpha[end]) * (1 - decay**2) * sde.lam**2 / float(sde.sigma_bar[t]) ** 2
    return Numbers(spread, kept, 1 - kept - gained, gained, draw=shrunk * sde.lam * math.sqrt(1 - decay**2))


def _ode(sde: MeanRevertingSDE, t: int, end: int, spread: float, previous_span: float) -> Numbers:
    """See MeanRevertingSDE.ode_jump. previous_span: infinite where no step before counts."""
    ratio = float(sde.sigma_bar[end] / sde.sigma_bar[t])
    gained = float(sde.alpha[end] - sde.alpha[t] * ratio)
    weight = float(sde.log_snr[end] - sde.log_snr[t]) / (2 * previous_span) if end > 0 else 0.0
    return Numbers(spread, ratio, 1 - ratio - gained, gained * (1 + weight), previous=-gained * weight)


def _estimate(sde: MeanRevertingSDE, t: int) -> dict[str, float]:
    """See MeanRevertingSDE.clean_from_step."""
    k1, k2 = sde.optimum_weights(t, None)
    pull = float(sde.theta[t]) * sde.dt
    push = float(sde.sigma[t]) ** 2 * sde.dt / float(sde.sigma_bar[t])
    return {"of_start": (1 + pull) / k2, "of_noise": -push / k2, "of_state": -k1 / k2}


def limits_of(mu: Tensor) -> tuple[Tensor, Tensor]:
    """See sampler.reach_of: mu (2, B, C, h, w) to (2, B, 1, 1, 1) each."""
    axes = (2, 3, 4)
    low, high = mu.amin(axes, keepdim=True), mu.amax(axes, keepdim=True)
    margin = (high - low) / 2
    return low - margin, high + margin


def advanced(
    sampler: SamplerName,
    numbers: Numbers,
    prediction: Prediction,
    state: Tensor,
    mu: Tensor,
    *,
    limits: tuple[Tensor, Tensor],
    previous: Tensor,
    draw: Tensor,
) -> tuple[Tensor, Tensor]:
    """The state after one step, and the clean latents that it believed in; numbers are tensors without dimensions."""
    output = torch.stack(list(prediction.output))
    base, drive = state, output
    if prediction.kind == "clean":
        drive = mu + output
    else:
        vis, ir = prediction.start
        start = vis[None] if vis is ir else torch.stack([vis, ir])
        if sampler == "euler":
            base = start
        else:
            drive = torch.addcmul(mu, start - mu, numbers.of_start).addcmul(output, numbers.of_noise)
            drive = drive.addcmul(state - mu, numbers.of_state).clamp(*limits)
    new = (base * numbers.base).addcmul(mu, numbers.to_mu).addcmul(drive, numbers.drive)
    if sampler == "ode2":
        new = new.addcmul(previous, numbers.previous)
    elif sampler in ("euler", "posterior"):
        new = new.addcmul(draw, numbers.draw)
    return new, drive
