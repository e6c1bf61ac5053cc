"""The backdrop: sky, ground and facades, ray-cast in closed form and lit by the lamps."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from recofuse_core.scenes.facades import facade_surface
from recofuse_core.scenes.patterns import pulse, sample, smooth_edge, stripe
from recofuse_core.scenes.street import (
    FAR_M,
    LANE_M,
    NEAR_M,
    ROAD_HALF_M,
    WALL_M,
    Building,
    Camera,
    Floats,
    Rgb,
    Street,
)


@dataclass
class Backdrop:
    """Per-pixel surface: position and albedo for light that moves, and what static light and heat already gave."""

    x: Floats  # (H, W)
    y: Floats
    z: Floats
    facing: NDArray[np.uint8]  # 0 sky, 1 ground, 2 wall along the street, 3 wall across it
    albedo: Floats  # (H, W, 3)
    light: Floats  # (H, W, 3)
    heat: Floats  # (H, W)


def render_backdrop(street: Street, camera: Camera) -> Backdrop:
    """The street without what stands in it, under the lamps; the same in all frames."""
    shape = (camera.height, camera.width)
    backdrop = Backdrop(
        x=np.zeros(shape, np.float32),
        y=np.zeros(shape, np.float32),
        z=np.full(shape, FAR_M, np.float32),
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


def _cast_sky(street: Street, camera: Camera, backdrop: Backdrop) -> None:
    num_rows = min(camera.height, max(1, math.ceil(camera.horizon) + 1))
    rows = np.arange(num_rows, dtype=np.float32)
    climb = np.clip((camera.horizon - rows) / (0.5 * camera.focal), 0, 1)[:, None, None]  # 0 horizon, 1 zenith
    blend = np.exp(-3.2 * climb)
    gradient = np.asarray(street.zenith, np.float32) * (1 - blend) + np.asarray(street.glow, np.float32) * blend
    # Clouds lie on a plane overhead, so they flatten towards the horizon.
    depth = 1 / (climb[..., 0] + 0.06)
    across = (np.arange(camera.width, dtype=np.float32)[None, :] - camera.centre_x) / camera.focal * depth
    clouds = sample(street.tile, across * 60, np.broadcast_to(depth * 60, across.shape))
    fine = sample(street.tile, across * 190, np.broadcast_to(depth * 190, across.shape))
    cover = np.clip(0.35 * clouds + 0.12 * fine, -0.6, 0.9)
    backdrop.light[:num_rows] = gradient * (1 + 0.45 * cover[..., None])
    backdrop.heat[:num_rows] = 0.07 + 0.14 * blend[..., 0] + 0.05 * cover


def _cast_ground(street: Street, camera: Camera, backdrop: Backdrop) -> None:
    first = max(0, math.floor(camera.horizon) + 1)
    if first >= camera.height:
        return
    rows = np.arange(first, camera.height, dtype=np.float32)[:, None]
    columns = np.arange(camera.width, dtype=np.float32)[None, :]
    z = np.minimum(camera.height_m * camera.focal / (rows - camera.horizon + 0.5), FAR_M).astype(np.float32)
    x = ((columns - camera.centre_x) * z / camera.focal + np.float32(camera.x_m)).astype(np.float32)
    z = np.broadcast_to(z, x.shape)
    across, along = z / camera.focal, z * z / (camera.height_m * camera.focal)  # footprint of a pixel, metres

    sharp = 1 / (1 + (24 * along) ** 2)
    coarse = sample(street.tile, x * 9, z * 9) / (1 + (4 * along) ** 2)
    fine = sample(street.tile, x * 70 + 100, z * 70) * sharp
    grit = sample(street.tile, x * 230, z * 230 + 50) / (1 + (90 * along) ** 2)
    patches = sample(street.tile, x * 2.3 + 200, z * 1.1)

    off_road = np.abs(x) - ROAD_HALF_M
    pavement = smooth_edge(off_road, across)
    kerb = smooth_edge(off_road + 0.02, across) * smooth_edge(0.28 - off_road, across)
    slab = 1 - (1 - pulse(x / 0.6, 0.94, across / 0.6) * pulse(z / 0.6, 0.94, along / 0.6)) * 0.35
    lawn = smooth_edge(np.abs(x) - (WALL_M + 0.4), across)

    tone = 0.10 * (1 + 0.12 * coarse + 0.30 * fine + 0.34 * grit + 0.10 * patches)
    tracks = np.exp(-(((np.abs(np.abs(x) - LANE_M) - 0.75) / 0.28) ** 2))
    tone *= 1 - 0.14 * tracks
    seam = sample(street.tile, x * 5 + 33, z * 5 + 90)
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


def _markings(street: Street, x: Floats, z: Floats, across: Floats, along: Floats) -> Iterator[tuple[Rgb, Floats]]:
    """The painted lines: colour and coverage, (rows, W) in [0, 1]."""
    crossing = smooth_edge(z - street.crossing_z, along) * smooth_edge(street.crossing_z + 3.2 - z, along)
    clear = 1 - smooth_edge(z - street.crossing_z + 2.2, along) * smooth_edge(street.crossing_z + 5 - z, along)
    white: Rgb = (0.62, 0.62, 0.60)
    dashes = pulse(z / 6.0, 0.5, along / 6.0)
    yield street.centre_paint, stripe(x, 0.0, 0.14, across) * dashes * clear
    for side in (-1, 1):
        yield white, stripe(x, side * 4.15, 0.12, across) * clear
    yield white, pulse(x / 0.9, 0.5, across / 0.9) * crossing * smooth_edge(ROAD_HALF_M - 0.4 - np.abs(x), across)
    yield white, stripe(z, street.crossing_z - 1.6, 0.35, along) * stripe(x, 2.1, 4.0, across)


def _cast_building(street: Street, camera: Camera, backdrop: Backdrop, building: Building) -> None:
    """The wall along the street (depth depends on the column alone) and the wall across it (depth is constant)."""
    columns = np.arange(camera.width, dtype=np.float32)
    low, high = sorted((building.near_x, building.far_x))
    start_z = max(building.start_z, NEAR_M)

    x_here = (columns - camera.centre_x) * start_z / camera.focal + np.float32(camera.x_m)
    hit = np.flatnonzero((x_here >= low) & (x_here <= high))
    if hit.size:
        span = slice(int(hit[0]), int(hit[-1]) + 1)
        depth = np.full(hit.size, start_z, np.float32)
        footprint = depth / camera.focal
        _paint_wall(street, camera, backdrop, building, span, depth, x_here[span], footprint, facing=3)

    with np.errstate(divide="ignore"):
        depth = (building.near_x - camera.x_m) * camera.focal / (columns - camera.centre_x)
    hit = np.flatnonzero((depth >= start_z) & (depth <= building.stop_z))
    if hit.size and low * high > 0:  # the skyline straddles the axis and shows no side
        span = slice(int(hit[0]), int(hit[-1]) + 1)
        depth = depth[span].astype(np.float32)
        footprint = depth**2 / (abs(building.near_x) * camera.focal)
        _paint_wall(street, camera, backdrop, building, span, depth, depth, footprint, facing=2)


def _paint_wall(
    street: Street,
    camera: Camera,
    backdrop: Backdrop,
    building: Building,
    span: slice,
    depth: Floats,
    run: Floats,
    run_footprint: Floats,
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

    albedo, emission, heat = facade_surface(facade, building.height_m, u, v, fu, fv, street.tile)
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


def _irradiance(street: Street, backdrop: Backdrop) -> Floats:
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


def _add_air(street: Street, backdrop: Backdrop) -> None:
    """Thin air light: distance pulls light to the horizon's glow and heat to the air's."""
    solid = backdrop.facing > 0
    veil = np.where(solid, 1 - np.exp(-backdrop.z / 320), 0).astype(np.float32)
    backdrop.light += (np.asarray(street.glow, np.float32) * 0.8 - backdrop.light) * veil[..., None]
    backdrop.albedo *= (1 - veil)[..., None]
    backdrop.heat += (0.24 - backdrop.heat) * (0.7 * veil)
