"""A street becomes registered pictures: `make_scene` for one seed, `moving_scene` for the same street over time."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import cv2
import numpy as np
import torch
from torch import Tensor

from recofuse_core.errors import ShapeError
from recofuse_core.scenes.backdrop import Backdrop, render_backdrop
from recofuse_core.scenes.canvas import Canvas, DepthCanvas
from recofuse_core.scenes.figures import (
    add_reflections,
    paint_car,
    paint_lamp,
    paint_person,
    paint_tree,
    shine_headlights,
)
from recofuse_core.scenes.street import FAR_M, Camera, Car, Lamp, Person, Street, Tree, draw_street

MIN_SIDE = 32
FRAMES_PER_S = 25.0

_TRAFFIC_M = (-7.0, 113.0)  # cars and people leave at one end and come back at the other


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
    street = draw_street(np.random.default_rng(seed))
    camera = street.camera(height, width)
    backdrop = render_backdrop(street, camera)
    for frame in range(num_frames):
        yield _render_frame(street, camera, backdrop, frame / FRAMES_PER_S)


@dataclass(frozen=True)
class TwoViews:
    """A street from two cameras side by side: vis (3, H, W) of the one, ir (1, H, W) of the other, as in `Scene`.

    depth_m: (H, W), how far away what vis shows is. What is z metres away lies focal * across_m / z pixels further to
    the left in ir than in vis, and focal * up_m / z further down.
    """

    vis: Tensor
    ir: Tensor
    depth_m: Tensor
    focal: float


def two_views(
    seed: int, *, across_m: float, up_m: float, height: int = 480, width: int = 640, time_s: float = 0.0
) -> TwoViews:
    """The street of `seed`, its infrared seen from across_m further right and up_m higher.

    With 0 and 0 it is registered, and at time 0 it is `make_scene(seed, height, width)`.
    """
    if min(height, width) < MIN_SIDE:
        raise ShapeError(f"a scene needs sides of at least {MIN_SIDE} pixels, got {height}x{width}")
    street = draw_street(np.random.default_rng(seed))
    camera = street.camera(height, width)
    backdrop = render_backdrop(street, camera)
    depth = np.where(backdrop.facing > 0, backdrop.z, np.float32(FAR_M))
    canvas = DepthCanvas(street, camera, backdrop.light.copy(), backdrop.heat.copy(), depth)
    _paint_things(street, canvas, backdrop, time_s)
    other = replace(camera, x_m=camera.x_m + across_m, height_m=camera.height_m + up_m)
    scene = _render_frame(street, other, render_backdrop(street, other), time_s)
    return TwoViews(_develop_vis(canvas), scene.ir, torch.from_numpy(canvas.depth_m), camera.focal)


def _render_frame(street: Street, camera: Camera, backdrop: Backdrop, time_s: float) -> Scene:
    canvas = Canvas(street, camera, backdrop.light.copy(), backdrop.heat.copy())
    _paint_things(street, canvas, backdrop, time_s)
    return Scene(_develop_vis(canvas), _develop_ir(canvas))


def _paint_things(street: Street, canvas: Canvas, backdrop: Backdrop, time_s: float) -> None:
    """What stands and moves in the street, from far to near."""
    cars = [replace(car, z=_wrap(car.z + car.speed * time_s)) if car.speed else car for car in street.cars]
    people = [_walk(person, time_s) for person in street.people]
    for car in cars:
        if car.has_lights:
            shine_headlights(canvas, backdrop, car)
    add_reflections(canvas, cars)
    things: list[Car | Person | Tree | Lamp] = [*cars, *people, *street.trees, *street.lamps]
    for thing in sorted(things, key=lambda thing: -thing.z):
        match thing:
            case Car():
                paint_car(canvas, thing)
            case Person():
                paint_person(canvas, thing, time_s)
            case Tree():
                paint_tree(canvas, thing)
            case Lamp():
                paint_lamp(canvas, thing)


def _wrap(z: float) -> float:
    low, high = _TRAFFIC_M
    return low + (z - low) % (high - low)


def _walk(person: Person, time_s: float) -> Person:
    x, speed_x, edge = person.x, person.speed_x, 9.0
    if speed_x:  # to and fro: at the far pavement the walker turns round
        travelled = (x + edge + speed_x * time_s) % (4 * edge)
        x = travelled - edge if travelled < 2 * edge else 3 * edge - travelled
        speed_x = speed_x if travelled < 2 * edge else -speed_x
    z = _wrap(person.z + person.speed_z * time_s) if person.speed_z else person.z
    return replace(person, x=x, z=z, speed_x=speed_x)


# --- from light and heat to images ------------------------------------------------------------------------------------


def _develop_vis(canvas: Canvas) -> Tensor:
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


def _develop_ir(canvas: Canvas) -> Tensor:
    """A slightly soft lens and a gentle stretch; (1, H, W) in [0, 1]."""
    heat = cv2.GaussianBlur(canvas.ir, (0, 0), 0.6)
    return torch.from_numpy(((heat - 0.04) * 1.06).astype(np.float32)).clamp_(0, 1).unsqueeze(0)
