"""One picture: what may be asked for, and the order of work from a pair to its pictures.

The order is the same for every runtime: prepare both frames, encode them, sample, fuse, decode, tile by tile where a
frame is large. What the networks compute is a runtime's own (`Networks`): torch's modules, or graphs of them that run
without torch. So nothing here needs torch, and arrays are those of the runtime.

Letters: B batch, H and W image size, C latent channels, h and w latent size.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, get_args

from recofuse_core.brightening import Brightening
from recofuse_core.errors import ConfigError, NumericsError, ShapeError
from recofuse_core.sampler import (
    SAMPLERS,
    NoiseSource,
    Pair,
    Prediction,
    SamplerName,
    late_start,
    num_draws,
    plan_timesteps,
)
from recofuse_core.sde import MeanRevertingSDE
from recofuse_core.tiling import Canvas, Mosaic, Tile, TilingConfig, plan_tiles

OutputName = Literal["fused", "vis", "ir"]
Exposure = Literal["as_shot", "lit"]
PredictionKind = Literal["noise", "clean"]
ALL_OUTPUTS: tuple[OutputName, ...] = ("fused", "vis", "ir")
MIN_SIDE = 32
LATENT_FACTOR = 8
PADDING = 16  # images are padded to multiples of it

Array = Any  # of the runtime
Skips = tuple[Array, ...]


@dataclass(frozen=True)
class ModelInfo:
    """What a model is, for people and for response headers."""

    name: str
    version: str
    preset: str
    default_steps: int
    default_sampler: SamplerName
    num_parameters: int
    provenance: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class FusionOutput:
    """Images in [0, 1], or uint8 levels if the input was; None where not asked for.

    fused, vis: (B, 3, H, W). ir: (B, 1, H, W). latents: the restored latents, both (B, C, h, w), from which the next
    frame of a sequence may start; None from a runtime.
    """

    fused: Any | None
    vis: Any | None
    ir: Any | None
    latents: Pair | None = field(default=None, kw_only=True)


@dataclass(frozen=True)
class Defaults:
    """What of a model decides how a request without wishes is worked on."""

    sampler: SamplerName
    steps: int
    prediction: PredictionKind
    can_light: bool


@dataclass(frozen=True)
class FusionPlan:
    """A checked request without its images: hashable, and all that decides what is computed for a shape."""

    sampler: SamplerName
    timesteps: tuple[int, ...]
    outputs: frozenset[OutputName]
    coupled: bool
    tiling: TilingConfig
    exposure: Exposure = "as_shot"

    @property
    def num_draws(self) -> int:
        """Pairs of noise that a run draws."""
        return num_draws(self.sampler, len(self.timesteps))

    def tiles(self, height: int, width: int) -> bool:
        """Whether a frame of this size is worked on in tiles."""
        return padded(height) * padded(width) > self.tiling.max_pixels


def make_plan(
    info: ModelInfo,
    sde: MeanRevertingSDE,
    defaults: Defaults,
    *,
    steps: int | None = None,
    sampler: SamplerName | None = None,
    outputs: Collection[OutputName] = ALL_OUTPUTS,
    coupled: bool = True,
    tiling: TilingConfig | None = None,
    start: int | None = None,
    exposure: Exposure | None = None,
) -> FusionPlan:
    """Check a request and fill in the model's defaults: "lit" where the weights can give it, else "as_shot".

    Raises ConfigError for unknown names or steps, and for a rendition that the weights cannot give.
    """
    if exposure is None:
        exposure = "lit" if defaults.can_light else "as_shot"
    require_exposure(exposure)
    if exposure == "lit" and not defaults.can_light:
        raise cannot_light(info)
    sampler = sampler or defaults.sampler
    count = defaults.steps if steps is None else steps
    if start is None and sampler != "euler" and defaults.prediction == "noise":
        start = late_start(sde, count)
    timesteps = plan_timesteps(sampler, sde, count, start)
    return FusionPlan(sampler, timesteps, _require_outputs(outputs), coupled, tiling or TilingConfig(), exposure)


class Networks(Canvas, Protocol):
    """What a runtime computes. Images are float32 (B, 3, H, W) with sides that are multiples of `PADDING`.

    Where a runtime prepares infrared in one channel, its `encode` takes that for three equal ones.
    """

    def encode(self, image: Array) -> tuple[Array, Skips]:
        """An image to its latent (B, C, H / 8, W / 8) and skips."""

    def predict(self, state: Pair, mu: Pair, t: int) -> Prediction:
        """One coupled evaluation at step t: pairs of (B, C, h, w)."""

    def fuse(self, clean: Pair) -> Array:
        """The latent (B, C, h, w) of the fused image from both restored ones."""

    def fuse_skips(self, vis: Skips, ir: Skips) -> Skips:
        """The skips of the fused image, each place by itself: tiles are fused one by one."""

    def decode(self, latent: Array, skips: Skips) -> Array:
        """A latent and its skips to an image, not clamped."""

    def detail(self, name: OutputName, decoded: Array, shown: Pair, treated: Array | None) -> Array:
        """A decoded image, not clamped, with the detail of its frames, ir of one channel. treated: see run."""

    def contiguous(self, part: Array) -> Array:
        """A part that was cut from an array, in memory of its own if the networks are faster so."""

    @property
    def tile_batch(self) -> int:
        """How many tiles of large frames the networks do best at a time."""

    def together(self, parts: Sequence[Array]) -> Array:
        """Parts of one shape as one batch."""


@dataclass(frozen=True)
class Encoded:
    """Both frames as their networks see them: the frames (`run`), degraded latents (B, C, h, w) and skips."""

    frames: Pair
    mu: Pair
    vis_skips: Skips
    ir_skips: Skips


class Prepared(NamedTuple):
    """Frames as they are encoded, vis (B, 3, H, W) and ir of one channel or three.

    brightened_by: what made infrared brighter, beside lit frames. treated: see run; None for not at all.
    """

    frames: Pair
    brightened_by: Brightening | None = None
    treated: Array | None = None


Finish = Callable[[OutputName, Array], Array]


class Partial(Protocol):
    """Where infrared was measured, if not everywhere."""

    def blend(self, fused: Array, vis: Array) -> Array:
        """Features of the fused picture and of the visible one to those of what is decoded as the fused one."""

    def shown(self, frames: Pair) -> Pair:
        """Padded frames, ir of one channel, with the visible one's luma where infrared was not measured."""


def run(
    networks: Networks,
    sde: MeanRevertingSDE,
    plan: FusionPlan,
    frames: Pair,
    size: tuple[int, int],
    draw: NoiseSource,
    finish: Finish,
    previous: Pair | None = None,
    partial: Partial | None = None,
    treated: Array | None = None,
) -> tuple[dict[OutputName, Array], Pair]:
    """The pictures that a plan asks for, and the restored latents.

    frames: prepared (lit, toned), padded, ir in three channels, or one if the networks take that; size: theirs before
    the padding. `draw` gives noise like the latents; `finish` makes of a decoded image (B, 3, *size), not clamped, what
    is kept of it. `previous` holds clean latents to start from at the plan's first step, in place of mu. Raises
    ShapeError for one of another size.
    `partial` says where infrared was measured, if not everywhere; `treated` how far visible frames are
    others than they came, (B, 1, 1, 1), 0 to 1: of these less detail can be trusted.
    """
    frame = Frame(networks, plan, size)
    encoded = frame.encode(frames)
    state = _start(sde, encoded.mu, draw(), previous, plan.timesteps[0])
    clean = SAMPLERS[plan.sampler](frame.predict, sde, state, encoded.mu, draw, plan.timesteps)
    return frame.pictures(clean, encoded, finish, partial, treated), clean


def _start(sde: MeanRevertingSDE, mu: Pair, noise: Pair, previous: Pair | None, t: int) -> Pair:
    """Where the reverse process starts: mu + lam n at T, else the marginal at t of `previous` or mu itself."""
    if previous is None and t == sde.num_steps:
        return Pair(sde.noise_state(mu.vis, noise.vis), sde.noise_state(mu.ir, noise.ir))
    states = []
    for clean, m, n in zip(previous or mu, mu, noise, strict=True):
        mean, std = sde.marginal(clean, m, t)
        states.append(mean + std * n)
    return Pair(*states)


class Frame:
    """Applies the networks to whole frames of a size, tile by tile where a plan says so.

    Tiles are of one size, so as many at a time as the networks do best are a batch.
    """

    def __init__(self, networks: Networks, plan: FusionPlan, size: tuple[int, int]) -> None:
        self.networks = networks
        self.plan = plan
        self.size = size
        self.grid = latent_size(*size)
        self.tiles: tuple[Tile, ...] = ()
        if plan.tiles(*size):
            tile, overlap = plan.tiling.tile // LATENT_FACTOR, plan.tiling.overlap // LATENT_FACTOR
            self.tiles = plan_tiles(*self.grid, tile, overlap)

    def encode(self, frames: Pair) -> Encoded:
        """What `run` begins with."""
        vis_mu, vis_skips = self._encode(frames.vis)
        ir_mu, ir_skips = self._encode(frames.ir)
        return Encoded(frames, Pair(vis_mu, ir_mu), vis_skips, ir_skips)

    def predict(self, state: Pair, mu: Pair, t: int) -> Prediction:
        """One coupled evaluation."""
        if not self.tiles:
            return self.networks.predict(state, mu, t)
        kinds: list[PredictionKind] = []

        def of_tiles(*parts: Array) -> tuple[Array, ...]:
            prediction = self.networks.predict(Pair(*parts[:2]), Pair(*parts[2:]), t)
            kinds.append(prediction.kind)
            # Who predicts the clean latent needs no start; coupled branches have one start.
            starts = prediction.start[: 1 + (prediction.start.vis is not prediction.start.ir)]
            return (*prediction.output, *(starts if prediction.kind == "noise" else ()))

        def cut(tile: Tile) -> tuple[Array, ...]:
            return tuple(self.networks.contiguous(tile.cut(array, 1)) for array in (*state, *mu))

        vis, ir, *starts = self._of_all(cut, of_tiles)
        start = Pair(starts[0], starts[-1]) if starts else state
        return Prediction(start, Pair(vis, ir), kinds[0])

    def pictures(
        self,
        clean: Pair,
        encoded: Encoded,
        finish: Finish,
        partial: Partial | None = None,
        treated: Array | None = None,
    ) -> dict[OutputName, Array]:
        """What `run` ends with."""
        frames = Pair(encoded.frames.vis, encoded.frames.ir[:, :1])

        def decode(name: OutputName, latent: Array, *skips: Skips) -> Array:
            shown = frames if partial is None or name != "fused" else partial.shown(frames)
            detailed = self.networks.detail(name, self._decode(latent, *skips), shown, treated)
            return finish(name, detailed[..., : self.size[0], : self.size[1]])

        pictures: dict[OutputName, Array] = {}
        vis_skips, ir_skips = encoded.vis_skips, encoded.ir_skips
        if "fused" in self.plan.outputs:
            latent = self._fuse(clean)
            if partial is not None:
                skips = self.networks.fuse_skips(vis_skips, ir_skips)
                latent, skips = partial.blend(latent, clean.vis), tuple(map(partial.blend, skips, vis_skips))
                pictures["fused"] = decode("fused", latent, skips)
            else:
                pictures["fused"] = decode("fused", latent, vis_skips, ir_skips)
        if "vis" in self.plan.outputs:
            pictures["vis"] = decode("vis", clean.vis, vis_skips)
        if "ir" in self.plan.outputs:
            pictures["ir"] = decode("ir", clean.ir, ir_skips)
        return pictures

    def _of_all(
        self, cut: Callable[[Tile], tuple[Array, ...]], call: Callable[..., tuple[Array, ...]]
    ) -> tuple[Array, ...]:
        """Call with what is cut from every tile, and join the results, arrays of any scales.

        Only one batch of tiles is alive at a time.
        """
        mosaics: list[Mosaic] = []
        for group, parts, batch in self._batches(cut):
            results = call(*parts)
            if not mosaics:
                scales = [array.shape[-2] // (group[0].bottom - group[0].top) for array in results]
                mosaics = [Mosaic(self.networks, self.tiles, self.grid, scale) for scale in scales]
            for mosaic, array in zip(mosaics, results, strict=True):
                for place, tile in enumerate(group):
                    mosaic.add(tile, array[place * batch : (place + 1) * batch])
        return tuple(mosaic.joined() for mosaic in mosaics)

    def _batches(
        self, cut: Callable[[Tile], tuple[Array, ...]]
    ) -> Iterator[tuple[tuple[Tile, ...], tuple[Array, ...], int]]:
        """Tiles that go together, what was cut from them as one batch, and how much of it one tile has."""
        start = 0
        while start < len(self.tiles):
            first = cut(self.tiles[start])
            batch = len(first[0])
            most = max(1, self.networks.tile_batch // batch)
            left = len(self.tiles) - start
            count = -(-left // -(-left // most))  # batches as even as can be
            group = self.tiles[start : start + count]
            if count == 1:
                yield group, first, batch
            else:
                cuts = zip(first, *map(cut, group[1:]), strict=True)
                yield group, tuple(map(self.networks.together, cuts)), batch
            start += count

    def _encode(self, image: Array) -> tuple[Array, Skips]:
        if not self.tiles:
            return self.networks.encode(image)

        def of_tiles(part: Array) -> tuple[Array, ...]:
            latent, skips = self.networks.encode(part)
            return (latent, *skips)

        latent, *skips = self._of_all(lambda tile: (tile.cut(image, LATENT_FACTOR),), of_tiles)
        return latent, tuple(skips)

    def _fuse(self, clean: Pair) -> Array:
        if not self.tiles:
            return self.networks.fuse(clean)
        (latent,) = self._of_all(
            lambda tile: tuple(self.networks.contiguous(tile.cut(array, 1)) for array in clean),
            lambda vis, ir: (self.networks.fuse(Pair(vis, ir)),),
        )
        return latent

    def _decode(self, latent: Array, *skips: Skips) -> Array:
        """The image of a latent and its skips, or of those of both frames: what fuses them mixes no places."""
        if not self.tiles:
            return self._decoded(latent, skips)
        rows, _ = self.grid
        flat = tuple(itertools.chain.from_iterable(skips))

        def of_tiles(part: Array, *part_skips: Array) -> tuple[Array, ...]:
            each = len(part_skips) // len(skips)
            of_frames = [part_skips[start : start + each] for start in range(0, len(part_skips), each)]
            return (self._decoded(part, of_frames),)

        (image,) = self._of_all(
            lambda tile: (tile.cut(latent, 1), *(tile.cut(skip, skip.shape[-2] // rows) for skip in flat)), of_tiles
        )
        return image

    def _decoded(self, latent: Array, skips: Sequence[Skips]) -> Array:
        return self.networks.decode(latent, skips[0] if len(skips) == 1 else self.networks.fuse_skips(*skips))


def padded(side: int) -> int:
    """A side filled up to a multiple of `PADDING`."""
    return -(-side // PADDING) * PADDING


def latent_size(height: int, width: int) -> tuple[int, int]:
    """(h, w) of the latents of images of a size."""
    return padded(height) // LATENT_FACTOR, padded(width) // LATENT_FACTOR


def require_shapes(vis: Sequence[int], ir: Sequence[int]) -> tuple[int, int, int]:
    """(B, H, W) of a pair of valid shapes; ShapeError otherwise."""
    if len(vis) != 4 or vis[1] != 3:
        raise ShapeError(f"vis must be (B, 3, H, W), got {tuple(vis)}")
    if tuple(ir) != (vis[0], 1, *vis[-2:]):
        raise ShapeError(f"ir must be (B, 1, H, W) of the size of vis {tuple(vis)}, got {tuple(ir)}")
    batch, _, height, width = vis
    if batch < 1 or min(height, width) < MIN_SIDE:
        raise ShapeError(f"both sides must be at least {MIN_SIDE} px, got {width}x{height}")
    return batch, height, width


def seed_list(seeds: int | Sequence[int], batch: int) -> list[int]:
    """One seed an item. Raises ShapeError if there are neither one nor `batch`."""
    result = [seeds] * batch if isinstance(seeds, int) else list(seeds)
    if len(result) != batch:
        raise ShapeError(f"{batch} pairs need {batch} seeds or one, got {len(result)}")
    return result


def require_finite(is_finite: Any) -> None:
    """Raise NumericsError unless the flag of a run is true. Waits for the device."""
    if not bool(is_finite):
        raise NumericsError("a decoded image is not finite")


def require_exposure(exposure: str) -> None:
    """Raise ConfigError for a rendition that does not exist."""
    if exposure not in get_args(Exposure):
        raise ConfigError(f"exposure must be one of {', '.join(get_args(Exposure))}, got {exposure!r}")


def cannot_light(info: ModelInfo) -> ConfigError:
    """What to raise where weights cannot give the rendition "lit"."""
    return ConfigError(
        f"the weights {info.name} {info.version} have no exposure estimator and cannot give exposure 'lit'; "
        "take other weights, or 'as_shot'"
    )


def _require_outputs(outputs: Collection[OutputName]) -> frozenset[OutputName]:
    unknown = set(outputs) - set(ALL_OUTPUTS)
    if unknown or not outputs:
        raise ConfigError(f"outputs must be some of {', '.join(ALL_OUTPUTS)}, got {sorted(outputs)}")
    return frozenset(outputs)
