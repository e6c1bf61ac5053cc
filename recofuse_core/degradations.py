"""Seeded physical degradations of clean visible and infrared images, each with its model and range.

`degrade_vis` and `degrade_ir` draw a recipe and apply it in the order in which light meets lens, scene, sensor and
codec: blur, then low light, haze, rain, snow or their dense forms (infrared: low contrast), then colour cast, stripes,
fixed pattern, noise, dead pixels, JPEG, rounding to 8 bit. Recipes are drawn from the kinds that have a weight below;
weather but for haze, fixed pattern and dead pixels come only when asked for by name. docs/degradations.md shows each.
The single functions take explicit parameters and, `jpeg` aside, do not clip: a sensor clips once, in `quantise`, and
clipping every part would bias the noise. All randomness comes from the `torch.Generator` passed in (a CPU generator);
images are CPU float32 in [0, 1]. Letters: C channels (3 vis, 1 ir), H and W height and width, at least 16.

Reading "strength": every range has a mild and a harsh end. "medium" draws from the whole range, "light" from its mild
half, "strong" from its harsh half with two or three kinds in every image. Values without a harsh end (airlight tone,
contrast offset, angles) are always drawn from their whole range.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, TypeVar

import cv2
import numpy as np
import torch
from torch import Generator, Tensor

from recofuse_core.errors import ConfigError, CoreError, ShapeError
from recofuse_core.weather import downpour_cover, scene_depth, snowfall_cover
from recofuse_images.errors import ImageError
from recofuse_images.limits import OWN_FILES
from recofuse_images.reader import read_picture
from recofuse_images.writer import jpeg_bytes

Strength = Literal["light", "medium", "strong"]
MIN_SIDE = 16
MAX_KINDS = 3


class VisKind(StrEnum):
    """Visible degradations, listed in the order in which they are applied."""

    BLUR = "blur"
    LOW_LIGHT = "low_light"
    HAZE = "haze"
    RAIN = "rain"
    SNOW = "snow"
    FOG = "fog"
    DOWNPOUR = "downpour"
    SNOWFALL = "snowfall"
    COLOUR_CAST = "colour_cast"
    GAUSSIAN_NOISE = "gaussian_noise"
    POISSON_NOISE = "poisson_noise"
    DEAD_PIXELS = "dead_pixels"
    JPEG = "jpeg"


class IrKind(StrEnum):
    """Infrared degradations, listed in the order in which they are applied."""

    BLUR = "blur"
    LOW_CONTRAST = "low_contrast"
    STRIPES = "stripes"
    FIXED_PATTERN = "fixed_pattern"
    GAUSSIAN_NOISE = "gaussian_noise"
    DEAD_PIXELS = "dead_pixels"
    JPEG = "jpeg"


_Kind = TypeVar("_Kind", VisKind, IrKind)
_Parameters = dict[str, float | str]


@dataclass(frozen=True)
class Step:
    """One applied degradation: its kind and the parameters drawn for it, as (name, value) pairs."""

    kind: VisKind | IrKind
    parameters: tuple[tuple[str, float | str], ...]

    def __str__(self) -> str:
        values = (
            f"{name}={value if isinstance(value, str) else format(value, '.3g')}" for name, value in self.parameters
        )
        return f"{self.kind}({', '.join(values)})"


@dataclass(frozen=True)
class Degraded:
    """A degraded image (C, H, W) in [0, 1] on the 8-bit grid, and the steps that made it; no steps: a clean input."""

    image: Tensor
    recipe: tuple[Step, ...]


@dataclass(frozen=True)
class Range:
    """From a mild to a harsh end, either of which may be the larger number; log: uniform in logarithm."""

    mild: float
    harsh: float
    log: bool = False

    def draw(self, generator: Generator, strength: Strength = "medium") -> float:
        """One value of the half (or whole) that belongs to `strength`."""
        start, stop = {"light": (0.0, 0.5), "medium": (0.0, 1.0), "strong": (0.5, 1.0)}[strength]
        position = _uniform(generator, start, stop)
        if self.log:
            return self.mild * math.exp(math.log(self.harsh / self.mild) * position)
        return self.mild + (self.harsh - self.mild) * position


LOW_LIGHT_GAIN = Range(0.9, 0.35)
LOW_LIGHT_GAMMA = Range(1.2, 2.6)
HAZE_DENSITY = Range(0.5, 1.6)
HAZE_TRANSMISSION = Range(0.7, 0.3)
AIRLIGHT = Range(0.7, 1.0)
AIRLIGHT_TINT = Range(-0.03, 0.03)
VIS_NOISE_SIGMA = Range(4 / 255, 30 / 255)
POISSON_PEAK = Range(300.0, 20.0, log=True)
VIS_BLUR_SIGMA = Range(0.6, 2.2)
VIS_MOTION_LENGTH = Range(3.0, 13.0)
VIS_JPEG_QUALITY = Range(80.0, 25.0)
CAST_DEVIATION = Range(0.0, 0.2)
RAIN_DENSITY = Range(0.001, 0.006)
RAIN_LENGTH = Range(9.0, 27.0)
SNOW_DENSITY = Range(0.001, 0.006)
FOG_DENSITY = Range(1.4, 3.6)
DOWNPOUR_INTENSITY = Range(0.4, 1.5)
DOWNPOUR_VEIL = Range(0.05, 0.45)
SNOWFALL_INTENSITY = Range(0.4, 1.6)
SNOWFALL_VEIL = Range(0.1, 0.9)

IR_CONTRAST = Range(0.75, 0.25)
IR_STRIPE_STD = Range(1.5 / 255, 12 / 255)
IR_STRIPE_GAIN_STD = Range(0.01, 0.06)
IR_NOISE_SIGMA = Range(4 / 255, 25 / 255)
IR_BLUR_SIGMA = Range(0.6, 1.5)
IR_MOTION_LENGTH = Range(3.0, 7.0)
IR_JPEG_QUALITY = Range(90.0, 40.0)
IR_PATTERN_STD = Range(1.5 / 255, 8 / 255)
IR_SHADING = Range(0.02, 0.12)

DEAD_PIXEL_SHARE = Range(0.0005, 0.005)

VIS_WEIGHTS = {
    VisKind.LOW_LIGHT: 0.28,
    VisKind.HAZE: 0.28,
    VisKind.GAUSSIAN_NOISE: 0.22,
    VisKind.POISSON_NOISE: 0.10,
    VisKind.BLUR: 0.06,
    VisKind.JPEG: 0.06,
}
VIS_EXTRAS = {VisKind.COLOUR_CAST: 0.1}  # probability of joining the drawn kinds while fewer than MAX_KINDS
IR_WEIGHTS = {IrKind.LOW_CONTRAST: 0.32, IrKind.STRIPES: 0.32, IrKind.GAUSSIAN_NOISE: 0.30}
IR_EXTRAS = {IrKind.BLUR: 0.15, IrKind.JPEG: 0.1}
# A scene is either dark or veiled, and one sensor noise model is enough.
VIS_RIVALS = {
    VisKind.LOW_LIGHT: VisKind.HAZE,
    VisKind.HAZE: VisKind.LOW_LIGHT,
    VisKind.GAUSSIAN_NOISE: VisKind.POISSON_NOISE,
    VisKind.POISSON_NOISE: VisKind.GAUSSIAN_NOISE,
}
IR_RIVALS: dict[IrKind, IrKind] = {}


# --- the physical models ----------------------------------------------------------------------------------------------


def low_light(image: Tensor, gain: float, gamma: float) -> Tensor:
    """Under-exposure: (gain * I) ** gamma; gain in [0.35, 0.9], gamma in [1.2, 2.6]."""
    return (image * gain).clamp_min(0).pow(gamma)


def haze(image: Tensor, airlight: Tensor | float, transmission: Tensor | float) -> Tensor:
    """Atmospheric scattering (Koschmieder): I * t + A * (1 - t).

    airlight: scalar or (C, 1, 1), in [0.7, 1]; transmission: scalar or (1, H, W), in (0, 1].
    """
    return image * transmission + airlight * (1 - transmission)


def depth_surrogate(height: int, width: int, clutter: float, generator: Generator) -> Tensor:
    """A smooth stand-in for scene depth, (1, H, W) in [0.4, 1], far at the top and near at the bottom.

    Blurred noise is mixed in; clutter in [0, 1] is its share. The noise is a 5x5 random grid blown up bicubically,
    which costs next to nothing and has the spectrum of heavily blurred white noise.
    """
    grid = torch.rand(5, 5, generator=generator).numpy()
    bumps = torch.from_numpy(cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC)).clamp_(0, 1)
    slope = torch.linspace(1, 0, height).unsqueeze(1)  # (H, 1)
    return bumps.mul_(clutter).add_(slope * (1 - clutter)).mul_(0.6).add_(0.4).unsqueeze(0)


def precipitation(image: Tensor, cover: Tensor, brightness: float) -> Tensor:
    """Rain or snow in front of a scene: I * (1 - cover) + brightness * cover; cover (1, H, W) in [0, 1]."""
    return image * (1 - cover) + brightness * cover


def rain_cover(
    height: int, width: int, density: float, length: float, angle: float, opacity: float, generator: Generator
) -> Tensor:
    """What falling drops cover while the shutter is open, (1, H, W) in [0, opacity]: short, parallel streaks.

    density: drops a pixel, in [0.001, 0.006]; length: of a streak in px, in [9, 27]; angle: from the x axis, radians.
    """
    drops = (torch.rand(1, height, width, generator=generator) < density).float()
    drops *= torch.rand(drops.shape, generator=generator)
    kernel = _line_kernel(length, angle)
    kernel /= kernel.max()
    streaks = _filter_planes(drops, lambda plane: cv2.filter2D(plane, -1, kernel, borderType=cv2.BORDER_CONSTANT))
    return streaks.clamp_(0, 1) * opacity  # large kernels go through a Fourier transform, which may dip below zero


def snow_cover(height: int, width: int, density: float, opacity: float, generator: Generator) -> Tensor:
    """What falling flakes cover, (1, H, W) in [0, opacity]: soft discs of three sizes, the large (near) ones rarer.

    density: flakes a pixel, in [0.001, 0.006].
    """
    cover = torch.zeros(1, height, width)
    for sigma, share in ((0.7, 0.7), (1.3, 0.25), (2.4, 0.05)):
        flakes = (torch.rand(1, height, width, generator=generator) < density * share).float()
        soft = gaussian_blur(flakes, sigma) * (2 * math.pi * sigma**2)  # a lone flake's peak is one
        cover = torch.maximum(cover, soft)
    return cover.clamp_(0, 1) * opacity


def colour_cast(image: Tensor, gains: Tensor) -> Tensor:
    """Wrong white balance: one gain per channel, gains (3,) in [0.8, 1.2]."""
    return image * gains.view(-1, 1, 1)


def low_contrast(image: Tensor, slope: float, offset: float) -> Tensor:
    """Squeezed thermal contrast: slope * I + offset; slope in [0.25, 0.75], offset in [0, 1 - slope]."""
    return image * slope + offset


def stripe_profile(
    length: int, std: float, generator: Generator, *, smoothing: float = 0.0, max_run: int = 1
) -> Tensor:
    """Random per-line values of the given std, (length,): white, Gaussian low-pass, or constant in runs.

    smoothing: the low-pass std in px. Runs have 1 to max_run lines. A low-passed profile is scaled back, so that its
    expected std stays `std`.
    """
    if max_run > 1:
        runs = torch.randint(1, max_run + 1, (length,), generator=generator)
        levels = torch.randn(length, generator=generator)
        return torch.repeat_interleave(levels, runs)[:length] * std
    if smoothing <= 0:
        return torch.randn(length, generator=generator) * std
    radius = max(1, math.ceil(3 * smoothing))
    positions = torch.arange(-radius, radius + 1, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (positions / smoothing) ** 2)
    kernel /= kernel.square().sum().sqrt()  # unit energy keeps the variance of white noise
    white = torch.randn(1, 1, length + 2 * radius, generator=generator)
    return torch.nn.functional.conv1d(white, kernel.view(1, 1, -1)).view(-1) * std


def stripes(
    image: Tensor, offsets: Tensor, gains: Tensor | None = None, axis: Literal["columns", "rows"] = "columns"
) -> Tensor:
    """Fixed-pattern noise of a line-read infrared sensor: I * (1 + gains) + offsets, one value per column (or row).

    offsets, gains: (W,) for columns, (H,) for rows. Offset std in [1.5, 12] / 255, gain std in [0.01, 0.06].
    Raises ShapeError if a profile does not fit the image.
    """
    view = (1, 1, -1) if axis == "columns" else (1, -1, 1)
    num_lines = image.shape[-1 if axis == "columns" else -2]
    for profile in (offsets, gains):
        if profile is not None and profile.shape != (num_lines,):
            raise ShapeError(f"a stripe profile must have shape ({num_lines},) for {axis}, got {tuple(profile.shape)}")
    if gains is not None:
        image = image * (1 + gains.view(view))
    return image + offsets.view(view)


def fixed_pattern(image: Tensor, offsets: Tensor, gains: Tensor) -> Tensor:
    """Non-uniformity of an uncooled sensor: I * (1 + gains) + offsets, one value a pixel; offsets, gains (1, H, W).

    Offset std in [1.5, 8] / 255, with a smooth shading of up to 0.12 from the warm housing; gain std half of it.
    """
    return image * (1 + gains) + offsets


def dead_pixels(image: Tensor, is_dead: Tensor, levels: Tensor) -> Tensor:
    """Defective elements: pixels that show `levels` whatever the scene; is_dead (1, H, W), share in [.05, .5] %."""
    return torch.where(is_dead, levels, image)


def gaussian_noise(image: Tensor, sigma: float, generator: Generator, correlation: float = 0.0) -> Tensor:
    """Additive sensor noise of std sigma, in [4, 30] / 255; correlation in [0, 1] is shared by every two channels."""
    noise = torch.randn(image.shape, generator=generator)
    if correlation > 0:
        shared = torch.randn(1, *image.shape[1:], generator=generator)
        noise.mul_(math.sqrt(1 - correlation)).add_(shared, alpha=math.sqrt(correlation))
    return noise.mul_(sigma).add_(image)


def poisson_noise(image: Tensor, peak: float, generator: Generator) -> Tensor:
    """Photon noise: Poisson(I * peak) / peak; peak, the photons of a white pixel, in [20, 300]."""
    return torch.poisson(image.clamp_min(0) * peak, generator=generator) / peak


def gaussian_blur(image: Tensor, sigma: float) -> Tensor:
    """Defocus: a Gaussian of std sigma px, in [0.6, 2.2] (infrared [0.6, 1.5]), reflecting borders."""
    return _filter_planes(
        image, lambda plane: cv2.GaussianBlur(plane, (0, 0), sigma, borderType=cv2.BORDER_REFLECT_101)
    )


def motion_blur(image: Tensor, length: float, angle: float) -> Tensor:
    """Camera shake: the mean along a straight path of `length` px, in [3, 13] (infrared [3, 7]), at `angle` radians."""
    kernel = _line_kernel(length, angle)
    return _filter_planes(image, lambda plane: cv2.filter2D(plane, -1, kernel, borderType=cv2.BORDER_REFLECT_101))


def jpeg(image: Tensor, quality: int) -> Tensor:
    """JPEG coding and decoding at `quality`, in [25, 80] (infrared [40, 90]); clips to [0, 1] and rounds to 8 bit."""
    channels = image.shape[0]
    pixels = image.clamp(0, 1).mul_(255).round_().to(torch.uint8)
    array = (pixels[0] if channels == 1 else pixels.permute(1, 2, 0)).contiguous().numpy()
    try:
        decoded = read_picture(jpeg_bytes(array, quality), "vis", OWN_FILES).values
    except ImageError as error:
        raise CoreError(f"JPEG coding failed for an image of shape {tuple(image.shape)}") from error
    planes = torch.from_numpy(np.array(decoded).reshape(*pixels.shape[1:], channels)).permute(2, 0, 1)
    return planes.contiguous().float().div_(255)


def quantise(image: Tensor) -> Tensor:
    """Clip to [0, 1] and round to 8 bit, as the sensor's converter does."""
    return image.clamp(0, 1).mul_(255).round_().div_(255)


# --- drawing a recipe -------------------------------------------------------------------------------------------------


def degrade_vis(
    image: Tensor,
    generator: Generator,
    strength: Strength = "medium",
    kinds: Iterable[VisKind | str] | None = None,
    clean_probability: float = 0.0,
) -> Degraded:
    """Degrade a clean visible image, (3, H, W) float32 in [0, 1], by a random recipe.

    kinds: exactly these, in physical order; None draws 1, 2 or 3 distinct kinds with p .5, .35, .15 (strong: 2 or 3).
    Low light and haze exclude each other, and so do the two noises. With p clean_probability the input stays clean.
    Raises ShapeError for another shape or a side below 16, ConfigError for an unknown kind.
    """
    _require_image(image, 3)
    wanted = _parse(VisKind, kinds)
    if _chance(generator, clean_probability):
        return Degraded(quantise(image), ())
    if wanted is None:
        wanted = _draw_kinds(generator, strength, VIS_WEIGHTS, VIS_EXTRAS, VIS_RIVALS)
    return _apply(image, [(kind, _VIS_MODELS[kind]) for kind in VisKind if kind in wanted], generator, strength)


def degrade_ir(
    image: Tensor,
    generator: Generator,
    strength: Strength = "medium",
    kinds: Iterable[IrKind | str] | None = None,
    clean_probability: float = 0.0,
) -> Degraded:
    """Degrade a clean infrared image, (1, H, W) float32 in [0, 1], by a random recipe; otherwise as `degrade_vis`."""
    _require_image(image, 1)
    wanted = _parse(IrKind, kinds)
    if _chance(generator, clean_probability):
        return Degraded(quantise(image), ())
    if wanted is None:
        wanted = _draw_kinds(generator, strength, IR_WEIGHTS, IR_EXTRAS, IR_RIVALS)
    return _apply(image, [(kind, _IR_MODELS[kind]) for kind in IrKind if kind in wanted], generator, strength)


_Model = Callable[[Tensor, Generator, Strength], tuple[Tensor, _Parameters]]


def _apply(
    image: Tensor,
    models: Iterable[tuple[VisKind | IrKind, _Model]],
    generator: Generator,
    strength: Strength,
) -> Degraded:
    recipe = []
    for kind, model in models:
        image, parameters = model(image, generator, strength)
        recipe.append(Step(kind, tuple(parameters.items())))
    return Degraded(quantise(image), tuple(recipe))


def _draw_kinds(
    generator: Generator,
    strength: Strength,
    weights: dict[_Kind, float],
    extras: dict[_Kind, float],
    rivals: dict[_Kind, _Kind],
) -> set[_Kind]:
    """Distinct kinds, drawn by weight without replacement; a drawn kind also removes its rival."""
    share = {1: 0.5, 2: 0.35, 3: 0.15} if strength != "strong" else {2: 0.7, 3: 0.3}
    pool = dict(weights)
    chosen: set[_Kind] = set()
    for _ in range(_pick(generator, share)):
        kind = _pick(generator, pool)
        chosen.add(kind)
        del pool[kind]
        if kind in rivals:
            pool.pop(rivals[kind], None)
    for kind, probability in extras.items():
        if _chance(generator, probability) and len(chosen) < MAX_KINDS:
            chosen.add(kind)
    return chosen


def _draw_low_light(image: Tensor, generator: Generator, strength: Strength) -> tuple[Tensor, _Parameters]:
    gain, gamma = LOW_LIGHT_GAIN.draw(generator, strength), LOW_LIGHT_GAMMA.draw(generator, strength)
    return low_light(image, gain, gamma), {"gain": gain, "gamma": gamma}


def _draw_haze(image: Tensor, generator: Generator, strength: Strength) -> tuple[Tensor, _Parameters]:
    tone = AIRLIGHT.draw(generator)
    tint = torch.tensor([AIRLIGHT_TINT.draw(generator) for _ in range(3)])
    airlight = (tone + tint).clamp_(max=1).view(3, 1, 1)
    if _chance(generator, 0.6):
        density, clutter = HAZE_DENSITY.draw(generator, strength), _uniform(generator, 0.2, 0.6)
        depth = depth_surrogate(image.shape[1], image.shape[2], clutter, generator)
        hazy = haze(image, airlight, depth.mul_(-density).exp_())
        return hazy, {"airlight": tone, "density": density, "clutter": clutter}
    transmission = HAZE_TRANSMISSION.draw(generator, strength)
    return haze(image, airlight, transmission), {"airlight": tone, "transmission": transmission}


def _draw_rain(image: Tensor, generator: Generator, strength: Strength) -> tuple[Tensor, _Parameters]:
    density, length = RAIN_DENSITY.draw(generator, strength), RAIN_LENGTH.draw(generator, strength)
    angle, opacity = math.pi / 2 + _uniform(generator, -0.35, 0.35), _uniform(generator, 0.35, 0.7)
    cover = rain_cover(image.shape[1], image.shape[2], density, length, angle, opacity, generator)
    parameters: _Parameters = {"density": density, "length": length, "angle": angle, "opacity": opacity}
    return precipitation(image, cover, 0.85), parameters


def _draw_snow(image: Tensor, generator: Generator, strength: Strength) -> tuple[Tensor, _Parameters]:
    density, opacity = SNOW_DENSITY.draw(generator, strength), _uniform(generator, 0.6, 0.95)
    cover = snow_cover(image.shape[1], image.shape[2], density, opacity, generator)
    return precipitation(image, cover, 0.95), {"density": density, "opacity": opacity}


def _draw_fog(image: Tensor, generator: Generator, strength: Strength) -> tuple[Tensor, _Parameters]:
    density, tone = FOG_DENSITY.draw(generator, strength), _sky_light(image, 0.78, 1.0, generator)
    return _veiled(image, density, tone, generator), {"density": density, "airlight": tone}


def _draw_downpour(image: Tensor, generator: Generator, strength: Strength) -> tuple[Tensor, _Parameters]:
    intensity, length = DOWNPOUR_INTENSITY.draw(generator, strength), _uniform(generator, 0.6, 1.5)
    angle = math.pi / 2 + _uniform(generator, -0.35, 0.35)
    veil, tone = DOWNPOUR_VEIL.draw(generator, strength), _sky_light(image, 0.6, 0.9, generator)
    cover = downpour_cover(image.shape[1], image.shape[2], intensity, length, angle, generator)
    rainy = precipitation(_veiled(image, veil, tone, generator), cover, tone)
    return rainy, {"intensity": intensity, "length": length, "angle": angle, "veil": veil, "brightness": tone}


def _draw_snowfall(image: Tensor, generator: Generator, strength: Strength) -> tuple[Tensor, _Parameters]:
    intensity, size = SNOWFALL_INTENSITY.draw(generator, strength), _uniform(generator, 0.7, 1.4)
    fall, angle = _uniform(generator, 0.0, 2.0), math.pi / 2 + _uniform(generator, -0.7, 0.7)
    veil, tone = SNOWFALL_VEIL.draw(generator, strength), _sky_light(image, 0.85, 1.0, generator)
    cover = snowfall_cover(image.shape[1], image.shape[2], intensity, size, fall, angle, generator)
    snowy = precipitation(_veiled(image, veil, 0.9 * tone, generator), cover, tone)
    return snowy, {"intensity": intensity, "size": size, "fall": fall, "angle": angle, "veil": veil, "brightness": tone}


def _veiled(image: Tensor, density: float, tone: float, generator: Generator) -> Tensor:
    """Haze over a made-up depth: exp(-density x depth) gets through; the airlight is `tone`, slightly tinted."""
    tint = torch.tensor([AIRLIGHT_TINT.draw(generator) for _ in range(3)])
    depth = scene_depth(image, generator)
    return haze(image, (tone + tint).clamp_(max=1).view(3, 1, 1), depth.mul_(-density).exp_())


def _sky_light(image: Tensor, low: float, high: float, generator: Generator) -> float:
    """How bright weather shines: as the sky by day, at night (a mean below 0.2) by the lamps, half to all as bright."""
    tone = _uniform(generator, low, high)
    at_night = _uniform(generator, 0.5, 1.0)
    return tone * at_night if float(image.mean()) < 0.2 else tone


def _draw_fixed_pattern(image: Tensor, generator: Generator, strength: Strength) -> tuple[Tensor, _Parameters]:
    std, shading = IR_PATTERN_STD.draw(generator, strength), IR_SHADING.draw(generator, strength)
    dome = depth_surrogate(image.shape[1], image.shape[2], 1.0, generator).sub_(0.7).mul_(shading / 0.3)
    offsets = torch.randn(image.shape, generator=generator) * std + dome
    gains = torch.randn(image.shape, generator=generator) * (std / 2)
    return fixed_pattern(image, offsets, gains), {"std": std, "shading": shading}


def _draw_dead_pixels(image: Tensor, generator: Generator, strength: Strength) -> tuple[Tensor, _Parameters]:
    share = DEAD_PIXEL_SHARE.draw(generator, strength)
    is_dead = torch.rand(1, *image.shape[1:], generator=generator) < share
    levels = (torch.rand(image.shape, generator=generator) < 0.5).float()  # stuck at black or at white
    return dead_pixels(image, is_dead, levels), {"share": share}


def _draw_colour_cast(image: Tensor, generator: Generator, strength: Strength) -> tuple[Tensor, _Parameters]:
    red, green, blue = (
        1 + CAST_DEVIATION.draw(generator, strength) * (1 if _chance(generator, 0.5) else -1) for _ in range(3)
    )
    return colour_cast(image, torch.tensor([red, green, blue])), {"red": red, "green": green, "blue": blue}


def _draw_vis_noise(image: Tensor, generator: Generator, strength: Strength) -> tuple[Tensor, _Parameters]:
    sigma = VIS_NOISE_SIGMA.draw(generator, strength)
    correlation = _uniform(generator, 0.3, 0.9) if _chance(generator, 0.5) else 0.0
    return gaussian_noise(image, sigma, generator, correlation), {"sigma": sigma, "correlation": correlation}


def _draw_poisson(image: Tensor, generator: Generator, strength: Strength) -> tuple[Tensor, _Parameters]:
    peak = POISSON_PEAK.draw(generator, strength)
    return poisson_noise(image, peak, generator), {"peak": peak}


def _draw_low_contrast(image: Tensor, generator: Generator, strength: Strength) -> tuple[Tensor, _Parameters]:
    slope = IR_CONTRAST.draw(generator, strength)
    offset = _uniform(generator, 0.0, 1 - slope) * _uniform(generator, 0.5, 1.0)
    return low_contrast(image, slope, offset), {"slope": slope, "offset": offset}


def _draw_stripes(image: Tensor, generator: Generator, strength: Strength) -> tuple[Tensor, _Parameters]:
    axis: Literal["columns", "rows"] = "rows" if _chance(generator, 0.15) else "columns"
    num_lines = image.shape[2] if axis == "columns" else image.shape[1]
    std, smoothing, max_run = IR_STRIPE_STD.draw(generator, strength), 0.0, 1
    if _chance(generator, 0.5):
        if _chance(generator, 0.5):
            smoothing = _uniform(generator, 1.0, 4.0)
        else:
            max_run = 6
    offsets = stripe_profile(num_lines, std, generator, smoothing=smoothing, max_run=max_run)
    gain_std = IR_STRIPE_GAIN_STD.draw(generator, strength) if _chance(generator, 0.2) else 0.0
    gains = stripe_profile(num_lines, gain_std, generator) if gain_std > 0 else None
    parameters: _Parameters = {
        "axis": axis,
        "std": std,
        "smoothing": smoothing,
        "max_run": float(max_run),
        "gain_std": gain_std,
    }
    return stripes(image, offsets, gains, axis), parameters


def _draw_ir_noise(image: Tensor, generator: Generator, strength: Strength) -> tuple[Tensor, _Parameters]:
    sigma = IR_NOISE_SIGMA.draw(generator, strength)
    return gaussian_noise(image, sigma, generator), {"sigma": sigma}


def _blur_model(sigma_range: Range, length_range: Range) -> _Model:
    def draw(image: Tensor, generator: Generator, strength: Strength) -> tuple[Tensor, _Parameters]:
        if _chance(generator, 0.5):
            sigma = sigma_range.draw(generator, strength)
            return gaussian_blur(image, sigma), {"sigma": sigma}
        length, angle = length_range.draw(generator, strength), _uniform(generator, 0.0, math.pi)
        return motion_blur(image, length, angle), {"length": length, "angle": angle}

    return draw


def _jpeg_model(quality_range: Range) -> _Model:
    def draw(image: Tensor, generator: Generator, strength: Strength) -> tuple[Tensor, _Parameters]:
        quality = round(quality_range.draw(generator, strength))
        return jpeg(image, quality), {"quality": float(quality)}

    return draw


_VIS_MODELS: dict[VisKind, _Model] = {
    VisKind.BLUR: _blur_model(VIS_BLUR_SIGMA, VIS_MOTION_LENGTH),
    VisKind.LOW_LIGHT: _draw_low_light,
    VisKind.HAZE: _draw_haze,
    VisKind.RAIN: _draw_rain,
    VisKind.SNOW: _draw_snow,
    VisKind.FOG: _draw_fog,
    VisKind.DOWNPOUR: _draw_downpour,
    VisKind.SNOWFALL: _draw_snowfall,
    VisKind.COLOUR_CAST: _draw_colour_cast,
    VisKind.GAUSSIAN_NOISE: _draw_vis_noise,
    VisKind.POISSON_NOISE: _draw_poisson,
    VisKind.DEAD_PIXELS: _draw_dead_pixels,
    VisKind.JPEG: _jpeg_model(VIS_JPEG_QUALITY),
}
_IR_MODELS: dict[IrKind, _Model] = {
    IrKind.BLUR: _blur_model(IR_BLUR_SIGMA, IR_MOTION_LENGTH),
    IrKind.LOW_CONTRAST: _draw_low_contrast,
    IrKind.STRIPES: _draw_stripes,
    IrKind.FIXED_PATTERN: _draw_fixed_pattern,
    IrKind.GAUSSIAN_NOISE: _draw_ir_noise,
    IrKind.DEAD_PIXELS: _draw_dead_pixels,
    IrKind.JPEG: _jpeg_model(IR_JPEG_QUALITY),
}


# --- small parts ------------------------------------------------------------------------------------------------------


def _require_image(image: Tensor, channels: int) -> None:
    if image.ndim != 3 or image.shape[0] != channels or min(image.shape[1:]) < MIN_SIDE:
        raise ShapeError(
            f"expected an image of shape ({channels}, H, W) with sides of at least {MIN_SIDE}, got {tuple(image.shape)}"
        )


def _parse(kind_type: type[_Kind], kinds: Iterable[_Kind | str] | None) -> set[_Kind] | None:
    if kinds is None:
        return None
    try:
        return {kind_type(kind) for kind in kinds}
    except ValueError as error:
        raise ConfigError(f"{error}; accepted: {', '.join(kind_type)}") from error


def _uniform(generator: Generator, low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator).item())


def _chance(generator: Generator, probability: float) -> bool:
    return _uniform(generator, 0.0, 1.0) < probability


_Choice = TypeVar("_Choice")


def _pick(generator: Generator, weights: dict[_Choice, float]) -> _Choice:
    """One key, with probability in proportion to its weight."""
    rest = _uniform(generator, 0.0, sum(weights.values()))
    *others, last = weights
    for choice in others:
        rest -= weights[choice]
        if rest < 0:
            return choice
    return last


def _filter_planes(image: Tensor, filter_plane: Callable[[np.ndarray], np.ndarray]) -> Tensor:
    planes = image.contiguous().numpy()
    return torch.from_numpy(np.stack([filter_plane(plane) for plane in planes]))


def _line_kernel(length: float, angle: float) -> np.ndarray:
    """A straight path through the centre, sampled four times per px and spread bilinearly; sums to one."""
    radius = math.ceil((length - 1) / 2) + 1
    along = np.linspace(-(length - 1) / 2, (length - 1) / 2, max(2, math.ceil(4 * length)))
    x, y = radius + along * math.cos(angle), radius + along * math.sin(angle)
    column, row = np.floor(x).astype(np.int64), np.floor(y).astype(np.int64)
    dx, dy = x - column, y - row
    kernel = np.zeros((2 * radius + 1, 2 * radius + 1))
    np.add.at(kernel, (row, column), (1 - dx) * (1 - dy))
    np.add.at(kernel, (row, column + 1), dx * (1 - dy))
    np.add.at(kernel, (row + 1, column), (1 - dx) * dy)
    np.add.at(kernel, (row + 1, column + 1), dx * dy)
    kernel /= kernel.sum()
    return kernel.astype(np.float32)
