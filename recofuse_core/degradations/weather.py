"""Weather between camera and scene: fog over depth, rain in layers, snow with flakes out of focus.

`recipes` names these kinds (`fog`, `downpour`, `snowfall`), draws their parameters and puts them in front of an
image; here is what they look like. Depth runs from 0, at the camera's feet, to 1, the farthest that is seen: nobody
knows the true one of a photograph, so it is drawn, as a road scene has it. Drops and flakes lie in layers, since near
ones are long, large and out of focus, and far ones are many and melt into a veil.

All randomness comes from the `torch.Generator` passed in. H and W are height and width in px, and sizes are meant for
frames of about 640x480.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Generator, Tensor

_Profile = Callable[[np.ndarray, np.ndarray], np.ndarray]


def scene_depth(image: Tensor, generator: Generator) -> Tensor:
    """Depth of a made-up road scene, (1, H, W) in [0, 1]: a ground plane to a horizon, things that stand on it, sky.

    What stands on the ground hides what lies behind it. Depth takes its edges from the image (C, H, W) in [0, 1], for
    an edge that no picture shows gives synthetic fog away.
    """
    height, width = image.shape[-2:]
    horizon, bend = _uniform(generator, 0.2, 0.5), _uniform(generator, 0.15, 1.2)
    rows = torch.linspace(0, 1, height).unsqueeze(1)  # (H, 1)
    below = ((rows - horizon) / (1 - horizon)).clamp(0, 1)
    nearest = bend / (1 + bend)
    ground = ((bend / (below + bend) - nearest) / (1 - nearest)).clamp(0, 1)  # (H, 1), 1 at the horizon, 0 at the feet
    scene = ground.expand(height, width).clone()
    num_walls = int(_uniform(generator, 3, 12))
    walls = _blown_up(torch.rand(1, num_walls, generator=generator), 1, width)  # (1, W), how far each thing stands
    tops = horizon * _blown_up(torch.rand(1, num_walls, generator=generator), 1, width)  # where it ends above
    scene = torch.where(rows > tops, torch.minimum(scene, 0.25 + 0.75 * walls), scene)
    clumps = _blown_up(torch.rand(6, 8, generator=generator), height, width)
    scene = scene * (1 - _uniform(generator, 0.1, 0.4) * clumps)
    radius = max(2, round(0.06 * width))
    guided = _guided(scene.numpy(), image.mean(dim=0).numpy(), radius, 1e-3)
    return torch.from_numpy(guided).clamp_(0, 1).unsqueeze(0)


@dataclass(frozen=True)
class RainLayer:
    """Streaks at about one distance: drops a pixel, streak length and width (a Gaussian's std) in px, opacity of one.

    spread: how far the angles of its streaks lie apart, in radians.
    """

    density: float
    length: float
    width: float
    opacity: float
    spread: float


# From far to near, at intensity 1 and length 1.
RAIN_LAYERS = (
    RainLayer(0.040, 15.0, 0.45, 0.15, 0.03),
    RainLayer(0.012, 27.0, 0.6, 0.26, 0.05),
    RainLayer(0.0015, 48.0, 0.85, 0.42, 0.07),
    RainLayer(0.0001, 110.0, 1.7, 0.3, 0.08),
)


def downpour_cover(
    height: int, width: int, intensity: float, length: float, angle: float, generator: Generator
) -> Tensor:
    """What the streaks of all layers cover, (1, H, W) in [0, 1].

    intensity: scales the number of drops, in [0.4, 1.5]; length: scales that of their streaks, in [0.6, 1.5]; angle:
    of the fall from the x axis, in radians.
    """
    free = torch.ones(height, width)
    for layer in RAIN_LAYERS:
        # A third of the drops each, at angles of their own: no wind is quite even.
        for _ in range(3):
            turn = angle + _uniform(generator, -layer.spread, layer.spread)
            reach = layer.length * length * _uniform(generator, 0.6, 1.4)
            drops = _scattered(height, width, intensity * layer.density / 3, generator)
            streaks = _stamped(drops, _streak(reach, turn, layer.width))
            free *= 1 - (layer.opacity * streaks).clamp_(0, 1)
    return (1 - free).unsqueeze(0)


@dataclass(frozen=True)
class FlakeLayer:
    """Flakes of about one distance: flakes a pixel, radius and softness of the rim in px, opacity of one."""

    density: float
    radius: float
    softness: float
    opacity: float


# From far to near, at intensity 1: what is nearest is out of focus, large and thin.
FLAKE_LAYERS = (
    FlakeLayer(0.014, 0.5, 0.5, 0.6),
    FlakeLayer(0.006, 0.9, 0.6, 0.8),
    FlakeLayer(0.0022, 1.6, 0.9, 0.9),
    FlakeLayer(0.0006, 2.8, 1.6, 0.9),
    FlakeLayer(0.00012, 5.0, 3.5, 0.75),
    FlakeLayer(0.00003, 10.0, 6.0, 0.45),
    FlakeLayer(0.000008, 20.0, 9.0, 0.25),
)


def snowfall_cover(
    height: int, width: int, intensity: float, size: float, fall: float, angle: float, generator: Generator
) -> Tensor:
    """What the flakes of all layers cover, (1, H, W) in [0, 1].

    intensity: scales the number of flakes, in [0.4, 1.6]; size: their radius, in [0.7, 1.4]; fall: how many of its own
    radii a flake falls while the shutter is open, in [0, 2]; angle: of the fall from the x axis, in radians.
    """
    free = torch.ones(height, width)
    for layer in FLAKE_LAYERS:
        flakes = _scattered(height, width, intensity * layer.density, generator)
        radius = layer.radius * size
        covered = _stamped(flakes, _flake(radius, layer.softness * size, fall * radius, angle))
        free *= 1 - (layer.opacity * covered).clamp_(0, 1)
    return (1 - free).unsqueeze(0)


# --- small parts ------------------------------------------------------------------------------------------------------


def _uniform(generator: Generator, low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator).item())


def _blown_up(grid: Tensor, height: int, width: int) -> Tensor:
    """A small grid of [0, 1] to (H, W), smoothly."""
    large = cv2.resize(grid.numpy(), (width, height), interpolation=cv2.INTER_CUBIC)
    return torch.from_numpy(np.ascontiguousarray(large)).view(height, width).clamp_(0, 1)


def _guided(plane: np.ndarray, guide: np.ndarray, radius: int, eps: float) -> np.ndarray:
    """A plane smoothed by lines of the guide over windows of 2 radius + 1 (He et al., guided image filtering)."""

    def mean(x: np.ndarray) -> np.ndarray:
        averaged: np.ndarray = cv2.blur(x, (2 * radius + 1, 2 * radius + 1), borderType=cv2.BORDER_REFLECT_101)
        return averaged

    guide_mean, plane_mean = mean(guide), mean(plane)
    slope = (mean(guide * plane) - guide_mean * plane_mean) / (mean(guide * guide) - guide_mean**2 + eps)
    smoothed: np.ndarray = mean(slope) * guide + mean(plane_mean - slope * guide_mean)
    return smoothed


def _scattered(height: int, width: int, density: float, generator: Generator) -> Tensor:
    """Points of random strength in [0.3, 1] at a share `density` of the pixels, (H, W)."""
    places = torch.rand(height, width, generator=generator)
    return torch.where(places < density, 0.3 + 0.7 * places / max(density, 1e-9), torch.zeros(()))


def _stamped(points: Tensor, kernel: np.ndarray) -> Tensor:
    """A kernel put at every point, times its strength; what overlaps adds up."""
    stamped = cv2.filter2D(points.numpy(), -1, kernel, borderType=cv2.BORDER_CONSTANT)
    return torch.from_numpy(stamped).clamp_(0, None)  # large kernels go through a Fourier transform: may dip below 0


def _streak(length: float, angle: float, width: float) -> np.ndarray:
    """A line of Gaussian profile that fades towards its ends, 1 at the centre."""
    return _capsule(length / 2, angle, lambda along, across: np.exp(-0.5 * (across / width) ** 2) * _fading(along))


def _flake(radius: float, softness: float, fall: float, angle: float) -> np.ndarray:
    """A disc with a soft rim, drawn out by its fall and as much thinner, 1 at the centre of one that stands still."""

    def profile(along: np.ndarray, across: np.ndarray) -> np.ndarray:
        beyond = np.maximum(np.abs(along) * (fall / 2 + radius) - fall / 2, 0)
        distance = np.hypot(beyond, across)
        soft: np.ndarray = 1 / (1 + np.exp((distance - radius) * 4 / softness))
        return soft * (2 * radius / (2 * radius + fall))

    return _capsule(fall / 2 + radius, angle, profile, margin=2 * softness)


def _capsule(half: float, angle: float, profile: _Profile, margin: float = 3.0) -> np.ndarray:
    """A kernel of `profile` over the place along the fall, in units of `half`, and the distance across it, in px."""
    reach = math.ceil(half + margin)
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1].astype(np.float64)
    along = (math.cos(angle) * x + math.sin(angle) * y) / half
    across = -math.sin(angle) * x + math.cos(angle) * y
    return profile(along, across).astype(np.float32)


def _fading(along: np.ndarray) -> np.ndarray:
    faded: np.ndarray = np.sqrt(np.clip(1 - along**2, 0, 1))
    return faded
