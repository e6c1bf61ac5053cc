"""What the exposure estimator learns from: frames in all lights beside the frame that each should be, and the loss.

Frames come from registered pairs and from a second folder, the references, of real photographs:

    lowlight/low/SCENE__K.*    darker exposures of a scene ...       lowlight/normal/SCENE.*   ... and the right one
    haze/hazy/NAME.*           a pair's visible frame in fog; the clear one and the infrared are the pair's, by name
    photos/*                   clean photographs
    thermal/*                  infrared frames of other cameras, which the tone estimator alone learns from

Every part may be missing. What stands for what (`FrameKind`): real dark pairs; well exposed frames, darkened; the same
left as they are, so that the estimator learns to keep its hands off; true nights, for which there is no reference and
`well_exposed` makes one; fog, which is not for lighting to lift; a covered lens or an even grey, which stay. Frames are
drawn once, averaged to cells and kept, so that a step costs little. All randomness comes from the `torch.Generator`
passed in. S is a frame's side in px.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from recofuse_core.data import find_images, read_ir, read_vis
from recofuse_core.degradations.physics import gaussian_noise, haze, jpeg, poisson_noise, quantise
from recofuse_core.degradations.recipes import Range
from recofuse_core.degradations.weather import scene_depth
from recofuse_core.errors import ConfigError, DatasetError
from recofuse_core.exposure import ExposureEstimator
from recofuse_core.losses import log_error, luma
from recofuse_core.training.draws import chance, index, taken_from, unit

DARKENING_GAIN = Range(0.85, 0.06, log=True)
DARKENING_GAMMA = Range(1.0, 2.4)
PHOTONS = Range(1000.0, 40.0, log=True)
NOISE_SIGMA = Range(1 / 255, 14 / 255, log=True)
NOISE_CORRELATION = Range(0.0, 0.9)
JPEG_QUALITY = Range(92.0, 40.0)
FOG_DENSITY = Range(0.35, 3.6, log=True)
FOG_POWER = Range(0.4, 1.8, log=True)  # of a real fog's transmission: the same depth in thinner or denser fog
AIRLIGHT = Range(0.45, 1.0)
AIRLIGHT_TINT = 0.025  # std
DUSK_GAIN, DUSK_GAMMA = Range(0.6, 1.0), Range(0.8, 1.6)  # fog is not always bright
CAST = 0.05  # std of a channel's gain
CROP = Range(0.6, 1.0)  # share of a frame's sides

WELL_EXPOSED = (0.28, 0.60)  # means of frames that are right as they are
VEILED_MEAN = 0.4  # about that of a dark frame in fog, lit
TRUE_NIGHT = 0.22  # means of visible frames of pairs below this one are nights


class FrameKind(StrEnum):
    """What a frame teaches."""

    DARK_PAIR = "dark_pair"
    DARKENED = "darkened"
    KEPT = "kept"
    NIGHT = "night"
    FOG_PAIR = "fog_pair"
    FOGGED = "fogged"
    EMPTY = "empty"


VEILED = (FrameKind.FOG_PAIR, FrameKind.FOGGED)  # their clear frame is for who lifts veils, not for lighting, to reach

SHARES = {
    FrameKind.DARK_PAIR: 0.24,
    FrameKind.DARKENED: 0.17,
    FrameKind.KEPT: 0.14,
    FrameKind.NIGHT: 0.14,
    FrameKind.FOG_PAIR: 0.11,
    FrameKind.FOGGED: 0.18,
    FrameKind.EMPTY: 0.02,
}


class Frame(NamedTuple):
    """Levels in memory: what there is (H, W, 3), what it should be, and the infrared (H, W), if there is any."""

    given: np.ndarray
    lit: np.ndarray
    ir: np.ndarray | None = None


@dataclass(frozen=True)
class References:
    """The second folder's photographs."""

    dark: list[Frame] = field(default_factory=list)
    photos: list[np.ndarray] = field(default_factory=list)
    foggy: dict[str, np.ndarray] = field(default_factory=dict)  # by the pair's name in lower case
    thermal: list[np.ndarray] = field(default_factory=list)  # (H, W)


def read_references(root: Path) -> References:
    """Read the second folder. Raises DatasetError if it is none, or if a dark frame has no reference."""
    if not root.is_dir():
        raise DatasetError(f"{root} is not a folder")

    def images(part: str, read: Callable[[Path], Tensor] = read_vis) -> dict[str, np.ndarray]:
        folder = root / part
        return {name: _levels(read(path)) for name, path in find_images(folder).items()} if folder.is_dir() else {}

    normal = images("lowlight/normal")
    dark = []
    for name, given in images("lowlight/low").items():
        scene = re.sub(r"__\w+$", "", name)
        if scene not in normal:
            raise DatasetError(f"{root}/lowlight/low has {name}, but lowlight/normal has no {scene}")
        dark.append(Frame(given, normal[scene]))
    photos = [*images("photos").values(), *normal.values()]
    foggy = {name.lower(): levels for name, levels in images("haze/hazy").items()}
    thermal = [levels[..., 0] for levels in images("thermal", read_ir).values()]
    return References(dark, photos, foggy, thermal)


def _levels(image: Tensor) -> np.ndarray:
    pixels: np.ndarray = image.permute(1, 2, 0).contiguous().numpy()
    return pixels


# --- what a frame should be -------------------------------------------------------------------------------------------


def well_exposed(image: Tensor) -> Tensor:
    """The target of a true night, (3, H, W) in [0, 1]: see `exposing`."""
    return exposing(image)(image)


def exposing(image: Tensor) -> Callable[[Tensor], Tensor]:
    """What makes of a true night its target: lamps stay lamps, a black sky stays dark, and the mean is a lit road's.

    image: (3, H, W) in [0, 1], as are those that the result takes. The mean aimed at is 0.38 and less where much is
    black: down to 0.14. First the black level goes, then the middle tones lose six tenths of their cast, then a gain of
    up to 2.5 brings the bright cells to 0.85, and a power of 0.36 at least does the rest.
    """
    cells = F.adaptive_avg_pool2d(image[None], 64)
    y = luma(cells).flatten()
    mean, share = float(y.mean()), float((y < 0.035).float().mean())
    aim = 0.38 - 0.12 * min(max((share - 0.25) / 0.4, 0), 1) - 0.12 * min(max((share - 0.65) / 0.25, 0), 1)
    black = min(0.9 * float(y.quantile(0.01)), 0.03)
    cells = ((cells - black) / (1 - black)).clamp(0, 1)
    y = luma(cells).flatten()
    middle = (y > y.quantile(0.3)) & (y < y.quantile(0.95))
    if not bool(middle.any()):
        return lambda other: other
    means = cells.flatten(2)[0][:, middle].mean(dim=1) + 1e-4
    gains = ((means.mean() / means) ** 0.6).clamp(0.75, 1.3) * min(
        max(0.85 / max(float(y.quantile(0.97)), 1e-3), 1), 2.5
    )
    gains = gains.view(3, 1, 1)
    lifted = (cells[0] * gains).clamp(0, 1)
    low, high = 0.36, 1.0
    for _ in range(20):
        power = (low + high) / 2
        low, high = (low, power) if float(lifted.pow(power).mean()) < max(aim, mean) else (power, high)
    return lambda other: (((other - black) / (1 - black)).clamp(0, 1) * gains).clamp(1e-5, 1).pow(power)


def _bright_enough(veiled: Tensor) -> Tensor:
    """A frame in fog as it is, or if it is as dark as a night, as bright as a well exposed one.

    In between it is a mixture: a step would ask for two brightnesses of frames that are alike.
    """
    mean = float(luma(veiled[None]).mean())
    share = min(max((WELL_EXPOSED[0] - mean) / (WELL_EXPOSED[0] - TRUE_NIGHT), 0), 1)
    if share == 0:
        return veiled
    brighter = veiled.clamp_min(1e-4).pow(math.log(VEILED_MEAN) / math.log(max(mean, 0.02)))
    return veiled + share * (brighter - veiled)


def is_crisp(levels: np.ndarray) -> bool:
    """Whether a frame is free of haze of its own, so that it can say what one without is: it has black and contrast."""
    cells = cv2.resize(levels, (64, 64), interpolation=cv2.INTER_AREA).astype(np.float32) / 255
    return bool(np.quantile(cells.min(axis=2), 0.03) < 0.10 and cells.mean(axis=2).std() > 0.16)


def transmission(hazy: Tensor, clear: Tensor) -> Tensor:
    """How much light a real fog let through, (1, H, W): Koschmieder's model solved over small windows."""
    airlight = hazy.flatten(1).quantile(0.995, dim=1).view(3, 1, 1)
    window = max(3, hazy.shape[-1] // 16)

    def averaged(plane: Tensor) -> Tensor:
        return torch.from_numpy(cv2.blur(plane.numpy(), (window, window)))

    veil, depth = (
        averaged(((airlight - hazy) * (airlight - clear)).sum(0)),
        averaged((airlight - clear).square().sum(0)),
    )
    return (veil / depth.clamp_min(1e-3)).clamp(0.03, 1)[None]


# --- drawing frames ---------------------------------------------------------------------------------------------------


class FrameSource:
    """Draws frames of all kinds from pairs (name, vis, ir), uint8, and from references."""

    def __init__(self, pairs: Iterable[tuple[str, np.ndarray, np.ndarray]], references: References) -> None:
        self.infrared: list[np.ndarray] = []
        self.scenes: list[Frame] = []  # all pairs, whatever they are
        self.photos = references.photos
        self.thermal = references.thermal
        self.pools: dict[FrameKind, list[Frame]] = {kind: [] for kind in FrameKind}
        self.pools[FrameKind.DARK_PAIR] = references.dark
        low, high = WELL_EXPOSED
        for name, vis, ir in pairs:
            self.infrared.append(ir)
            mean = float(vis.mean()) / 255
            frame = Frame(vis, vis, ir)
            self.scenes.append(frame)
            if mean < TRUE_NIGHT:
                self.pools[FrameKind.NIGHT].append(frame)
            elif low <= mean <= high and is_crisp(vis):
                self._take_clean(frame)
            if (hazy := references.foggy.get(name.lower())) is not None:
                self.pools[FrameKind.FOG_PAIR].append(Frame(hazy, vis, ir))
        for photo in references.photos:
            if low <= float(photo.mean()) / 255 <= high and is_crisp(photo):
                self._take_clean(Frame(photo, photo))
        self.kinds = [kind for kind in FrameKind if self.pools[kind]]
        if not self.kinds or not self.infrared:
            raise DatasetError("there is no frame to learn exposure from")

    def _take_clean(self, frame: Frame) -> None:
        for kind in (FrameKind.DARKENED, FrameKind.KEPT, FrameKind.FOGGED, FrameKind.EMPTY):
            self.pools[kind].append(frame)

    def draw(self, side: int, generator: Generator) -> tuple[Tensor, Tensor, Tensor, FrameKind]:
        """One frame: given and lit vis (3, S, S), ir (1, S, S), and its kind. A veil is not for lighting to lift."""
        given, lit, ir, kind = self.scene(side, generator)
        if kind in VEILED:
            lit = _bright_enough(given.clamp(0, 1))
        return sensed(given, generator), lit, ir, kind

    def scene(
        self, side: int, generator: Generator, shares: Mapping[FrameKind, float] = SHARES, crop: Range | None = CROP
    ) -> tuple[Tensor, Tensor, Tensor, FrameKind]:
        """The same before a sensor saw it: without noise that was not there, neither clipped nor rounded."""
        weights = torch.tensor([shares[kind] for kind in self.kinds])
        kind = self.kinds[int(torch.multinomial(weights, 1, generator=generator))]
        pool = self.pools[kind]
        given, lit, ir = self.cut(pool[index(len(pool), generator)], side, generator, crop)
        match kind:
            case FrameKind.DARK_PAIR:
                if chance(0.45, generator):
                    given = given.pow(Range(0.9, 1.35).draw(generator)) * Range(1.1, 0.5, log=True).draw(generator)
                given = _cast(given, 0.3, generator)
                given, lit = _in_the_night(given, lit, 0.15, generator)
            case FrameKind.DARKENED:
                power = DARKENING_GAMMA.draw(generator) if chance(0.6, generator) else 1.0
                given = (given * DARKENING_GAIN.draw(generator)).pow(power)
                given = given * max(1.0, 0.02 / max(float(given.mean()), 1e-4))  # a scene in three levels tells nothing
                given = _cast(given, 0.3, generator)
                given, lit = _in_the_night(given, lit, 0.25, generator)
            case FrameKind.NIGHT:
                lit = well_exposed(given)
                if chance(0.3, generator):
                    given = given.pow(Range(0.85, 1.25).draw(generator))
                given = _cast(given, 0.3, generator)
            case FrameKind.FOG_PAIR if chance(0.45, generator):
                given = fogged_again(given, lit, generator)
            case FrameKind.FOGGED:
                depth = scene_depth(lit, generator)
                given = _fogged(lit, (-FOG_DENSITY.draw(generator) * depth).exp(), generator)
            case FrameKind.EMPTY:
                given = lit = _empty(side, generator)
            case _:
                pass
        return given, lit.clamp(0, 1), ir, kind

    def cut(
        self, frame: Frame, side: int, generator: Generator, crop: Range | None = CROP
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same part of all images of a frame, squeezed to S x S; infrared of another scene where it has none.

        crop: its share of the frame's sides. None: about as sharp as it was recorded.
        """
        taken = taken_from(side, generator) if crop is None else None
        share = 1.0 if crop is None else crop.draw(generator)
        top, left = unit(generator), unit(generator)
        is_flipped = chance(0.5, generator)
        ir = frame.ir if frame.ir is not None else self.infrared[index(len(self.infrared), generator)]

        def cut(levels: np.ndarray) -> Tensor:
            height, width = (int(share * each) if taken is None else min(taken, each) for each in levels.shape[:2])
            y, x = int(top * (levels.shape[0] - height)), int(left * (levels.shape[1] - width))
            part = cv2.resize(levels[y : y + height, x : x + width], (side, side), interpolation=cv2.INTER_AREA)
            part = np.atleast_3d(part[:, ::-1] if is_flipped else part)
            return torch.from_numpy(np.ascontiguousarray(part)).permute(2, 0, 1).float() / 255

        return cut(frame.given), cut(frame.lit), cut(ir)


def sensed(image: Tensor, generator: Generator) -> Tensor:
    """A frame as a camera delivers it: mostly with noise of photons and of the sensor, sometimes coded as JPEG."""
    if chance(0.6, generator):
        image = poisson_noise(image.clamp(0, 1), PHOTONS.draw(generator), generator)
        sigma, correlation = NOISE_SIGMA.draw(generator), NOISE_CORRELATION.draw(generator)
        image = gaussian_noise(image, sigma, generator, correlation)
    image = quantise(image)
    return jpeg(image, round(JPEG_QUALITY.draw(generator))) if chance(0.3, generator) else image


def _cast(image: Tensor, probability: float, generator: Generator) -> Tensor:
    """Sometimes a wrong white balance."""
    if not chance(probability, generator):
        return image
    return image * (1 + CAST * torch.randn(3, 1, 1, generator=generator))


def _in_the_night(given: Tensor, lit: Tensor, probability: float, generator: Generator) -> tuple[Tensor, Tensor]:
    """Sometimes most of the frame as black as a night sky, before and after: that tells no exposure, and stays."""
    if not chance(probability, generator):
        return given, lit
    side = given.shape[-1]
    places = torch.linspace(0, 1, side)
    if chance(0.5, generator):  # all above a skyline
        skyline = Range(0.3, 0.8).draw(generator) + 0.15 * torch.randn(1, 1, 6, generator=generator)
        skyline = F.interpolate(skyline, side, mode="linear", align_corners=True)[0]
        seen = ((places.view(-1, 1) - skyline) * Range(15, 60).draw(generator)).sigmoid()
    else:  # all around a lit place
        x, y = (
            ((places - Range(0.3, 0.7).draw(generator)).abs() < Range(0.12, 0.35).draw(generator)).float()
            for _ in range(2)
        )
        seen = torch.from_numpy(cv2.GaussianBlur((y.view(-1, 1) * x).numpy(), (0, 0), Range(1, 4).draw(generator)))
    black = Range(0, 0.03).draw(generator) * (0.7 + 0.5 * torch.rand(3, 1, 1, generator=generator))
    return given * seen + (1 - seen) * black, lit * seen + (1 - seen) * black * Range(1.0, 1.6).draw(generator)


def _empty(side: int, generator: Generator) -> Tensor:
    """A covered lens, mostly, or some even grey: nearly one colour, with faint clouds."""
    is_black = chance(0.7, generator)
    level = Range(0, 0.02).draw(generator) * chance(0.8, generator) if is_black else unit(generator)
    tint = 1 + 0.15 * (torch.rand(3, 1, 1, generator=generator) - 0.5)
    clouds = F.interpolate(torch.rand(1, 3, 3, 3, generator=generator) - 0.5, side, mode="bilinear")[0]
    return (level * tint + (0.006 if is_black else 0.03) * clouds).clamp(0, 1)


def fogged_again(hazy: Tensor, clear: Tensor, generator: Generator) -> Tensor:
    """A clear frame in the fog of a hazy one of the same scene, (3, H, W), thinner or denser and of another light."""
    return _fogged(clear, transmission(hazy, clear).pow(FOG_POWER.draw(generator)), generator)


def _fogged(clear: Tensor, through: Tensor, generator: Generator) -> Tensor:
    airlight = AIRLIGHT.draw(generator) + AIRLIGHT_TINT * torch.randn(3, 1, 1, generator=generator)
    if chance(0.3, generator):  # warm as dust, or a little blue
        airlight = airlight + torch.tensor([0.05, 0.0, -0.06]).view(3, 1, 1) * Range(-1.0, 1.3).draw(generator)
    fogged = haze(clear, airlight.clamp(0, 1), through)
    if chance(0.35, generator):
        fogged = fogged.pow(DUSK_GAMMA.draw(generator)) * DUSK_GAIN.draw(generator)
    return fogged


# --- samples and loss -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LightSamples:
    """Frames averaged to cells: features (N, F), given and lit (N, 3, cells, cells), ir (N, 1, cells, cells)."""

    features: Tensor
    given: Tensor
    lit: Tensor
    ir: Tensor

    @classmethod
    def draw(
        cls, estimator: ExposureEstimator, source: FrameSource, count: int, side: int, generator: Generator
    ) -> "LightSamples":
        """`count` frames of S x S, kept in half precision. Raises ConfigError if frames are smaller than the cells."""
        if side < estimator.config.cells:
            raise ConfigError(f"frames must have at least {estimator.config.cells} px a side, got {side}")
        parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        for _ in range(count):
            given, lit, ir, _ = source.draw(side, generator)
            cells = estimator.average(given[None], ir[None])
            target = F.adaptive_avg_pool2d(lit, estimator.config.cells)
            parts.append((estimator.features(cells)[0], cells[0, :3].half(), target.half(), cells[0, 3:].half()))
        return cls(*(torch.stack(column) for column in zip(*parts, strict=True)))

    def take(self, batch: Tensor) -> "LightSamples":
        """The samples with the indices `batch`."""
        return LightSamples(self.features[batch], self.given[batch], self.lit[batch], self.ir[batch])

    def with_infrared_of(self, other: "LightSamples", where: Tensor, estimator: ExposureEstimator) -> "LightSamples":
        """These samples with the infrared of `other`, as many, at the positions `where` (B,) is true."""
        of_ir = estimator.infrared_features().to(where.device)
        features = torch.where(where[:, None] & of_ir, other.features, self.features)
        ir = torch.where(where[:, None, None, None], other.ir, self.ir)
        return LightSamples(features, self.given, self.lit, ir)

    def flipped(self) -> "LightSamples":
        """The samples mirrored, which changes no feature."""
        return LightSamples(self.features, self.given.flip(-1), self.lit.flip(-1), self.ir.flip(-1))

    def to(self, device: torch.device) -> "LightSamples":
        """The samples on a device."""
        return LightSamples(*(part.to(device) for part in (self.features, self.given, self.lit, self.ir)))


LOG_WEIGHT = 0.1
SPREAD_WEIGHT = 0.1


def lighting_loss(estimator: ExposureEstimator, samples: LightSamples) -> dict[str, Tensor]:
    """Losses of the lit cells: L1, the logarithm of each frame's squared error, and the difference in std."""
    given, lit = samples.given.float(), samples.lit.float()
    lighting = estimator.lighting(torch.cat([given, samples.ir.float()], dim=1), samples.features)
    ours = lighting.at_cells(given)
    spread = (ours.flatten(1).std(dim=1) - lit.flatten(1).std(dim=1)).abs().mean()
    return {
        "light": F.l1_loss(ours, lit),
        "log": LOG_WEIGHT * log_error(ours, lit),
        "spread": SPREAD_WEIGHT * spread,
    }
