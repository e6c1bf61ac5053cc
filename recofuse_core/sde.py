"""Mean-reverting SDE: dx = theta_t (mu - x) dt + sigma_t dw, sigma_t**2 = 2 lam**2 theta_t (Luo et al., ICML 2023).

The clean latent x_0 drifts to the degraded latent mu and gathers noise of stationary std lam. An instance holds
schedules only and is immutable: mu, the state and the noise are arguments, so one instance serves any number of images.

Letters: B batch, C latent channels, H and W latent height and width, T number of steps. Time steps are integers in
[0, T]; 0 is the clean end. `timesteps` may be one int for the whole batch or a (B,) tensor. With y = x - mu the process
is a variance-preserving diffusion, y_t = alpha_t y_0 + sigma_bar_t eps, so solvers for those apply to y.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from recofuse_core.errors import ConfigError, ShapeError

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


def theta_schedule(name: ScheduleName, num_steps: int) -> Tensor:
    """theta_0 .. theta_T as a float32 tensor of T + 1 entries; theta_0 belongs to no step.

    On the CPU also where the default device is another: a model may be built on the meta device and filled later.
    """
    if name == "cosine":
        num_knots = num_steps + 2
        knots = torch.linspace(0, num_knots, num_knots + 1, device="cpu")
        level = torch.cos((knots / num_knots + 0.008) / 1.008 * (math.pi / 2)) ** 2
        return 1 - (level / level[0])[1:-1]
    if name == "linear":
        scale = 1 / (num_steps + 1)
        return torch.linspace(0.1 * scale, 20 * scale, num_steps + 1, device="cpu")
    if name == "constant":
        return torch.ones(num_steps + 1, device="cpu")
    raise ConfigError(f"unknown schedule {name!r}; known: cosine, linear, constant")


class MeanRevertingSDE:
    """The tables of one schedule and the formulas that use them.

    Tables are float32 with T + 1 entries indexed by the time step: `theta`, `theta_bar` (its running integral, 0 at
    t = 0), `sigma`, `alpha` = exp(-theta_bar dt), `sigma_bar` (std of the marginal) and `log_snr` = ln(alpha/sigma_bar)
    (+inf at t = 0). All arithmetic on states is meant for float32: x_0 = .../alpha_t multiplies errors by up to 1/eps.
    """

    def __init__(self, config: SDEConfig) -> None:
        self.config = config
        self.num_steps = config.num_steps
        self.lam = config.max_sigma / 255 if config.max_sigma >= 1 else config.max_sigma
        self.theta = theta_schedule(config.schedule, config.num_steps)
        self.theta_bar = torch.cumsum(self.theta, 0) - self.theta[0]
        self.dt = float(-math.log(config.eps) / self.theta_bar[-1])
        self.sigma = self.lam * (2 * self.theta).sqrt()
        self.alpha = torch.exp(-self.theta_bar * self.dt)
        self.sigma_bar = self.lam * (1 - torch.exp(-2 * self.theta_bar * self.dt)).sqrt()
        self.log_snr = torch.log(self.alpha / self.sigma_bar)
        self.posterior_std = self._posterior_std()

    def _posterior_std(self) -> Tensor:
        """Std of x_{t-1} given x_t and x_0, entry t (entries 0 and 1 are 0 up to the clamp)."""
        step_decay = torch.exp(-2 * self.theta * self.dt)  # A**2
        marginal = torch.exp(-2 * self.theta_bar * self.dt)  # B**2 at t, C**2 at t - 1
        radicand = (1 - step_decay[1:]) * (1 - marginal[:-1]) / (1 - marginal[1:])
        return torch.cat([torch.zeros(1, device="cpu"), self.lam * radicand.clamp(min=1e-20 * self.dt).sqrt()])

    def _at(self, table: Tensor, timesteps: Tensor | int, like: Tensor) -> Tensor:
        """Entries of a table as (B, 1, 1, 1) on the device of `like`, or for one int as a number on the CPU.

        A number (no dimensions) goes along with every kernel; nothing is copied to the device and nothing waits.
        """
        if isinstance(timesteps, int):
            return table[timesteps]
        return table.to(like.device)[timesteps.to(like.device)].view(-1, 1, 1, 1)

    def marginal(self, x0: Tensor, mu: Tensor, timesteps: Tensor | int) -> tuple[Tensor, Tensor]:
        """Mean (B, C, H, W) and std (B, 1, 1, 1), or a number for one int, of x_t given x_0 (Prop. 3.1 of IR-SDE).

        Raises ShapeError if x0 and mu differ in shape.
        """
        if x0.shape != mu.shape:
            raise ShapeError(f"x0 and mu must have one shape, got {tuple(x0.shape)} and {tuple(mu.shape)}")
        return mu + (x0 - mu) * self._at(self.alpha, timesteps, x0), self._at(self.sigma_bar, timesteps, x0)

    def noise_state(self, mu: Tensor, noise: Tensor) -> Tensor:
        """The state the reverse process starts from: mu + lam n."""
        return mu + self.lam * noise

    def score(self, noise: Tensor, timesteps: Tensor | int) -> Tensor:
        """Score of the marginal from predicted noise: -eps / sigma_bar_t."""
        return -noise / self._at(self.sigma_bar, timesteps, noise)

    def reverse_drift(self, x: Tensor, mu: Tensor, noise: Tensor, timesteps: Tensor | int) -> Tensor:
        """D(x) = (theta_t (mu - x) - sigma_t**2 score) dt, the reverse-time drift of one step."""
        theta = self._at(self.theta, timesteps, x)
        sigma = self._at(self.sigma, timesteps, x)
        return (theta * (mu - x) - sigma**2 * self.score(noise, timesteps)) * self.dt

    def reverse_mean(self, x: Tensor, mu: Tensor, noise: Tensor, timesteps: Tensor | int) -> Tensor:
        """Mean of the Euler step of the reverse SDE, x - D(x)."""
        return x - self.reverse_drift(x, mu, noise, timesteps)

    def reverse_step(self, x: Tensor, mu: Tensor, noise: Tensor, timesteps: Tensor | int, draw: Tensor) -> Tensor:
        """Euler-Maruyama step of the reverse SDE; `draw` is standard normal, the minus before it the published one."""
        spread = self._at(self.sigma, timesteps, x) * math.sqrt(self.dt)
        return self.reverse_mean(x, mu, noise, timesteps) - spread * draw

    def reverse_jump(self, x: Tensor, mu: Tensor, noise: Tensor, start: int, end: int, draw: Tensor) -> Tensor:
        """Euler-Maruyama step over any distance: theta dt summed over end + 1..start. `reverse_step` for one step."""
        if end == start - 1:
            return self.reverse_step(x, mu, noise, start, draw)
        span = float(self.theta[end + 1 : start + 1].sum()) * self.dt
        drift = span * (mu - x - 2 * self.lam**2 * self.score(noise, start))
        return x - drift - self.lam * math.sqrt(2 * span) * draw

    def reverse_ode_step(self, x: Tensor, mu: Tensor, noise: Tensor, timesteps: Tensor | int) -> Tensor:
        """Euler step of the probability-flow ODE: half of the score term, no noise."""
        theta = self._at(self.theta, timesteps, x)
        sigma = self._at(self.sigma, timesteps, x)
        return x - (theta * (mu - x) - 0.5 * sigma**2 * self.score(noise, timesteps)) * self.dt

    def optimum_weights(self, timesteps: Tensor | int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Weights (k1, k2) of x_t - mu and x_0 - mu in the optimum of x_{t-1}; (B, 1, 1, 1), or numbers for one int."""
        earlier = timesteps - 1
        step_decay = torch.exp(-self._at(self.theta, timesteps, like) * self.dt)
        at_t = self._at(self.alpha, timesteps, like)
        at_earlier = self._at(self.alpha, earlier, like)
        divisor = 1 - at_t**2
        return step_decay * (1 - at_earlier**2) / divisor, at_earlier * (1 - step_decay**2) / divisor

    def optimum_step(self, x: Tensor, x0: Tensor, mu: Tensor, timesteps: Tensor | int) -> Tensor:
        """Most likely x_{t-1} given x_t and x_0 (Prop. 3.2 of IR-SDE); x_0 itself at t = 1."""
        k1, k2 = self.optimum_weights(timesteps, x)
        return mu + k1 * (x - mu) + k2 * (x0 - mu)

    def clean_from_noise(self, x: Tensor, mu: Tensor, noise: Tensor, timesteps: Tensor | int) -> Tensor:
        """x_0 that the marginal gives for a state and its noise."""
        return mu + (x - mu - self._at(self.sigma_bar, timesteps, x) * noise) / self._at(self.alpha, timesteps, x)

    def clean_from_optimum(self, optimum: Tensor, x: Tensor, mu: Tensor, timesteps: Tensor | int) -> Tensor:
        """x_0 for which `optimum` would be the optimum step from x: the inverse of `optimum_step`.

        The consistent estimate for a coupled noise predictor, whose training target is the optimum step of the
        modality's own state. Errors grow by 1/k2 (about 1000 at t = T of the default schedule, 1 at t = 1).
        """
        k1, k2 = self.optimum_weights(timesteps, x)
        return mu + (optimum - mu - k1 * (x - mu)) / k2

    def posterior_step(self, x: Tensor, x0: Tensor, mu: Tensor, timesteps: Tensor | int, draw: Tensor) -> Tensor:
        """Sample of x_{t-1} given x_t and x_0; `draw` is standard normal."""
        return self.optimum_step(x, x0, mu, timesteps) + self._at(self.posterior_std, timesteps, x) * draw

    def noise_of(self, x: Tensor, x0: Tensor, mu: Tensor, timesteps: Tensor | int) -> Tensor:
        """The noise that the marginal needs to reach x from x_0."""
        mean, std = self.marginal(x0, mu, timesteps)
        return (x - mean) / std

    def ancestral_jump(self, x: Tensor, x0: Tensor, mu: Tensor, start: int, end: int, draw: Tensor) -> Tensor:
        """Sample of x_end given x_start and x_0: the posterior step over any distance (MR sampler, order 1).

        For end = start - 1 it is `posterior_step`.
        """
        decay = float(self.alpha[start] / self.alpha[end])
        kept = float((self.sigma_bar[end] / self.sigma_bar[start]) ** 2) * decay
        gained = float(self.alpha[end]) * (1 - decay**2) * self.lam**2 / float(self.sigma_bar[start]) ** 2
        spread = float(self.sigma_bar[end] / self.sigma_bar[start]) * self.lam * math.sqrt(1 - decay**2)
        return mu + kept * (x - mu) + gained * (x0 - mu) + spread * draw

    def ode_jump(self, x: Tensor, x0: Tensor, mu: Tensor, start: int, end: int) -> Tensor:
        """Order-1 exponential step of the probability-flow ODE with data prediction, from `start` to `end` < `start`.

        x_t = mu + (sigma_t/sigma_s)(x_s - mu) + alpha_t (1 - e^-h)(x_0 - mu), h = log_snr_t - log_snr_s.
        It is x_0 at end = 0.
        """
        ratio = float(self.sigma_bar[end] / self.sigma_bar[start])
        gained = float(self.alpha[end] - self.alpha[start] * ratio)
        return mu + ratio * (x - mu) + gained * (x0 - mu)

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
            nearest = int((self.log_snr[1 : first + 1] - wanted).abs().argmin()) + 1
            ceiling = chosen[-1] - 1 if chosen else first
            chosen.append(max(min(nearest, ceiling), num_evaluations - index))
        return tuple(chosen)
