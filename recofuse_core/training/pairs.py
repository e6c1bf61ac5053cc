"""Training batches from registered pairs: cropped, varied and degraded anew at every draw."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Generator, Tensor

from recofuse_core.data import find_pairs, read_pair
from recofuse_core.degradations.recipes import degrade_ir, degrade_vis
from recofuse_core.errors import DatasetError
from recofuse_core.sampler import Pair
from recofuse_core.training.config import DataConfig
from recofuse_core.training.draws import taken_from


class RawPair(NamedTuple):
    """A pair in memory, uint8: vis (H, W, 3), ir (H, W), and what its files hold degraded already, if anything."""

    name: str
    vis: np.ndarray
    ir: np.ndarray
    vis_degraded: np.ndarray | None = None
    ir_degraded: np.ndarray | None = None
    source: str = ""  # its data set

    def starts_with(self, prefixes: tuple[str, ...]) -> bool:
        """Whether the name or the data set's does."""
        return self.name.startswith(prefixes) or self.source.startswith(prefixes)


def read_images(root: Path, split: str = "") -> Iterator[RawPair]:
    """Every pair below a folder, or of one split of it, with its degraded files where it has them."""

    def pixels(image: Tensor | None) -> np.ndarray | None:
        if image is None:
            return None
        levels: np.ndarray = image.permute(1, 2, 0).contiguous().numpy()
        return levels[..., 0] if levels.shape[2] == 1 else levels

    for files in find_pairs(root, split=split or None):
        pair = read_pair(files)
        vis, ir = pair.vis.permute(1, 2, 0).contiguous().numpy(), pair.ir[0].numpy()
        yield RawPair(files.name, vis, ir, pixels(pair.vis_degraded), pixels(pair.ir_degraded), files.source)


def enhance_dark(vis: np.ndarray, dark_below: float) -> np.ndarray:
    """Target for a truly dark visible image: lightly smoothed and lifted by a gamma curve; others come back unchanged.

    (H, W, 3) uint8. The mean is moved half-way to 1.2 * dark_below: a night stays a night, yet shows what is in it.
    """
    mean = float(vis.mean()) / 255
    if mean >= dark_below:
        return vis
    smooth = cv2.bilateralFilter(vis, 5, 12, 2)
    histogram = np.bincount(smooth.ravel(), minlength=256) / smooth.size
    levels = np.arange(256) / 255
    gammas = np.linspace(0.3, 1.0, 71)
    means = np.array([(histogram * levels**gamma).sum() for gamma in gammas])
    gamma = gammas[np.abs(means - (mean + 0.5 * (1.2 * dark_below - mean))).argmin()]
    lifted: np.ndarray = cv2.LUT(smooth, (255 * levels**gamma).round().astype(np.uint8))
    return lifted


@dataclass(frozen=True)
class Batch:
    """Clean targets and degraded inputs, (B, 3, H, W) each; infrared repeated to three channels.

    context: the degraded frames that the inputs were cut from, infrared of one channel; None if they are the inputs.
    """

    clean: Pair
    degraded: Pair
    context: Pair | None = None

    @property
    def frame(self) -> Pair:
        """What tone curves are taken from: the context, or the inputs themselves; infrared of one channel."""
        return self.context or Pair(self.degraded.vis, self.degraded.ir[:, :1])

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device."""

        def moved(pair: Pair) -> Pair:
            return Pair(pair.vis.to(device), pair.ir.to(device))

        return Batch(moved(self.clean), moved(self.degraded), None if self.context is None else moved(self.context))


class DegradedFrame(NamedTuple):
    """A square of a pair: clean vis (3, side, side) and ir (1, side, side), then both degraded."""

    vis: Tensor
    ir: Tensor
    degraded_vis: Tensor
    degraded_ir: Tensor


def cut_batch(frames: Iterable[DegradedFrame], crop: int, generator: Generator) -> Batch:
    """A batch of one `crop` x `crop` square of each frame, with the whole frames as context."""
    parts: list[tuple[Tensor, ...]] = []
    for frame in frames:
        side = frame.vis.shape[-1]
        top, left = (torch.rand(2, generator=generator) * (side - crop + 1)).int().tolist()
        area = np.s_[..., top : top + crop, left : left + crop]
        parts.append((*(image[area] for image in frame), frame.degraded_vis, frame.degraded_ir))
    vis, ir, low_vis, low_ir, vis_frame, ir_frame = (torch.stack(column) for column in zip(*parts, strict=True))
    clean = Pair(channels_last(vis), channels_last(ir.expand(-1, 3, -1, -1)))
    degraded = Pair(channels_last(low_vis), channels_last(low_ir.expand(-1, 3, -1, -1)))
    return Batch(clean, degraded, Pair(vis_frame, ir_frame))


@dataclass(frozen=True)
class _Images:
    """What crops are cut from: source of the degradations and target (H, W, 3), ir (H, W), given degraded ones."""

    vis: np.ndarray
    target: np.ndarray
    ir: np.ndarray
    vis_degraded: np.ndarray | None
    ir_degraded: np.ndarray | None


class PairSource:
    """Draws training batches from pairs held in memory as uint8. Every draw comes from the generator passed in."""

    def __init__(self, config: DataConfig, pairs: Iterable[RawPair | tuple[str, np.ndarray, np.ndarray]]) -> None:
        self.config = config
        groups: dict[str, list[_Images]] = {}
        for pair in (RawPair(*pair) for pair in pairs):
            if pair.starts_with(config.exclude_prefixes):
                continue
            prefix = next((p for p in config.group_weights if pair.starts_with((p,))), "")
            # A clean file beside a degraded one is the target as it is, however dark.
            is_enhanced = config.enhance_dark and pair.vis_degraded is None
            target = enhance_dark(pair.vis, config.dark_below) if is_enhanced else pair.vis
            images = _Images(pair.vis, target, pair.ir, pair.vis_degraded, pair.ir_degraded)
            groups.setdefault(prefix, []).append(images)
        if not groups:
            raise DatasetError(f"no training pair in {config.root}")
        self.groups = list(groups.values())
        weights = torch.tensor([config.group_weights.get(prefix, config.other_weight) for prefix in groups])
        self.cumulative = (weights / weights.sum()).cumsum(0)

    def draw(self, batch_size: int, crop: int, generator: Generator) -> Batch:
        """A batch of `crop` x `crop` pairs, degraded anew."""
        side = max(crop, self.config.context)
        batch = cut_batch((self.frame(side, generator) for _ in range(batch_size)), crop, generator)
        return batch if self.config.context else Batch(batch.clean, batch.degraded)

    def frame(self, side: int, generator: Generator, *, as_recorded: bool = False) -> DegradedFrame:
        """One square, degraded anew. as_recorded: about as sharp as cameras deliver frames, whatever is configured."""
        vis, target, ir, low_vis, low_ir = self._crop(side, generator, as_recorded)
        if low_ir is None:
            ir = self.vary_ir(ir, generator)
        if low_vis is None:
            vis, target = self._vary_dark(vis, target, generator)
        config = self.config
        pick = float(torch.rand(1, generator=generator))
        strength = config.strengths[int(pick * len(config.strengths))]
        if low_vis is None:
            low_vis = degrade_vis(vis, generator, strength, clean_probability=config.clean_probability).image
        if low_ir is None:
            low_ir = degrade_ir(ir, generator, strength, clean_probability=config.clean_probability).image
        return DegradedFrame(target, ir, low_vis, low_ir)

    def square(self, side: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """The same square of the clean images of one pair: vis (3, side, side) and ir (1, side, side), ir varied."""
        vis, _, ir, _, _ = self._crop(side, generator)
        return vis, self.vary_ir(ir, generator)

    def _crop(
        self, size: int, generator: Generator, as_recorded: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """The same square of vis, target and ir of one pair, and of the degraded files that it has."""
        pick, item, zoom, scale, top, left, flip, turn = torch.rand(8, generator=generator).tolist()
        group = self.groups[min(int((self.cumulative < pick).sum()), len(self.groups) - 1)]
        images = group[int(item * len(group))]
        height, width = images.ir.shape
        side = size
        if as_recorded:
            side = taken_from(size, generator)
        elif zoom < self.config.rescale_probability:
            side = int(size * (1 + scale * (self.config.max_rescale - 1)))
        side = min(side, height, width)
        y, x = int(top * (height - side + 1)), int(left * (width - side + 1))

        def crop(image: np.ndarray) -> Tensor:
            part = image[y : y + side, x : x + side]
            if side != size:
                method = cv2.INTER_AREA if side > size else cv2.INTER_CUBIC
                part = cv2.resize(part, (size, size), interpolation=method)
            part = part[:, ::-1] if flip < 0.5 else part
            part = np.rot90(part) if turn < 0.1 else part
            tensor = torch.from_numpy(np.ascontiguousarray(part)).float().div_(255)
            return tensor.permute(2, 0, 1).contiguous() if tensor.ndim == 3 else tensor[None]

        low_vis = None if images.vis_degraded is None else crop(images.vis_degraded)
        low_ir = None if images.ir_degraded is None else crop(images.ir_degraded)
        return crop(images.vis), crop(images.target), crop(images.ir), low_vis, low_ir

    def vary_ir(self, ir: Tensor, generator: Generator) -> Tensor:
        """Gain, offset and gamma, input and target alike: cameras differ, and a target must stay unambiguous."""
        chance, gamma, gain, offset = torch.rand(4, generator=generator).tolist()
        if chance >= self.config.vary_ir_probability:
            return ir
        low, high = self.config.ir_gain
        curve = math.exp((2 * gamma - 1) * self.config.ir_log_gamma)
        shift = self.config.ir_offset[0] + (self.config.ir_offset[1] - self.config.ir_offset[0]) * offset
        varied: Tensor = (ir.pow(curve) * (low + (high - low) * gain) + shift).clamp(0, 1)
        return varied

    def _vary_dark(self, vis: Tensor, target: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """A gamma, input and target alike, for truly dark crops: nights differ, and few are at hand."""
        spread = self.config.dark_log_gamma
        if spread == 0 or float(vis.mean()) >= self.config.dark_below:
            return vis, target
        gamma = math.exp((2 * float(torch.rand(1, generator=generator)) - 1) * spread)
        return vis.pow(gamma), target.pow(gamma)


def channels_last(x: Tensor) -> Tensor:
    """The same numbers in the layout that convolutions are fast on."""
    return x.contiguous(memory_format=torch.channels_last)
