"""What a street is made of, in metres, and how one is drawn from a seed.

Nothing here knows pixels but the camera, and nothing paints: `backdrop` and `figures` do.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.floating[Any]]  # float32 throughout; the stubs widen it at every scalar
Rgb: TypeAlias = tuple[float, float, float]
Point: TypeAlias = tuple[float, float, float]

TILE = 512  # texels of the noise tile's side
NEAR_M, FAR_M = 0.8, 400.0
ROAD_HALF_M, WALL_M = 6.4, 10.0
LANE_M, PARKING_M = 2.6, 5.3


@dataclass(frozen=True)
class Camera:
    """A pinhole camera that looks along Z. x_m: how far it stands beside the street's axis."""

    height_m: float
    focal: float  # pixels
    centre_x: float  # pixel column of the vanishing point
    horizon: float  # pixel row of the horizon
    height: int
    width: int
    x_m: float = 0.0


@dataclass(frozen=True)
class Light:
    """A point that shines evenly in all directions."""

    position: Point
    colour: Rgb  # radiant intensity


@dataclass(frozen=True)
class Facade:
    """One wall: its colour, warmth and windows. Shares are of all windows, shops of the ground floor."""

    albedo: Rgb
    heat: float
    storey_m: float
    pitch_m: float
    window_share: float
    lit_share: float
    shop_share: float
    has_bricks: bool
    dice: Floats  # (4, 64, 64) uniform numbers: one column of chances for every window
    texture_offset: float


@dataclass(frozen=True)
class Building:
    """A box with one facade on every side that is seen."""

    near_x: float  # the wall along the street
    far_x: float
    start_z: float
    stop_z: float
    height_m: float
    facade: Facade


@dataclass(frozen=True)
class Car:
    """A car that stands or drives along Z."""

    x: float
    z: float  # nearest point
    speed: float  # m/s along Z
    paint: Rgb
    width_m: float
    height_m: float
    length_m: float
    is_warm: bool
    has_lights: bool
    shows_front: bool


@dataclass(frozen=True)
class Person:
    """A walker along the street (speed_z) or across it (speed_x)."""

    x: float
    z: float
    speed_x: float
    speed_z: float
    height_m: float
    coat: Rgb
    trousers: Rgb
    skin: Rgb
    warmth: float
    phase: float


@dataclass(frozen=True)
class Tree:
    """A trunk below a round crown."""

    x: float
    z: float
    height_m: float
    radius_m: float
    leaf: Rgb
    offset: float


@dataclass(frozen=True)
class Lamp:
    """A street lamp on a pole."""

    x: float
    z: float
    height_m: float
    reach_m: float  # signed length of the arm over the road
    colour: Rgb


@dataclass(frozen=True)
class Street:
    """All that one seed decides; the same at any size and time."""

    camera_height_m: float
    vanishing: tuple[float, float]  # of the image width and height
    ambient: Rgb
    zenith: Rgb
    glow: Rgb
    wetness: float
    centre_paint: Rgb
    crossing_z: float
    buildings: tuple[Building, ...]
    cars: tuple[Car, ...]
    people: tuple[Person, ...]
    trees: tuple[Tree, ...]
    lamps: tuple[Lamp, ...]
    tile: Floats  # (512, 512) periodic 1/f noise, zero mean, unit std
    exposure: float

    def camera(self, height: int, width: int) -> Camera:
        """The same view at any size: the focal length follows the larger of the width and 4/3 of the height."""
        focal = 0.86 * max(width, height * 4 / 3)
        across, down = self.vanishing
        return Camera(self.camera_height_m, focal, across * width, down * height, height, width)

    @cached_property
    def lights(self) -> list[Light]:
        """One light below every lamp head."""
        return [Light((lamp.x + lamp.reach_m, lamp.height_m - 0.1, lamp.z), lamp.colour) for lamp in self.lamps]


# --- drawing one from a seed ------------------------------------------------------------------------------------------


_PAINTS: tuple[Rgb, ...] = (
    (0.55, 0.56, 0.58),
    (0.75, 0.75, 0.73),
    (0.05, 0.05, 0.06),
    (0.12, 0.14, 0.17),
    (0.35, 0.05, 0.05),
    (0.06, 0.12, 0.32),
    (0.30, 0.31, 0.29),
    (0.42, 0.36, 0.24),
)
_CLOTHES: tuple[Rgb, ...] = (
    (0.05, 0.05, 0.07),
    (0.09, 0.11, 0.20),
    (0.35, 0.33, 0.30),
    (0.42, 0.08, 0.07),
    (0.60, 0.58, 0.52),
    (0.10, 0.20, 0.12),
    (0.55, 0.40, 0.10),
)
_WALLS: tuple[Rgb, ...] = (
    (0.34, 0.20, 0.15),
    (0.42, 0.38, 0.32),
    (0.30, 0.30, 0.32),
    (0.48, 0.42, 0.30),
    (0.24, 0.22, 0.21),
    (0.38, 0.30, 0.25),
)


def draw_street(rng: np.random.Generator) -> Street:
    """A street of random light, weather, buildings and traffic. The order of the draws is what a seed means."""
    dusk = float(rng.uniform(0, 1))  # 0 deep night, 1 early dusk
    sodium = rng.random() < 0.6
    lamp_rgb: Rgb = (1.0, 0.66, 0.30) if sodium else (0.95, 0.95, 0.85)
    brightness = 0.02 + 0.085 * dusk
    lamps = _draw_lamps(rng, lamp_rgb)
    return Street(
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


def _noise_tile(rng: np.random.Generator) -> Floats:
    spectrum = np.fft.rfft2(rng.standard_normal((TILE, TILE), dtype=np.float32))
    rows, columns = np.fft.fftfreq(TILE)[:, None], np.fft.rfftfreq(TILE)[None, :]
    frequency = np.hypot(rows, columns)
    frequency[0, 0] = np.inf  # zero mean
    tile = np.fft.irfft2(spectrum / frequency**0.9, s=(TILE, TILE))
    unit: Floats = np.clip(tile / tile.std(), -3, 3).astype(np.float32)
    return unit


def _draw_facade(rng: np.random.Generator) -> Facade:
    return Facade(
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


def _draw_buildings(rng: np.random.Generator) -> tuple[Building, ...]:
    buildings = []
    for side in (-1, 1):
        z = float(rng.uniform(1.0, 4.0))
        while z < 150:
            length = float(rng.uniform(9, 22))
            wall = side * (WALL_M + float(rng.choice([0.0, 0.0, 1.5, 3.0])))
            height = float(rng.uniform(7, 22)) if rng.random() < 0.85 else float(rng.uniform(25, 45))
            buildings.append(Building(wall, wall + side * 22, z, z + length, height, _draw_facade(rng)))
            z += length + (float(rng.uniform(4, 10)) if rng.random() < 0.3 else 0.0)
    for _ in range(5):  # the skyline that closes the street
        x, z = float(rng.uniform(-60, 40)), float(rng.uniform(160, 300))
        height = float(rng.uniform(14, 60))
        buildings.append(Building(x, x + float(rng.uniform(14, 40)), z, z + 20, height, _draw_facade(rng)))
    return tuple(sorted(buildings, key=lambda building: -building.start_z))


def _draw_lamps(rng: np.random.Generator, colour: Rgb) -> tuple[Lamp, ...]:
    spacing, start = float(rng.uniform(18, 26)), float(rng.uniform(7, 14))
    height, power = float(rng.uniform(5.5, 7.5)), float(rng.uniform(11, 18))
    rgb = (colour[0] * power, colour[1] * power, colour[2] * power)
    lamps = []
    for index in range(5):
        for side in (-1, 1):
            z = start + index * spacing + (spacing / 2 if side > 0 else 0.0)
            lamps.append(Lamp(side * (ROAD_HALF_M + 0.7), z, height, -side * 1.9, rgb))
    return tuple(lamps)


def _draw_trees(rng: np.random.Generator) -> tuple[Tree, ...]:
    trees = []
    for side in (-1, 1):
        if rng.random() < 0.2:
            continue
        z = float(rng.uniform(8, 16))
        while z < 95:
            size = float(rng.uniform(0.75, 1.25))
            leaf = _vary(rng, (0.095, 0.13, 0.05), 0.35)
            x = side * (ROAD_HALF_M + float(rng.uniform(1.2, 2.2)))
            trees.append(Tree(x, z, 5.2 * size, 1.9 * size, leaf, float(rng.uniform(0, 400))))
            z += float(rng.uniform(7, 20))
    return tuple(trees)


def _draw_cars(rng: np.random.Generator) -> tuple[Car, ...]:
    cars = []
    for side in (-1, 1):
        z = float(rng.uniform(9, 22))
        speed = -side * float(rng.uniform(-8, -5))  # right-hand traffic: the left lane comes towards the camera
        while z < 105:
            cars.append(_draw_car(rng, side * LANE_M, z, speed, is_moving=True))
            z += float(rng.uniform(12, 40))
        z = float(rng.uniform(6, 14))
        while z < 90:
            if rng.random() < 0.6:
                cars.append(_draw_car(rng, side * PARKING_M, z, 0.0, is_moving=False))
            z += float(rng.uniform(6, 11))
    return tuple(cars)


def _draw_car(rng: np.random.Generator, x: float, z: float, speed: float, *, is_moving: bool) -> Car:
    is_van = rng.random() < 0.25
    return Car(
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


def _draw_people(rng: np.random.Generator) -> tuple[Person, ...]:
    people = []
    for index in range(int(rng.integers(6, 13))):
        crosses = index < 2 and rng.random() < 0.6
        side = float(rng.choice([-1.0, 1.0]))
        walking = float(rng.choice([-1.0, 1.0])) * float(rng.uniform(0.9, 1.5))
        x = float(rng.uniform(-5, 5)) if crosses else side * float(rng.uniform(6.9, 9.3))
        people.append(
            Person(
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


def _pick(rng: np.random.Generator, options: Sequence[Rgb]) -> Rgb:
    return options[int(rng.integers(len(options)))]


def _vary(rng: np.random.Generator, colour: Rgb, amount: float) -> Rgb:
    shade = 1 + float(rng.uniform(-amount, amount))
    red, green, blue = (c * shade * (1 + float(rng.uniform(-amount, amount)) / 4) for c in colour)
    return red, green, blue
