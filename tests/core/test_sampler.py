"""Samplers against oracles that know the clean latent, and against the formulas written out."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor

from recofuse_core.errors import ConfigError
from recofuse_core.model import noise_like
from recofuse_core.sampler import (
    SAMPLERS,
    NoiseSource,
    Pair,
    Prediction,
    Predictor,
    SamplerName,
    clean_latents,
    num_draws,
    plan_timesteps,
)
from recofuse_core.sde import MeanRevertingSDE, SDEConfig

SDE = MeanRevertingSDE(SDEConfig())
SHAPE = (2, 3, 4, 5)
SEEDS = st.integers(0, 2**31)
DATA_SAMPLERS: tuple[SamplerName, ...] = ("posterior", "ode1", "ode2")


def normal(seed: int, count: int) -> list[Tensor]:
    generator = Generator().manual_seed(seed)
    return [torch.randn(SHAPE, generator=generator) for _ in range(count)]


def latents(seed: int) -> tuple[Pair, Pair]:
    """(clean, mu)."""
    a, b, c, d = normal(seed, 4)
    return Pair(a, b), Pair(a + 0.3 * c, b + 0.3 * d)


def clean_oracle(clean: Pair) -> Predictor:
    def predict(state: Pair, mu: Pair, t: int) -> Prediction:
        return Prediction(state, Pair(clean.vis - mu.vis, clean.ir - mu.ir), "clean")

    return predict


def noise_oracle(clean: Pair) -> Predictor:
    """Trained to perfection as published: from any start, the Euler mean is the own state's optimum step."""

    def predict(state: Pair, mu: Pair, t: int) -> Prediction:
        start = (state.vis + state.ir) / 2
        theta_dt = float(SDE.theta[t]) * SDE.dt
        gain = float(SDE.sigma[t]) ** 2 * SDE.dt / float(SDE.sigma_bar[t])
        noises = []
        for x, x0, m in zip(state, clean, mu, strict=True):
            optimum = SDE.optimum_step(x, x0, m, t)
            noises.append((start - optimum - theta_dt * (m - start)) / gain)
        return Prediction(Pair(start, start), Pair(*noises), "noise")

    return predict


def sample(name: SamplerName, predict: Predictor, mu: Pair, steps: int, draw: NoiseSource | None = None) -> Pair:
    draw = draw or noise_like([0, 1], mu.vis)
    noise = draw()
    state = Pair(*(SDE.noise_state(m, n) for m, n in zip(mu, noise, strict=True)))
    return SAMPLERS[name](predict, SDE, state, mu, draw, plan_timesteps(name, SDE, steps))


def distance(result: Pair, clean: Pair) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(result, clean, strict=True))


@settings(deadline=None, max_examples=10)
@given(st.sampled_from(DATA_SAMPLERS), st.integers(1, 100), SEEDS)
def test_an_oracle_of_the_clean_latent_is_reached_in_any_number_of_steps(
    name: SamplerName, steps: int, seed: int
) -> None:
    clean, mu = latents(seed)
    assert distance(sample(name, clean_oracle(clean), mu, steps), clean) < 5e-4


@settings(deadline=None, max_examples=6)
@given(st.sampled_from(DATA_SAMPLERS), st.sampled_from([1, 5, 100]), SEEDS)
def test_a_perfect_coupled_noise_predictor_is_read_back_exactly(name: SamplerName, steps: int, seed: int) -> None:
    """Although both branches start from one fused state. Early errors are magnified, the last evaluation's are not."""
    clean, mu = latents(seed)
    assert distance(sample(name, noise_oracle(clean), mu, steps), clean) < (2e-2 if steps > 1 else 0.6)


@settings(deadline=None, max_examples=6)
@given(st.sampled_from([30, 60, 100]), SEEDS)
def test_euler_comes_near_the_clean_latent(steps: int, seed: int) -> None:
    clean, mu = latents(seed)
    result = sample("euler", clean_oracle(clean), mu, steps)
    mean_error = float((result.vis - clean.vis).abs().mean())
    assert mean_error < 0.5 * float((mu.vis - clean.vis).abs().mean())


def test_euler_over_the_whole_schedule_is_the_published_step() -> None:
    clean, mu = latents(4)
    predict = noise_oracle(clean)
    noises = [Pair(*normal(100 + i, 2)) for i in range(101)]
    draws = iter(noises)
    result = sample("euler", predict, mu, 100, lambda: next(draws))

    vis, ir = (m + SDE.lam * n for m, n in zip(mu, noises[0], strict=True))
    for t, noise in zip(range(100, 0, -1), noises[1:], strict=True):
        prediction = predict(Pair(vis, ir), mu, t)
        theta, sigma, sigma_bar = (float(table[t]) for table in (SDE.theta, SDE.sigma, SDE.sigma_bar))
        moved = []
        for start, eps, m, n in zip(prediction.start, prediction.output, mu, noise, strict=True):
            drift = (theta * (m - start) + sigma**2 * eps / sigma_bar) * SDE.dt
            moved.append(start - drift - sigma * math.sqrt(SDE.dt) * n)
        vis, ir = moved
    torch.testing.assert_close(result, Pair(vis, ir), rtol=1e-4, atol=1e-4)


def test_second_order_is_nearer_to_the_limit_of_many_steps() -> None:
    """For a predictor whose estimate drifts with the state, as a trained one's does."""
    _, mu = latents(6)

    def predict(state: Pair, mu: Pair, t: int) -> Prediction:
        output = (torch.tanh(x - m) * (0.4 + 0.4 * math.exp(-t / 40)) for x, m in zip(state, mu, strict=True))
        return Prediction(state, Pair(*output), "clean")

    limit = sample("ode2", predict, mu, 100)
    first, second = (distance(sample(name, predict, mu, 12), limit) for name in ("ode1", "ode2"))
    assert second < first
    assert distance(sample("ode1", predict, mu, 100), limit) < first


def test_one_step_ends_at_the_estimate() -> None:
    clean, mu = latents(8)
    for name in ("ode1", "ode2"):
        assert distance(sample(name, clean_oracle(clean), mu, 1), clean) < 1e-5


@settings(deadline=None, max_examples=20)
@given(st.sampled_from(list(SAMPLERS)), st.integers(1, 100))
def test_plans_decrease_from_the_noisy_end(name: SamplerName, steps: int) -> None:
    plan = plan_timesteps(name, SDE, steps)
    assert len(plan) == steps
    assert plan[0] == 100
    assert plan[-1] >= 1
    assert all(a > b for a, b in pairwise(plan))
    if steps == 100:
        assert plan == tuple(range(100, 0, -1))


@pytest.mark.parametrize("steps", [0, 101, -3])
def test_impossible_numbers_of_steps_are_refused(steps: int) -> None:
    with pytest.raises(ConfigError, match=r"within 1\.\.100"):
        plan_timesteps("ode2", SDE, steps)


@pytest.mark.parametrize("name", SAMPLERS)
def test_draws_are_counted(name: SamplerName) -> None:
    clean, mu = latents(1)
    source, count = noise_like([3, 4], mu.vis), 0

    def draw() -> Pair:
        nonlocal count
        count += 1
        return source()

    sample(name, clean_oracle(clean), mu, 7, draw)
    assert count == num_draws(name, 7)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_jump_is_reported(name: SamplerName) -> None:
    clean, mu = latents(2)
    seen: list[int] = []
    draw = noise_like([0, 1], mu.vis)
    plan = plan_timesteps(name, SDE, 5)
    result = SAMPLERS[name](clean_oracle(clean), SDE, mu, mu, draw, plan, lambda t, state: seen.append(t))
    assert seen == [*plan[1:], 0]
    assert result.vis.shape == SHAPE


def test_noise_belongs_to_the_item() -> None:
    like = torch.empty(SHAPE)
    both, alone = noise_like([3, 9], like), noise_like([9], like[:1])
    for _ in range(3):
        together, single = both(), alone()
        assert torch.equal(together.vis[1:], single.vis)
        assert torch.equal(together.ir[1:], single.ir)
    assert not torch.equal(together.vis[0], together.vis[1])


def test_estimates_stay_within_reach_of_the_latents() -> None:
    _, mu = latents(3)
    wild = Prediction(mu, Pair(1e4 * mu.vis, -1e4 * mu.ir), "noise")
    estimate = clean_latents(SDE, wild, mu, mu, 90)
    for x, m in zip(estimate, mu, strict=True):
        span = float(m.max() - m.min())
        assert float(x.max()) <= float(m.max()) + span
        assert float(x.min()) >= float(m.min()) - span
