"""Two small networks that turn a visible and an infrared picture into maps which are alike where both show one thing.

Each begins with a stem of its own, and one trunk serves both. They read grey values of any range, (B, 1, H, W), sides
of whole fours, and give (B, MAPS, H, W) of lengths below 1 over the maps: short where there is nothing to tell. What
is bright to one camera may be dark to the other, and the light is unknown, so values are first taken relative to the
picture and to their surroundings, within the graph, so that whoever runs it has nothing to prepare.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Side = Literal["vis", "ir"]
SIDES: tuple[Side, Side] = ("vis", "ir")

MAPS = 8
_HALF, _QUARTER = 16, 32  # channels in half and in a quarter of the resolution
_FLOOR = 0.1  # of the picture's deviation, which surroundings are given at least


class Relative(nn.Module):
    """(B, 1, H, W) of any range to (B, 2, H, W): relative to the picture, and to the surroundings; within 4 of 0."""

    def forward(self, grey: Tensor) -> Tensor:
        centred = grey - F.adaptive_avg_pool2d(grey, 1)
        whole = centred / (F.adaptive_avg_pool2d(centred * centred, 1) + 1e-3).sqrt()
        about = whole - _around(whole)
        local = about / (_around(about * about) + _FLOOR**2).sqrt()
        return torch.cat([whole, local], dim=1).clamp(-4, 4)


def _around(values: Tensor) -> Tensor:
    """Means of about 20 x 20 pixels, of what is in the picture."""
    cells = F.avg_pool2d(F.avg_pool2d(values, 4), 5, 1, 2, count_include_pad=False)
    return F.interpolate(cells, scale_factor=4, mode="bilinear", align_corners=False)


class Stem(nn.Module):
    """What is particular to one camera: (B, 1, H, W) to features in half resolution."""

    def __init__(self) -> None:
        super().__init__()
        self.relative = Relative()
        self.first = nn.Conv2d(2, _HALF, 4, stride=2, padding=1)
        self.second = nn.Conv2d(_HALF, _HALF, 3, padding=1)

    def forward(self, grey: Tensor) -> Tensor:
        features = F.relu(self.first(self.relative(grey)))
        return features + F.relu(self.second(features))


class Trunk(nn.Module):
    """From a stem's features to the maps, by way of a quarter of the resolution."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(_HALF, _QUARTER, 3, stride=2, padding=1)
        self.deep = nn.ModuleList(nn.Conv2d(_QUARTER, _QUARTER, 3, padding=gap, dilation=gap) for gap in (1, 2))
        self.up = nn.Conv2d(_QUARTER, _HALF, 1)
        self.last = nn.Conv2d(_HALF, _HALF, 3, padding=1)
        self.maps = nn.ConvTranspose2d(_HALF, MAPS, 4, stride=2, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        deep = F.relu(self.down(features))
        for layer in self.deep:
            deep = deep + F.relu(layer(deep))
        features = features + F.interpolate(self.up(deep), scale_factor=2, mode="nearest")
        maps: Tensor = self.maps(features + F.relu(self.last(features)))
        return maps / (1 + (maps * maps).sum(dim=1, keepdim=True)).sqrt()


class CueNetwork(nn.Module):
    """Both networks."""

    def __init__(self) -> None:
        super().__init__()
        self.stems = nn.ModuleDict({side: Stem() for side in SIDES})
        self.trunk = Trunk()

    def forward(self, grey: Tensor, side: Side) -> Tensor:
        """(B, 1, H, W) of any range, sides of whole fours, to maps (B, MAPS, H, W) of lengths below 1."""
        maps: Tensor = self.trunk(self.stems[side](grey))
        return maps


def write_graphs(network: CueNetwork, folder: Path) -> list[Path]:
    """Write `cues_vis.onnx` and `cues_ir.onnx`, for pictures of any size of whole fours. Returns their paths."""
    paths = []
    for side in SIDES:
        path = folder / f"cues_{side}.onnx"
        with warnings.catch_warnings():
            # Of the older exporter, which needs no more than `onnx`.
            warnings.simplefilter("ignore", DeprecationWarning)
            torch.onnx.export(
                nn.Sequential(network.stems[side], network.trunk).eval(),
                (torch.zeros(1, 1, 96, 128),),
                str(path),
                input_names=["grey"],
                output_names=["maps"],
                dynamic_axes={"grey": {2: "height", 3: "width"}, "maps": {2: "height", 3: "width"}},
                opset_version=13,
                dynamo=False,
            )
        paths.append(path)
    return paths
