"""The score during training: how well a fixed set of degraded crops is restored."""

from pathlib import Path

import numpy as np
import torch
from torch import Generator, Tensor

from recofuse_core.degradations.recipes import degrade_ir, degrade_vis
from recofuse_core.errors import NumericsError
from recofuse_core.evaluation.quality import psnr
from recofuse_core.model import ReCoFuse
from recofuse_core.sampler import Pair
from recofuse_core.training.config import DataConfig
from recofuse_core.training.pairs import read_images


class Validation:
    """Restoration scores of a model on a fixed set of degraded centre crops."""

    SIDE = 256
    SEED = 11

    def __init__(self, config: DataConfig, root: Path) -> None:
        generator = Generator().manual_seed(self.SEED)
        self.items: list[tuple[Pair, Pair]] = []
        for pair in read_images(root, config.validation_split):
            if pair.starts_with(config.exclude_prefixes):
                continue
            clean_vis, clean_ir = self._centre(pair.vis), self._centre(pair.ir)
            strength = config.strengths[0]
            low_vis = degrade_vis(clean_vis, generator, strength).image
            low_ir = degrade_ir(clean_ir, generator, strength).image
            if pair.vis_degraded is not None:
                low_vis = self._centre(pair.vis_degraded)
            if pair.ir_degraded is not None:
                low_ir = self._centre(pair.ir_degraded)
            self.items.append((Pair(clean_vis[None], clean_ir[None]), Pair(low_vis[None], low_ir[None])))

    def _centre(self, image: np.ndarray) -> Tensor:
        """(H, W, 3) or (H, W) levels to the crop (C, H', W') in [0, 1]."""
        height, width = (min(side, self.SIDE) for side in image.shape[:2])
        top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
        pixels = np.atleast_3d(image)[top : top + height, left : left + width]
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255

    def __call__(self, model: ReCoFuse) -> tuple[dict[str, float], list[Tensor]]:
        """Mean PSNR of both modalities before and after, in dB, and a few rows (3, H, W) of pictures."""
        sums = dict.fromkeys(("vis_degraded", "vis", "ir_degraded", "ir"), 0.0)
        rows: list[Tensor] = []
        for clean, degraded in self.items:
            device = next(model.parameters()).device
            output = model.fuse(degraded.vis.to(device), degraded.ir.to(device), exposure="as_shot")
            if output.vis is None or output.ir is None or output.fused is None:
                raise NumericsError("the model left an output out")
            sums["vis_degraded"] += float(psnr(degraded.vis[0], clean.vis[0]))
            sums["ir_degraded"] += float(psnr(degraded.ir[0], clean.ir[0]))
            vis, ir, fused = output.vis[0].cpu(), output.ir[0].cpu(), output.fused[0].cpu()
            sums["vis"] += float(psnr(vis, clean.vis[0]))
            sums["ir"] += float(psnr(ir, clean.ir[0]))
            if len(rows) < 4:
                grey = (degraded.ir[0].expand(3, -1, -1), ir.expand(3, -1, -1))
                rows.append(torch.cat([degraded.vis[0], vis, *grey, fused], dim=2))
        return {name: total / len(self.items) for name, total in sums.items()}, rows
