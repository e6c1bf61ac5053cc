"""Which parts of a model run on our kernels: those that agree with their twins on this card and are faster there.

No kernel is trusted on its word. Before a model serves anything, it runs once as it is, on a frame of the usual size;
what came to its parts is given to their replacements, too, and both are timed as recorded graphs. One block of each
kind and width speaks for the others. What cannot be compiled, disagrees or loses is not used, and the log says why.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from recofuse_core.errors import ConfigError
from recofuse_core.faults import Fault, fault_of
from recofuse_core.finishing import Finish
from recofuse_core.layers import GatedConvBlock
from recofuse_core.model import ReCoFuse, noise_like
from recofuse_core.networks import LatentFusion, Rows
from recofuse_core.stacked import StackedBlock, StackedDenoiser

logger = logging.getLogger(__name__)

KernelChoice = Literal["auto", "eager", "triton"]
KINDS = ("beginning", "block", "stacked block", "fusion", "end")  # what there are kernels for

TRIAL_SIZE = (480, 640)  # height, width
TRIAL_BATCHES = (1, 8)
NUM_TIMED = 5  # calls of a block in one graph
# Greatest rms of the difference, as a part of the rms of what the block adds to its input: a few roundings.
# For levels, one value in a hundred off by one.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2, torch.uint8: 1e-3}

Result = Tensor | tuple[Tensor, ...]
TimeMs = Callable[[Callable[[], Result]], float]


class Form(NamedTuple):
    """Parts that do alike: blocks of one width, the fusion module, the beginning of a run and its end."""

    kind: str
    channels: int


@dataclass(frozen=True, slots=True)
class Place:
    """A part of a model that has a replacement."""

    parent: nn.Module
    name: str
    block: nn.Module
    form: Form

    def fused(self) -> nn.Module:
        """The replacement."""
        return _replacement(self.block)


@dataclass(frozen=True, slots=True)
class Trial:
    """How kernels did against eager on one form. error: see TOLERANCES."""

    form: Form
    error: float
    tolerance: float
    eager_ms: float
    fused_ms: float

    @property
    def is_won(self) -> bool:
        """Whether they agree and are faster."""
        return self.error <= self.tolerance and self.fused_ms < self.eager_ms


def has_triton() -> bool:
    """Whether Triton can be imported here."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


def places(model: nn.Module) -> Iterator[Place]:
    """All parts of a model that have a replacement, in the order of the model; not those that went into a stack."""
    stacks = [module for module in model.modules() if isinstance(module, StackedDenoiser)]
    emptied = {id(module) for stack in stacks for module in stack.branches.modules()}
    for parent in list(model.modules()):
        for name, block in list(parent.named_children()):
            if id(block) not in emptied and (form := _form(block)) is not None:
                yield Place(parent, name, block, form)


def use_kernels(model: ReCoFuse, choice: KernelChoice) -> str:
    """Put kernels into a model from `frozen_copy`, in place; returns what was chosen, in words.

    auto: what wins on this GPU, for networks in half precision (exact products of float32 take a minute to compile, and
    have no unit of their own on a card); nothing elsewhere. triton: all, untried, as tests and simulations want it.
    Raises ConfigError for "triton" where that is not installed, or the device is none of its own.
    """
    if choice not in ("auto", "eager", "triton"):
        raise ConfigError(f"kernels must be auto, eager or triton, got {choice!r}")
    device = next(model.parameters()).device
    if choice == "eager" or (choice == "auto" and device.type != "cuda"):
        return "eager"
    if device.type != "meta" and not has_triton():
        if choice == "triton":
            raise ConfigError("kernels=triton: Triton is not installed here; torch for CUDA brings it")
        return "eager: Triton is not installed"
    if choice == "auto" and all(_dtype(place.block) == torch.float32 for place in places(model)):
        return "eager: the networks are in float32"
    if choice == "triton":
        if device.type == "cpu" and not _is_interpreted():
            raise ConfigError("kernels=triton needs a GPU; on a CPU they run with TRITON_INTERPRET=1 alone, for tests")
        return replace_all(model)
    return use_winners(model)


def replace_all(model: nn.Module, forms: frozenset[Form] | None = None) -> str:
    """Replace every part, or those of some forms; returns what was replaced, in words."""
    counts: dict[Form, int] = {}
    for place in list(places(model)):
        if forms is None or place.form in forms:
            setattr(place.parent, place.name, place.fused())
            counts[place.form] = counts.get(place.form, 0) + 1
    told = ", ".join(f"{count} {form.kind} of {form.channels}" for form, count in counts.items())
    return f"triton: {told}" if told else "eager"


def use_winners(
    model: ReCoFuse,
    *,
    time_ms: TimeMs | None = None,
    batches: tuple[int, ...] = TRIAL_BATCHES,
    size: tuple[int, int] = TRIAL_SIZE,
) -> str:
    """Try the kernels on every form and use those that agree and win. time_ms: of a call."""
    started = time.monotonic()
    won = set()
    for form, calls in seen_calls(model, batches, size).items():
        try:
            trial = tried(form, *calls, time_ms=time_ms or graph_ms)
        except Exception as error:
            if fault_of(error) is Fault.BROKEN:
                raise
            logger.warning(
                "kernels cannot be used",
                extra={"block": form.kind, "channels": form.channels, "error": f"{type(error).__name__}: {error}"},
            )
            continue
        logger.info(
            "kernels tried",
            extra={
                "block": form.kind,
                "channels": form.channels,
                "error": float(f"{trial.error:.2g}"),
                "eager_ms": round(trial.eager_ms, 3),
                "kernels_ms": round(trial.fused_ms, 3),
                "chosen": trial.is_won,
            },
        )
        if trial.is_won:
            won.add(form)
    told = replace_all(model, frozenset(won))
    torch.cuda.empty_cache()
    logger.info("kernels chosen", extra={"kernels": told, "seconds": round(time.monotonic() - started, 1)})
    return told


@torch.inference_mode()
def seen_calls(
    model: ReCoFuse, batches: tuple[int, ...], size: tuple[int, int] = TRIAL_SIZE
) -> dict[Form, tuple[nn.Module, list[tuple[Any, ...]]]]:
    """One part of each form, and what came to it in runs of one step over noise, one run for every batch size."""
    device = next(model.parameters()).device
    chosen: dict[Form, Place] = {}
    for place in places(model):
        chosen.setdefault(place.form, place)
    calls: dict[Form, list[tuple[Any, ...]]] = {form: [] for form in chosen}

    def keep_calls(place: Place, count: int) -> Callable[[], None]:
        """Keep the first arguments that come, until there are `count`; returns what ends that."""
        call = _entry(place.block)

        def kept(*arguments: Any) -> Any:
            if len(calls[place.form]) < count:
                calls[place.form].append(arguments)
            return call(*arguments)

        setattr(place.block, call.__name__, kept)
        return lambda: delattr(place.block, call.__name__)

    generator = torch.Generator().manual_seed(0)
    for count, batch in enumerate(batches, start=1):
        ends = [keep_calls(place, count) for place in chosen.values()]
        try:
            images = torch.randint(256, (batch, 4, *size), dtype=torch.uint8, generator=generator).to(device)
            like = torch.empty(model.latent_shape(batch, *size), device=device)
            draw = noise_like([0] * batch, like)
            model.run(images[:, :3], images[:, 3:], model.plan(steps=1), draw)
        finally:
            for end in ends:
                end()
    return {form: (chosen[form].block, inputs) for form, inputs in calls.items() if inputs}


@torch.inference_mode()
def tried(form: Form, block: nn.Module, inputs: list[tuple[Any, ...]], time_ms: TimeMs) -> Trial:
    """Compare a part and its replacement on inputs; times are summed over them, of the error the greatest counts."""
    eager_call, fused_call = _entry(block), _entry(_replacement(block))
    error, tolerance, eager_ms, fused_ms = 0.0, 0.0, 0.0, 0.0
    for arguments in inputs:
        expected, found = _image(eager_call(*arguments)), _image(fused_call(*arguments))
        tolerance = TOLERANCES[expected.dtype if expected.dtype == torch.uint8 else _dtype(block)]
        error = max(error, relative_rms(found, expected, arguments[0]))
        eager_ms += time_ms(lambda given=arguments: eager_call(*given))  # type: ignore[misc]
        fused_ms += time_ms(lambda given=arguments: fused_call(*given))  # type: ignore[misc]
    return Trial(form, error, tolerance, eager_ms, fused_ms)


def relative_rms(found: Tensor, expected: Tensor, given: Tensor) -> float:
    """Rms of the difference as a part of the rms of what was added to the input; infinite if anything is not finite."""
    is_sum = (given.shape, given.dtype) == (expected.shape, expected.dtype)
    found, expected = found.float(), expected.float()
    added = (expected - given.float() if is_sum else expected).square().mean().sqrt()
    error = float((found - expected).square().mean().sqrt() / added.clamp_min(1e-6))
    return math.inf if math.isnan(error) else error


def graph_ms(call: Callable[[], Result]) -> float:
    """Milliseconds of one call within a recorded graph, least of three."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # compiles, and picks algorithms
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        for _ in range(NUM_TIMED):
            call()
    spent = []
    for _ in range(3):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        first.record()
        graph.replay()
        last.record()
        last.synchronize()
        spent.append(first.elapsed_time(last) / NUM_TIMED)
    graph.reset()
    return float(min(spent))


def _dtype(block: nn.Module) -> torch.dtype:
    """Of what a part computes in; what it takes and gives may be float32."""
    if isinstance(block, StackedBlock):
        return block.get_buffer("expand1_weight").dtype
    if isinstance(block, Finish | Rows):  # rows are computed in it, and rounded once
        return torch.float32
    first = block.intro if isinstance(block, LatentFusion) else block.expand1
    assert isinstance(first, nn.Conv2d)
    return first.weight.dtype


def _form(block: nn.Module) -> Form | None:
    if isinstance(block, StackedBlock):
        return Form("stacked block", block.channels)
    if isinstance(block, GatedConvBlock):
        return Form("block", block.expand1.in_channels)
    if isinstance(block, LatentFusion):
        return Form("fusion", block.intro.out_channels)
    if isinstance(block, Finish):
        return Form("end", 3)
    if isinstance(block, Rows):
        return Form("beginning", 3 * block.factor**2)
    return None


def _image(result: Result) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


def _entry(block: nn.Module) -> Callable[..., Result]:
    """What a model calls of a part, or of its replacement."""
    entry: Callable[..., Result] = getattr(block, "fuse", block.forward)
    return entry


def _replacement(block: nn.Module) -> nn.Module:
    from recofuse_core.kernels.blocks import FusedBlock, FusedConvBlock
    from recofuse_core.kernels.ends import FusedFinish, FusedRows
    from recofuse_core.kernels.fusion import FusedLatentFusion

    if isinstance(block, StackedBlock):
        return FusedBlock(block)
    if isinstance(block, LatentFusion):
        return FusedLatentFusion(block)
    if isinstance(block, Finish):
        return FusedFinish(block)
    if isinstance(block, Rows):
        return FusedRows(block)
    assert isinstance(block, GatedConvBlock)
    return FusedConvBlock(block)


def _is_interpreted() -> bool:
    import triton

    return bool(triton.knobs.runtime.interpret)
