"""One step in numbers is the step of every sampler."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recofuse_core.picture import PredictionKind
from recofuse_core.sampler import SAMPLERS, Pair, Prediction, SamplerName, plan_timesteps
from recofuse_core.sde import MeanRevertingSDE, SDEConfig
from recofuse_core.stepping import Numbers, advanced, limits_of, table

SHAPE = (2, 3, 4, 5)


@pytest.mark.parametrize("kind", ["noise", "clean"])
@pytest.mark.parametrize("sampler", SAMPLERS)
@given(
    schedule=st.sampled_from(["cosine", "linear", "constant"]),
    num_steps=st.integers(5, 100),
    data=st.data(),
    seed=st.integers(0, 99),
    is_coupled=st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_steps_in_numbers_are_those_of_the_sampler(  # type: ignore[no-untyped-def]
    sampler: SamplerName, kind: PredictionKind, schedule, num_steps: int, data, seed: int, is_coupled: bool
) -> None:
    """In double precision, so that what is seen is the formula and not its rounding."""
    sde = MeanRevertingSDE(SDEConfig(num_steps=num_steps, schedule=schedule))
    first = data.draw(st.integers(2, num_steps))
    timesteps = plan_timesteps(sampler, sde, data.draw(st.integers(1, first)), first)
    generator = torch.Generator().manual_seed(seed)

    def some() -> torch.Tensor:
        return torch.randn(SHAPE, generator=generator, dtype=torch.float64)

    mixing = torch.rand(2, generator=generator, dtype=torch.float64)

    def predict(state: Pair, mu: Pair, t: int) -> Prediction:
        start = state
        if is_coupled:
            fused = mixing[0] * state.vis + (1 - mixing[0]) * state.ir
            start = Pair(fused, fused)
        output = Pair(*(0.1 * torch.sin(3 * x + m * mixing[1] + t) for x, m in zip(start, mu, strict=True)))
        return Prediction(start, output, kind)

    mu = Pair(some(), some())
    draws = [Pair(some(), some()) for _ in range(len(timesteps) + 1)]
    rows = table(sde, sampler, kind, timesteps, np.float64)
    state = torch.stack(list(mu)) + rows[0][0] * torch.stack(list(draws[0]))
    source = iter(draws[1:])
    seen: list[torch.Tensor] = []
    expected = SAMPLERS[sampler](
        predict, sde, Pair(*state), mu, lambda: next(source), timesteps, lambda _, s: seen.append(torch.stack(list(s)))
    )
    both = torch.stack(list(mu))
    previous = torch.zeros_like(both)
    for row, t, draw, known in zip(rows, timesteps, draws[1:], seen, strict=True):
        state, previous = advanced(
            sampler,
            Numbers(*torch.tensor(row)),
            predict(Pair(*state), mu, t),
            state,
            both,
            limits=limits_of(both),
            previous=previous,
            draw=torch.stack(list(draw)),
        )
        assert torch.allclose(state, known, rtol=1e-7, atol=1e-7)
        state = known  # differences are not to add up
    assert torch.equal(known, torch.stack(list(expected)))


def test_a_table_is_of_the_precision_of_states() -> None:
    sde = MeanRevertingSDE(SDEConfig())
    made = table(sde, "ode2", "noise", (60, 30, 1))
    assert made.dtype == np.float32
    assert made.shape == (3, len(Numbers._fields))
    assert np.isfinite(made).all()
