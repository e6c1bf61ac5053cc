"""Mean-reverting SDE: dx = theta_t (mu - x) dt + sigma_t dw, sigma_t**2 = 2 lam**2 theta_t (Luo et al., ICML 2023).

The clean latent x_0 drifts to the degraded latent mu and gathers noise of stationary std lam. An instance holds
schedules only and is immutable: mu, the state and the noise are arguments, so one instance serves any number of images.

Letters: B batch, C latent channels, H and W latent height and width, T number of steps. Time steps are integers in
[0, T]; 0 is the clean end. `timesteps` may be one int for the whole batch or a (B,) tensor. With y = x - mu the process
is a variance-preserving diffusion, y_t = alpha_t y_0 + sigma_bar_t eps, so solvers for those apply to y.

Nothing here needs torch: for an int every table gives a Python number, so that states may be arrays of any library that
has operators. (B,) timesteps are torch tensors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from recofuse_core.errors import ConfigError, ShapeError

if TYPE_CHECKING:
    from torch import Tensor

Table = NDArray[np.float64]
State: TypeAlias = Any  # a torch tensor or numpy array, (B, C, H, W)
Number: TypeAlias = "float | Tensor"  # for an int or (B,) steps

ScheduleName = Literal["cosine", "linear", "constant"]


@dataclass(frozen=True)
class SDEConfig:
    """Schedule of the process. `max_sigma` is lam in 8-bit grey levels (values below 1 are lam itself)."""

    num_steps: int = 100
    max_sigma: float = 50.0
    schedule: ScheduleName = "cosine"
    eps: float = 0.005  # what is left of x_0 - mu at t = T

    def __post_init__(self) -> None:
        if self.num_steps < 1 or self.max_sigma <= 0 or not 0 < self.eps < 1:
            raise ConfigError(f"an SDE needs num_steps >= 1, max_sigma > 0 and 0 < eps < 1, got {self}")


def theta_schedule(name: ScheduleName, num_steps: int) -> Table:
    """theta_0 .. theta_T as T + 1 numbers; theta_0 belongs to no step."""
    if name == "cosine":
        num_knots = num_steps + 2
        knots = np.arange(num_knots + 1)
        level = np.cos((knots / num_knots + 0.008) / 1.008 * (math.pi / 2)) ** 2
        theta: Table = 1 - (level / level[0])[1:-1]
        return theta
    if name == "linear":
        scale = 1 / (num_steps + 1)
        return np.linspace(0.1 * scale, 20 * scale, num_steps + 1)
    if name == "constant":
        return np.ones(num_steps + 1)
    raise ConfigError(f"unknown schedule {name!r}; known: cosine, linear, constant")


class MeanRevertingSDE:
    """The tables of one schedule and the formulas that use them.

    Tables have T + 1 entries of double precision, indexed by the time step: `theta`, `theta_bar` (its running integral,
    0 at t = 0), `sigma`, `alpha` = exp(-theta_bar dt), `sigma_bar` (std of the marginal) and `log_snr` =
    ln(alpha/sigma_bar) (+inf at t = 0). States are meant to be float32 at least: x_0 = .../alpha_t multiplies errors by
    up to 1/eps.
    """

    def __init__(self, config: SDEConfig) -> None:
        self.config = config
        self.num_steps = config.num_steps
        self.lam = config.max_sigma / 255 if config.max_sigma >= 1 else config.max_sigma
        self.theta = theta_schedule(config.schedule, config.num_steps)
        self.theta_bar: Table = np.cumsum(self.theta) - self.theta[0]
        self.dt = float(-math.log(config.eps) / self.theta_bar[-1])
        self.sigma: Table = self.lam * np.sqrt(2 * self.theta)
        self.alpha: Table = np.exp(-self.theta_bar * self.dt)
        self.sigma_bar: Table = self.lam * np.sqrt(1 - np.exp(-2 * self.theta_bar * self.dt))
        with np.errstate(divide="ignore"):
            self.log_snr: Table = np.log(self.alpha / self.sigma_bar)
        self.posterior_std = self._posterior_std()

    def _posterior_std(self) -> Table:
        """Std of x_{t-1} given x_t and x_0, entry t (entries 0 and 1 are 0 up to the clamp)."""
        step_decay = np.exp(-2 * self.theta * self.dt)  # A**2
        marginal = np.exp(-2 * self.theta_bar * self.dt)  # B**2 at t, C**2 at t - 1
        radicand = (1 - step_decay[1:]) * (1 - marginal[:-1]) / (1 - marginal[1:])
        std: Table = np.concatenate([[0], self.lam * np.sqrt(radicand.clip(min=1e-20 * self.dt))])
        return std

    def _exact(self, table: Table, timesteps: Tensor | int) -> Any:
        """Entries of a table in double precision: (B,), or for one int a number."""
        if isinstance(timesteps, int):
            return float(table[timesteps])
        return timesteps.double().new_tensor(table)[timesteps]

    def _at(self, table: Table, timesteps: Tensor | int, like: State) -> Any:
        """Entries of a table as (B, 1, 1, 1) in the dtype and on the device of `like`, or for one int as a number.

        A number goes along with every kernel; nothing is copied to the device and nothing waits.
        """
        return _beside(self._exact(table, timesteps), like)

    def marginal(self, x0: State, mu: State, timesteps: Tensor | int) -> tuple[State, Number]:
        """Mean (B, C, H, W) and std (B, 1, 1, 1), or a number for one int, of x_t given x_0 (Prop. 3.1 of IR-SDE).

        Raises ShapeError if x0 and mu differ in shape.
        """
        if x0.shape != mu.shape:
            raise ShapeError(f"x0 and mu must have one shape, got {tuple(x0.shape)} and {tuple(mu.shape)}")
        return mu + (x0 - mu) * self._at(self.alpha, timesteps, x0), self._at(self.sigma_bar, timesteps, x0)

    def noise_state(self, mu: State, noise: State) -> State:
        """The state the reverse process starts from: mu + lam n."""
        return plus(mu, noise, self.lam)

    def score(self, noise: State, timesteps: Tensor | int) -> State:
        """Score of the marginal from predicted noise: -eps / sigma_bar_t."""
        return -noise / self._at(self.sigma_bar, timesteps, noise)

    def reverse_drift(self, x: State, mu: State, noise: State, timesteps: Tensor | int) -> State:
        """D(x) = (theta_t (mu - x) - sigma_t**2 score) dt, the reverse-time drift of one step."""
        theta = self._at(self.theta, timesteps, x)
        sigma = self._at(self.sigma, timesteps, x)
        return (theta * (mu - x) - sigma**2 * self.score(noise, timesteps)) * self.dt

    def reverse_mean(self, x: State, mu: State, noise: State, timesteps: Tensor | int) -> State:
        """Mean of the Euler step of the reverse SDE, x - D(x)."""
        return x - self.reverse_drift(x, mu, noise, timesteps)

    def reverse_step(self, x: State, mu: State, noise: State, timesteps: Tensor | int, draw: State) -> State:
        """Euler-Maruyama step of the reverse SDE; `draw` is standard normal, the minus before it the published one."""
        spread = self._at(self.sigma, timesteps, x) * math.sqrt(self.dt)
        return self.reverse_mean(x, mu, noise, timesteps) - spread * draw

    def reverse_jump(self, x: State, mu: State, noise: State, start: int, end: int, draw: State) -> State:
        """Euler-Maruyama step over any distance: theta dt summed over end + 1..start. `reverse_step` for one step."""
        if end == start - 1:
            return self.reverse_step(x, mu, noise, start, draw)
        span = float(self.theta[end + 1 : start + 1].sum()) * self.dt
        drift = span * (mu - x - 2 * self.lam**2 * self.score(noise, start))
        return x - drift - self.lam * math.sqrt(2 * span) * draw

    def reverse_ode_step(self, x: State, mu: State, noise: State, timesteps: Tensor | int) -> State:
        """Euler step of the probability-flow ODE: half of the score term, no noise."""
        theta = self._at(self.theta, timesteps, x)
        sigma = self._at(self.sigma, timesteps, x)
        return x - (theta * (mu - x) - 0.5 * sigma**2 * self.score(noise, timesteps)) * self.dt

    def optimum_weights(self, timesteps: Tensor | int, like: State) -> tuple[Any, Any]:
        """Weights (k1, k2) of x_t - mu and x_0 - mu in the optimum of x_{t-1}; (B, 1, 1, 1), or numbers for one int."""
        earlier = timesteps - 1
        rate = -self._exact(self.theta, timesteps) * self.dt
        step_decay = math.exp(rate) if isinstance(rate, float) else rate.exp()
        at_t, at_earlier = self._exact(self.alpha, timesteps), self._exact(self.alpha, earlier)
        divisor = 1 - at_t**2
        k1, k2 = step_decay * (1 - at_earlier**2) / divisor, at_earlier * (1 - step_decay**2) / divisor
        return _beside(k1, like), _beside(k2, like)

    def optimum_step(self, x: State, x0: State, mu: State, timesteps: Tensor | int) -> State:
        """Most likely x_{t-1} given x_t and x_0 (Prop. 3.2 of IR-SDE); x_0 itself at t = 1."""
        k1, k2 = self.optimum_weights(timesteps, x)
        return mu + k1 * (x - mu) + k2 * (x0 - mu)

    def clean_from_noise(self, x: State, mu: State, noise: State, timesteps: Tensor | int) -> State:
        """x_0 that the marginal gives for a state and its noise."""
        return mu + (x - mu - self._at(self.sigma_bar, timesteps, x) * noise) / self._at(self.alpha, timesteps, x)

    def clean_from_optimum(self, optimum: State, x: State, mu: State, timesteps: Tensor | int) -> State:
        """x_0 for which `optimum` would be the optimum step from x: the inverse of `optimum_step`.

        The consistent estimate for a coupled noise predictor, whose training target is the optimum step of the
        modality's own state. Errors grow by 1/k2 (about 1000 at t = T of the default schedule, 1 at t = 1).
        """
        k1, k2 = self.optimum_weights(timesteps, x)
        return mu + (optimum - mu - k1 * (x - mu)) / k2

    def clean_from_step(self, start: State, noise: State, x: State, mu: State, step: int) -> State:
        """`clean_from_optimum` of the `reverse_mean` from `start`: all of it in three numbers for one step.

        x_0 = mu + a (start - mu) + b noise + c (x - mu).
        """
        k1, k2 = self.optimum_weights(step, x)
        pull = float(self.theta[step]) * self.dt
        push = float(self.sigma[step]) ** 2 * self.dt / float(self.sigma_bar[step])
        clean = plus(mu, start - mu, (1 + pull) / k2)
        return plus(plus(clean, noise, -push / k2), x - mu, -k1 / k2)

    def posterior_step(self, x: State, x0: State, mu: State, timesteps: Tensor | int, draw: State) -> State:
        """Sample of x_{t-1} given x_t and x_0; `draw` is standard normal."""
        return self.optimum_step(x, x0, mu, timesteps) + self._at(self.posterior_std, timesteps, x) * draw

    def noise_of(self, x: State, x0: State, mu: State, timesteps: Tensor | int) -> State:
        """The noise that the marginal needs to reach x from x_0."""
        mean, std = self.marginal(x0, mu, timesteps)
        return (x - mean) / std

    def ancestral_jump(self, x: State, x0: State, mu: State, start: int, end: int, draw: State) -> State:
        """Sample of x_end given x_start and x_0: the posterior step over any distance (MR sampler, order 1).

        For end = start - 1 it is `posterior_step`.
        """
        decay = float(self.alpha[start] / self.alpha[end])
        kept = float((self.sigma_bar[end] / self.sigma_bar[start]) ** 2) * decay
        gained = float(self.alpha[end]) * (1 - decay**2) * self.lam**2 / float(self.sigma_bar[start]) ** 2
        spread = float(self.sigma_bar[end] / self.sigma_bar[start]) * self.lam * math.sqrt(1 - decay**2)
        return mu + kept * (x - mu) + gained * (x0 - mu) + spread * draw

    def ode_jump(self, x: State, x0: State, mu: State, start: int, end: int) -> State:
        """Order-1 exponential step of the probability-flow ODE with data prediction, from `start` to `end` < `start`.

        x_t = mu + (sigma_t/sigma_s)(x_s - mu) + alpha_t (1 - e^-h)(x_0 - mu), h = log_snr_t - log_snr_s.
        It is x_0 at end = 0.
        """
        ratio = float(self.sigma_bar[end] / self.sigma_bar[start])
        gained = float(self.alpha[end] - self.alpha[start] * ratio)
        return plus(plus(ratio * x, x0, gained), mu, 1 - ratio - gained)

    def spaced_timesteps(self, num_evaluations: int, start: int | None = None) -> tuple[int, ...]:
        """Decreasing steps, `start` (default T) first and 1 or more last, close to uniform in log-SNR.

        Returns `num_evaluations` distinct integers; a sampler evaluates the network at each and ends at 0. Raises
        ConfigError if the range has fewer steps than asked for.
        """
        first = self.num_steps if start is None else start
        if not 1 <= num_evaluations <= first <= self.num_steps:
            raise ConfigError(f"cannot place {num_evaluations} evaluations in the steps {first}..1 of {self.num_steps}")
        # The span ends one interval before t = 1, so that the last jump to 0 is no longer than the others.
        low, high = float(self.log_snr[first]), float(self.log_snr[1])
        chosen: list[int] = []
        for index in range(num_evaluations):
            wanted = low + (high - low) * index / num_evaluations
            nearest = int(np.abs(self.log_snr[1 : first + 1] - wanted).argmin()) + 1
            ceiling = chosen[-1] - 1 if chosen else first
            chosen.append(max(min(nearest, ceiling), num_evaluations - index))
        return tuple(chosen)


def plus(total: State, part: State, weight: float) -> State:
    """Return total + weight * part, in one pass where the library has one."""
    return total.add(part, alpha=weight) if hasattr(total, "add") else total + weight * part


def _beside(entries: Any, like: State) -> Any:
    """(B,) entries as (B, 1, 1, 1) like `like`; a number as it is."""
    return entries if isinstance(entries, float) else entries.to(like.device, like.dtype).view(-1, 1, 1, 1)
