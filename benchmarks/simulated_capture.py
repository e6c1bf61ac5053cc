"""What a recorded run would ask of a GPU, seen by a dispatch mode, and what no recording may hold.

The model lies on torch's meta device, which knows shapes and layouts, holds no data, and stands for the GPU here; the
host's tensors are on the CPU as ever. Between the two nothing may pass in a recording: no copy, no value that the host
waits for, no tensor of the host in an operation of the device (numbers without dimensions go along as arguments).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from recofuse_core.model import PRESETS, ModelConfig
from recofuse_core.recording import EagerRecorder, Results

DEVICE = torch.device("meta")

# The device's answer is needed before the host can go on.
WAITS = frozenset({"_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal", "unique_dim", "_unique2"})
COPIES = frozenset({"_to_copy", "copy_"})
WHOLE = frozenset({"scaled_dot_product_attention", "upsample_bilinear2d"})  # one kernel on a GPU, but not here
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
    **dict.fromkeys(("channel_attention", "spatial_maps", "weigh"), lambda args: 0),
    **dict.fromkeys(("unshuffled", "luma_cells", "ranked", "paint"), lambda args: 0),
    "spatial_gate": lambda args: 2 * args[4].numel() * args[5][0, 0].numel(),
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
        if name not in WHOLE and _is_composite(func):
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
        if name == "upsample_bilinear2d":
            images, size = args[:2]
            layout = suggest_memory_format(images)
            return torch.empty(*images.shape[:2], *size, dtype=images.dtype, device=images.device, memory_format=layout)
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


@contextlib.contextmanager
def simulation() -> Iterator[None]:
    """`torch.autocast` knows no meta device; the models only ever turn it off."""
    autocast = torch.autocast
    torch.autocast = lambda *arguments, **options: contextlib.nullcontext()  # type: ignore[assignment, misc]
    try:
        yield
    finally:
        torch.autocast = autocast  # type: ignore[misc]


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


def small(preset: str) -> ModelConfig:
    """A preset with one block where it has many: what blocks do they do alike."""
    config = PRESETS[preset]
    levels = (1,) * len(config.denoiser.encoder_blocks)
    denoiser = replace(config.denoiser, encoder_blocks=levels, middle_blocks=1, decoder_blocks=levels)
    return replace(config, denoiser=denoiser)
