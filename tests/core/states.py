"""Small configs of both kinds and random weights for them, for the tests of what lies on disk."""

import dataclasses

import torch
from torch import Generator, Tensor

from recofuse_core.checkpoint import blank_model
from recofuse_core.model import ModelConfig
from recofuse_core.networks import DenoiserConfig, FusionConfig, GatedAutoencoderConfig, PaperAutoencoderConfig
from recofuse_core.sde import SDEConfig

State = dict[str, Tensor]

FUSION = FusionConfig(latent_channels=2, width=32, time_dim=128)
BRANCH = DenoiserConfig(2, 4, (1, 2), 1, (2, 1), sinusoid_dim=4, time_dim=16)
PAPER = ModelConfig(
    PaperAutoencoderConfig(2, (2, 2, 3, 4), 2), BRANCH, FUSION, SDEConfig(num_steps=20), sampler="ode1", steps=20
)
GATED = ModelConfig(
    GatedAutoencoderConfig(4, 4, (1, 1), (1, 1), 2),
    dataclasses.replace(BRANCH, prediction="clean"),
    FUSION,
    SDEConfig(num_steps=50, max_sigma=30, schedule="linear", eps=0.01),
    sampler="ode2",
    steps=4,
)


def random_state(config: ModelConfig, seed: int = 0) -> State:
    generator = Generator().manual_seed(seed)
    shapes = {name: value.shape for name, value in blank_model(config).state_dict().items()}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def same(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
