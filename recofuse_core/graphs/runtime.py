"""The model without torch: its networks as graphs beside the weights, run by ONNX Runtime on processors.

`GraphRuntime` computes what `Runtime` does and in the same order (`picture.run`), with the same samplers, tiles and
noise, on numpy arrays. Only what the networks compute comes from graphs, which torch wrote once (export.py); they read
their weights from the safetensors file that they lie beside. A start takes a second or two and no torch.

Threads that wait sleep, and all graphs of a process take their memory from one arena. What is joined of tiles lies
there, too, and so do frames as floats: the system would clear the pages of fresh arrays for every frame
(docs/decisions/0047).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from recofuse_core.brightening import Brightening
from recofuse_core.errors import CheckpointError, ShapeError
from recofuse_core.overlap import Overlap, require_overlap, shares_of
from recofuse_core.picture import (
    ALL_OUTPUTS,
    Defaults,
    Exposure,
    FusionOutput,
    FusionPlan,
    ModelInfo,
    OutputName,
    PredictionKind,
    Prepared,
    Skips,
    latent_size,
    make_plan,
    padded,
    require_finite,
    require_shapes,
    run,
    seed_list,
)
from recofuse_core.sampler import Pair, Prediction, SamplerName, seeded_noise
from recofuse_core.sde import MeanRevertingSDE, SDEConfig
from recofuse_core.tiling import Ramps, Spans, TilingConfig, ramps
from recofuse_core.weights_file import StrPath, read_verified, resolve
from recofuse_host.processors import Threads, decide_threads, read_processors

Floats = NDArray[np.float32]
Levels = NDArray[np.uint8]
Images = Floats | Levels
Found = tuple[Floats, Floats | None]  # frames without what lay over them, and how much of it was taken off, (B,)
PartName = Literal[
    "weather",
    "clear",
    "tone",
    "light",
    "veil",
    "lift",
    "encode",
    "encode_ir",
    "predict",
    "fuse",
    "fuse_skips",
    "decode",
    "detail_fused",
    "detail_vis",
    "detail_ir",
    "widen",
]
DETAIL_PARTS: dict[OutputName, PartName] = {"fused": "detail_fused", "vis": "detail_vis", "ir": "detail_ir"}

ZEROS_PATH = Path(__file__).with_name("zeros.onnx")  # a graph that belongs to no weights: an array of a shape
NO_MEMORY = ("Failed to allocate memory", "bad allocation", "bad_alloc")  # in words of ONNX Runtime and of C++
PREFIX = "recofuse."  # of the metadata
FACTS_KEY = PREFIX + "about"  # in the graph `predict`
CHECKSUM_KEY = PREFIX + "checksum"
VERSION_KEY = PREFIX + "format_version"
# 6: veils knew nothing of rain and snow. 5: relief was by surroundings. 4: lit frames had none. 3: detail was not given
# back. 2: infrared was not brightened. 1: veils were lifted by gains, behind the lighting
FORMAT_VERSION = 7


def graph_path(weights: Path, part: PartName) -> Path:
    """Where the graph of a part lies, beside its weights."""
    return weights.with_name(f"{weights.stem}.{part}.onnx")


def has_graphs(name_or_path: StrPath) -> bool:
    """Whether graphs lie beside these weights. Raises CheckpointError if there are no such weights."""
    return graph_path(resolve(name_or_path), "predict").is_file()


@dataclass(frozen=True)
class Facts:
    """What of a model is not in its networks: how it is sampled, and what it can."""

    sampler: SamplerName
    steps: int
    prediction: PredictionKind
    sde: SDEConfig
    latent_channels: int
    widening: float
    can_light: bool
    clears: bool
    lifts_veil: bool
    details: bool
    num_parameters: int


class GraphRuntime:
    """A model of graphs, ready to be run many times. Used from one thread at a time, as `Runtime` is.

    num_threads: 0 for as many as the process may use, divided by `num_sharing` processes that share them.
    Raises CheckpointError if the weights or their graphs are missing, damaged, or do not belong together.
    """

    def __init__(self, name_or_path: StrPath = "compact", *, num_threads: int = 0, num_sharing: int = 1) -> None:
        weights = resolve(name_or_path)
        label, _ = read_verified(weights)
        self.threads: Threads = decide_threads(num_threads, read_processors(), num_sharing)
        _share_memory()
        predict = _opened(weights, "predict", label.checksum, self.threads.count)
        self.facts = _facts_of(weights, predict)
        others: list[PartName] = ["tone", "encode", "encode_ir", "fuse", "fuse_skips", "decode"]
        if self.facts.clears:
            others += ["weather", "clear"]
        if self.facts.lifts_veil:
            others += ["veil", "lift"]
        if self.facts.can_light:
            others.append("light")
        if self.facts.details:
            others += DETAIL_PARTS.values()
        if self.facts.widening > 0:
            others.append("widen")
        sessions = {part: _opened(weights, part, label.checksum, self.threads.count) for part in others}
        self._networks = GraphNetworks({"predict": predict, **sessions}, self.facts.prediction)
        self.sde = MeanRevertingSDE(self.facts.sde)
        self.info = ModelInfo(
            name=label.about.name,
            version=label.about.version,
            preset=label.about.preset,
            default_steps=self.facts.steps,
            default_sampler=self.facts.sampler,
            num_parameters=self.facts.num_parameters,
            provenance=label.about.provenance,
        )

    @property
    def can_light(self) -> bool:
        """Whether the weights offer the rendition "lit"."""
        return self.facts.can_light

    def plan(
        self,
        *,
        steps: int | None = None,
        sampler: SamplerName | None = None,
        outputs: Collection[OutputName] = ALL_OUTPUTS,
        tiling: TilingConfig | None = None,
        exposure: Exposure | None = None,
    ) -> FusionPlan:
        """Check a request and fill in the model's defaults. Raises ConfigError, as `ReCoFuse.plan` does."""
        facts = self.facts
        return make_plan(
            self.info,
            self.sde,
            Defaults(facts.sampler, facts.steps, facts.prediction, facts.can_light),
            steps=steps,
            sampler=sampler,
            outputs=outputs,
            tiling=tiling,
            exposure=exposure,
        )

    def fuse(
        self,
        vis: Images,
        ir: Images,
        *,
        steps: int | None = None,
        sampler: SamplerName | None = None,
        seeds: int | Sequence[int] = 0,
        outputs: Collection[OutputName] = ALL_OUTPUTS,
        tiling: TilingConfig | None = None,
        exposure: Exposure | None = None,
        overlap: NDArray[np.uint8] | None = None,
    ) -> FusionOutput:
        """See `ReCoFuse.fuse`; images and results are numpy arrays: vis (B, 3, H, W), ir (B, 1, H, W).

        overlap: (B, H, W, 2), where infrared was measured, as `Overlap` has it; None for everywhere.
        Raises MemoryError for a batch that does not fit, too.
        """
        batch, height, width = _require_pair(vis, ir)
        plan = self.plan(steps=steps, sampler=sampler, outputs=outputs, tiling=tiling, exposure=exposure)
        partial: Overlap | None = None
        if overlap is not None:
            require_overlap(overlap.shape, batch, height, width)
            partial = Overlap(shares_of(overlap), lambda matrix: matrix)
        shape = (self.facts.latent_channels, *latent_size(height, width))
        draw = seeded_noise(seed_list(seeds, batch), shape, lambda noise: noise)
        networks = self._networks
        is_levels = vis.dtype == np.uint8
        images = networks.unit_range(vis), networks.unit_range(ir)
        frames, brightened_by, treated = networks.prepare(*images, plan.exposure)

        def finish(name: OutputName, decoded: Floats) -> Images:
            require_finite(np.isfinite(decoded).all())
            image = np.clip(decoded, 0, 1, out=decoded)  # nobody else has it
            if name == "fused":
                widened = networks.widen(image)
                image = widened if partial is None else image + partial.tone * (widened - image)
            elif name == "ir":
                image = image.mean(axis=1, keepdims=True)
                image = image if brightened_by is None else brightened_by.undone(image)
            if not is_levels:
                return np.ascontiguousarray(image)
            image *= 255
            np.rint(image, out=image)
            return image.astype(np.uint8)

        pictures, _ = run(
            networks, self.sde, plan, frames, (height, width), draw, finish, partial=partial, treated=treated
        )
        return FusionOutput(pictures.get("fused"), pictures.get("vis"), pictures.get("ir"))


class Seen(NamedTuple):
    """Visible frames without weather, as they came, and how much of it was taken off, (B,)."""

    cleared: Floats
    came: Floats
    weather: Floats


class GraphNetworks:
    """The graphs of a model as `picture.run` calls them."""

    def __init__(self, sessions: dict[PartName, onnxruntime.InferenceSession], prediction: PredictionKind) -> None:
        self._sessions = sessions
        self._zeros = _session(ZEROS_PATH, 1)
        self._inputs = {part: [entry.name for entry in session.get_inputs()] for part, session in sessions.items()}
        self._prediction = prediction

    def _run(self, part: PartName, *arrays: NDArray[Any]) -> list[Floats]:
        feed = dict(zip(self._inputs[part], map(np.ascontiguousarray, arrays), strict=True))
        return _results(self._sessions[part], feed, part)

    def prepare(self, vis: Floats, ir: Floats, exposure: Exposure) -> Prepared:
        """Frames as ReCoFuse.delivered has them, padded, ir of one channel."""
        cleared, weather = self._clear(vis, ir)
        seen = Seen(cleared, vis, np.zeros(len(vis), np.float32) if weather is None else weather)
        if exposure == "lit":
            unveiled, veil = self._unveil(seen, ir)
            lit_vis, brighter_ir, *by = self._run("light", unveiled, ir)
            brightening = Brightening(*by)
            return Prepared(
                Pair(_padded(lit_vis), _padded(brighter_ir)), brightening, _most(weather, veil, brightening.lit)
            )
        toned = Pair(*self._run("tone", cleared, ir))
        lifted, veil = self._lift(toned, seen, toned.vis)
        return Prepared(Pair(_padded(lifted), _padded(toned.ir)), treated=_most(weather, veil))

    def _unveil(self, seen: Seen, ir: Floats) -> Found:
        """The visible frames as they are lit; under tone curves only within, so that a large pair takes less memory."""
        if "veil" not in self._sessions:
            return seen.cleared, None
        return self._lift(Pair(*self._run("tone", seen.cleared, ir)), seen, seen.cleared)

    def _clear(self, vis: Floats, ir: Floats) -> Found:
        """The visible frames without weather: what it looks like is asked for only where there is any."""
        if "weather" not in self._sessions:
            return vis, None
        height, width = vis.shape[-2:]
        vis_sides = _padded(vis)
        share, *seen = self._run("weather", vis_sides, _padded(ir))
        if not share.any():
            return vis, None
        return self._run("clear", vis_sides, share, *seen)[0][..., :height, :width], share

    def _lift(self, toned: Pair, seen: Seen, onto: Floats) -> Found:
        """Toned visible frames, `seen` before, without their veil, and `onto` where they have none."""
        if "veil" not in self._sessions:
            return onto, None
        share, darkened, *veil = self._run("veil", *toned, *seen)
        if not share.any() and (onto is toned.vis or not darkened.any()):
            return onto, None
        return self._run("lift", toned.vis, onto, share, darkened, *veil)[0], share

    def encode(self, image: Floats) -> tuple[Floats, Skips]:
        """See Networks; an image of one channel stands for three that are equal."""
        latent, *skips = self._run("encode" if image.shape[1] == 3 else "encode_ir", image)
        return latent, tuple(skips)

    def predict(self, state: Pair, mu: Pair, t: int) -> Prediction:
        """See Networks."""
        vis, ir, *start = self._run("predict", *state, *mu, np.array([t], np.int64))
        fused = start[0] if start else state.vis  # who predicts the clean latent needs no start
        return Prediction(Pair(fused, fused), Pair(vis, ir), self._prediction)

    def fuse(self, clean: Pair) -> Floats:
        """See Networks."""
        return self._run("fuse", *clean)[0]

    def fuse_skips(self, vis: Skips, ir: Skips) -> Skips:
        """See Networks."""
        return tuple(self._run("fuse_skips", *vis, *ir))

    def decode(self, latent: Floats, skips: Skips) -> Floats:
        """See Networks."""
        return self._run("decode", latent, *skips)[0]

    def detail(self, name: OutputName, decoded: Floats, shown: Pair, treated: Floats | None) -> Floats:
        """See Networks."""
        part = DETAIL_PARTS[name]
        if part not in self._sessions:
            return decoded
        if name == "ir":
            return self._run(part, decoded, shown.ir)[0]
        treated = np.zeros((len(decoded), 1, 1, 1), np.float32) if treated is None else treated
        return self._run(part, decoded, treated, *(shown if name == "fused" else (shown.vis,)))[0]

    def widen(self, image: Floats) -> Floats:
        """Images (B, 3, H, W) in [0, 1] with the range of their luma widened, if the model does that."""
        return self._run("widen", image)[0] if "widen" in self._sessions else image

    def contiguous(self, part: Floats) -> Floats:
        """See Networks; what a graph is given is contiguous anyhow."""
        return part

    tile_batch = 1  # more at a time are no faster on a processor

    def together(self, parts: Sequence[Floats]) -> Floats:
        """See Networks."""
        return np.concatenate(parts)

    def unit_range(self, image: Images) -> Floats:
        """Floats in [0, 1] of floats or levels."""
        if image.dtype != np.uint8:
            return image.astype(np.float32, copy=False)
        return np.divide(image, np.float32(255), out=self.zeros(image.shape, image), dtype=np.float32)

    def zeros(self, shape: tuple[int, ...], like: Images) -> Floats:
        """See Canvas; float32 always. Its memory is no other array's, and goes back to the graphs' arena with it."""
        return _results(self._zeros, {"shape": np.array(shape, np.int64)}, "a frame")[0]

    def ramps(self, spans: Spans, length: int, scale: int, like: Floats) -> Ramps:
        """See Canvas."""
        return ramps(spans, length, scale)


@functools.cache
def _share_memory() -> None:
    """One arena for all graphs of the process; each would keep what it needed at most otherwise."""
    arena, default = onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, onnxruntime.OrtMemType.DEFAULT
    memory = onnxruntime.OrtMemoryInfo("Cpu", arena, 0, default)
    onnxruntime.create_and_register_allocator(memory, None)


def _opened(weights: Path, part: PartName, checksum: str, num_threads: int) -> onnxruntime.InferenceSession:
    path = graph_path(weights, part)
    if not path.is_file():
        raise CheckpointError(f"there is no graph at {path}; torch writes it, with `recofuse convert --to graphs`")
    session = _session(path, num_threads)
    known = session.get_modelmeta().custom_metadata_map
    if (version := known.get(VERSION_KEY)) != str(FORMAT_VERSION):
        raise CheckpointError(
            f"{path} was written by another release (format {version}, not {FORMAT_VERSION}); write the graphs again, "
            "with `recofuse convert --to graphs`"
        )
    found = known.get(CHECKSUM_KEY)
    if found != checksum:
        raise CheckpointError(f"{path} was written for other weights ({found}) than {weights} has ({checksum})")
    return session


def _session(path: Path, num_threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.use_env_allocators", "1")
    options.enable_mem_pattern = False  # a second run of a shape would take one block for all that it computes
    options.log_severity_level = 3  # its warnings tell of constants that were folded
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise CheckpointError(f"{path} does not load: {error}") from error


def _results(session: onnxruntime.InferenceSession, feed: dict[str, NDArray[Any]], what: str) -> list[Floats]:
    """All outputs of a graph. Raises MemoryError, which names what there was none for."""
    try:
        results: list[Floats] = session.run(None, feed)
    except Exception as error:
        if any(words in str(error) for words in NO_MEMORY):
            raise MemoryError(f"no memory for {what}") from None
        raise
    return results


def _facts_of(weights: Path, predict: onnxruntime.InferenceSession) -> Facts:
    try:
        facts = json.loads(predict.get_modelmeta().custom_metadata_map[FACTS_KEY])
        named = {field.name: facts[field.name] for field in fields(Facts)}
        return Facts(**named | {"sde": SDEConfig(**facts["sde"])})
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{graph_path(weights, 'predict')}: the metadata are not understood: {error}") from error


def _require_pair(vis: Images, ir: Images) -> tuple[int, int, int]:
    """(B, H, W) of a valid pair; ShapeError otherwise."""
    size = require_shapes(vis.shape, ir.shape)
    is_levels = vis.dtype == ir.dtype == np.uint8
    if not is_levels and not (vis.dtype.kind == ir.dtype.kind == "f"):
        raise ShapeError(f"vis and ir must be floating point in [0, 1] or both uint8, got {vis.dtype} and {ir.dtype}")
    return size


def _most(*shares: Floats | None) -> Floats | None:
    """The largest of shares (B,) or (B, 1, 1, 1), as (B, 1, 1, 1); None if there is none."""
    found = [share.reshape(-1, 1, 1, 1) for share in shares if share is not None]
    return functools.reduce(np.maximum, found) if found else None


def _padded(image: Floats) -> Floats:
    """An image mirrored at its ends up to sides that the networks take; the same where there is nothing to add."""
    height, width = image.shape[-2:]
    rows, columns = padded(height) - height, padded(width) - width
    return np.pad(image, ((0, 0), (0, 0), (0, rows), (0, columns)), "reflect") if rows or columns else image
