"""Crops that are encoded once."""

from dataclasses import replace

import pytest
import torch
from torch import Generator

from recofuse_core.errors import ConfigError
from recofuse_core.training.config import DataConfig
from recofuse_core.training.latents import Encoded, LatentSource
from recofuse_core.training.pairs import PairSource
from tests.core.training.small import CROP, scenes, stage, trainer


def test_encoded_crops_come_back_as_they_were_kept() -> None:
    run = trainer(stage("coupled", 2))
    source = LatentSource.encode(run.model, PairSource(DataConfig(root="x"), scenes()), 5, CROP, Generator())
    assert len(source) == 5
    again = LatentSource(Encoded.from_tensors(source.crops.tensors()))
    batch, same = (each.draw(3, Generator().manual_seed(2)) for each in (source, again))
    assert batch.clean.vis.shape == (3, 16, CROP // 8, CROP // 8)
    assert batch.references.ir.shape == (3, 3, CROP, CROP)
    for name, tensor in batch.tensors().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, same.tensors()[name])
    run.source = source
    assert [report.step for report in run.run_stage()] == [1, 2]
    run.config = replace(run.config, stages=(stage("coupled", 2, rollout=True),))
    run.start_stage()
    with pytest.raises(ConfigError, match="encoded crops serve"):
        next(run.run_stage())
