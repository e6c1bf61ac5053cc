"""Which dtype the networks of a model run in, chosen by what each costs in exactness where more than one is at hand.

Half precision is bfloat16, with the range of float32 and eight bits of precision, or float16, with eleven bits and
values up to 65504. Cards before compute capability 8.0 multiply in float16 alone. With the shipped weights float16 is
eight times closer to float32, and the largest value in any network is a thousandth of its range (tests/core); other
weights may be larger, so on a GPU `auto` runs the model on a few frames in each and takes the closest that stays well
within its range.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recofuse_core.errors import ConfigError
from recofuse_core.model import ReCoFuse, noise_like
from recofuse_core.picture import Exposure
from recofuse_core.stacked import StackedDenoiser

Precision = Literal["auto", "float32", "bfloat16", "float16"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Parts of a parameter's name. Time vectors are made once a schedule; tone curves, lighting, veils and the two
# convolutions read and write pixels, and bfloat16 near 1 is as coarse as an 8-bit level.
KEPT_IN_FLOAT32 = frozenset(
    {"tone", "exposure", "veil", "detail", "time", "time_projection", "init_conv", "final_conv"}
)

FIRST_WITH_FLOAT16, FIRST_WITH_BFLOAT16 = (7, 0), (8, 0)  # compute capabilities
TRIAL_SIZE = (192, 256)
TRIAL_STEPS = 4  # at most
MAX_ERROR = 2 / 255  # rms of a picture in [0, 1]; what is above is no rounding
HEADROOM = 16.0  # so much larger may values become on frames that were not tried


def native_dtypes(device: torch.device) -> tuple[torch.dtype, ...]:
    """The half precisions that a device computes in natively, the more exact one first."""
    if device.type == "cuda":
        # Of this device, whichever is the current one.
        capability = torch.cuda.get_device_capability(device)
        has = {torch.float16: FIRST_WITH_FLOAT16, torch.bfloat16: FIRST_WITH_BFLOAT16}
        return tuple(dtype for dtype, first in has.items() if capability >= first)
    capabilities = torch.cpu.get_capabilities()
    has_bfloat16 = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return (torch.bfloat16,) if has_bfloat16 else ()


def choose_dtype(model: ReCoFuse, precision: Precision, *, stacked: bool) -> tuple[torch.dtype, str]:
    """The dtype for a model on the device where it lies, and why, in words.

    Raises ConfigError for an unknown precision, and for bfloat16 on a GPU that does not compute in it.
    """
    device = next(model.parameters()).device
    if precision != "auto":
        return named_dtype(precision, device), "as asked"
    native = native_dtypes(device)
    if not native:
        return torch.float32, "this device has no half precision of its own"
    if device.type == "cpu":
        return native[0], "this processor computes in it"
    return closest_dtype(model, native, stacked=stacked)


def named_dtype(precision: str, device: torch.device) -> torch.dtype:
    """What a name other than auto stands for. Raises as `choose_dtype` does."""
    if precision not in DTYPES:
        raise ConfigError(f"precision must be auto, {', '.join(DTYPES)}, got {precision!r}")
    dtype = DTYPES[precision]
    if dtype == torch.bfloat16 and device.type == "cuda" and dtype not in native_dtypes(device):
        raise ConfigError(
            "precision=bfloat16: this GPU does not compute in it (compute capability 8.0 and newer do); take float16 "
            "or auto"
        )
    return dtype


def closest_dtype(model: ReCoFuse, dtypes: Sequence[torch.dtype], *, stacked: bool) -> tuple[torch.dtype, str]:
    """The one of some half precisions that a model may run in and is closest in; float32 if there is none. And why."""
    trials = measure(model, dtypes, stacked=stacked)
    told = "; ".join(str(trial) for trial in trials)
    sound = [trial for trial in trials if trial.is_sound]
    if not sound:
        return torch.float32, f"half precision is too coarse or too narrow for these weights: {told}"
    return min(sound, key=lambda trial: trial.error).dtype, told


@dataclass(frozen=True)
class Trial:
    """How far pictures in a dtype are from those in float32, as rms in [0, 1], and the largest value in the networks.

    error: infinite where something was not finite. largest: of the run in float32, in what is not kept in it.
    """

    dtype: torch.dtype
    error: float
    largest: float

    @property
    def is_sound(self) -> bool:
        """Whether a model may run in it."""
        return self.error <= MAX_ERROR and self.largest * HEADROOM <= torch.finfo(self.dtype).max

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        return f"{name} is off by {255 * self.error:.3f} levels, values up to {self.largest:.3g}"


@torch.inference_mode()
def measure(
    model: ReCoFuse,
    dtypes: Sequence[torch.dtype],
    *,
    stacked: bool,
    size: tuple[int, int] = TRIAL_SIZE,
    everywhere: bool | None = None,
) -> list[Trial]:
    """Run a model on a few frames in float32 and in each of some dtypes, in every rendition that it offers.

    everywhere: see `frozen_copy`.
    """
    largest = 0.0

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        nonlocal largest
        for tensor in output if isinstance(output, tuple | list) else (output,):
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.numel():
                largest = max(largest, float(tensor.abs().max()))

    exact = frozen_copy(model, torch.float32, stacked=False)
    hooks = [
        module.register_forward_hook(note)
        for name, module in exact.named_modules()
        if KEPT_IN_FLOAT32.isdisjoint(name.split("."))
    ]
    expected = _pictures(exact, size)
    for hook in hooks:
        hook.remove()
    trials = []
    for dtype in dtypes:
        found = _pictures(frozen_copy(model, dtype, stacked=stacked, everywhere=everywhere), size)
        errors = [float((a - b).square().mean().sqrt()) for a, b in zip(found, expected, strict=True)]
        worst = max(errors) if all(error == error for error in errors) else float("inf")  # NaN is no number
        trials.append(Trial(dtype, worst, largest))
    return trials


def _pictures(model: ReCoFuse, size: tuple[int, int]) -> list[Tensor]:
    """Of every rendition that the weights offer: lighting lifts what is dark, and what half precision did to it."""
    renditions: tuple[Exposure, ...] = ("as_shot",) if model.exposure is None else get_args(Exposure)
    return [picture for exposure in renditions for picture in _pictures_of(model, size, exposure)]


def _pictures_of(model: ReCoFuse, size: tuple[int, int], exposure: Exposure) -> list[Tensor]:
    device = next(model.parameters()).device
    vis, ir = trial_frames(size)
    plan = model.plan(steps=min(TRIAL_STEPS, model.config.steps), exposure=exposure)
    draw = noise_like([0] * len(vis), torch.empty(model.latent_shape(len(vis), *size), device=device))
    output, is_finite = model.run(vis.to(device), ir.to(device), plan, draw)
    if not bool(is_finite):
        return [torch.full((1,), torch.nan)] * 3
    return [image.float().cpu() for image in (output.fused, output.vis, output.ir) if image is not None]


def trial_frames(size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Frames to try a model on: smooth, dark and noisy, of extremes alone; vis (3, 3, H, W) and ir (3, 1, H, W)."""
    generator = torch.Generator().manual_seed(0)
    smooth = F.interpolate(torch.rand(1, 4, 6, 8, generator=generator), size, mode="bicubic").clamp(0, 1)
    noisy = (0.1 * smooth + 0.05 * torch.randn(smooth.shape, generator=generator)).clamp(0, 1)
    blocks = F.interpolate(torch.rand(1, 4, 24, 32, generator=generator).round(), size)
    frames = torch.cat([smooth, noisy, blocks])
    return frames[:, :3], frames[:, 3:]


def frozen_copy(model: ReCoFuse, dtype: torch.dtype, *, stacked: bool, everywhere: bool | None = None) -> ReCoFuse:
    """A model for inference alone, its networks in `dtype`, its branches stacked if asked; `model` stays as it is.

    everywhere: the fusion module, too; None: but on a CPU, where it is no faster so.
    """
    frozen = copy.deepcopy(model).requires_grad_(False).eval()
    if everywhere is None:
        everywhere = next(model.parameters()).device.type != "cpu"
    kept = KEPT_IN_FLOAT32 if everywhere else KEPT_IN_FLOAT32 | {"fusion"}
    for name, parameter in frozen.named_parameters():
        if kept.isdisjoint(name.split(".")):
            parameter.data = parameter.data.to(dtype)
    if stacked:
        frozen.denoiser = StackedDenoiser(frozen.denoiser)  # type: ignore[assignment]  # the same two methods
    return frozen
