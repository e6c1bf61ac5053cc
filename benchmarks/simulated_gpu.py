"""What a run would ask of a GPU, counted without one: `recofuse bench engine --model-gpu H200`.

The model lies on torch's meta device, which knows shapes and layouts, holds no data, and stands for the GPU here; the
host's tensors are on the CPU as ever. A dispatch mode sees every operation of a run that would be captured. Between the
two devices nothing may pass there: no copy, no value that the host waits for, no tensor of the host in an operation of
the device (numbers without dimensions go along as arguments). The same operations are counted: so many kernels each as
cuDNN, cuBLAS and ATen launch for it, as far as their sources tell, and the bytes that they read and write. From both
comes a time: each operation takes its launches, or its multiplications, or its bytes, whichever is longest, at half of
what the card's maker says. All of that is an estimate, good for comparing two states of the code and no promise of what
a card does. `benchmarks/kernels.json` holds the counts of the presets, so that nobody adds a thousand kernels unseen.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.engine import BATCHES, NAMED_SIZE, Ceilings, count_costs
from recofuse_core.kernels.choice import KernelChoice, use_kernels
from recofuse_core.model import PRESETS, ModelConfig, ReCoFuse, build_model
from recofuse_core.picture import ALL_OUTPUTS, Exposure, OutputName
from recofuse_core.precision import DTYPES, Precision, frozen_copy
from recofuse_core.programs import MAX_UNROLLED_STEPS, ProgramKey, Supplies, build_program
from recofuse_core.recording import EagerRecorder, Results
from recofuse_core.runtime import Runtime
from recofuse_core.sampler import SAMPLERS, SamplerName
from recofuse_core.tiling import TilingConfig

DEVICE = torch.device("meta")
FUSED: tuple[OutputName, ...] = ("fused",)
TABLE = Path(__file__).with_name("kernels.json")
TABLE_BATCHES = (1, 8)
BLOCKS: tuple[KernelChoice, ...] = ("eager", "triton")

# The device's answer is needed before the host can go on.
WAITS = frozenset({"_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal", "unique_dim", "_unique2"})
COPIES = frozenset({"_to_copy", "copy_"})
KERNELS = {"native_group_norm": 3, "sort": 4, "baddbmm": 2, "constant_pad_nd": 2}
FREE = frozenset({"_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"})
SHUFFLES = frozenset({"pixel_shuffle", "pixel_unshuffle"})  # a GPU writes their results plane by plane
# Multiplications and additions of the kernels in recofuse_core/kernels, each of which is one.
OF_OURS: dict[str, Callable[[Any], int]] = {
    "norm_product": lambda args: 2 * args[0].numel() * args[3].shape[-1],
    "depthwise_gate": lambda args: 2 * 9 * args[0].numel(),
    "attend": lambda args: 2 * args[0].shape[0] * args[1].shape[-1] ** 2,
    "product_add": lambda args: 2 * args[0].numel() * args[2].shape[-1],
    "finish": lambda args: 4 * 2 * args[2].numel() * args[2].shape[-1],
    "project": lambda args: 4 * args[0].numel() * args[2].shape[-1] // args[4] ** 2,
    **dict.fromkeys(("beside", "tile_sums", "norm_coefficients", "norm_silu", "channel_pools"), lambda args: 0),
    **dict.fromkeys(("channel_attention", "spatial_maps", "weigh", "luma_cells", "ranked", "paint"), lambda args: 0),
    "spatial_gate": lambda args: 2 * args[4].numel() * args[5][0, 0].numel(),
}
LAUNCH_S = 2e-6  # from one kernel to the next that waits for it, within a graph


@dataclass(frozen=True, slots=True)
class Card:
    """What its maker says of a card: dense products in its half precision and in float32, memory, and its cache."""

    name: str
    half_flops_s: float
    float_flops_s: float
    bytes_s: float
    cache_bytes: float
    precision: Precision = "bfloat16"  # or float16, which is as fast where both are there

    def seconds(self, operation: Operation) -> float:
        """What one operation takes, at half of everything."""
        flops_s = self.half_flops_s if operation.is_half else self.float_flops_s
        bytes_s = self.bytes_s if operation.num_bytes > self.cache_bytes else CACHE_FACTOR * self.bytes_s
        return max(LAUNCH_S * operation.kernels, operation.flops / (flops_s / 2), operation.num_bytes / (bytes_s / 2))


CACHE_FACTOR = 2.0  # what fits the cache moves so much faster
CARDS = {
    card.name: card
    for card in (
        Card("H200", 790e12, 67e12, 4.8e12, 25e6),
        Card("H100", 790e12, 67e12, 3.35e12, 25e6),
        Card("4090", 165e12, 82e12, 1.01e12, 36e6),
        Card("T4", 65e12, 8.1e12, 0.32e12, 2e6, precision="float16"),
    )
}


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation of the device."""

    name: str
    kernels: int
    num_bytes: int
    flops: int
    is_half: bool


@dataclass(frozen=True, slots=True)
class _Known:
    """What was found of an operation on tensors of some shapes, strides and dtypes: it will be the same again."""

    operation: Operation
    outs: list[tuple[tuple[int, ...], tuple[int, ...], torch.dtype]]
    is_single: bool


_KNOWN: dict[Any, _Known] = {}  # working out a shape takes torch a millisecond


class _Factories(TorchFunctionMode):
    """Sees tensors of the device made from numbers of the host: torch copies those unseen by any dispatch mode."""

    def __init__(self, flags: list[str]) -> None:
        super().__init__()
        self._flags = flags

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See TorchFunctionMode."""
        made = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor, torch.asarray) and _is_on_device(made):
            self._flags.append(f"{func.__name__}: numbers of the host made a tensor of the device")
        return made


@dataclass
class Capture(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Watches the operations within: what they ask of the device, and which could not be captured."""

    operations: list[Operation] = field(default_factory=list)
    flags: list[str] = field(default_factory=list)
    _entered: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __enter__(self) -> Self:
        self._entered.append(_Factories(self.flags) if not self._entered else contextlib.nullcontext())
        self._entered[-1].__enter__()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)  # type: ignore[no-untyped-call]
        self._entered.pop().__exit__(*raised)

    @property
    def demand(self) -> Demand:
        """All of it, summed."""
        return Demand.of(self.operations)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See TorchDispatchMode."""
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        if name != "scaled_dot_product_attention" and _is_composite(func):
            with self:  # in inference mode nothing has been taken apart yet
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        leaves = tree_leaves((args, kwargs))
        form = [len(argument) if isinstance(argument, list | tuple) else 0 for argument in args]
        same = [next(i for i, other in enumerate(leaves) if other is leaf) for leaf in leaves]
        key = None if _aliases(func) else (func, *form, *kwargs, *same, *map(_signature, leaves))
        if key is not None and (known := _KNOWN.get(key)) is not None:
            self.operations.append(known.operation)
            outs = [
                torch.empty_strided(shape, stride, dtype=dtype, device=DEVICE) for shape, stride, dtype in known.outs
            ]
            return outs[0] if known.is_single else tuple(outs)
        out = self._computed(name, func, args, kwargs, leaves)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        outs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if _is_view(func):
            return out
        num_flags = len(self.flags)
        self._check(name, args, tensors, outs)
        if any(map(_is_on_device, (*tensors, *outs))) and name not in FREE:
            operation = _operation(name, args, tensors, outs)
            self.operations.append(operation)
            if key is not None and len(self.flags) == num_flags and outs and all(map(_is_on_device, (*tensors, *outs))):
                is_single = isinstance(out, Tensor)
                if is_single or len(out) == len(outs):
                    described = [(tuple(o.shape), o.stride(), o.dtype) for o in outs]
                    _KNOWN[key] = _Known(operation, described, is_single)
        return out

    def _computed(self, name: str, func: Any, args: Any, kwargs: Any, leaves: list[Any]) -> Any:
        if name == "scaled_dot_product_attention":  # one kernel where attention is fused, as it is on a GPU
            return torch.empty_like(args[0])
        if name in WAITS and any(map(_is_on_device, leaves)):
            self.flags.append(f"{name}: the host waits for a value")
            return _some_value(name, args[0])
        if name == "index" and any(part is not None and part.dtype in (torch.bool, torch.uint8) for part in args[1]):
            self.flags.append("index: the host waits for the number of trues")
            return torch.empty_like(args[0])
        target = kwargs.get("device")
        if name == "_to_copy" and target is not None and target.type == "cpu" and _is_on_device(args[0]):
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)  # there is no data to copy
        return _in_gpu_layout(name, args, func(*args, **kwargs))

    def _check(self, name: str, args: Any, tensors: list[Tensor], outs: list[Tensor]) -> None:
        touched = [*tensors, *outs]
        devices = {tensor.device.type for tensor in touched}
        has_shape = {tensor.device.type for tensor in touched if tensor.ndim}
        if len(devices) > 1 and (name in COPIES or len(has_shape) > 1):
            self.flags.append(f"{name}: {' and '.join(sorted(devices))} in one operation")
        elif has_shape == {"cpu"} and any(out.ndim for out in outs):
            self.flags.append(f"{name}: a tensor made on the host")


def _operation(name: str, args: Any, tensors: list[Tensor], outs: list[Tensor]) -> Operation:
    """What one operation asks of the device."""
    kernels = KERNELS.get(name, 1)
    flops = 0
    different = {id(tensor): tensor for tensor in (*tensors, *outs)}
    size = sum(map(_bytes, different.values()))
    if name in ("mm", "bmm", "addmm", "baddbmm", "addmm_", "baddbmm_"):
        first = args[0 if name in ("mm", "bmm") else 1]
        flops = 2 * first.numel() * outs[0].shape[-1]
        if name == "baddbmm":  # what is added is spread over the result first
            size += 2 * _bytes(outs[0])
        elif name == "addmm" and args[0].ndim != 1:
            kernels, size = 2, size + 2 * _bytes(outs[0])
    elif name in OF_OURS:
        flops = OF_OURS[name](args)
    elif name == "scaled_dot_product_attention":
        query, key = args[:2]
        flops = 4 * query.numel() * key.shape[-2]
    elif name == "constant_pad_nd" and not any(args[1]):
        kernels = 1
    elif name == "convolution":
        images, weight, bias = args[:3]
        flops = 2 * outs[0].numel() * weight[0].numel()
        if not images.is_contiguous(memory_format=_convolved_format(images, weight)):
            kernels, size = kernels + 1, size + 2 * _bytes(images)
        if bias is not None:
            kernels, size = kernels + 1, size + 2 * _bytes(outs[0])
    is_half = bool(outs) and outs[0].dtype in (torch.bfloat16, torch.float16)
    return Operation(name, kernels, size, flops, is_half)


def _convolved_format(images: Tensor, weight: Tensor) -> torch.memory_format:
    last = torch.channels_last
    return last if last in {suggest_memory_format(tensor) for tensor in (images, weight)} else torch.contiguous_format


def _in_gpu_layout(name: str, args: Any, out: Any) -> Any:
    """What an operation returned, in the layout in which a GPU returns it."""
    if name == "convolution" and _is_on_device(out) and out.ndim == 4:
        return out.contiguous(memory_format=_convolved_format(*args[:2]))
    if name in SHUFFLES and _is_on_device(out):
        return out.contiguous()
    return out


def _is_on_device(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and leaf.device.type == DEVICE.type


@functools.cache
def _is_composite(func: Any) -> bool:
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"))


@functools.cache
def _aliases(func: Any) -> bool:
    return any(entry.alias_info is not None for entry in (*func._schema.returns, *func._schema.arguments))


def _signature(leaf: Any) -> Any:
    """All of an argument that may decide the shape and the cost of a result."""
    if isinstance(leaf, Tensor):
        return tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.device.type
    return (type(leaf), None if isinstance(leaf, float) else leaf)


@functools.cache
def _is_view(func: Any) -> bool:
    return any(out.alias_info is not None and not out.alias_info.is_write for out in func._schema.returns)


def _bytes(tensor: Tensor) -> int:
    """What is read or written of a tensor; places that share memory count once."""
    if not _is_on_device(tensor):
        return 0
    count = 1
    for side, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= side if stride else 1
    return count * tensor.element_size()


def _some_value(name: str, like: Tensor) -> Any:
    if name in ("is_nonzero", "equal"):
        return True
    return 1 if name == "_local_scalar_dense" else torch.empty(0, dtype=like.dtype, device=like.device)


class SimulatedRecorder(EagerRecorder):
    """Runs as within a capture, if asked once before it, as `CudaRecorder` does. Nothing can be replayed."""

    def __init__(self, *, warms_up: bool = False) -> None:
        self.capture = Capture()
        self.parts: list[list[Operation]] = []  # of every recording
        self._warms_up = warms_up

    def record(self, function: Callable[[], Results]) -> tuple[Callable[[], None], Results]:
        """See Recorder."""
        if self._warms_up:
            function()
        num_before = len(self.capture.operations)
        with self.capture:
            results = function()
        self.parts.append(self.capture.operations[num_before:])
        return lambda: None, results


@contextlib.contextmanager
def simulation() -> Iterator[None]:
    """`torch.autocast` knows no meta device; the models only ever turn it off."""
    autocast = torch.autocast
    torch.autocast = lambda *arguments, **options: contextlib.nullcontext()  # type: ignore[assignment, misc]
    try:
        yield
    finally:
        torch.autocast = autocast  # type: ignore[misc]


def on_device(
    config: ModelConfig, precision: Precision = "bfloat16", *, stacked: bool = True, kernels: KernelChoice = "eager"
) -> ReCoFuse:
    """A model for inference on the device that stands for a GPU, its weights never filled."""
    with DEVICE:
        model = build_model(config).eval()
    frozen = frozen_copy(model, DTYPES[precision], stacked=stacked)
    use_kernels(frozen, kernels)
    return frozen


@torch.inference_mode()
def recorded(
    model: ReCoFuse,
    batch: int = 1,
    height: int = 480,
    width: int = 640,
    *,
    levels: bool = True,
    sampler: SamplerName | None = None,
    steps: int | None = None,
    outputs: Collection[OutputName] = ALL_OUTPUTS,
    tiling: TilingConfig | None = None,
    exposure: Exposure = "as_shot",
    is_long: bool = False,
    is_partial: bool = False,
) -> SimulatedRecorder:
    """The recordings of one kind of run of a model from `on_device`.

    is_long: as for many steps, however few. is_partial: infrared was not measured everywhere.
    """
    plan = model.plan(steps=steps, sampler=sampler, outputs=outputs, tiling=tiling, exposure=exposure)
    # What tiles are weighed by, and what features are blended with, is made once.
    recorder = SimulatedRecorder(warms_up=plan.tiles(height, width) or is_partial)
    with simulation():
        key = ProgramKey.of(plan, batch, height, width, levels=levels, partial=is_partial)
        key = replace(key, plan=replace(plan, timesteps=())) if is_long else key
        build_program(model, key, DEVICE, recorder, Supplies(model, DEVICE))
    return recorder


def captured(model: ReCoFuse, batch: int = 1, height: int = 480, width: int = 640, **options: Any) -> Capture:
    """What the captures of `recorded` would be."""
    return recorded(model, batch, height, width, **options).capture


@dataclass(frozen=True, slots=True)
class Demand:
    """What a run asks of a device."""

    operations: int
    kernels: int
    num_bytes: int
    flops: int

    @classmethod
    def of(cls, operations: Collection[Operation]) -> Demand:
        """The sum of operations."""
        return cls(
            len(operations),
            sum(operation.kernels for operation in operations),
            sum(operation.num_bytes for operation in operations),
            sum(operation.flops for operation in operations),
        )


def run_operations(
    config: ModelConfig, batch: int, precision: Precision = "bfloat16", **options: Any
) -> list[Operation]:
    """The operations of a run at 640x480 with a preset's own sampler and steps."""
    model = on_device(config, precision, stacked=options.pop("stacked", True), kernels=options.pop("kernels", "eager"))
    width, height = NAMED_SIZE
    parts = recorded(model, batch, height, width, steps=config.steps, **options).parts
    if config.steps <= MAX_UNROLLED_STEPS:
        return parts[0]
    begin, step, end = parts
    # Before every step its numbers and its conditioning are put in place; noise is not counted.
    put = [Operation("copy_", 1, 0, 0, is_half=False)] * 2
    return [*begin, *(put + step) * config.steps, *end]


@dataclass(frozen=True, slots=True)
class Count:
    """One line of the committed table: a preset at 640x480 in bfloat16, its own steps, the fused picture alone.

    blocks: what they and the fusion module run on, torch's kernels ("eager") or ours ("triton").
    """

    preset: str
    batch: int
    blocks: KernelChoice
    kernels: int
    gigabytes: float


def count(preset: str, batch: int, blocks: KernelChoice) -> Count:
    """What the code asks for now."""
    demand = Demand.of(run_operations(PRESETS[preset], batch, outputs=FUSED, kernels=blocks))
    return Count(preset, batch, blocks, demand.kernels, round(demand.num_bytes / 1e9, 2))


def table() -> list[Count]:
    """What the code asked for when the table was written."""
    return [Count(**line) for line in json.loads(TABLE.read_text(encoding="utf-8"))]


def write_table() -> list[Count]:
    """Count again, for whoever changes what a run asks for: `python -m benchmarks.simulated_gpu`."""
    made = list(itertools.starmap(count, itertools.product(("compact", "paper"), TABLE_BATCHES, BLOCKS)))
    TABLE.write_text(json.dumps([asdict(row) for row in made], indent=2) + "\n", encoding="utf-8")
    return made


# --- what a capture may not hold --------------------------------------------------------------------------------------

SMALL_SIZE = (50, 70)  # height, width; padded on both sides
SMALL_TILES = TilingConfig(max_pixels=64 * 64, tile=64, overlap=32)

Way = tuple[Precision, bool, KernelChoice]  # the second: stacked or not
WAYS: tuple[Way, ...] = (
    ("bfloat16", True, "eager"),
    ("bfloat16", True, "triton"),
    ("bfloat16", False, "triton"),
    ("bfloat16", False, "eager"),
    ("float32", True, "eager"),
)


def small(preset: str) -> ModelConfig:
    """A preset with one block where it has many: what blocks do they do alike."""
    config = PRESETS[preset]
    levels = (1,) * len(config.denoiser.encoder_blocks)
    denoiser = replace(config.denoiser, encoder_blocks=levels, middle_blocks=1, decoder_blocks=levels)
    return replace(config, denoiser=denoiser)


def all_captures() -> Iterator[tuple[str, Capture]]:
    """Every kind of run that may be recorded, with its name: of both presets, three steps each."""
    for preset, (precision, stacked, kernels) in itertools.product(PRESETS, WAYS):
        model = on_device(small(preset), precision, stacked=stacked, kernels=kernels)
        exposures: tuple[Exposure, ...] = ("as_shot", "as_shot") if model.exposure is None else ("as_shot", "lit")
        for sampler, outputs, levels in itertools.product(
            SAMPLERS, (FUSED, ("vis",), ("ir",), ALL_OUTPUTS), (True, False)
        ):
            way = f"{precision} {'stacked' if stacked else 'apart'} {kernels}"
            name = f"{preset} {way} {sampler} {'+'.join(outputs)} {levels=}"
            options: dict[str, Any] = {"sampler": sampler, "steps": 3, "outputs": outputs, "levels": levels}
            yield name, captured(model, 2, *SMALL_SIZE, **options, exposure=exposures[levels])
            if outputs == ALL_OUTPUTS:
                yield f"{name} tiled", captured(model, 1, 64, 96, **options, tiling=SMALL_TILES)
                yield f"{name} long", captured(model, 2, *SMALL_SIZE, **options, is_long=True)
                yield f"{name} partial", captured(model, 2, *SMALL_SIZE, **options, is_partial=True)


# --- what is left to the host -----------------------------------------------------------------------------------------


class HostRecorder(SimulatedRecorder):
    """Leaves out what a GPU does by itself, runs and transfers; so what is left is the host's work."""

    def upload(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """See Recorder."""

    def run(self, work: Callable[[], None]) -> None:
        """See Recorder."""

    def download(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Callable[[], None]:
        """See Recorder. The last result says whether all is finite."""
        pairs[-1][0].fill_(True)
        return lambda: None


class HostWork(NamedTuple):
    """Processor time of the model's thread for a batch of 640x480 through the service's engine, least of some runs.

    Frames are put together, staged, and made pictures of; what a GPU would do meanwhile takes no time.
    copying_ms: what copying as many bytes as the frames have takes in between, which is the floor.
    """

    ms: float
    copying_ms: float


def host_work(batch: int = 8, repeats: int = 15) -> HostWork:
    """See HostWork."""
    from service.terms.jobs import FusionOptions
    from service.terms.settings import EngineSettings
    from service.work.engine import PassOptions
    from service.work.torch_engine import TorchEngine

    with DEVICE:
        model = build_model(small("compact")).eval()
    engine = TorchEngine(EngineSettings())
    engine._runtime = Runtime(
        model, precision="bfloat16", graphs=True, stacked=True, recorder=HostRecorder(), batch_sizes=(batch,)
    )
    options = PassOptions.of(FusionOptions(), engine.info)
    width, height = NAMED_SIZE
    vis = [np.full((height, width, 3), item, np.uint8) for item in range(batch)]
    ir = [np.full((height, width), item, np.uint8) for item in range(batch)]
    source = np.ones(sum(frame.nbytes for frame in (*vis, *ir)), np.uint8)
    target = np.zeros_like(source)

    def spent_on(work: Callable[[], object]) -> float:
        started = time.thread_time()
        work()
        return time.thread_time() - started

    with simulation():
        engine._runtime.record([(batch, height, width)], outputs=FUSED, levels=True, exposure=options.exposure)
        spent = [
            (
                spent_on(lambda: engine.start(vis, ir, options, [0] * batch)()),
                spent_on(lambda: np.copyto(target, source)),
            )
            for _ in range(repeats)
        ]
    return HostWork(*(1e3 * min(each) for each in zip(*spent, strict=True)))


# --- the command ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Row:
    """One run at 640x480 on a card that is not there. floor_ms as in benchmarks/engine.py, at the maker's figures.

    form: the branches stacked or apart on torch's kernels, or stacked on ours ("kernels").
    """

    preset: str
    batch: int
    outputs: str
    form: str
    operations: int
    kernels: int
    gigabytes: float
    gigaflops: float
    floor_ms: float
    launch_ms: float  # what launching alone takes
    modelled_ms: float

    def text(self) -> str:
        """A line of the table."""
        return (
            f"{self.preset:8} {self.batch:>3}  {self.outputs:5} {self.form:7} "
            f"{self.operations:>6} {self.kernels:>7} {self.gigabytes:>7.2f} {self.gigaflops:>7.0f} "
            f"{self.floor_ms:>8.2f} {self.launch_ms:>9.2f} {self.modelled_ms:>8.2f} "
            f"{1e3 * self.batch / self.modelled_ms:>8.0f}"
        )


HEADING = "preset batch outputs form      ops kernels      GB  GFLOP floor ms launch ms  model ms  pairs/s"


@dataclass(frozen=True, slots=True)
class Outcome:
    """All figures. flags: operations that no graph could hold. line: the last one said."""

    rows: list[Row]
    flags: list[str]
    line: str


def run(
    card: str,
    *,
    presets: Sequence[str] = ("compact", "paper"),
    is_quick: bool = False,
    json_path: Path | None = None,
    say: Callable[[str], None] = print,
) -> Outcome:
    """Model runs on a card; say one row at a time, and a summary as the last line. quick: few runs, and no captures."""
    model_of = CARDS[card]
    say(f"{card}, modelled: launches of {1e6 * LAUNCH_S:.0f} us, half of the maker's figures, {model_of.precision}")
    say(HEADING)
    rows, flags = [], []
    for preset in presets:
        for batch in TABLE_BATCHES if is_quick else BATCHES:
            for form in ("kernels", "stacked") if is_quick else ("kernels", "stacked", "apart"):
                for outputs in (FUSED,) if is_quick or form == "apart" else (FUSED, ALL_OUTPUTS):
                    rows.append(_row(model_of, preset, batch, outputs, form))
                    say(rows[-1].text())
    line = "; ".join(
        f"{row.preset} batch {row.batch} {row.form}: {row.kernels} kernels, {row.gigabytes:.1f} GB, "
        f"{row.modelled_ms:.1f} ms"
        for row in rows
        if row.batch in TABLE_BATCHES and row.form != "apart" and row.outputs == "fused"
    )
    host = host_work()
    line += (
        f"; {host.ms:.1f} ms of one thread of this host for a batch of 8, {host.copying_ms:.1f} for copying its bytes"
    )
    if not is_quick:
        num_captures = 0
        for name, found in all_captures():
            num_captures += 1
            flags += [f"{name}: {flag}" for flag in found.flags]
        for flag in flags:
            say(flag)
        line += f"; {num_captures} captures, {len(flags) or 'no'} operations that none may hold"
    line = f"engine modelled on {card}: {line}"
    if json_path is not None:
        document = {
            "card": asdict(model_of),
            "torch": torch.__version__,
            "rows": [asdict(row) for row in rows],
            "host_ms": host.ms,
            "host_copying_ms": host.copying_ms,
        }
        json_path.write_text(json.dumps({**document, "flags": flags, "line": line}, indent=2) + "\n", encoding="utf-8")
    say(line)
    return Outcome(rows, flags, line)


def _row(card: Card, preset: str, batch: int, outputs: tuple[OutputName, ...], form: str) -> Row:
    config = PRESETS[preset]
    kernels: KernelChoice = "triton" if form == "kernels" else "eager"
    operations = run_operations(
        config, batch, card.precision, outputs=outputs, stacked=form != "apart", kernels=kernels
    )
    demand = Demand.of(operations)
    is_half = card.precision != "float32"
    with DEVICE:
        bare = build_model(config).eval()
    width, height = NAMED_SIZE
    costs = count_costs(bare, height, width, 2 if is_half else 4)
    ceilings = Ceilings(card.half_flops_s if is_half else card.float_flops_s, card.bytes_s, card.precision)
    return Row(
        preset,
        batch,
        "all" if len(outputs) == len(ALL_OUTPUTS) else "+".join(outputs),
        form,
        demand.operations,
        demand.kernels,
        round(demand.num_bytes / 1e9, 3),
        round(demand.flops / 1e9, 1),
        round(1e3 * costs.floor_s(batch, config.steps, len(outputs), ceilings), 3),
        round(1e3 * LAUNCH_S * demand.kernels, 3),
        round(1e3 * sum(map(card.seconds, operations)), 3),
    )


if __name__ == "__main__":
    for line in write_table():
        name = f"{line.preset:8} batch {line.batch} {line.blocks:6}"
        print(f"{name}: {line.kernels:>6} kernels, {line.gigabytes:>6.2f} GB")
