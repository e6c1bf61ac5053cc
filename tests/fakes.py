"""Small working stand-ins for the parts that a test is not about, and pictures to feed it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import get_args

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from service.terms import images
from service.terms.errors import OutOfMemoryError
from service.terms.jobs import Exposure, FusionJob, FusionOptions, IrSource, Part, Priority, new_job_id
from service.terms.settings import CodecSettings, LimitSettings
from service.work.engine import EngineInfo, NullEngine, PassOptions, Pixels


class FakeClock:
    """Time that passes when told to. Seconds."""

    def __init__(self, now_s: float = 1000.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s

    def advance(self, seconds: float) -> None:
        self.now_s += seconds


@dataclass
class FakeEngine(NullEngine):
    """Returns its input, and remembers how it was asked.

    poison_seeds: a pass that holds one of them fails. max_fit: larger passes run out of memory. gate: passes wait
    until it is set. exposures: those that it offers. blends: told of an overlap, it shows its shares as the fused
    picture. batches: the seeds of every pass that was tried, in order; options: what they had in common.
    """

    poison_seeds: frozenset[int] = frozenset()
    max_fit: int = 1 << 30
    batch_sizes: tuple[int, ...] = ()
    exposures: tuple[Exposure, ...] = get_args(Exposure)
    blends: bool = False
    gate: threading.Event = field(default_factory=threading.Event)
    started: threading.Event = field(default_factory=threading.Event)
    batches: list[list[int]] = field(default_factory=list)
    options: list[PassOptions] = field(default_factory=list)
    on_load: Callable[[], None] | None = None

    def __post_init__(self) -> None:
        self.gate.set()

    @property
    def info(self) -> EngineInfo:
        return EngineInfo("fake", "7", "none", 3, "ode1", self.batch_sizes, self.exposures, self.blends)

    def load(self) -> None:
        if self.on_load is not None:
            self.on_load()

    def fuse(
        self, vis: Pixels, ir: Pixels, options: PassOptions, seeds: list[int], overlap: Pixels | None = None
    ) -> dict[Part, Pixels]:
        self.batches.append(list(seeds))
        self.options.append(options)
        self.started.set()
        assert self.gate.wait(30)
        if len(seeds) > self.max_fit:
            raise OutOfMemoryError(f"{len(seeds)} do not fit")
        if self.poison_seeds & set(seeds):
            raise RuntimeError("poisoned")
        pictures = super().fuse(vis, ir, options, seeds, overlap)
        if overlap is not None:
            pictures[Part.FUSED] = overlap[..., [0, 1, 1]]
        return pictures


class TellingCodec(images.FileCodec):
    """Reads and writes files, and says of some infrared ones that more was read of them than grey values.

    told: by the bytes of the infrared image; of any other the file codec's own word counts.
    """

    told: dict[bytes, tuple[IrSource, tuple[str, ...]]]

    @classmethod
    def serve(cls, monkeypatch: pytest.MonkeyPatch, told: dict[bytes, tuple[IrSource, tuple[str, ...]]]) -> None:
        """Let the workers that begin from now on have such a codec."""

        def build(settings: CodecSettings, limits: LimitSettings) -> TellingCodec:
            codec = cls(settings, limits)
            codec.told = told
            return codec

        monkeypatch.setattr(images, "build_codec", build)

    def decode(self, job: FusionJob) -> images.Decoded:
        decoded = super().decode(job)
        pair = decoded.pair
        source, warnings = self.told.get(job.ir, (pair.ir_source, pair.warnings))
        return replace(decoded, pair=replace(pair, ir_source=source, warnings=warnings))


def picture(width: int = 64, height: int = 48, *, channels: int = 3, seed: int = 0) -> NDArray[np.uint8]:
    """A smooth random picture: (H, W, 3), or (H, W) for one channel."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (6, 8, channels), dtype=np.uint8)
    smooth = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.asarray(smooth if channels > 1 else smooth.reshape(height, width), np.uint8)


def file_of(pixels: NDArray[np.generic], suffix: str = ".png") -> bytes:
    """An image file; colour is taken as RGB."""
    array = np.asarray(pixels)
    ordered = array[..., ::-1] if array.ndim == 3 and array.shape[2] == 3 else array
    is_done, encoded = cv2.imencode(suffix, np.ascontiguousarray(ordered))
    assert is_done
    return encoded.tobytes()


def pair(width: int = 64, height: int = 48, *, seed: int = 0) -> tuple[bytes, bytes]:
    """A vis and an ir file."""
    return (
        file_of(picture(width, height, seed=seed)),
        file_of(picture(width, height, channels=1, seed=seed + 1)),
    )


def job(
    *,
    seed: int = 0,
    width: int = 64,
    height: int = 48,
    created_s: float = 1000.0,
    deadline_s: float | None = None,
    priority: Priority = Priority.NORMAL,
    keep_result: bool = False,
    options: FusionOptions | None = None,
) -> FusionJob:
    """A complete job of real, small files."""
    vis, ir = pair(width, height, seed=seed)
    return FusionJob(
        id=new_job_id(),
        vis=vis,
        ir=ir,
        width=width,
        height=height,
        created_s=created_s,
        deadline_s=deadline_s,
        priority=priority,
        keep_result=keep_result,
        options=options or FusionOptions(seed=seed),
    )
