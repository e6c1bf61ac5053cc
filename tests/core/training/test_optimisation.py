"""Optimizer, learning rate and weight average against their formulas."""

import numpy as np
import pytest
import torch
from torch import Generator, nn

from recofuse_core.training.config import StageConfig
from recofuse_core.training.optimisation import Lion, WeightAverage, learning_rate


def test_lion_follows_its_formula() -> None:
    generator = Generator().manual_seed(0)
    start, gradients = torch.randn(7, generator=generator), torch.randn(3, 7, generator=generator)
    parameter = nn.Parameter(start.clone())
    optimizer = Lion([parameter], lr=0.1, betas=(0.9, 0.99), weight_decay=0.02)
    wanted, momentum = start.double().numpy(), np.zeros(7)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
        g = gradient.double().numpy()
        wanted = wanted * (1 - 0.1 * 0.02) - 0.1 * np.sign(0.9 * momentum + 0.1 * g)
        momentum = 0.99 * momentum + 0.01 * g
    np.testing.assert_allclose(parameter.detach().numpy(), wanted, rtol=1e-5)


def test_learning_rate_warms_up_and_ends_at_its_final_ratio() -> None:
    config = StageConfig("branches", 1000, 1, 32, 1e-3, warmup_steps=10, final_ratio=0.1)
    assert learning_rate(config, 0, 0.0) == pytest.approx(1e-4)
    assert learning_rate(config, 9, 0.0) == pytest.approx(1e-3)
    assert learning_rate(config, 1000, 1.0) == pytest.approx(1e-4)
    rates = [learning_rate(config, 10 + i, i / 100) for i in range(101)]
    assert rates == sorted(rates, reverse=True)


def test_average_follows_the_weights_and_starts_quickly() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    average = WeightAverage(model, 0.99)
    nn.init.ones_(model.weight)
    average.update(model)
    assert float(average.weights["weight"]) == pytest.approx(1 - 2 / 11)
    for _ in range(2000):
        average.update(model)
    assert float(average.weights["weight"]) == pytest.approx(1, abs=1e-4)
