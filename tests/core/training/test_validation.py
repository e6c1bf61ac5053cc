"""The score during training, on files that are degraded already."""

import math
from pathlib import Path

import cv2
import numpy as np
import pytest

from recofuse_core import load_pretrained
from recofuse_core.training.config import DataConfig
from recofuse_core.training.pairs import read_images
from recofuse_core.training.validation import Validation
from tests.core.training.small import scenes


def test_folders_of_degraded_and_clean_files_are_read_and_scored(tmp_path: Path) -> None:
    for name, vis, ir in scenes():
        for quality, change in (("HQ", 1.0), ("LQ", 0.4)):
            for modality, image in (("vi", vis[..., ::-1]), ("ir", ir)):
                folder = tmp_path / "pairs" / "FMB" / modality / quality
                folder.mkdir(parents=True, exist_ok=True)
                cv2.imwrite(str(folder / f"{name}.png"), (image * change).astype(np.uint8))
    first, *_ = read_images(tmp_path / "pairs")
    assert (first.name, first.source) == ("other_c", "FMB")
    assert first.vis_degraded is not None
    assert first.ir_degraded is not None
    assert first.ir_degraded.shape == first.ir.shape
    assert abs(float(first.ir_degraded.mean()) - 0.4 * float(first.ir.mean())) < 1
    scores, _ = Validation(DataConfig(root="x"), tmp_path / "pairs")(load_pretrained("compact"))
    expected = [10 * math.log10(255**2 / float(((0.6 * vis.astype(float)) ** 2).mean())) for _, vis, _ in scenes()]
    assert scores["vis_degraded"] == pytest.approx(sum(expected) / len(expected), abs=0.2)
