"""Batches from pairs: seeded, cut from their frames, drawn by group, and degraded where they are not already."""

import numpy as np
import pytest
import torch
from torch import Generator

from recofuse_core.errors import DatasetError
from recofuse_core.training.config import DataConfig
from recofuse_core.training.pairs import PairSource, RawPair, enhance_dark
from tests.core.training.small import CROP, scenes


def test_batches_depend_on_the_generator_alone_and_hold_valid_images() -> None:
    source = PairSource(DataConfig(root="scenes"), scenes())
    first, again = (source.draw(3, CROP, Generator().manual_seed(5)) for _ in range(2))
    other = source.draw(3, CROP, Generator().manual_seed(6))
    for image, same, different in zip(
        (*first.clean, *first.degraded), (*again.clean, *again.degraded), (*other.clean, *other.degraded), strict=True
    ):
        assert image.shape == (3, 3, CROP, CROP)
        assert float(image.min()) >= 0
        assert float(image.max()) <= 1
        assert torch.equal(image, same)
        assert not torch.equal(image, different)


def test_inputs_are_cut_from_the_frames_around_them() -> None:
    source = PairSource(DataConfig(root="scenes", context=48), scenes())
    batch = source.draw(4, CROP, Generator().manual_seed(3))
    assert batch.context is not None
    assert batch.context.vis.shape == (4, 3, 48, 48)
    assert batch.context.ir.shape == (4, 1, 48, 48)
    for image, frame in zip(batch.degraded.vis, batch.context.vis, strict=True):
        places = frame.unfold(1, CROP, 1).unfold(2, CROP, 1)  # (3, 17, 17, CROP, CROP)
        assert (places == image[:, None, None]).flatten(3).all(dim=3).all(dim=0).any()


def test_groups_are_drawn_by_weight_and_prefixes_are_left_out() -> None:
    dark, bright = np.full((40, 40, 3), 60, np.uint8), np.full((40, 40, 3), 200, np.uint8)
    ir = np.full((40, 40), 90, np.uint8)
    pairs = [("a_1", dark, ir), ("a_2", dark, ir), ("b_1", bright, ir), ("c_1", np.zeros_like(dark), ir)]
    config = DataConfig(root="x", exclude_prefixes=("c_",), group_weights={"a": 0.25}, other_weight=0.75)
    batch = PairSource(config, pairs).draw(200, CROP, Generator().manual_seed(0))
    share = float((batch.clean.vis.mean(dim=(1, 2, 3)) > 0.5).float().mean())
    assert 0.65 < share < 0.85
    assert float(batch.clean.vis.min()) > 0.2
    with pytest.raises(DatasetError, match="no training pair"):
        PairSource(DataConfig(root="x", exclude_prefixes=("a_",)), pairs[:1])


@pytest.mark.parametrize("with_ir", [True, False])
def test_files_that_are_degraded_already_are_inputs_as_they_are(with_ir: bool) -> None:
    (name, vis, ir), *_ = scenes()
    dark = (vis // 8).astype(np.uint8)  # so dark that it would be given another target, were it the clean file
    pair = RawPair(name, dark, ir, vis_degraded=255 - dark, ir_degraded=255 - ir if with_ir else None)
    config = DataConfig(root="x", vary_ir_probability=1.0, rescale_probability=0.0)
    batch = PairSource(config, [pair]).draw(6, CROP, Generator().manual_seed(4))
    assert torch.allclose(batch.clean.vis + batch.degraded.vis, torch.ones(()), atol=1e-6)
    assert float(batch.clean.vis.max()) <= 31.5 / 255
    both = batch.clean.ir + batch.degraded.ir
    assert torch.allclose(both, torch.ones(()), atol=1e-6) == with_ir


def test_groups_may_be_data_sets() -> None:
    bright, dark = np.full((40, 40, 3), 200, np.uint8), np.full((40, 40, 3), 60, np.uint8)
    ir = np.full((40, 40), 90, np.uint8)
    pairs = [RawPair("00001", bright, ir, source="FMB"), RawPair("00002", dark, ir, source="LLVIP")]
    batch = PairSource(DataConfig(root="x", exclude_prefixes=("LLVIP",)), pairs).draw(20, CROP, Generator())
    assert float(batch.clean.vis.min()) > 0.7
    weights = {"FMB": 0.0, "LLVIP": 1.0}
    batch = PairSource(DataConfig(root="x", group_weights=weights), pairs).draw(20, CROP, Generator())
    assert float(batch.clean.vis.max()) < 0.3


def test_only_dark_targets_are_lifted_and_stay_dark() -> None:
    rng = np.random.default_rng(0)
    bright = rng.integers(60, 255, (40, 50, 3), dtype=np.uint8)
    dark = rng.integers(0, 40, (40, 50, 3), dtype=np.uint8)
    assert enhance_dark(bright, 0.18) is bright
    lifted = enhance_dark(dark, 0.18)
    assert dark.mean() < lifted.mean() < 0.22 * 255
    assert lifted.shape == dark.shape


@pytest.mark.parametrize("is_dark", [True, False])
def test_only_dark_crops_are_varied_and_their_targets_alike(is_dark: bool) -> None:
    rng = np.random.default_rng(1)
    vis = rng.integers(5, 60, (CROP, CROP, 3), dtype=np.uint8) + (0 if is_dark else 120)
    pairs = [("night_1", vis.astype(np.uint8), rng.integers(0, 255, (CROP, CROP), dtype=np.uint8))]
    config = DataConfig(root="x", enhance_dark=False, dark_log_gamma=0.5, rescale_probability=0, clean_probability=1.0)
    batch = PairSource(config, pairs).draw(6, CROP, Generator().manual_seed(0))
    assert float((batch.clean.vis - batch.degraded.vis).abs().max()) <= 0.5 / 255 + 1e-6  # rounded to 8 bits
    means = batch.clean.vis.mean(dim=(1, 2, 3))
    spread = float(means.max() / means.min())
    assert spread > 1.2 if is_dark else spread == pytest.approx(1, abs=1e-4)
