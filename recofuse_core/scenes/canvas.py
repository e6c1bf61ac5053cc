"""Polygons in metres, crowns of leaves and wet reflections, painted into light and heat at once."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from recofuse_core.scenes.patterns import sample
from recofuse_core.scenes.street import FAR_M, NEAR_M, TILE, Camera, Floats, Point, Rgb, Street

DARK: Rgb = (0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Material:
    """How a polygon answers to light and heat; texture and heat_texture are relative and absolute noise amplitudes."""

    albedo: Rgb
    heat: float
    emission: Rgb = DARK
    texture: float = 0.12
    heat_texture: float = 0.02
    opacity: float = 1.0
    fall: float = 0.25  # darkening from the top edge to the bottom edge


@dataclass
class Canvas:
    """The two pictures under the brush, light and heat, in the order from far to near."""

    street: Street
    camera: Camera
    vis: Floats  # (H, W, 3) linear light
    ir: Floats  # (H, W) heat

    def project(self, x: float, y: float, z: float) -> tuple[float, float]:
        """Pixel column and row of a point in front of the camera."""
        scale = self.camera.focal / z
        return self.camera.centre_x + (x - self.camera.x_m) * scale, self.camera.horizon + (
            self.camera.height_m - y
        ) * scale

    def light_at(self, x: float, y: float, z: float) -> Rgb:
        """Light that reaches a small thing from the sky and the lamps."""
        total = [2.2 * value for value in self.street.ambient]
        for light in self.street.lights:
            lx, ly, lz = light.position
            square = (x - lx) ** 2 + (y - ly) ** 2 + (z - lz) ** 2 + 4.0
            front = 0.75 if lz < z else 0.35  # lamps behind the thing light its far side
            total = [value + front * colour / square for value, colour in zip(total, light.colour, strict=True)]
        return total[0], total[1], total[2]

    def fill(self, points: Sequence[Point], material: Material, light: Rgb, anchor: float = 0.0) -> None:
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

    def foliage(self, x: float, y: float, z: float, radius: float, leaf: Rgb, light: Rgb, offset: float) -> None:
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
        clumps = sample(self.street.tile, grid_u * 34 + offset, grid_v * 34 + offset)
        leaves = sample(self.street.tile, grid_u * 150 + offset, grid_v * 150)
        leaves = leaves / (1 + (40 / extent) ** 2)
        body = 1 - (grid_u / 1.1) ** 2 - grid_v**2
        alpha = np.clip((body + 0.28 * clumps + 0.22 * leaves - 0.12) * 5, 0, 1)
        alpha *= np.clip(1.5 + 1.1 * leaves + 0.9 * clumps + body, 0, 1)
        tone = np.clip(0.75 + 0.42 * clumps + 0.45 * leaves - 0.25 * grid_v, 0.08, 2.2)
        tint = np.multiply(leaf, light).astype(np.float32)
        heat = 0.40 + 0.035 * clumps + 0.05 * leaves + 0.02 * grid_v
        self._blend(region, alpha.astype(np.float32), tone[..., None] * tint, heat)

    def streak(self, x: float, y: float, z: float, colour: Rgb, strength: float) -> None:
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

    def _screen_noise(self, rows: slice, columns: slice, left: int, top: int) -> Floats:
        """Noise that is fixed to the painted thing, one texel a pixel."""
        row_index = np.arange(rows.start - top, rows.stop - top) % TILE
        column_index = np.arange(columns.start - left, columns.stop - left) % TILE
        noise: Floats = self.street.tile[row_index[:, None], column_index[None, :]]
        return noise

    def _blend(self, region: tuple[slice, slice], alpha: Floats, light: Floats, heat: Floats | float) -> None:
        self.vis[region] += (light - self.vis[region]) * alpha[..., None]
        self.ir[region] += (heat - self.ir[region]) * alpha


@dataclass
class DepthCanvas(Canvas):
    """A canvas that also knows how far away what it shows is: depth_m (H, W)."""

    depth_m: Floats
    _brush_m: float = FAR_M

    def fill(self, points: Sequence[Point], material: Material, light: Rgb, anchor: float = 0.0) -> None:
        """See Canvas; a polygon counts as far away as its middle."""
        self._brush_m = max(NEAR_M, sum(point[2] for point in points) / max(len(points), 1))
        super().fill(points, material, light, anchor)

    def foliage(self, x: float, y: float, z: float, radius: float, leaf: Rgb, light: Rgb, offset: float) -> None:
        """See Canvas."""
        self._brush_m = max(NEAR_M, z)
        super().foliage(x, y, z, radius, leaf, light, offset)

    def _blend(self, region: tuple[slice, slice], alpha: Floats, light: Floats, heat: Floats | float) -> None:
        super()._blend(region, alpha, light, heat)
        self.depth_m[region][alpha > 0.5] = self._brush_m


def _clip_near(points: Sequence[Point]) -> list[Point]:
    """The part of a polygon beyond the near plane (Sutherland-Hodgman)."""
    kept: list[Point] = []
    for index, point in enumerate(points):
        before = points[index - 1]
        if (before[2] < NEAR_M) != (point[2] < NEAR_M):
            share = (NEAR_M - before[2]) / (point[2] - before[2])
            x, y = (before[axis] + share * (point[axis] - before[axis]) for axis in (0, 1))
            kept.append((x, y, NEAR_M))
        if point[2] >= NEAR_M:
            kept.append(point)
    return kept
