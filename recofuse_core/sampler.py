"""Reverse-time samplers: from the noisy degraded latents of both modalities to their clean latents.

Each sampler is one function of the same signature: the coupled predictor, the SDE, the start state, mu, a noise source
and the decreasing time steps at which the predictor is evaluated; the last jump ends at 0. The predictor couples the
two branches (TIM, then both denoisers), so coupling happens at every step of every sampler.

What a newcomer would get wrong: a published (noise-predicting) denoiser is trained such that the Euler mean *from the
fused state* hits the optimum step of the modality's *own* state. Its clean latent is therefore the inverse of that
optimum step (`MeanRevertingSDE.clean_from_optimum`), not x_0 of the marginal formula.

States are arrays of any library that has operators, `clip` and the like: nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from recofuse_core.errors import ConfigError
from recofuse_core.sde import MeanRevertingSDE, plus

if TYPE_CHECKING:
    from torch import Tensor

SamplerName = Literal["euler", "posterior", "ode1", "ode2"]


class Pair(NamedTuple):
    """One tensor, or array, of each modality, both (B, C, h, w)."""

    vis: Any
    ir: Any


@dataclass(frozen=True)
class Prediction:
    """What one coupled evaluation says: the states the branches started from, and their outputs.

    `start` is the fused latent twice (each modality's own state without coupling). `output` is the noise for
    kind "noise", x_0 - mu for kind "clean".
    """

    start: Pair
    output: Pair
    kind: Literal["noise", "clean"]


class Predictor(Protocol):
    """One coupled evaluation at one time step."""

    def __call__(self, state: Pair, mu: Pair, t: int) -> Prediction: ...


NoiseSource = Callable[[], Pair]
OnStep = Callable[[int, Pair], None]


class Sampler(Protocol):
    """State at the first of `timesteps` to the state at 0. `on_step(t, state)` sees the state after each jump to t."""

    def __call__(
        self,
        predict: Predictor,
        sde: MeanRevertingSDE,
        state: Pair,
        mu: Pair,
        draw: NoiseSource,
        timesteps: Sequence[int],
        on_step: OnStep | None = None,
    ) -> Pair: ...


def seeded_noise(
    seeds: Sequence[int], shape: Sequence[int], adopt: Callable[[NDArray[np.float32]], Any]
) -> NoiseSource:
    """Standard normal pairs (B, C, h, w), vis drawn before ir; item i, of `shape` (C, h, w), depends on seeds[i] alone.

    Drawn by numpy, so that a seed gives the same noise on every device, in every batch and in every runtime. `adopt`
    makes what the networks take of a float32 array.
    """
    generators = [np.random.default_rng(seed % 2**64) for seed in seeds]

    def draw_one() -> Any:
        return adopt(np.stack([generator.standard_normal(shape, np.float32) for generator in generators]))

    return lambda: Pair(draw_one(), draw_one())


def num_draws(sampler: SamplerName, steps: int) -> int:
    """How many pairs of noise a whole run draws, the start state's included."""
    return 1 if sampler in ("ode1", "ode2") else steps + 1


def clean_latents(
    sde: MeanRevertingSDE, prediction: Prediction, state: Pair, mu: Pair, t: Tensor | int, reach: Reach | None = None
) -> Pair:
    """Estimates of both clean latents from one coupled evaluation at step t, or at (B,) steps.

    reach: of mu, if it is known already.
    """
    if prediction.kind == "clean":
        return Pair(mu.vis + prediction.output.vis, mu.ir + prediction.output.ir)
    estimates = []
    limits = reach or reach_of(mu)
    for start, noise, x, m, (low, high) in zip(prediction.start, prediction.output, state, mu, limits, strict=True):
        if isinstance(t, int):
            clean = sde.clean_from_step(start, noise, x, m, t)
        else:
            clean = sde.clean_from_optimum(sde.reverse_mean(start, m, noise, t), x, m, t)
        estimates.append(clean.clip(low, high))
    return Pair(*estimates)


Reach = tuple[tuple[Any, Any], tuple[Any, Any]]


def reach_of(mu: Pair) -> Reach:
    """The least and the most that estimates may be, either (B, 1, 1, 1): mu's range, widened by half its span.

    Early estimates magnify errors up to 1000 times.
    """
    vis, ir = (_widened_range(m) for m in mu)
    return vis, ir


def _widened_range(mu: Any) -> tuple[Any, Any]:
    axes = (1, 2, 3)
    is_numpy = isinstance(mu, np.ndarray)
    low = mu.min(axes, keepdims=True) if is_numpy else mu.amin(axes, keepdim=True)
    high = mu.max(axes, keepdims=True) if is_numpy else mu.amax(axes, keepdim=True)
    margin = (high - low) / 2
    return low - margin, high + margin


class _Estimates:
    """Both clean latents at any step of one run; what limits them is found once."""

    def __init__(self, predict: Predictor, sde: MeanRevertingSDE, mu: Pair) -> None:
        self._predict, self._sde, self._mu = predict, sde, mu
        self._reach: Reach | None = None

    def __call__(self, state: Pair, t: int) -> Pair:
        prediction = self._predict(state, self._mu, t)
        if self._reach is None and prediction.kind == "noise":
            self._reach = reach_of(self._mu)
        return clean_latents(self._sde, prediction, state, self._mu, t, self._reach)


def euler(
    predict: Predictor,
    sde: MeanRevertingSDE,
    state: Pair,
    mu: Pair,
    draw: NoiseSource,
    timesteps: Sequence[int],
    on_step: OnStep | None = None,
) -> Pair:
    """The published sampler: Euler-Maruyama on the coupled reverse SDE, noise at every step, the last included."""
    for t, end in jumps(timesteps):
        prediction = predict(state, mu, t)
        start, noise = prediction.start, prediction.output
        if prediction.kind == "clean":
            clean = clean_latents(sde, prediction, state, mu, t)
            start = state
            noise = Pair(*(sde.noise_of(x, x0, m, t) for x, x0, m in zip(state, clean, mu, strict=True)))
        draws = draw()
        state = Pair(
            *(sde.reverse_jump(x, m, eps, t, end, n) for x, m, eps, n in zip(start, mu, noise, draws, strict=True))
        )
        if on_step is not None:
            on_step(end, state)
    return state


def posterior(
    predict: Predictor,
    sde: MeanRevertingSDE,
    state: Pair,
    mu: Pair,
    draw: NoiseSource,
    timesteps: Sequence[int],
    on_step: OnStep | None = None,
) -> Pair:
    """Ancestral sampling: each jump draws x_end given x_t and the estimated x_0."""
    estimate = _Estimates(predict, sde, mu)
    for t, end in jumps(timesteps):
        clean = estimate(state, t)
        draws = draw()
        state = Pair(
            *(sde.ancestral_jump(x, x0, m, t, end, n) for x, x0, m, n in zip(state, clean, mu, draws, strict=True))
        )
        if on_step is not None:
            on_step(end, state)
    return state


def ode1(
    predict: Predictor,
    sde: MeanRevertingSDE,
    state: Pair,
    mu: Pair,
    draw: NoiseSource,
    timesteps: Sequence[int],
    on_step: OnStep | None = None,
) -> Pair:
    """Deterministic exponential solver of the probability-flow ODE with data prediction, order 1 (MR sampler)."""
    return _solve_ode(predict, sde, state, mu, timesteps, on_step, second_order=False)


def ode2(
    predict: Predictor,
    sde: MeanRevertingSDE,
    state: Pair,
    mu: Pair,
    draw: NoiseSource,
    timesteps: Sequence[int],
    on_step: OnStep | None = None,
) -> Pair:
    """The same of order 2, multi-step: the previous estimate extrapolates the current one, at no extra evaluation."""
    return _solve_ode(predict, sde, state, mu, timesteps, on_step, second_order=True)


def _solve_ode(
    predict: Predictor,
    sde: MeanRevertingSDE,
    state: Pair,
    mu: Pair,
    timesteps: Sequence[int],
    on_step: OnStep | None,
    second_order: bool,
) -> Pair:
    previous: Pair | None = None
    previous_span = 0.0
    estimate = _Estimates(predict, sde, mu)
    for t, end in jumps(timesteps):
        clean = estimate(state, t)
        span = float(sde.log_snr[end] - sde.log_snr[t])  # infinite for the last jump, which ends at the estimate itself
        target = clean
        if second_order and previous is not None and end > 0:
            weight = span / (2 * previous_span)
            target = Pair(*(plus((1 + weight) * x0, old, -weight) for x0, old in zip(clean, previous, strict=True)))
        state = Pair(*(sde.ode_jump(x, x0, m, t, end) for x, x0, m in zip(state, target, mu, strict=True)))
        previous, previous_span = clean, span
        if on_step is not None:
            on_step(end, state)
    return state


def late_start(sde: MeanRevertingSDE, steps: int) -> int:
    """Where samplers but euler begin with a noise-predicting network: at 0.6 T, unless that leaves too few steps.

    The clean latent is found from noise by a division that magnifies errors up to 1000 times at T, and 36 times there
    (docs/decisions/0010).
    """
    return max(min(steps, sde.num_steps), round(0.6 * sde.num_steps))


def jumps(timesteps: Sequence[int]) -> list[tuple[int, int]]:
    """(from, to) of every jump, the last one to 0."""
    return list(zip(timesteps, [*timesteps[1:], 0], strict=True))


SAMPLERS: dict[SamplerName, Sampler] = {"euler": euler, "posterior": posterior, "ode1": ode1, "ode2": ode2}


def plan_timesteps(
    sampler: SamplerName, sde: MeanRevertingSDE, steps: int, start: int | None = None
) -> tuple[int, ...]:
    """The steps at which a sampler evaluates the network: uniform in t for euler, in log-SNR for the others.

    start: the first of them (default T). Raises ConfigError for an unknown sampler, start outside 1..T or steps outside
    1..start.
    """
    if sampler not in SAMPLERS:
        raise ConfigError(f"unknown sampler {sampler!r}; known: {', '.join(SAMPLERS)}")
    first = sde.num_steps if start is None else start
    if not 1 <= first <= sde.num_steps:
        raise ConfigError(f"the first step must be within 1..{sde.num_steps}, got {first}")
    if not 1 <= steps <= first:
        raise ConfigError(f"steps must be within 1..{first}, got {steps}")
    if sampler == "euler":
        return tuple(round(first * (steps - i) / steps) for i in range(steps))
    return sde.spaced_timesteps(steps, first)
