"""What stands in the street: cars, people, trees and lamps, made of polygons, and the light that they throw on it."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from recofuse_core.scenes.backdrop import Backdrop
from recofuse_core.scenes.canvas import Canvas, Material
from recofuse_core.scenes.street import NEAR_M, Car, Lamp, Person, Point, Rgb, Tree

_CIRCLE = tuple((math.cos(a), math.sin(a)) for a in np.linspace(0, 2 * math.pi, 18, endpoint=False))


def shine_headlights(canvas: Canvas, backdrop: Backdrop, car: Car) -> None:
    """Add the beam on the road before a car; one that drives away also reddens the road behind it."""
    white: Rgb = (2.2, 2.1, 1.9)
    if car.shows_front:
        _shine(canvas, backdrop, car.x, car.z, -30.0, white)
    else:
        _shine(canvas, backdrop, car.x, car.z + car.length_m, 30.0, white)
        _shine(canvas, backdrop, car.x, car.z, -8.0, (0.8, 0.0, 0.0))


def _shine(canvas: Canvas, backdrop: Backdrop, x: float, z: float, reach: float, colour: Rgb) -> None:
    """Light the ground from (x, z) over a signed distance along Z, widening and fading on the way."""
    low, high = max(min(z, z + reach), NEAR_M), max(z, z + reach)
    if high <= 2 * NEAR_M:
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


def add_reflections(canvas: Canvas, cars: Sequence[Car]) -> None:
    """Add the streaks that lamps and the lights of cars leave on a wet road."""
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


def paint_car(canvas: Canvas, car: Car) -> None:
    """A car as a lofted box: side, roof, screens, bonnet or boot, face, wheels and lights."""
    if car.z + car.length_m < NEAR_M:
        return
    half, top, length = car.width_m / 2, car.height_m, car.length_m
    light = canvas.light_at(car.x, 1.0, car.z)
    lit: Rgb = (light[0] * 1.15, light[1] * 1.15, light[2] * 1.15)
    anchor = car.width_m * 40
    heat = 0.33 if car.is_warm else 0.27
    engine = 0.60 if car.is_warm else heat
    waist, sill = 0.58 * top, 0.24
    nose = 0.95 if car.shows_front else 0.45  # from the face to the foot of the screen
    screen = nose + (0.75 if car.shows_front else 0.5)  # to its upper edge
    tail = length - 0.5

    paint = Material(car.paint, heat, texture=0.05, heat_texture=0.012, fall=0.5)
    hood = replace(paint, heat=engine if car.shows_front else heat + 0.03, fall=0.1)
    glass = Material((0.035, 0.04, 0.05), 0.22, texture=0.25, heat_texture=0.02, fall=0.8)
    tyre = Material((0.03, 0.03, 0.03), 0.62 if car.is_warm else 0.34, texture=0.2, fall=0.3)
    shadow = Material((0.01, 0.01, 0.01), 0.40 if car.is_warm else 0.33, opacity=0.75, fall=0.0)

    def at(x: float, y: float, z: float) -> Point:
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
        canvas.fill(rim, Material((0.16, 0.16, 0.17), tyre.heat + 0.05, texture=0.2), lit, anchor)
    roof = [at(x, top, z) for x, z in ((-0.8, screen), (0.8, screen), (0.8, tail - 0.6), (-0.8, tail - 0.6))]
    canvas.fill(roof, paint, lit, anchor)
    screens = [at(-1, waist, nose), at(1, waist, nose), at(0.8, top, screen), at(-0.8, top, screen)]
    canvas.fill(screens, paint, lit, anchor)
    inner = [at(-0.84, waist + 0.05, nose), at(0.84, waist + 0.05, nose), at(0.7, top - 0.06, screen)]
    canvas.fill([*inner, at(-0.7, top - 0.06, screen)], glass, lit, anchor)
    for seat in (-0.42, 0.42):  # headrests, or the people in front of them
        heads = [at(seat + 0.17 * c, waist + 0.22 + 0.15 * s, nose + 0.3) for c, s in _CIRCLE]
        canvas.fill(heads, Material((0.02, 0.02, 0.02), 0.34 if car.has_lights else 0.24, opacity=0.7), lit, anchor)
    deck = [at(-1, waist * 0.92, 0), at(1, waist * 0.92, 0), at(1, waist, nose), at(-1, waist, nose)]
    canvas.fill(deck, hood, (lit[0] * 1.2, lit[1] * 1.2, lit[2] * 1.2), anchor)

    for wheel_x in (-0.8, 0.8):
        foot = [at(wheel_x + 0.17 * dx, y, 0.25) for dx, y in ((-1, 0.0), (1, 0.0), (1, 0.45), (-1, 0.45))]
        canvas.fill(foot, tyre, lit, anchor)
    bulge = (0.0, sill), (0.98, sill), (1.0, 0.45), (0.98, waist * 0.92)
    face = [at(x, y, 0) for x, y in bulge[1:]] + [at(-x, y, 0) for x, y in reversed(bulge[1:])]
    canvas.fill(face, replace(paint, heat=heat + 0.04, fall=0.9), light, anchor)
    bumper = [at(x, y, -0.02) for x, y in ((-0.97, sill), (0.97, sill), (0.98, 0.42), (-0.98, 0.42))]
    canvas.fill(bumper, Material((0.05, 0.05, 0.055), heat + 0.02, fall=0.5), lit, anchor)
    if car.shows_front:
        grille = [at(x, y, -0.03) for x, y in ((-0.5, 0.44), (0.5, 0.44), (0.55, 0.62), (-0.55, 0.62))]
        canvas.fill(grille, Material((0.02, 0.02, 0.02), engine + 0.14, texture=0.6, heat_texture=0.06), lit, anchor)
    else:
        pipe = [at(0.55 + 0.09 * c, sill + 0.04 + 0.05 * s, -0.04) for c, s in _CIRCLE]
        canvas.fill(pipe, Material((0.1, 0.1, 0.1), 0.95 if car.is_warm else 0.3), lit, anchor)
    plate = [at(x, y, -0.05) for x, y in ((-0.28, 0.44), (0.28, 0.44), (0.28, 0.55), (-0.28, 0.55))]
    canvas.fill(plate, Material((0.5, 0.5, 0.46), heat, texture=0.4), lit, anchor)
    _paint_car_lights(canvas, car, waist, lit)


def _paint_car_lights(canvas: Canvas, car: Car, waist: float, light: Rgb) -> None:
    if car.shows_front:
        lamp = Material((0.5, 0.5, 0.5), 0.40, texture=0.1)
        if car.has_lights:
            lamp = replace(lamp, emission=(6.5, 6.0, 5.0), heat=0.92)
    else:
        lamp = Material((0.30, 0.02, 0.02), 0.36, texture=0.15)
        if car.has_lights:
            lamp = replace(lamp, emission=(2.6, 0.10, 0.06), heat=0.55)
    half = car.width_m / 2
    for side in (-1.0, 1.0):
        corners = ((0.94, waist * 0.70), (0.62, waist * 0.72), (0.66, waist * 0.88), (0.96, waist * 0.89))
        points = [(car.x + side * x * half, y, car.z - 0.05) for x, y in corners]
        canvas.fill(points, lamp, light)


def paint_person(canvas: Canvas, person: Person, time_s: float) -> None:
    """A walker seen from the front or back, or from the side while crossing: legs, coat, arms, head, hair."""
    if person.z < NEAR_M:
        return
    size, warmth = person.height_m / 1.75, person.warmth
    light = canvas.light_at(person.x, 1.0, person.z)
    anchor = person.phase * 60
    stride = math.sin(person.phase + 5.5 * time_s)
    swing = 0.30 * stride if person.speed_x else 0.05 * stride
    lift = 0.0 if person.speed_x else 0.06 * stride
    lean = math.copysign(0.04, person.speed_x) if person.speed_x else 0.0

    def at(x: float, y: float) -> Point:
        return person.x + x * size, y * size, person.z

    coat = Material(person.coat, 0.90 * warmth, texture=0.10, heat_texture=0.03, fall=0.4)
    legs = Material(person.trousers, 0.80 * warmth, texture=0.10, heat_texture=0.025, fall=0.5)
    skin = Material(person.skin, min(1.0, 1.12 * warmth), texture=0.12, heat_texture=0.03)
    hair = Material((0.03, 0.025, 0.02), 0.85 * warmth, texture=0.3)
    shoe = Material((0.03, 0.03, 0.03), 0.60 * warmth, texture=0.2)
    ground = [(person.x + 0.32 * c, 0.0, person.z + 0.28 * s) for c, s in _CIRCLE]
    canvas.fill(ground, Material((0.01, 0.01, 0.01), 0.37, opacity=0.5, fall=0.0), light, anchor)

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


def paint_tree(canvas: Canvas, tree: Tree) -> None:
    """A trunk, three boughs and a crown of three parts."""
    light = canvas.light_at(tree.x, 0.7 * tree.height_m, tree.z)
    bark = Material((0.09, 0.07, 0.05), 0.36, texture=0.18, heat_texture=0.03, fall=-0.3)
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


def paint_lamp(canvas: Canvas, lamp: Lamp) -> None:
    """A pole, an arm over the road, and the head with its bright bowl."""
    light = canvas.light_at(lamp.x, 2.0, lamp.z)
    metal = Material((0.12, 0.13, 0.13), 0.27, texture=0.15, fall=0.2)
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
