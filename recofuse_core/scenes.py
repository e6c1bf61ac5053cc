"""Procedural night and dusk streets: registered, clean visible/infrared pairs for tests, demos and documentation.

One scene description, drawn from a seed, is rendered twice: light for vis, heat for ir. So the two are registered
by construction and disagree where the real modalities do: a lit sign is cold, a pedestrian in dark clothes is hot, a
lane marking is nearly invisible in ir.

How it works: a pinhole camera stands on the centre line of a straight street. The backdrop (ground, facades, sky) is
ray-cast in closed form into per-pixel albedo, emission and heat, textured in metres and filtered by the pixel's
footprint; lamps light it. Everything that stands in the street (cars, people, trees, lamps) is made of polygons in
metres, painted from far to near. A film curve maps light to [0, 1].

Not photographs: use them to see that a pipeline works, never to claim quality. World axes: X right, Y up from the
ground, Z forward, in metres; light is linear RGB, heat is in [0, 1].
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, TypeAlias

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recofuse_core.errors import ShapeError

MIN_SIDE = 32
FRAMES_PER_S = 25.0

_Floats: TypeAlias = NDArray[np.floating[Any]]  # float32 throughout; the stubs widen it at every scalar
_Rgb: TypeAlias = tuple[float, float, float]
_Point: TypeAlias = tuple[float, float, float]

_TILE = 512  # texels of the noise tile's side
_NEAR_M, _FAR_M = 0.8, 400.0
_ROAD_HALF_M, _WALL_M = 6.4, 10.0
_LANE_M, _PARKING_M = 2.6, 5.3
_TRAFFIC_M = (-7.0, 113.0)  # cars and people leave at one end and come back at the other
_DARK: _Rgb = (0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Scene:
    """A registered pair: vis (3, H, W) and ir (1, H, W), float32 in [0, 1]."""

    vis: Tensor
    ir: Tensor


def make_scene(seed: int, height: int = 480, width: int = 640) -> Scene:
    """The clean street that belongs to `seed`; raises ShapeError for a side below 32."""
    return next(moving_scene(seed, 1, height, width))


def moving_scene(seed: int, num_frames: int, height: int = 480, width: int = 640) -> Iterator[Scene]:
    """The same street over time, at 25 frames a second: cars and people move, the camera stands still.

    The first frame is `make_scene(seed, height, width)`. Raises ShapeError, at the first frame, for a side below 32.
    """
    if min(height, width) < MIN_SIDE:
        raise ShapeError(f"a scene needs sides of at least {MIN_SIDE} pixels, got {height}x{width}")
    street = _draw_street(np.random.default_rng(seed))
    camera = street.camera(height, width)
    backdrop = _render_backdrop(street, camera)
    for frame in range(num_frames):
        yield _render_frame(street, camera, backdrop, frame / FRAMES_PER_S)


# --- what a street is made of -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Camera:
    height_m: float
    focal: float  # pixels
    centre_x: float  # pixel column of the vanishing point
    horizon: float  # pixel row of the horizon
    height: int
    width: int


@dataclass(frozen=True)
class _Material:
    """How a polygon answers to light and heat; texture and heat_texture are relative and absolute noise amplitudes."""

    albedo: _Rgb
    heat: float
    emission: _Rgb = _DARK
    texture: float = 0.12
    heat_texture: float = 0.02
    opacity: float = 1.0
    fall: float = 0.25  # darkening from the top edge to the bottom edge


@dataclass(frozen=True)
class _Light:
    position: _Point
    colour: _Rgb  # radiant intensity


@dataclass(frozen=True)
class _Facade:
    albedo: _Rgb
    heat: float
    storey_m: float
    pitch_m: float
    window_share: float
    lit_share: float
    shop_share: float
    has_bricks: bool
    dice: _Floats  # (4, 64, 64) uniform numbers: one column of chances for every window
    texture_offset: float


@dataclass(frozen=True)
class _Building:
    near_x: float  # the wall along the street
    far_x: float
    start_z: float
    stop_z: float
    height_m: float
    facade: _Facade


@dataclass(frozen=True)
class _Car:
    x: float
    z: float  # nearest point
    speed: float  # m/s along Z
    paint: _Rgb
    width_m: float
    height_m: float
    length_m: float
    is_warm: bool
    has_lights: bool
    shows_front: bool


@dataclass(frozen=True)
class _Person:
    x: float
    z: float
    speed_x: float
    speed_z: float
    height_m: float
    coat: _Rgb
    trousers: _Rgb
    skin: _Rgb
    warmth: float
    phase: float


@dataclass(frozen=True)
class _Tree:
    x: float
    z: float
    height_m: float
    radius_m: float
    leaf: _Rgb
    offset: float


@dataclass(frozen=True)
class _Lamp:
    x: float
    z: float
    height_m: float
    reach_m: float  # signed length of the arm over the road
    colour: _Rgb


@dataclass(frozen=True)
class _Street:
    camera_height_m: float
    vanishing: tuple[float, float]  # of the image width and height
    ambient: _Rgb
    zenith: _Rgb
    glow: _Rgb
    wetness: float
    centre_paint: _Rgb
    crossing_z: float
    buildings: tuple[_Building, ...]
    cars: tuple[_Car, ...]
    people: tuple[_Person, ...]
    trees: tuple[_Tree, ...]
    lamps: tuple[_Lamp, ...]
    tile: _Floats  # (512, 512) periodic 1/f noise, zero mean, unit std
    exposure: float

    def camera(self, height: int, width: int) -> _Camera:
        """The same view at any size: the focal length follows the larger of the width and 4/3 of the height."""
        focal = 0.86 * max(width, height * 4 / 3)
        across, down = self.vanishing
        return _Camera(self.camera_height_m, focal, across * width, down * height, height, width)

    @cached_property
    def lights(self) -> list[_Light]:
        """One light below every lamp head."""
        return [_Light((lamp.x + lamp.reach_m, lamp.height_m - 0.1, lamp.z), lamp.colour) for lamp in self.lamps]


# --- drawing a street from a seed -------------------------------------------------------------------------------------

_PAINTS: tuple[_Rgb, ...] = (
    (0.55, 0.56, 0.58),
    (0.75, 0.75, 0.73),
    (0.05, 0.05, 0.06),
    (0.12, 0.14, 0.17),
    (0.35, 0.05, 0.05),
    (0.06, 0.12, 0.32),
    (0.30, 0.31, 0.29),
    (0.42, 0.36, 0.24),
)
_CLOTHES: tuple[_Rgb, ...] = (
    (0.05, 0.05, 0.07),
    (0.09, 0.11, 0.20),
    (0.35, 0.33, 0.30),
    (0.42, 0.08, 0.07),
    (0.60, 0.58, 0.52),
    (0.10, 0.20, 0.12),
    (0.55, 0.40, 0.10),
)
_WALLS: tuple[_Rgb, ...] = (
    (0.34, 0.20, 0.15),
    (0.42, 0.38, 0.32),
    (0.30, 0.30, 0.32),
    (0.48, 0.42, 0.30),
    (0.24, 0.22, 0.21),
    (0.38, 0.30, 0.25),
)


def _draw_street(rng: np.random.Generator) -> _Street:
    dusk = float(rng.uniform(0, 1))  # 0 deep night, 1 early dusk
    sodium = rng.random() < 0.6
    lamp_rgb: _Rgb = (1.0, 0.66, 0.30) if sodium else (0.95, 0.95, 0.85)
    brightness = 0.02 + 0.085 * dusk
    lamps = _draw_lamps(rng, lamp_rgb)
    return _Street(
        camera_height_m=float(rng.uniform(1.5, 2.6)),
        vanishing=(float(rng.uniform(0.40, 0.60)), float(rng.uniform(0.42, 0.50))),
        ambient=(brightness * 0.85, brightness * 0.95, brightness * 1.25),
        zenith=(0.006 + 0.04 * dusk, 0.008 + 0.06 * dusk, 0.018 + 0.13 * dusk),
        glow=(0.06 + 0.26 * dusk, 0.04 + 0.15 * dusk, 0.035 + 0.13 * dusk),
        wetness=float(max(0.0, rng.uniform(-0.6, 1.0))),
        centre_paint=(0.62, 0.45, 0.08) if rng.random() < 0.4 else (0.6, 0.6, 0.58),
        crossing_z=float(rng.uniform(9, 30)),
        buildings=_draw_buildings(rng),
        cars=_draw_cars(rng),
        people=_draw_people(rng),
        trees=_draw_trees(rng),
        lamps=lamps,
        tile=_noise_tile(rng),
        exposure=float(rng.uniform(2.0, 2.8)) * (1.2 - 0.35 * dusk),
    )


def _noise_tile(rng: np.random.Generator) -> _Floats:
    spectrum = np.fft.rfft2(rng.standard_normal((_TILE, _TILE), dtype=np.float32))
    rows, columns = np.fft.fftfreq(_TILE)[:, None], np.fft.rfftfreq(_TILE)[None, :]
    frequency = np.hypot(rows, columns)
    frequency[0, 0] = np.inf  # zero mean
    tile = np.fft.irfft2(spectrum / frequency**0.9, s=(_TILE, _TILE))
    unit: _Floats = np.clip(tile / tile.std(), -3, 3).astype(np.float32)
    return unit


def _draw_facade(rng: np.random.Generator) -> _Facade:
    return _Facade(
        albedo=_vary(rng, _pick(rng, _WALLS), 0.2),
        heat=float(rng.uniform(0.24, 0.50)),
        storey_m=float(rng.uniform(2.9, 3.6)),
        pitch_m=float(rng.uniform(1.9, 3.6)),
        window_share=float(rng.uniform(0.38, 0.62)),
        lit_share=float(rng.uniform(0.12, 0.5)),
        shop_share=float(rng.uniform(0.2, 0.9)),
        has_bricks=bool(rng.random() < 0.5),
        dice=rng.random((4, 64, 64), dtype=np.float32),
        texture_offset=float(rng.uniform(0, 50)),
    )


def _draw_buildings(rng: np.random.Generator) -> tuple[_Building, ...]:
    buildings = []
    for side in (-1, 1):
        z = float(rng.uniform(1.0, 4.0))
        while z < 150:
            length = float(rng.uniform(9, 22))
            wall = side * (_WALL_M + float(rng.choice([0.0, 0.0, 1.5, 3.0])))
            height = float(rng.uniform(7, 22)) if rng.random() < 0.85 else float(rng.uniform(25, 45))
            buildings.append(_Building(wall, wall + side * 22, z, z + length, height, _draw_facade(rng)))
            z += length + (float(rng.uniform(4, 10)) if rng.random() < 0.3 else 0.0)
    for _ in range(5):  # the skyline that closes the street
        x, z = float(rng.uniform(-60, 40)), float(rng.uniform(160, 300))
        height = float(rng.uniform(14, 60))
        buildings.append(_Building(x, x + float(rng.uniform(14, 40)), z, z + 20, height, _draw_facade(rng)))
    return tuple(sorted(buildings, key=lambda building: -building.start_z))


def _draw_lamps(rng: np.random.Generator, colour: _Rgb) -> tuple[_Lamp, ...]:
    spacing, start = float(rng.uniform(18, 26)), float(rng.uniform(7, 14))
    height, power = float(rng.uniform(5.5, 7.5)), float(rng.uniform(11, 18))
    rgb = (colour[0] * power, colour[1] * power, colour[2] * power)
    lamps = []
    for index in range(5):
        for side in (-1, 1):
            z = start + index * spacing + (spacing / 2 if side > 0 else 0.0)
            lamps.append(_Lamp(side * (_ROAD_HALF_M + 0.7), z, height, -side * 1.9, rgb))
    return tuple(lamps)


def _draw_trees(rng: np.random.Generator) -> tuple[_Tree, ...]:
    trees = []
    for side in (-1, 1):
        if rng.random() < 0.2:
            continue
        z = float(rng.uniform(8, 16))
        while z < 95:
            size = float(rng.uniform(0.75, 1.25))
            leaf = _vary(rng, (0.095, 0.13, 0.05), 0.35)
            x = side * (_ROAD_HALF_M + float(rng.uniform(1.2, 2.2)))
            trees.append(_Tree(x, z, 5.2 * size, 1.9 * size, leaf, float(rng.uniform(0, 400))))
            z += float(rng.uniform(7, 20))
    return tuple(trees)


def _draw_cars(rng: np.random.Generator) -> tuple[_Car, ...]:
    cars = []
    for side in (-1, 1):
        z = float(rng.uniform(9, 22))
        speed = -side * float(rng.uniform(-8, -5))  # right-hand traffic: the left lane comes towards the camera
        while z < 105:
            cars.append(_draw_car(rng, side * _LANE_M, z, speed, is_moving=True))
            z += float(rng.uniform(12, 40))
        z = float(rng.uniform(6, 14))
        while z < 90:
            if rng.random() < 0.6:
                cars.append(_draw_car(rng, side * _PARKING_M, z, 0.0, is_moving=False))
            z += float(rng.uniform(6, 11))
    return tuple(cars)


def _draw_car(rng: np.random.Generator, x: float, z: float, speed: float, *, is_moving: bool) -> _Car:
    is_van = rng.random() < 0.25
    return _Car(
        x=x + float(rng.uniform(-0.2, 0.2)),
        z=z,
        speed=speed,
        paint=_vary(rng, _pick(rng, _PAINTS), 0.15),
        width_m=float(rng.uniform(1.72, 1.9)),
        height_m=float(rng.uniform(1.8, 2.05)) if is_van else float(rng.uniform(1.4, 1.58)),
        length_m=float(rng.uniform(4.0, 4.8)),
        is_warm=is_moving or bool(rng.random() < 0.3),
        has_lights=is_moving,
        shows_front=x < 0,
    )


def _draw_people(rng: np.random.Generator) -> tuple[_Person, ...]:
    people = []
    for index in range(int(rng.integers(6, 13))):
        crosses = index < 2 and rng.random() < 0.6
        side = float(rng.choice([-1.0, 1.0]))
        walking = float(rng.choice([-1.0, 1.0])) * float(rng.uniform(0.9, 1.5))
        x = float(rng.uniform(-5, 5)) if crosses else side * float(rng.uniform(6.9, 9.3))
        people.append(
            _Person(
                x=x,
                z=float(rng.uniform(8, 18)) if index < 3 else float(rng.uniform(11, 60)),
                speed_x=walking if crosses else 0.0,
                speed_z=0.0 if crosses else walking,
                height_m=float(rng.uniform(1.56, 1.88)),
                coat=_vary(rng, _pick(rng, _CLOTHES), 0.2),
                trousers=_vary(rng, _pick(rng, _CLOTHES[:3]), 0.2),
                skin=_pick(rng, ((0.45, 0.30, 0.22), (0.30, 0.19, 0.13), (0.52, 0.38, 0.30))),
                warmth=float(rng.uniform(0.76, 0.92)),
                phase=float(rng.uniform(0, 2 * math.pi)),
            )
        )
    return tuple(people)


def _pick(rng: np.random.Generator, options: Sequence[_Rgb]) -> _Rgb:
    return options[int(rng.integers(len(options)))]


def _vary(rng: np.random.Generator, colour: _Rgb, amount: float) -> _Rgb:
    shade = 1 + float(rng.uniform(-amount, amount))
    red, green, blue = (c * shade * (1 + float(rng.uniform(-amount, amount)) / 4) for c in colour)
    return red, green, blue


# --- the backdrop: sky, ground and facades, ray-cast ------------------------------------------------------------------


@dataclass
class _Backdrop:
    """Per-pixel surface: position and albedo for light that moves, and what static light and heat already gave."""

    x: _Floats  # (H, W)
    y: _Floats
    z: _Floats
    facing: NDArray[np.uint8]  # 0 sky, 1 ground, 2 wall along the street, 3 wall across it
    albedo: _Floats  # (H, W, 3)
    light: _Floats  # (H, W, 3)
    heat: _Floats  # (H, W)


def _render_backdrop(street: _Street, camera: _Camera) -> _Backdrop:
    shape = (camera.height, camera.width)
    backdrop = _Backdrop(
        x=np.zeros(shape, np.float32),
        y=np.zeros(shape, np.float32),
        z=np.full(shape, _FAR_M, np.float32),
        facing=np.zeros(shape, np.uint8),
        albedo=np.zeros((*shape, 3), np.float32),
        light=np.zeros((*shape, 3), np.float32),
        heat=np.zeros(shape, np.float32),
    )
    _cast_sky(street, camera, backdrop)
    _cast_ground(street, camera, backdrop)
    for building in street.buildings:
        _cast_building(street, camera, backdrop, building)
    irradiance = _irradiance(street, backdrop)
    backdrop.light += backdrop.albedo * irradiance
    _add_air(street, backdrop)
    return backdrop


def _cast_sky(street: _Street, camera: _Camera, backdrop: _Backdrop) -> None:
    num_rows = min(camera.height, max(1, math.ceil(camera.horizon) + 1))
    rows = np.arange(num_rows, dtype=np.float32)
    climb = np.clip((camera.horizon - rows) / (0.5 * camera.focal), 0, 1)[:, None, None]  # 0 horizon, 1 zenith
    blend = np.exp(-3.2 * climb)
    gradient = np.asarray(street.zenith, np.float32) * (1 - blend) + np.asarray(street.glow, np.float32) * blend
    # Clouds lie on a plane overhead, so they flatten towards the horizon.
    depth = 1 / (climb[..., 0] + 0.06)
    across = (np.arange(camera.width, dtype=np.float32)[None, :] - camera.centre_x) / camera.focal * depth
    clouds = _sample(street.tile, across * 60, np.broadcast_to(depth * 60, across.shape))
    fine = _sample(street.tile, across * 190, np.broadcast_to(depth * 190, across.shape))
    cover = np.clip(0.35 * clouds + 0.12 * fine, -0.6, 0.9)
    backdrop.light[:num_rows] = gradient * (1 + 0.45 * cover[..., None])
    backdrop.heat[:num_rows] = 0.07 + 0.14 * blend[..., 0] + 0.05 * cover


def _cast_ground(street: _Street, camera: _Camera, backdrop: _Backdrop) -> None:
    first = max(0, math.floor(camera.horizon) + 1)
    if first >= camera.height:
        return
    rows = np.arange(first, camera.height, dtype=np.float32)[:, None]
    columns = np.arange(camera.width, dtype=np.float32)[None, :]
    z = np.minimum(camera.height_m * camera.focal / (rows - camera.horizon + 0.5), _FAR_M).astype(np.float32)
    x = ((columns - camera.centre_x) * z / camera.focal).astype(np.float32)
    z = np.broadcast_to(z, x.shape)
    across, along = z / camera.focal, z * z / (camera.height_m * camera.focal)  # footprint of a pixel, metres

    sharp = 1 / (1 + (24 * along) ** 2)
    coarse = _sample(street.tile, x * 9, z * 9) / (1 + (4 * along) ** 2)
    fine = _sample(street.tile, x * 70 + 100, z * 70) * sharp
    grit = _sample(street.tile, x * 230, z * 230 + 50) / (1 + (90 * along) ** 2)
    patches = _sample(street.tile, x * 2.3 + 200, z * 1.1)

    off_road = np.abs(x) - _ROAD_HALF_M
    pavement = _smooth_edge(off_road, across)
    kerb = _smooth_edge(off_road + 0.02, across) * _smooth_edge(0.28 - off_road, across)
    slab = 1 - (1 - _pulse(x / 0.6, 0.94, across / 0.6) * _pulse(z / 0.6, 0.94, along / 0.6)) * 0.35
    lawn = _smooth_edge(np.abs(x) - (_WALL_M + 0.4), across)

    tone = 0.10 * (1 + 0.12 * coarse + 0.30 * fine + 0.34 * grit + 0.10 * patches)
    tracks = np.exp(-(((np.abs(np.abs(x) - _LANE_M) - 0.75) / 0.28) ** 2))
    tone *= 1 - 0.14 * tracks
    seam = _sample(street.tile, x * 5 + 33, z * 5 + 90)
    cracks = np.exp(-((seam / 0.05) ** 2)) * (patches > 0.2) / (1 + (5 * along) ** 2)
    tone *= 1 - 0.5 * cracks
    asphalt = tone[..., None] * np.asarray((1.0, 0.99, 0.97), np.float32)
    stone = (0.20 * slab * (1 + 0.14 * coarse + 0.20 * fine + 0.12 * grit))[..., None] * np.asarray(
        (1.0, 0.96, 0.90), np.float32
    )
    grass = (0.10 * (1 + 0.3 * coarse + 0.5 * fine))[..., None] * np.asarray((0.6, 1.0, 0.4), np.float32)

    albedo = asphalt + (stone - asphalt) * pavement[..., None]
    albedo += (grass - albedo) * lawn[..., None]
    albedo += (0.26 * (1 + 0.15 * fine)[..., None] - albedo) * (0.8 * kerb)[..., None]
    wear = np.clip(0.82 + 0.3 * fine - 0.25 * coarse + 0.15 * grit, 0.15, 1)
    for paint, cover in _markings(street, x, z, across, along):
        albedo += (np.asarray(paint, np.float32) - albedo) * (cover * wear)[..., None]

    heat = 0.375 + 0.014 * coarse + 0.024 * fine + 0.026 * grit + 0.035 * patches + 0.05 * tracks - 0.05 * cracks
    heat += pavement * (-0.045 + 0.03 * (slab - 1) - 0.03 * patches) + kerb * 0.05 - lawn * 0.06
    for _, cover in _markings(street, x, z, across, along):
        heat -= 0.035 * cover * wear  # paint emits a little less than asphalt

    puddle = street.wetness * np.clip(patches * 0.9 + 0.25, 0, 1) * (1 - pavement)
    albedo *= (1 - 0.45 * puddle)[..., None]
    mirrored = np.asarray(street.glow, np.float32) * 0.22
    region = np.s_[first:]
    backdrop.x[region], backdrop.z[region], backdrop.y[region] = x, z, 0.0
    backdrop.facing[region] = 1
    backdrop.albedo[region] = np.maximum(albedo, 0.004)
    backdrop.light[region] = puddle[..., None] * mirrored
    backdrop.heat[region] = heat - 0.06 * puddle


def _markings(
    street: _Street, x: _Floats, z: _Floats, across: _Floats, along: _Floats
) -> Iterator[tuple[_Rgb, _Floats]]:
    """The painted lines: colour and coverage, (rows, W) in [0, 1]."""
    crossing = _smooth_edge(z - street.crossing_z, along) * _smooth_edge(street.crossing_z + 3.2 - z, along)
    clear = 1 - _smooth_edge(z - street.crossing_z + 2.2, along) * _smooth_edge(street.crossing_z + 5 - z, along)
    white: _Rgb = (0.62, 0.62, 0.60)
    dashes = _pulse(z / 6.0, 0.5, along / 6.0)
    yield street.centre_paint, _stripe(x, 0.0, 0.14, across) * dashes * clear
    for side in (-1, 1):
        yield white, _stripe(x, side * 4.15, 0.12, across) * clear
    yield white, _pulse(x / 0.9, 0.5, across / 0.9) * crossing * _smooth_edge(_ROAD_HALF_M - 0.4 - np.abs(x), across)
    yield white, _stripe(z, street.crossing_z - 1.6, 0.35, along) * _stripe(x, 2.1, 4.0, across)


def _cast_building(street: _Street, camera: _Camera, backdrop: _Backdrop, building: _Building) -> None:
    """The wall along the street (depth depends on the column alone) and the wall across it (depth is constant)."""
    columns = np.arange(camera.width, dtype=np.float32)
    low, high = sorted((building.near_x, building.far_x))
    start_z = max(building.start_z, _NEAR_M)

    x_here = (columns - camera.centre_x) * start_z / camera.focal
    hit = np.flatnonzero((x_here >= low) & (x_here <= high))
    if hit.size:
        span = slice(int(hit[0]), int(hit[-1]) + 1)
        depth = np.full(hit.size, start_z, np.float32)
        footprint = depth / camera.focal
        _paint_wall(street, camera, backdrop, building, span, depth, x_here[span], footprint, facing=3)

    with np.errstate(divide="ignore"):
        depth = building.near_x * camera.focal / (columns - camera.centre_x)
    hit = np.flatnonzero((depth >= start_z) & (depth <= building.stop_z))
    if hit.size and low * high > 0:  # the skyline straddles the axis and shows no side
        span = slice(int(hit[0]), int(hit[-1]) + 1)
        depth = depth[span].astype(np.float32)
        footprint = depth**2 / (abs(building.near_x) * camera.focal)
        _paint_wall(street, camera, backdrop, building, span, depth, depth, footprint, facing=2)


def _paint_wall(
    street: _Street,
    camera: _Camera,
    backdrop: _Backdrop,
    building: _Building,
    span: slice,
    depth: _Floats,
    run: _Floats,
    run_footprint: _Floats,
    facing: Literal[2, 3],
) -> None:
    """One wall over the columns `span`; depth, run (metres along the wall) and its footprint are per column."""
    facade, nearest = building.facade, float(depth.min())
    top = camera.horizon + (camera.height_m - building.height_m) * camera.focal / nearest
    bottom = camera.horizon + camera.height_m * camera.focal / nearest
    rows = slice(max(0, math.floor(top)), min(camera.height, math.ceil(bottom) + 1))
    if rows.start >= rows.stop:
        return
    offsets = np.arange(rows.start, rows.stop, dtype=np.float32)[:, None] - camera.horizon
    v = camera.height_m - offsets * (depth / camera.focal)[None, :]  # metres above the ground
    u = np.broadcast_to(run[None, :], v.shape)
    fu = np.broadcast_to(np.maximum(run_footprint, 1e-4)[None, :], v.shape)
    fv = np.broadcast_to((depth / camera.focal)[None, :], v.shape)
    inside = (v >= 0) & (v <= building.height_m)

    albedo, emission, heat = _facade_surface(facade, building.height_m, u, v, fu, fv, street.tile)
    region = (rows, span)
    backdrop.albedo[region][inside] = albedo[inside]
    backdrop.light[region][inside] = emission[inside]
    backdrop.heat[region][inside] = heat[inside]
    backdrop.y[region][inside] = v[inside]
    z = np.broadcast_to(depth[None, :], v.shape)
    x = u if facing == 3 else np.full(v.shape, building.near_x, np.float32)
    backdrop.z[region][inside] = z[inside]
    backdrop.x[region][inside] = x[inside]
    backdrop.facing[region][inside] = facing


def _facade_surface(
    facade: _Facade, height_m: float, u: _Floats, v: _Floats, fu: _Floats, fv: _Floats, tile: _Floats
) -> tuple[_Floats, _Floats, _Floats]:
    """Albedo (h, w, 3), emission (h, w, 3) and heat (h, w) of a wall at u metres along and v metres up."""
    shift = facade.texture_offset
    coarse = _sample(tile, (u + shift) * 11, v * 11) / (1 + (5 * fu) ** 2)
    fine = _sample(tile, (u + shift) * 75, v * 75) / (1 + (35 * fu) ** 2)
    stain = _sample(tile, (u + shift) * 6, v * 1.3 + shift)  # rain runs down
    tone = 1 + 0.12 * coarse + 0.26 * fine + 0.12 * stain
    heat = facade.heat + 0.016 * coarse + 0.022 * fine + 0.024 * stain
    if facade.has_bricks:
        joints = _pulse(v / 0.25, 0.82, fv / 0.25) * _pulse(u / 0.5, 0.9, fu / 0.5)
        tone *= 0.72 + 0.28 * joints
        heat -= 0.012 * (1 - joints)
    storey, cell = v / facade.storey_m, u / facade.pitch_m
    ledge = 1 - _pulse(storey - 0.03, 0.95, fv / facade.storey_m)
    roof = _smooth_edge(v - (height_m - 0.5), fv)
    tone *= 1 + 0.5 * ledge + 0.35 * roof
    heat += 0.025 * ledge + 0.03 * roof

    # One throw of dice for every window; where windows shrink below a pixel the throw fades to its mean.
    is_shop = storey < 1
    column = np.floor(np.where(is_shop, cell / 2, cell)).astype(np.int64) & 63
    row = np.floor(storey).astype(np.int64) & 63
    lit_dice, tone_dice, hue_dice, blind_dice = facade.dice[:, row, column]
    share = np.where(is_shop, np.float32(facade.shop_share), np.float32(facade.lit_share))
    far = np.clip(np.maximum(fu / facade.pitch_m, fv / facade.storey_m) * 1.6 - 0.25, 0, 1)
    lit = (lit_dice < share) * (1 - far) + share * far
    bright = (0.25 + 0.75 * tone_dice) * (1 - far) + 0.6 * far

    part_u, part_v = facade.window_share, 0.52
    upper = _pulse(cell - 0.22, part_u, fu / facade.pitch_m) * _pulse(storey - 0.28, part_v, fv / facade.storey_m)
    panes = _pulse(cell / part_u * 2 + 0.1, 0.9, fu / facade.pitch_m / part_u * 2)
    shop = _pulse(cell / 2 - 0.06, 0.86, fu / facade.pitch_m / 2) * _pulse(storey - 0.08, 0.62, fv / facade.storey_m)
    glass = np.where(is_shop, shop, upper * (0.35 + 0.65 * panes))
    glass *= 1 - roof
    sill = _pulse(cell - 0.18, part_u + 0.08, fu / facade.pitch_m) * _pulse(storey - 0.22, 0.06, fv / facade.storey_m)
    lintel = _pulse(cell - 0.18, part_u + 0.08, fu / facade.pitch_m) * _pulse(storey - 0.80, 0.05, fv / facade.storey_m)
    trim = (sill + np.float32(0.6) * lintel) * ~is_shop
    tone = tone * (1 + 0.45 * trim)
    heat = heat + 0.035 * trim

    # Behind the glass: a ceiling lamp, things standing about, blinds half down.
    height_in = np.mod(storey - 0.28, 1.0) / part_v
    is_drawn = (height_in > 1.1 - 0.8 * blind_dice) & ~is_shop
    blind = 1 - np.float32(0.6) * is_drawn
    clutter = np.clip(1 + 0.32 * coarse + 0.40 * fine, 0.15, 1.9)
    hue = np.stack([np.ones_like(u), 0.62 + 0.30 * hue_dice, 0.22 + 0.62 * hue_dice**2], axis=-1)
    power = glass * lit * bright * blind * clutter * np.where(is_shop, np.float32(0.62), np.float32(0.40))
    emission = hue * power[..., None]

    sign_row = _pulse(storey - 0.75, 0.17, fv / facade.storey_m) * is_shop
    sign = (
        sign_row * _pulse(cell / 2 - 0.12, 0.7, fu / facade.pitch_m / 2) * (tone_dice < 0.55 * facade.shop_share + 0.2)
    )
    letters = np.clip(0.55 + 0.9 * np.sign(_sample(tile, u * 60 + shift, v * 35)) * (1 - far), 0.12, 1)
    angle = 2 * math.pi * hue_dice
    paint = np.stack(
        [0.55 + 0.45 * np.cos(angle), 0.45 + 0.4 * np.cos(angle - 2.1), 0.45 + 0.45 * np.cos(angle + 2.1)], -1
    )
    emission += paint * (sign * letters * 0.75)[..., None]

    wall = np.asarray(facade.albedo, np.float32) * np.maximum(tone, 0.1)[..., None]
    pane = np.asarray((0.05, 0.06, 0.08), np.float32) * (1 + 0.5 * stain[..., None])
    albedo = wall + (pane - wall) * glass[..., None]
    heat = heat + glass * (0.10 * lit * bright - 0.075 + 0.03 * stain) + 0.04 * sign
    return albedo.astype(np.float32), np.maximum(emission, 0).astype(np.float32), heat.astype(np.float32)


def _irradiance(street: _Street, backdrop: _Backdrop) -> _Floats:
    """Sky light plus every lamp, with Lambert's cosine and the inverse square; (H, W, 3)."""
    total = np.empty((*backdrop.z.shape, 3), np.float32)
    total[:] = street.ambient
    level = np.empty_like(backdrop.z)
    wall_along, wall_across = backdrop.facing == 2, backdrop.facing == 3
    for light in street.lights:
        dx, dy, dz = (
            backdrop.x - np.float32(light.position[0]),
            np.float32(light.position[1]) - backdrop.y,
            backdrop.z - np.float32(light.position[2]),
        )
        square = dx * dx + dy * dy + dz * dz + 0.6
        towards = np.maximum(dy, 0)
        np.copyto(towards, np.abs(dx) * (dy > -1.5), where=wall_along)
        np.copyto(towards, np.maximum(dz, 0) * (dy > -1.5), where=wall_across)
        np.divide(towards, square * np.sqrt(square), out=level)
        for channel in range(3):
            total[..., channel] += level * np.float32(light.colour[channel])
    return total


def _add_air(street: _Street, backdrop: _Backdrop) -> None:
    """Thin air light: distance pulls light to the horizon's glow and heat to the air's."""
    solid = backdrop.facing > 0
    veil = np.where(solid, 1 - np.exp(-backdrop.z / 320), 0).astype(np.float32)
    backdrop.light += (np.asarray(street.glow, np.float32) * 0.8 - backdrop.light) * veil[..., None]
    backdrop.albedo *= (1 - veil)[..., None]
    backdrop.heat += (0.24 - backdrop.heat) * (0.7 * veil)


# --- what stands in the street, painted from far to near --------------------------------------------------------------


@dataclass
class _Canvas:
    street: _Street
    camera: _Camera
    vis: _Floats  # (H, W, 3) linear light
    ir: _Floats  # (H, W) heat

    def project(self, x: float, y: float, z: float) -> tuple[float, float]:
        """Pixel column and row of a point in front of the camera."""
        scale = self.camera.focal / z
        return self.camera.centre_x + x * scale, self.camera.horizon + (self.camera.height_m - y) * scale

    def light_at(self, x: float, y: float, z: float) -> _Rgb:
        """Light that reaches a small thing from the sky and the lamps."""
        total = [2.2 * value for value in self.street.ambient]
        for light in self.street.lights:
            lx, ly, lz = light.position
            square = (x - lx) ** 2 + (y - ly) ** 2 + (z - lz) ** 2 + 4.0
            front = 0.75 if lz < z else 0.35  # lamps behind the thing light its far side
            total = [value + front * colour / square for value, colour in zip(total, light.colour, strict=True)]
        return total[0], total[1], total[2]

    def fill(self, points: Sequence[_Point], material: _Material, light: _Rgb, anchor: float = 0.0) -> None:
        """Paint one polygon, given by points in metres; anchor shifts its texture and must not change over time."""
        visible = _clip_near(points)
        if len(visible) < 3:
            return
        corners = np.array([self.project(*point) for point in visible])
        region = self.region(corners[:, 0].min(), corners[:, 0].max(), corners[:, 1].min(), corners[:, 1].max())
        if region is None:
            return
        rows, columns = region
        mask = np.zeros((rows.stop - rows.start, columns.stop - columns.start), np.uint8)
        fixed = np.clip((corners - (columns.start, rows.start)) * 16, -(2**24), 2**24)
        cv2.fillPoly(mask, [np.round(fixed).astype(np.int32)], 255, lineType=cv2.LINE_AA, shift=4)
        alpha = mask.astype(np.float32) * np.float32(material.opacity / 255)
        left, top = int(corners[0, 0] + 37 * anchor), int(corners[0, 1] + 91 * anchor)
        noise = self._screen_noise(rows, columns, left, top)
        span = max(float(corners[:, 1].max() - corners[:, 1].min()), 1.0)
        down = ((np.arange(rows.start, rows.stop) - corners[:, 1].min()) / span).clip(0, 1).astype(np.float32)[:, None]
        shade = (1 + material.texture * noise) * (1 + material.fall * (0.5 - down))
        colour = np.multiply(material.albedo, light).astype(np.float32)
        self._blend(
            region,
            alpha,
            shade[..., None] * colour + np.asarray(material.emission, np.float32),
            material.heat + material.heat_texture * noise - 0.1 * material.fall * material.heat * (down - 0.5),
        )

    def foliage(self, x: float, y: float, z: float, radius: float, leaf: _Rgb, light: _Rgb, offset: float) -> None:
        """Paint a ragged crown of leaves around a point; radius in metres."""
        if z < 2.0:
            return
        column, row = self.project(x, y, z)
        extent = radius * self.camera.focal / z
        region = self.region(column - 1.4 * extent, column + 1.4 * extent, row - 1.2 * extent, row + 1.2 * extent)
        if region is None:
            return
        rows, columns = region
        v = (np.arange(rows.start, rows.stop, dtype=np.float32)[:, None] - row) / extent
        u = (np.arange(columns.start, columns.stop, dtype=np.float32)[None, :] - column) / extent
        grid_u, grid_v = np.broadcast_to(u, (v.size, u.size)), np.broadcast_to(v, (v.size, u.size))
        clumps = _sample(self.street.tile, grid_u * 34 + offset, grid_v * 34 + offset)
        leaves = _sample(self.street.tile, grid_u * 150 + offset, grid_v * 150)
        leaves = leaves / (1 + (40 / extent) ** 2)
        body = 1 - (grid_u / 1.1) ** 2 - grid_v**2
        alpha = np.clip((body + 0.28 * clumps + 0.22 * leaves - 0.12) * 5, 0, 1)
        alpha *= np.clip(1.5 + 1.1 * leaves + 0.9 * clumps + body, 0, 1)
        tone = np.clip(0.75 + 0.42 * clumps + 0.45 * leaves - 0.25 * grid_v, 0.08, 2.2)
        tint = np.multiply(leaf, light).astype(np.float32)
        heat = 0.40 + 0.035 * clumps + 0.05 * leaves + 0.02 * grid_v
        self._blend(region, alpha.astype(np.float32), tone[..., None] * tint, heat)

    def streak(self, x: float, y: float, z: float, colour: _Rgb, strength: float) -> None:
        """Add the long reflection that a light at height y leaves on a wet road."""
        if strength <= 0 or z < 2.0:
            return
        column, row = self.project(x, -y, z)
        _, foot = self.project(x, 0.0, z)
        sigma_x, sigma_y = 0.16 * self.camera.focal / z + 0.8, 0.30 * (row - foot) + 2.0
        region = self.region(column - 3 * sigma_x, column + 3 * sigma_x, foot, row + 2.5 * sigma_y)
        if region is None:
            return
        rows, columns = region
        v = (np.arange(rows.start, rows.stop, dtype=np.float32)[:, None] - row) / sigma_y
        u = (np.arange(columns.start, columns.stop, dtype=np.float32)[None, :] - column) / sigma_x
        ripple = 1 + 0.35 * self._screen_noise(rows, columns, int(column), int(row))
        shape = np.exp(-0.5 * (u * u + v * v)) * np.clip(ripple, 0.1, 2) * strength
        self.vis[rows, columns] += shape[..., None].astype(np.float32) * np.asarray(colour, np.float32)

    def region(self, left: float, right: float, top: float, bottom: float) -> tuple[slice, slice] | None:
        """The rows and columns of a box in pixels, cut to the image; None if nothing is left."""
        columns = slice(max(0, math.floor(left) - 1), min(self.camera.width, math.ceil(right) + 2))
        rows = slice(max(0, math.floor(top) - 1), min(self.camera.height, math.ceil(bottom) + 2))
        return (rows, columns) if rows.start < rows.stop and columns.start < columns.stop else None

    def _screen_noise(self, rows: slice, columns: slice, left: int, top: int) -> _Floats:
        """Noise that is fixed to the painted thing, one texel a pixel."""
        row_index = np.arange(rows.start - top, rows.stop - top) % _TILE
        column_index = np.arange(columns.start - left, columns.stop - left) % _TILE
        noise: _Floats = self.street.tile[row_index[:, None], column_index[None, :]]
        return noise

    def _blend(self, region: tuple[slice, slice], alpha: _Floats, light: _Floats, heat: _Floats | float) -> None:
        self.vis[region] += (light - self.vis[region]) * alpha[..., None]
        self.ir[region] += (heat - self.ir[region]) * alpha


def _render_frame(street: _Street, camera: _Camera, backdrop: _Backdrop, time_s: float) -> Scene:
    canvas = _Canvas(street, camera, backdrop.light.copy(), backdrop.heat.copy())
    cars = [replace(car, z=_wrap(car.z + car.speed * time_s)) if car.speed else car for car in street.cars]
    people = [_walk(person, time_s) for person in street.people]
    for car in cars:
        if car.has_lights:
            _shine_headlights(canvas, backdrop, car)
    _add_reflections(canvas, cars)
    things: list[_Car | _Person | _Tree | _Lamp] = [*cars, *people, *street.trees, *street.lamps]
    for thing in sorted(things, key=lambda thing: -thing.z):
        match thing:
            case _Car():
                _paint_car(canvas, thing)
            case _Person():
                _paint_person(canvas, thing, time_s)
            case _Tree():
                _paint_tree(canvas, thing)
            case _Lamp():
                _paint_lamp(canvas, thing)
    return Scene(_develop_vis(canvas), _develop_ir(canvas))


def _wrap(z: float) -> float:
    low, high = _TRAFFIC_M
    return low + (z - low) % (high - low)


def _walk(person: _Person, time_s: float) -> _Person:
    x, speed_x, edge = person.x, person.speed_x, 9.0
    if speed_x:  # to and fro: at the far pavement the walker turns round
        travelled = (x + edge + speed_x * time_s) % (4 * edge)
        x = travelled - edge if travelled < 2 * edge else 3 * edge - travelled
        speed_x = speed_x if travelled < 2 * edge else -speed_x
    z = _wrap(person.z + person.speed_z * time_s) if person.speed_z else person.z
    return replace(person, x=x, z=z, speed_x=speed_x)


def _shine_headlights(canvas: _Canvas, backdrop: _Backdrop, car: _Car) -> None:
    """Add the beam on the road before a car; one that drives away also reddens the road behind it."""
    white: _Rgb = (2.2, 2.1, 1.9)
    if car.shows_front:
        _shine(canvas, backdrop, car.x, car.z, -30.0, white)
    else:
        _shine(canvas, backdrop, car.x, car.z + car.length_m, 30.0, white)
        _shine(canvas, backdrop, car.x, car.z, -8.0, (0.8, 0.0, 0.0))


def _shine(canvas: _Canvas, backdrop: _Backdrop, x: float, z: float, reach: float, colour: _Rgb) -> None:
    """Light the ground from (x, z) over a signed distance along Z, widening and fading on the way."""
    low, high = max(min(z, z + reach), _NEAR_M), max(z, z + reach)
    if high <= 2 * _NEAR_M:
        return
    half = 2.2 * (0.8 + 0.16 * abs(reach))
    corners = [canvas.project(x + side * half, 0.0, end) for side in (-1, 1) for end in (low, high)]
    columns, rows = [corner[0] for corner in corners], [corner[1] for corner in corners]
    region = canvas.region(min(columns), max(columns), min(rows), max(rows))
    if region is None:
        return
    ahead = np.maximum((backdrop.z[region] - np.float32(z)) * np.float32(math.copysign(1, reach)), 0)
    across = (backdrop.x[region] - np.float32(x)) / (np.float32(0.8) + np.float32(0.16) * ahead)
    level = np.exp(-across * across - ahead * np.float32(3.6 / abs(reach))) * np.minimum(ahead / np.float32(3), 1)
    level *= backdrop.facing[region] == 1
    canvas.vis[region] += backdrop.albedo[region] * level[..., None] * np.asarray(colour, np.float32)


def _add_reflections(canvas: _Canvas, cars: Sequence[_Car]) -> None:
    wetness = canvas.street.wetness
    for light in canvas.street.lights:
        x, y, z = light.position
        peak = max(light.colour)
        colour = (light.colour[0] / peak, light.colour[1] / peak, light.colour[2] / peak)
        canvas.streak(x, y, z, colour, 0.16 * wetness)
    for car in cars:
        if not car.has_lights:
            continue
        colour = (1.0, 0.95, 0.85) if car.shows_front else (0.8, 0.05, 0.03)
        for side in (-0.36, 0.36):
            canvas.streak(car.x + side * car.width_m, 0.7, car.z, colour, (0.1 + 0.5 * wetness))


def _paint_car(canvas: _Canvas, car: _Car) -> None:
    """A car as a lofted box: side, roof, screens, bonnet or boot, face, wheels and lights."""
    if car.z + car.length_m < _NEAR_M:
        return
    half, top, length = car.width_m / 2, car.height_m, car.length_m
    light = canvas.light_at(car.x, 1.0, car.z)
    lit: _Rgb = (light[0] * 1.15, light[1] * 1.15, light[2] * 1.15)
    anchor = car.width_m * 40
    heat = 0.33 if car.is_warm else 0.27
    engine = 0.60 if car.is_warm else heat
    waist, sill = 0.58 * top, 0.24
    nose = 0.95 if car.shows_front else 0.45  # from the face to the foot of the screen
    screen = nose + (0.75 if car.shows_front else 0.5)  # to its upper edge
    tail = length - 0.5

    paint = _Material(car.paint, heat, texture=0.05, heat_texture=0.012, fall=0.5)
    hood = replace(paint, heat=engine if car.shows_front else heat + 0.03, fall=0.1)
    glass = _Material((0.035, 0.04, 0.05), 0.22, texture=0.25, heat_texture=0.02, fall=0.8)
    tyre = _Material((0.03, 0.03, 0.03), 0.62 if car.is_warm else 0.34, texture=0.2, fall=0.3)
    shadow = _Material((0.01, 0.01, 0.01), 0.40 if car.is_warm else 0.33, opacity=0.75, fall=0.0)

    def at(x: float, y: float, z: float) -> _Point:
        return car.x + x * half, y, car.z + z

    canvas.fill([at(-1.1, 0, -0.2), at(1.1, 0, -0.2), at(1.1, 0, length), at(-1.1, 0, length)], shadow, lit, anchor)
    side = -1.0 if car.x > 0 else 1.0  # the side that faces the camera's axis
    lower = [(0.0, waist * 0.92), (0.0, sill), (length, sill), (length, waist * 0.95), (tail, waist)]
    upper = [(tail - 0.6, top), (screen, top)]  # the sides lean in above the waist
    body = [at(side, y, z) for z, y in lower] + [at(0.8 * side, y, z) for z, y in upper] + [at(side, waist, nose)]
    canvas.fill(body, replace(paint, fall=0.8), (light[0] * 0.8, light[1] * 0.8, light[2] * 0.8), anchor)
    panes = (1.0, nose + 0.25, waist), (0.83, screen + 0.12, 0.94 * top), (0.83, tail - 0.7, 0.95 * top)
    window = [at(side * x * 1.005, y, z) for x, z, y in (*panes, (1.0, tail - 0.25, waist))]
    canvas.fill(window, glass, lit, anchor)
    for axle in (0.75, length - 0.85):
        wheel = [at(side * 1.01, 0.32 + 0.32 * s, axle + 0.34 * c) for c, s in _CIRCLE]
        rim = [at(side * 1.02, 0.32 + 0.19 * s, axle + 0.20 * c) for c, s in _CIRCLE]
        canvas.fill(wheel, tyre, lit, anchor)
        canvas.fill(rim, _Material((0.16, 0.16, 0.17), tyre.heat + 0.05, texture=0.2), lit, anchor)
    roof = [at(x, top, z) for x, z in ((-0.8, screen), (0.8, screen), (0.8, tail - 0.6), (-0.8, tail - 0.6))]
    canvas.fill(roof, paint, lit, anchor)
    screens = [at(-1, waist, nose), at(1, waist, nose), at(0.8, top, screen), at(-0.8, top, screen)]
    canvas.fill(screens, paint, lit, anchor)
    inner = [at(-0.84, waist + 0.05, nose), at(0.84, waist + 0.05, nose), at(0.7, top - 0.06, screen)]
    canvas.fill([*inner, at(-0.7, top - 0.06, screen)], glass, lit, anchor)
    for seat in (-0.42, 0.42):  # headrests, or the people in front of them
        heads = [at(seat + 0.17 * c, waist + 0.22 + 0.15 * s, nose + 0.3) for c, s in _CIRCLE]
        canvas.fill(heads, _Material((0.02, 0.02, 0.02), 0.34 if car.has_lights else 0.24, opacity=0.7), lit, anchor)
    deck = [at(-1, waist * 0.92, 0), at(1, waist * 0.92, 0), at(1, waist, nose), at(-1, waist, nose)]
    canvas.fill(deck, hood, (lit[0] * 1.2, lit[1] * 1.2, lit[2] * 1.2), anchor)

    for wheel_x in (-0.8, 0.8):
        foot = [at(wheel_x + 0.17 * dx, y, 0.25) for dx, y in ((-1, 0.0), (1, 0.0), (1, 0.45), (-1, 0.45))]
        canvas.fill(foot, tyre, lit, anchor)
    bulge = (0.0, sill), (0.98, sill), (1.0, 0.45), (0.98, waist * 0.92)
    face = [at(x, y, 0) for x, y in bulge[1:]] + [at(-x, y, 0) for x, y in reversed(bulge[1:])]
    canvas.fill(face, replace(paint, heat=heat + 0.04, fall=0.9), light, anchor)
    bumper = [at(x, y, -0.02) for x, y in ((-0.97, sill), (0.97, sill), (0.98, 0.42), (-0.98, 0.42))]
    canvas.fill(bumper, _Material((0.05, 0.05, 0.055), heat + 0.02, fall=0.5), lit, anchor)
    if car.shows_front:
        grille = [at(x, y, -0.03) for x, y in ((-0.5, 0.44), (0.5, 0.44), (0.55, 0.62), (-0.55, 0.62))]
        canvas.fill(grille, _Material((0.02, 0.02, 0.02), engine + 0.14, texture=0.6, heat_texture=0.06), lit, anchor)
    else:
        pipe = [at(0.55 + 0.09 * c, sill + 0.04 + 0.05 * s, -0.04) for c, s in _CIRCLE]
        canvas.fill(pipe, _Material((0.1, 0.1, 0.1), 0.95 if car.is_warm else 0.3), lit, anchor)
    plate = [at(x, y, -0.05) for x, y in ((-0.28, 0.44), (0.28, 0.44), (0.28, 0.55), (-0.28, 0.55))]
    canvas.fill(plate, _Material((0.5, 0.5, 0.46), heat, texture=0.4), lit, anchor)
    _paint_car_lights(canvas, car, waist, lit)


def _paint_car_lights(canvas: _Canvas, car: _Car, waist: float, light: _Rgb) -> None:
    if car.shows_front:
        lamp = _Material((0.5, 0.5, 0.5), 0.40, texture=0.1)
        if car.has_lights:
            lamp = replace(lamp, emission=(6.5, 6.0, 5.0), heat=0.92)
    else:
        lamp = _Material((0.30, 0.02, 0.02), 0.36, texture=0.15)
        if car.has_lights:
            lamp = replace(lamp, emission=(2.6, 0.10, 0.06), heat=0.55)
    half = car.width_m / 2
    for side in (-1.0, 1.0):
        corners = ((0.94, waist * 0.70), (0.62, waist * 0.72), (0.66, waist * 0.88), (0.96, waist * 0.89))
        points = [(car.x + side * x * half, y, car.z - 0.05) for x, y in corners]
        canvas.fill(points, lamp, light)


_CIRCLE = tuple((math.cos(a), math.sin(a)) for a in np.linspace(0, 2 * math.pi, 18, endpoint=False))


def _paint_person(canvas: _Canvas, person: _Person, time_s: float) -> None:
    """A walker seen from the front or back, or from the side while crossing: legs, coat, arms, head, hair."""
    if person.z < _NEAR_M:
        return
    size, warmth = person.height_m / 1.75, person.warmth
    light = canvas.light_at(person.x, 1.0, person.z)
    anchor = person.phase * 60
    stride = math.sin(person.phase + 5.5 * time_s)
    swing = 0.30 * stride if person.speed_x else 0.05 * stride
    lift = 0.0 if person.speed_x else 0.06 * stride
    lean = math.copysign(0.04, person.speed_x) if person.speed_x else 0.0

    def at(x: float, y: float) -> _Point:
        return person.x + x * size, y * size, person.z

    coat = _Material(person.coat, 0.90 * warmth, texture=0.10, heat_texture=0.03, fall=0.4)
    legs = _Material(person.trousers, 0.80 * warmth, texture=0.10, heat_texture=0.025, fall=0.5)
    skin = _Material(person.skin, min(1.0, 1.12 * warmth), texture=0.12, heat_texture=0.03)
    hair = _Material((0.03, 0.025, 0.02), 0.85 * warmth, texture=0.3)
    shoe = _Material((0.03, 0.03, 0.03), 0.60 * warmth, texture=0.2)
    ground = [(person.x + 0.32 * c, 0.0, person.z + 0.28 * s) for c, s in _CIRCLE]
    canvas.fill(ground, _Material((0.01, 0.01, 0.01), 0.37, opacity=0.5, fall=0.0), light, anchor)

    narrow = 0.75 if person.speed_x else 1.0
    for side in (-1.0, 1.0):
        foot, hip, step = side * (0.09 * narrow + swing), side * 0.09 * narrow, max(0.0, side * lift)
        knee = (foot + hip) / 2 + 0.02
        limb = [at(hip - 0.085, 0.88), at(hip + 0.085, 0.88), at(knee + 0.07, 0.48), at(foot + 0.055, 0.07 + step)]
        canvas.fill([*limb, at(foot - 0.055, 0.07 + step), at(knee - 0.07, 0.48)], legs, light, anchor + side)
        sole = [
            at(foot - 0.06, step),
            at(foot + 0.08, step),
            at(foot + 0.06, 0.09 + step),
            at(foot - 0.06, 0.09 + step),
        ]
        canvas.fill(sole, shoe, light, anchor)
    arm_swing = 0.8 * swing
    for side in (-1.0, 1.0):
        shoulder, hand = side * 0.20 * narrow + lean, side * (0.27 * narrow - arm_swing) + lean
        sleeve = [at(shoulder - 0.05, 1.40), at(shoulder + 0.05, 1.40), at(hand + 0.05, 0.86), at(hand - 0.05, 0.86)]
        canvas.fill(sleeve, replace(coat, fall=0.7), light, anchor + 3 * side)
        palm = [at(hand + 0.045 * c, 0.82 + 0.06 * s) for c, s in _CIRCLE]
        canvas.fill(palm, skin, light, anchor)
    chest = ((0.10, 1.49), (0.21, 1.43), (0.20, 1.15), (0.17, 1.0), (0.20, 0.80))
    trunk = [at(x * narrow + lean, y) for x, y in chest] + [at(-x * narrow + lean, y) for x, y in reversed(chest)]
    canvas.fill(trunk, coat, light, anchor)
    canvas.fill([at(lean + 0.05 * c, 1.50 + 0.06 * s) for c, s in _CIRCLE], skin, light, anchor)
    canvas.fill([at(lean + 0.090 * c, 1.635 + 0.118 * s) for c, s in _CIRCLE], hair, light, anchor)
    if person.speed_z <= 0:  # coming: the face shows
        canvas.fill([at(lean + 0.072 * c, 1.605 + 0.088 * s) for c, s in _CIRCLE], skin, light, anchor)


def _paint_tree(canvas: _Canvas, tree: _Tree) -> None:
    light = canvas.light_at(tree.x, 0.7 * tree.height_m, tree.z)
    bark = _Material((0.09, 0.07, 0.05), 0.36, texture=0.18, heat_texture=0.03, fall=-0.3)
    girth, crown = 0.05 * tree.radius_m + 0.06, tree.height_m - tree.radius_m
    trunk = ((-1.3, 0.0), (1.3, 0.0), (0.7, crown), (-0.7, crown))
    canvas.fill([(tree.x + girth * x, y, tree.z) for x, y in trunk], bark, light, tree.offset)
    for lean in (-0.55, 0.5, 0.05):
        bough = ((-0.4, 0.75 * crown), (0.4, 0.78 * crown))
        tip = (tree.x + lean * tree.radius_m, crown + 0.5 * tree.radius_m, tree.z)
        canvas.fill([*((tree.x + girth * x, y, tree.z) for x, y in bough), tip], bark, light, tree.offset)
    for dx, dy, share, shade in ((0.35, 0.25, 0.8, 0.7), (-0.4, 0.1, 0.75, 0.85), (0.0, 0.0, 1.0, 1.0)):
        leaf = (tree.leaf[0] * shade, tree.leaf[1] * shade, tree.leaf[2] * shade)
        centre = tree.x + dx * tree.radius_m, crown + (0.45 + dy) * tree.radius_m
        canvas.foliage(*centre, tree.z, share * tree.radius_m, leaf, light, tree.offset + 90 * dx)


def _paint_lamp(canvas: _Canvas, lamp: _Lamp) -> None:
    light = canvas.light_at(lamp.x, 2.0, lamp.z)
    metal = _Material((0.12, 0.13, 0.13), 0.27, texture=0.15, fall=0.2)
    pole = ((-0.09, 0.0), (0.09, 0.0), (0.05, lamp.height_m), (-0.05, lamp.height_m))
    canvas.fill([(lamp.x + x, y, lamp.z) for x, y in pole], metal, light)
    end, head = lamp.x + lamp.reach_m, lamp.height_m + 0.25
    arm = ((lamp.x, lamp.height_m - 0.1), (lamp.x, lamp.height_m), (end, head), (end, head - 0.07))
    canvas.fill([(x, y, lamp.z) for x, y in arm], metal, light)
    peak = max(lamp.colour)
    glow = (lamp.colour[0] / peak * 9, lamp.colour[1] / peak * 9, lamp.colour[2] / peak * 9)
    housing = ((-0.42, 0.02), (0.42, 0.02), (0.30, 0.14), (-0.30, 0.14))
    canvas.fill([(end + x, head + y, lamp.z) for x, y in housing], replace(metal, heat=0.55), light)
    bowl = ((-0.36, 0.03), (0.36, 0.03), (0.26, -0.11), (-0.26, -0.11))
    canvas.fill([(end + x, head + y, lamp.z) for x, y in bowl], replace(metal, heat=0.88, emission=glow), light)


# --- from light and heat to images ------------------------------------------------------------------------------------


def _develop_vis(canvas: _Canvas) -> Tensor:
    """Lens bloom around bright lights, then an exponential film curve and display gamma; (3, H, W) in [0, 1]."""
    vis, camera = canvas.vis, canvas.camera
    small = (max(8, camera.width // 4), max(8, camera.height // 4))
    bright = cv2.resize(np.clip(vis - 0.45, 0, 8), small, interpolation=cv2.INTER_AREA)
    unit = camera.focal / 4 / 100
    bloom = 0.30 * cv2.GaussianBlur(bright, (0, 0), 0.7 * unit) + 0.16 * cv2.GaussianBlur(bright, (0, 0), 4.0 * unit)
    vis = vis + cv2.resize(bloom, (camera.width, camera.height), interpolation=cv2.INTER_LINEAR)
    vis = cv2.GaussianBlur(vis, (0, 0), 0.5)  # the lens; also softens the stairs of ray-cast edges
    exposed = 1 - np.exp(-canvas.street.exposure * np.maximum(vis, 0))
    image = np.power(exposed, np.float32(1 / 2.2)).astype(np.float32)
    image += np.float32(0.45) * (image * image * (3 - 2 * image) - image)  # a mild S-curve keeps the night black
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).clamp_(0, 1)


def _develop_ir(canvas: _Canvas) -> Tensor:
    """A slightly soft lens and a gentle stretch; (1, H, W) in [0, 1]."""
    heat = cv2.GaussianBlur(canvas.ir, (0, 0), 0.6)
    return torch.from_numpy(((heat - 0.04) * 1.06).astype(np.float32)).clamp_(0, 1).unsqueeze(0)


# --- small parts ------------------------------------------------------------------------------------------------------


def _sample(tile: _Floats, u: _Floats, v: _Floats) -> _Floats:
    """The periodic noise tile at texel coordinates u, v (h, w), bilinear."""
    # The wrap is done here: OpenCV's own loses precision on coordinates far outside the tile.
    map_u, map_v = np.mod(u, np.float32(_TILE)), np.mod(v, np.float32(_TILE))
    drawn = cv2.remap(
        tile,
        map_u.astype(np.float32, copy=False),
        map_v.astype(np.float32, copy=False),
        cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_WRAP,
    )
    return drawn.astype(np.float32, copy=False)


def _pulse(u: _Floats, share: float, footprint: _Floats) -> _Floats:
    """Coverage of a pixel by a square wave of period 1, on over [0, share): the wave's exact box filter."""
    half = np.maximum(footprint, 1e-4) / 2

    def integral(position: _Floats) -> _Floats:
        whole = np.floor(position)
        covered: _Floats = whole * np.float32(share) + np.minimum(position - whole, np.float32(share))
        return covered

    return (integral(u + half) - integral(u - half)) / (2 * half)


def _smooth_edge(distance: _Floats, footprint: _Floats) -> _Floats:
    """Coverage of a pixel by the half plane distance > 0."""
    return np.clip(distance / np.maximum(footprint, 1e-4) + 0.5, 0, 1)


def _stripe(u: _Floats, centre: float, width: float, footprint: _Floats) -> _Floats:
    """Coverage of a pixel by one line of the given width; thin lines fade instead of breaking up."""
    half = np.maximum(footprint, 1e-4) / 2
    low, high = np.maximum(u - half, centre - width / 2), np.minimum(u + half, centre + width / 2)
    covered: _Floats = np.maximum(high - low, 0) / (2 * half)
    return covered


def _clip_near(points: Sequence[_Point]) -> list[_Point]:
    """The part of a polygon beyond the near plane (Sutherland-Hodgman)."""
    kept: list[_Point] = []
    for index, point in enumerate(points):
        before = points[index - 1]
        if (before[2] < _NEAR_M) != (point[2] < _NEAR_M):
            share = (_NEAR_M - before[2]) / (point[2] - before[2])
            x, y = (before[axis] + share * (point[axis] - before[axis]) for axis in (0, 1))
            kept.append((x, y, _NEAR_M))
        if point[2] >= _NEAR_M:
            kept.append(point)
    return kept
