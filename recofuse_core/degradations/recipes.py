"""Random recipes: which degradations an image gets, with which parameters, drawn from the tables below.

Reading "strength": every range has a mild and a harsh end. "medium" draws from the whole range, "light" from its mild
half, "strong" from its harsh half with two or three kinds in every image. Values without a harsh end (airlight tone,
contrast offset, angles) are always drawn from their whole range.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, NamedTuple, TypeVar

import torch
from torch import Generator, Tensor

from recofuse_core.degradations.physics import (
    colour_cast,
    dead_pixels,
    depth_surrogate,
    fixed_pattern,
    gaussian_blur,
    gaussian_noise,
    haze,
    jpeg,
    low_contrast,
    low_light,
    motion_blur,
    poisson_noise,
    precipitation,
    quantise,
    rain_cover,
    snow_cover,
    stripe_profile,
    stripes,
)
from recofuse_core.degradations.weather import downpour_cover, scene_depth, snowfall_cover
from recofuse_core.errors import ConfigError, ShapeError

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


def bad_camera(vis: Tensor, ir: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    """A clean pair as a bad camera films it: dark, of squeezed contrast, the same in every frame, and fresh noise."""
    dark = gaussian_noise(low_light(vis, 0.6, 1.8), 14 / 255, generator)
    flat = gaussian_noise(low_contrast(ir, 0.45, 0.2), 10 / 255, generator)
    return quantise(dark), quantise(flat)


_Model = Callable[[Tensor, Generator, Strength], tuple[Tensor, _Parameters]]
_FallModel = Callable[[Tensor, Generator, Strength], tuple["Fall", _Parameters]]


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


# --- drawing each kind's parameters -----------------------------------------------------------------------------------


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


class Fall(NamedTuple):
    """What falls in front of a scene: the scene under the veil of it (3, H, W), its cover (1, H, W), its brightness."""

    scene: Tensor
    cover: Tensor
    brightness: float

    @property
    def image(self) -> Tensor:
        """What a camera sees, (3, H, W)."""
        return precipitation(self.scene, self.cover, self.brightness)


def draw_fall(image: Tensor, kind: VisKind, generator: Generator, strength: Strength = "medium") -> Fall:
    """The parts of a degradation that falls, as `degrade_vis` puts it in front of an image (3, H, W) in [0, 1].

    kind: rain, snow, downpour or snowfall. Raises KeyError for another one.
    """
    return _FALLS[kind](image, generator, strength)[0]


def _draw_rain(image: Tensor, generator: Generator, strength: Strength) -> tuple[Fall, _Parameters]:
    density, length = RAIN_DENSITY.draw(generator, strength), RAIN_LENGTH.draw(generator, strength)
    angle, opacity = math.pi / 2 + _uniform(generator, -0.35, 0.35), _uniform(generator, 0.35, 0.7)
    cover = rain_cover(image.shape[1], image.shape[2], density, length, angle, opacity, generator)
    parameters: _Parameters = {"density": density, "length": length, "angle": angle, "opacity": opacity}
    return Fall(image, cover, 0.85), parameters


def _draw_snow(image: Tensor, generator: Generator, strength: Strength) -> tuple[Fall, _Parameters]:
    density, opacity = SNOW_DENSITY.draw(generator, strength), _uniform(generator, 0.6, 0.95)
    cover = snow_cover(image.shape[1], image.shape[2], density, opacity, generator)
    return Fall(image, cover, 0.95), {"density": density, "opacity": opacity}


def _draw_fog(image: Tensor, generator: Generator, strength: Strength) -> tuple[Tensor, _Parameters]:
    density, tone = FOG_DENSITY.draw(generator, strength), _sky_light(image, 0.78, 1.0, generator)
    return _veiled(image, density, tone, generator), {"density": density, "airlight": tone}


def _draw_downpour(image: Tensor, generator: Generator, strength: Strength) -> tuple[Fall, _Parameters]:
    intensity, length = DOWNPOUR_INTENSITY.draw(generator, strength), _uniform(generator, 0.6, 1.5)
    angle = math.pi / 2 + _uniform(generator, -0.35, 0.35)
    veil, tone = DOWNPOUR_VEIL.draw(generator, strength), _sky_light(image, 0.6, 0.9, generator)
    cover = downpour_cover(image.shape[1], image.shape[2], intensity, length, angle, generator)
    fall = Fall(_veiled(image, veil, tone, generator), cover, tone)
    return fall, {"intensity": intensity, "length": length, "angle": angle, "veil": veil, "brightness": tone}


def _draw_snowfall(image: Tensor, generator: Generator, strength: Strength) -> tuple[Fall, _Parameters]:
    intensity, size = SNOWFALL_INTENSITY.draw(generator, strength), _uniform(generator, 0.7, 1.4)
    fall, angle = _uniform(generator, 0.0, 2.0), math.pi / 2 + _uniform(generator, -0.7, 0.7)
    veil, tone = SNOWFALL_VEIL.draw(generator, strength), _sky_light(image, 0.85, 1.0, generator)
    cover = snowfall_cover(image.shape[1], image.shape[2], intensity, size, fall, angle, generator)
    snow = Fall(_veiled(image, veil, 0.9 * tone, generator), cover, tone)
    return snow, {"intensity": intensity, "size": size, "fall": fall, "angle": angle, "veil": veil, "brightness": tone}


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


_FALLS: dict[VisKind, _FallModel] = {
    VisKind.RAIN: _draw_rain,
    VisKind.SNOW: _draw_snow,
    VisKind.DOWNPOUR: _draw_downpour,
    VisKind.SNOWFALL: _draw_snowfall,
}


def _fall_model(draw_parts: _FallModel) -> _Model:
    def draw(image: Tensor, generator: Generator, strength: Strength) -> tuple[Tensor, _Parameters]:
        fall, parameters = draw_parts(image, generator, strength)
        return fall.image, parameters

    return draw


_VIS_MODELS: dict[VisKind, _Model] = {
    VisKind.BLUR: _blur_model(VIS_BLUR_SIGMA, VIS_MOTION_LENGTH),
    VisKind.LOW_LIGHT: _draw_low_light,
    VisKind.HAZE: _draw_haze,
    VisKind.RAIN: _fall_model(_draw_rain),
    VisKind.SNOW: _fall_model(_draw_snow),
    VisKind.FOG: _draw_fog,
    VisKind.DOWNPOUR: _fall_model(_draw_downpour),
    VisKind.SNOWFALL: _fall_model(_draw_snowfall),
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
