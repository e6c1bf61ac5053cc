"""The mean-reverting SDE: its table, its formulas anew in float64, and the properties that tie them together."""

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor

from recofuse_core.errors import ConfigError, ShapeError
from recofuse_core.sde import MeanRevertingSDE, ScheduleName, SDEConfig, theta_schedule

SDE = MeanRevertingSDE(SDEConfig())
STEPS = st.integers(1, 100)
SEEDS = st.integers(0, 2**31)
SCHEDULES: tuple[ScheduleName, ...] = ("cosine", "linear", "constant")

# t: theta, theta_bar, alpha, sigma, sigma_bar, posterior std of the published schedule (docs/model.md, 5)
TABLE = {
    0: (0.00061429, 0, 1, 0.006873, 0, None),
    1: (0.00169456, 0.001695, 0.999824, 0.011415, 0.003683, 0),
    2: (0.00324011, 0.004935, 0.999486, 0.015784, 0.006283, 0.002984),
    10: (0.03208518, 0.141634, 0.985365, 0.049670, 0.033423, 0.014094),
    25: (0.15853047, 1.526429, 0.853089, 0.110408, 0.102307, 0.033708),
    50: (0.50615633, 9.792815, 0.360822, 0.197282, 0.182870, 0.061492),
    75: (0.85031813, 27.150679, 0.059236, 0.255703, 0.195734, 0.078952),
    100: (0.99976659, 50.899448, 0.005000, 0.277264, 0.196076, 0.084996),
}


def normal(seed: int, count: int) -> list[Tensor]:
    generator = Generator().manual_seed(seed)
    return [torch.randn(2, 3, 4, 5, generator=generator) for _ in range(count)]


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-4) -> bool:
    """Relative to the largest entry: 1 - alpha**2 loses digits near t = 0, where it is 3.5e-4 in float32."""
    return float((actual.double() - expected.double()).abs().max()) <= tolerance * max(
        float(expected.abs().max()), 1e-3
    )


# --- tables -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", TABLE)
def test_published_table(t: int) -> None:
    theta, theta_bar, alpha, sigma, sigma_bar, posterior_std = TABLE[t]
    assert float(SDE.theta[t]) == pytest.approx(theta, abs=2e-7)
    assert float(SDE.theta_bar[t]) == pytest.approx(theta_bar, rel=1e-5, abs=1e-6)
    assert float(SDE.alpha[t]) == pytest.approx(alpha, abs=1e-6)
    assert float(SDE.sigma[t]) == pytest.approx(sigma, abs=2e-6)
    assert float(SDE.sigma_bar[t]) == pytest.approx(sigma_bar, abs=2e-6)
    if posterior_std is not None:
        assert float(SDE.posterior_std[t]) == pytest.approx(posterior_std, abs=2e-6)


def test_published_constants() -> None:
    assert SDE.dt == pytest.approx(0.1040938, abs=1e-7)
    assert SDE.lam == pytest.approx(0.1960784, abs=1e-7)
    assert float(SDE.log_snr[100]) == pytest.approx(-3.67, abs=0.01)
    assert float(SDE.log_snr[1]) == pytest.approx(5.60, abs=0.01)
    assert float(SDE.log_snr[0]) == math.inf


def test_max_sigma_below_one_is_lam_itself() -> None:
    assert MeanRevertingSDE(SDEConfig(max_sigma=0.2)).lam == 0.2
    assert MeanRevertingSDE(SDEConfig(max_sigma=1.0)).lam == 1 / 255


def theta_by_definition(schedule: ScheduleName, num_steps: int) -> np.ndarray:
    if schedule == "constant":
        return np.ones(num_steps + 1)
    if schedule == "linear":
        low, high = 0.1 / (num_steps + 1), 20 / (num_steps + 1)
        return np.array([low + (high - low) * j / num_steps for j in range(num_steps + 1)])

    def level(k: int) -> float:
        return math.cos((k / (num_steps + 2) + 0.008) / 1.008 * math.pi / 2) ** 2

    return np.array([1 - level(j + 1) / level(0) for j in range(num_steps + 1)])


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(SCHEDULES), st.integers(1, 200), st.floats(1e-3, 0.5), st.floats(1, 100))
def test_tables_follow_their_definitions(schedule: ScheduleName, num_steps: int, eps: float, max_sigma: float) -> None:
    sde = MeanRevertingSDE(SDEConfig(num_steps, max_sigma, schedule, eps))
    theta = theta_by_definition(schedule, num_steps)
    theta_bar = np.array([theta[1 : t + 1].sum() for t in range(num_steps + 1)])
    dt = -math.log(eps) / theta_bar[-1]
    alpha = np.exp(-theta_bar * dt)
    lam = max_sigma / 255
    np.testing.assert_allclose(theta_schedule(schedule, num_steps), theta, atol=3e-7)
    assert sde.dt == pytest.approx(dt, rel=1e-4)
    np.testing.assert_allclose(sde.alpha, alpha, atol=2e-5)
    np.testing.assert_allclose(sde.sigma**2, lam**2 * 2 * theta, rtol=1e-4, atol=1e-6 * lam**2)
    np.testing.assert_allclose(sde.sigma_bar**2, lam**2 * (1 - alpha**2), atol=4e-5 * lam**2)
    assert float(sde.alpha[-1]) == pytest.approx(eps, rel=1e-4)
    assert float(sde.sigma_bar[0]) == 0
    assert all(len(table) == num_steps + 1 for table in (sde.theta, sde.theta_bar, sde.sigma_bar, sde.posterior_std))


@pytest.mark.parametrize(
    "broken", [{"num_steps": 0}, {"max_sigma": 0.0}, {"max_sigma": -5.0}, {"eps": 0.0}, {"eps": 1.0}], ids=str
)
def test_impossible_settings_are_refused(broken: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="num_steps >= 1"):
        SDEConfig(**broken)  # type: ignore[arg-type]  # one wrong value at a time


def test_unknown_schedule_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'square'.*cosine, linear, constant"):
        theta_schedule("square", 10)  # type: ignore[arg-type]


def test_a_default_device_without_memory_leaves_the_tables_alone() -> None:
    with torch.device("meta"):
        sde = MeanRevertingSDE(SDEConfig())
    assert np.array_equal(sde.posterior_std, SDE.posterior_std)
    assert np.array_equal(sde.sigma_bar, SDE.sigma_bar)


# --- formulas ---------------------------------------------------------------------------------------------------------


def coefficients(t: int) -> tuple[float, float, float, float, float, float]:
    """theta_t dt, A, B, C, sigma_bar_t and sigma_t in float64, from the definition alone."""
    theta = theta_by_definition("cosine", 100)
    dt = math.log(200) / theta[1:].sum()
    lam = 50 / 255
    at_t, at_earlier = (math.exp(-theta[1 : s + 1].sum() * dt) for s in (t, t - 1))
    step = theta[t] * dt
    return step, math.exp(-step), at_t, at_earlier, lam * math.sqrt(1 - at_t**2), lam * math.sqrt(2 * theta[t])


@settings(deadline=None, max_examples=20)
@given(STEPS, SEEDS)
def test_steps_follow_their_definitions(t: int, seed: int) -> None:
    x, x0, mu, noise, draw = (part.double() for part in normal(seed, 5))
    step, A, B, C, sigma_bar, sigma = coefficients(t)
    lam = 50 / 255
    singles = [part.float() for part in (x, x0, mu, noise, draw)]
    sx, sx0, smu, snoise, sdraw = singles
    dt = math.log(200) / theta_by_definition("cosine", 100)[1:].sum()

    score = -noise / sigma_bar
    drift = step * (mu - x) - sigma**2 * dt * score
    assert close(SDE.score(snoise, t), score, 2e-4)
    assert close(SDE.reverse_drift(sx, smu, snoise, t), drift, 2e-4)
    assert close(SDE.reverse_mean(sx, smu, snoise, t), x - drift, 2e-4)
    assert close(SDE.reverse_step(sx, smu, snoise, t, sdraw), x - drift - sigma * math.sqrt(dt) * draw, 2e-4)
    ode_drift = step * (mu - x) - 0.5 * sigma**2 * dt * score
    assert close(SDE.reverse_ode_step(sx, smu, snoise, t), x - ode_drift, 2e-4)
    assert close(SDE.noise_state(smu, snoise), mu + lam * noise)

    optimum = mu + A * (1 - C**2) / (1 - B**2) * (x - mu) + C * (1 - A**2) / (1 - B**2) * (x0 - mu)
    spread = lam * math.sqrt((1 - A**2) * (1 - C**2) / (1 - B**2))
    assert close(SDE.optimum_step(sx, sx0, smu, t), optimum, 5e-4)
    assert close(SDE.posterior_step(sx, sx0, smu, t, sdraw), optimum + spread * draw, 5e-4)
    assert close(SDE.clean_from_noise(sx, smu, snoise, t), mu + (x - mu - sigma_bar * noise) / B, 2e-4)
    mean, std = SDE.marginal(sx0, smu, t)
    assert close(mean, mu + (x0 - mu) * B)
    assert close(torch.as_tensor(std), torch.full((1, 1, 1, 1), sigma_bar), 2e-4)


@settings(deadline=None, max_examples=10)
@given(st.lists(STEPS, min_size=2, max_size=2), SEEDS)
def test_a_step_per_item_is_that_step_for_that_item(steps: list[int], seed: int) -> None:
    x, x0, mu, noise, draw = normal(seed, 5)
    timesteps = torch.tensor(steps)
    together = [
        SDE.marginal(x0, mu, timesteps)[0],
        SDE.reverse_step(x, mu, noise, timesteps, draw),
        SDE.reverse_ode_step(x, mu, noise, timesteps),
        SDE.posterior_step(x, x0, mu, timesteps, draw),
        SDE.clean_from_noise(x, mu, noise, timesteps),
    ]
    for i, t in enumerate(steps):
        one = slice(i, i + 1)
        alone = [
            SDE.marginal(x0[one], mu[one], t)[0],
            SDE.reverse_step(x[one], mu[one], noise[one], t, draw[one]),
            SDE.reverse_ode_step(x[one], mu[one], noise[one], t),
            SDE.posterior_step(x[one], x0[one], mu[one], t, draw[one]),
            SDE.clean_from_noise(x[one], mu[one], noise[one], t),
        ]
        assert all(close(a[one], b, 2e-6) for a, b in zip(together, alone, strict=True))  # a rounding apart


def test_marginal_refuses_different_shapes() -> None:
    with pytest.raises(ShapeError, match="one shape"):
        SDE.marginal(torch.zeros(1, 4, 3, 3), torch.zeros(1, 4, 3, 4), 5)


# --- what ties them together ------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=20)
@given(STEPS, SEEDS)
def test_posterior_mean_carries_the_marginal_mean_one_step_back(t: int, seed: int) -> None:
    x0, mu = normal(seed, 2)
    earlier, _ = SDE.marginal(x0, mu, t - 1)
    assert close(SDE.optimum_step(SDE.marginal(x0, mu, t)[0], x0, mu, t), earlier, 3e-4)


@settings(deadline=None, max_examples=20)
@given(STEPS)
def test_posterior_step_carries_the_marginal_variance_one_step_back(t: int) -> None:
    kept = float(SDE.optimum_weights(t, torch.zeros(1))[0])
    variance = (kept * float(SDE.sigma_bar[t])) ** 2 + float(SDE.posterior_std[t]) ** 2
    assert variance == pytest.approx(float(SDE.sigma_bar[t - 1]) ** 2, rel=2e-3, abs=1e-12)


@settings(deadline=None, max_examples=20)
@given(STEPS, SEEDS)
def test_noise_and_clean_latent_are_each_others_inverse(t: int, seed: int) -> None:
    x0, mu, noise = normal(seed, 3)
    mean, std = SDE.marginal(x0, mu, t)
    x = mean + std * noise
    assert close(SDE.noise_of(x, x0, mu, t), noise, 2e-3)  # divided by sigma_bar, 0.004 at t = 1
    assert close(SDE.clean_from_noise(x, mu, noise, t), x0, 2e-3)  # divided by alpha, 0.005 at t = T


@settings(deadline=None, max_examples=20)
@given(STEPS, SEEDS)
def test_clean_from_optimum_inverts_the_optimum_step(t: int, seed: int) -> None:
    x, x0, mu = normal(seed, 3)
    gain = 1 / float(SDE.optimum_weights(t, x)[1])
    assert close(SDE.clean_from_optimum(SDE.optimum_step(x, x0, mu, t), x, mu, t), x0, 1e-6 * gain + 1e-5)


def test_the_optimum_at_the_last_step_is_the_clean_latent() -> None:
    x, x0, mu = normal(3, 3)
    assert close(SDE.optimum_step(x, x0, mu, 1), x0, 5e-4)


@settings(deadline=None, max_examples=30)
@given(st.tuples(STEPS, st.integers(0, 99)).filter(lambda pair: pair[1] < pair[0]), SEEDS)
def test_jumps_stay_on_the_marginal(jump: tuple[int, int], seed: int) -> None:
    """With the true x_0: the ODE keeps the noise of the state, the ancestral jump keeps mean and variance."""
    start, end = jump
    x0, mu, noise = normal(seed, 3)
    mean, std = SDE.marginal(x0, mu, start)
    end_mean, end_std = SDE.marginal(x0, mu, end)
    assert close(SDE.ode_jump(mean + std * noise, x0, mu, start, end), end_mean + end_std * noise, 1e-5)

    zero, one = torch.zeros_like(mu), torch.ones_like(mu)
    assert close(SDE.ancestral_jump(mean, x0, mu, start, end, zero), end_mean, 5e-4)
    kept = SDE.ancestral_jump(one, zero, zero, start, end, zero)
    spread = SDE.ancestral_jump(zero, zero, zero, start, end, one)
    assert close(kept**2 * std**2 + spread**2, torch.as_tensor(end_std**2).expand_as(mu), 2e-3)


@settings(deadline=None, max_examples=20)
@given(st.lists(STEPS, min_size=2, max_size=6, unique=True), SEEDS)
def test_ode_jumps_compose(steps: list[int], seed: int) -> None:
    x, x0, mu = normal(seed, 3)
    path = sorted(steps, reverse=True)
    walked = x
    for start, end in pairwise(path):
        walked = SDE.ode_jump(walked, x0, mu, start, end)
    assert close(walked, SDE.ode_jump(x, x0, mu, path[0], path[-1]), 1e-4)


@settings(deadline=None, max_examples=20)
@given(STEPS, SEEDS)
def test_the_shortest_jumps_are_the_steps(t: int, seed: int) -> None:
    x, x0, mu, noise, draw = normal(seed, 5)
    assert close(SDE.ancestral_jump(x, x0, mu, t, t - 1, draw), SDE.posterior_step(x, x0, mu, t, draw), 5e-4)
    jumped = SDE.reverse_jump(x, mu, noise, t, t - 1, draw)
    assert torch.equal(jumped, SDE.reverse_step(x, mu, noise, t, draw))


@settings(deadline=None, max_examples=10)
@given(STEPS, SEEDS)
def test_jumps_to_zero_end_at_the_clean_latent(t: int, seed: int) -> None:
    x, x0, mu, draw = normal(seed, 4)
    assert close(SDE.ode_jump(x, x0, mu, t, 0), x0, 1e-6)
    assert close(SDE.ancestral_jump(x, x0, mu, t, 0, draw), x0, 5e-4)


def test_ode_jump_is_the_exponential_integrator() -> None:
    """As docs/model.md, 6, writes it, with h = log_snr_t - log_snr_s, and in its noise form."""
    x, x0, mu = (part.double() for part in normal(5, 3))
    for start, end in ((100, 60), (60, 59), (40, 3)):
        alpha_s, alpha_t = coefficients(start)[2], coefficients(end)[2]
        sigma_s, sigma_t = coefficients(start)[4], coefficients(end)[4]
        h = math.log(alpha_t / sigma_t) - math.log(alpha_s / sigma_s)
        expected = mu + sigma_t / sigma_s * (x - mu) + alpha_t * (1 - math.exp(-h)) * (x0 - mu)
        jumped = SDE.ode_jump(x.float(), x0.float(), mu.float(), start, end)
        assert close(jumped, expected)
        noise = (x - mu - alpha_s * (x0 - mu)) / sigma_s
        assert close(jumped, mu + alpha_t / alpha_s * (x - mu) - sigma_t * math.expm1(h) * noise, 2e-4)


def test_many_small_reverse_steps_reach_the_clean_latent() -> None:
    """With the exact noise of the state, Euler steps of both reverse processes end near x_0."""
    sde = MeanRevertingSDE(SDEConfig(num_steps=800))
    x0, mu, noise = normal(11, 3)
    x = sde.noise_state(mu, noise)
    for t in range(sde.num_steps, 0, -1):
        x = sde.reverse_ode_step(x, mu, sde.noise_of(x, x0, mu, t), t)
    assert float((x - x0).abs().mean()) < 0.02 * float((mu - x0).abs().mean())


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 100), st.integers(1, 100))
def test_spaced_timesteps(num_evaluations: int, start: int) -> None:
    if num_evaluations > start:
        with pytest.raises(ConfigError, match="cannot place"):
            SDE.spaced_timesteps(num_evaluations, start)
        return
    steps = SDE.spaced_timesteps(num_evaluations, start)
    assert len(steps) == num_evaluations
    assert steps[0] == start
    assert all(isinstance(t, int) for t in steps)
    assert steps[-1] >= 1
    assert all(later < earlier for earlier, later in pairwise(steps))


def test_all_steps_are_the_whole_schedule() -> None:
    assert SDE.spaced_timesteps(100) == tuple(range(100, 0, -1))
    with pytest.raises(ConfigError, match="cannot place"):
        SDE.spaced_timesteps(0)
    with pytest.raises(ConfigError, match="cannot place"):
        SDE.spaced_timesteps(5, start=101)


@pytest.mark.parametrize("t", [1, 30, 60])
@pytest.mark.parametrize("library", ["torch", "numpy"])
def test_three_numbers_are_the_inverse_of_the_optimum_step_from_the_reverse_mean(t: int, library: str) -> None:
    generator = torch.Generator().manual_seed(t)
    arrays: list[Any] = list(torch.randn(4, 2, 3, 4, 5, generator=generator, dtype=torch.float64))
    start, noise, x, mu = arrays if library == "torch" else [array.numpy() for array in arrays]
    expected = SDE.clean_from_optimum(SDE.reverse_mean(start, mu, noise, t), x, mu, t)
    np.testing.assert_allclose(SDE.clean_from_step(start, noise, x, mu, t), expected, rtol=1e-9, atol=1e-9)
