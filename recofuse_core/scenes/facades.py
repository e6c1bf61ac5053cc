"""What a facade looks like, in light and in heat: bricks, storeys, windows and what is behind them, shops and signs."""

import math

import numpy as np

from recofuse_core.scenes.patterns import pulse, sample, smooth_edge
from recofuse_core.scenes.street import Facade, Floats


def facade_surface(
    facade: Facade, height_m: float, u: Floats, v: Floats, fu: Floats, fv: Floats, tile: Floats
) -> tuple[Floats, Floats, Floats]:
    """Albedo (h, w, 3), emission (h, w, 3) and heat (h, w) of a wall at u metres along and v metres up."""
    shift = facade.texture_offset
    coarse = sample(tile, (u + shift) * 11, v * 11) / (1 + (5 * fu) ** 2)
    fine = sample(tile, (u + shift) * 75, v * 75) / (1 + (35 * fu) ** 2)
    stain = sample(tile, (u + shift) * 6, v * 1.3 + shift)  # rain runs down
    tone = 1 + 0.12 * coarse + 0.26 * fine + 0.12 * stain
    heat = facade.heat + 0.016 * coarse + 0.022 * fine + 0.024 * stain
    if facade.has_bricks:
        joints = pulse(v / 0.25, 0.82, fv / 0.25) * pulse(u / 0.5, 0.9, fu / 0.5)
        tone *= 0.72 + 0.28 * joints
        heat -= 0.012 * (1 - joints)
    storey, cell = v / facade.storey_m, u / facade.pitch_m
    ledge = 1 - pulse(storey - 0.03, 0.95, fv / facade.storey_m)
    roof = smooth_edge(v - (height_m - 0.5), fv)
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
    upper = pulse(cell - 0.22, part_u, fu / facade.pitch_m) * pulse(storey - 0.28, part_v, fv / facade.storey_m)
    panes = pulse(cell / part_u * 2 + 0.1, 0.9, fu / facade.pitch_m / part_u * 2)
    shop = pulse(cell / 2 - 0.06, 0.86, fu / facade.pitch_m / 2) * pulse(storey - 0.08, 0.62, fv / facade.storey_m)
    glass = np.where(is_shop, shop, upper * (0.35 + 0.65 * panes))
    glass *= 1 - roof
    sill = pulse(cell - 0.18, part_u + 0.08, fu / facade.pitch_m) * pulse(storey - 0.22, 0.06, fv / facade.storey_m)
    lintel = pulse(cell - 0.18, part_u + 0.08, fu / facade.pitch_m) * pulse(storey - 0.80, 0.05, fv / facade.storey_m)
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

    sign_row = pulse(storey - 0.75, 0.17, fv / facade.storey_m) * is_shop
    sign = (
        sign_row * pulse(cell / 2 - 0.12, 0.7, fu / facade.pitch_m / 2) * (tone_dice < 0.55 * facade.shop_share + 0.2)
    )
    letters = np.clip(0.55 + 0.9 * np.sign(sample(tile, u * 60 + shift, v * 35)) * (1 - far), 0.12, 1)
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
