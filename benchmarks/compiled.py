"""Our kernels, compiled for cards that are not here: `python -m benchmarks.compiled [PRESET] [CAPABILITY...]`.

Triton and NVIDIA's assembler need no card to compile, so this shows that every kernel of a preset at 640x480 compiles
for a compute capability, how many compilations a start waits for, what they cost the processor here, and whether their
shared memory is there on such a card. It does not show that they are right or fast.

Models lie on the meta device, as in simulated_gpu.py; an operation of ours runs its launches with nothing behind them.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

os.environ.pop("TRITON_INTERPRET", None)  # before anything imports Triton

import torch
import triton
from torch._library.custom_ops import CustomOpDef
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from benchmarks.simulated_capture import DEVICE, simulation
from benchmarks.simulated_gpu import on_device
from recofuse_core.kernels import fusion_operations, operations, picture_operations
from recofuse_core.model import PRESETS, ModelConfig
from recofuse_core.picture import ALL_OUTPUTS, OutputName
from recofuse_core.precision import FIRST_WITH_BFLOAT16, Precision
from recofuse_core.programs import ProgramKey, build_program
from recofuse_core.recording import EagerRecorder, Results
from recofuse_core.supplies import Supplies

# Bytes of shared memory that a block may have, by compute capability (CUDA's programming guide).
SHARED_BYTES = {
    (7, 5): 64 << 10,
    (8, 0): 163 << 10,
    (8, 6): 99 << 10,
    (8, 9): 99 << 10,
    (9, 0): 227 << 10,
    (10, 0): 227 << 10,
    (12, 0): 99 << 10,
}
Shape = tuple[int, int, int]  # batch, height, width
SHAPES: tuple[Shape, ...] = ((1, 480, 640), (8, 480, 640))
WISHES: tuple[tuple[OutputName, ...], ...] = (("fused",), ALL_OUTPUTS)


@dataclass(frozen=True, slots=True)
class Compiled:
    """One compilation. shape: that of the run which first asked for it. seconds: of the processor, or of a cache."""

    name: str
    shape: Shape
    seconds: float
    shared_bytes: int


class _Target:
    """Stands for Triton's driver: says for which card to compile, and no more."""

    def __init__(self, capability: tuple[int, int]) -> None:
        self._target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> Any:
        return self._target  # kernels are kept by device

    def get_current_stream(self, device: Any) -> int:
        return 0


class _Launching(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Has our operations make their launches, where the meta device has shapes alone."""

    OURS: ClassVar[dict[str, Callable[..., Any]]] = {
        entry._qualname: entry._init_fn
        for module in (operations, fusion_operations, picture_operations)
        for entry in vars(module).values()
        if isinstance(entry, CustomOpDef)
    }

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See TorchDispatchMode."""
        return self.OURS.get(func._schema.name, func)(*args, **(kwargs or {}))


class _Recorder(EagerRecorder):
    """Runs once."""

    def record(self, function: Callable[[], Results]) -> tuple[Callable[[], None], Results]:
        """See Recorder."""
        with _Launching():  # type: ignore[no-untyped-call]
            results = function()
        return lambda: None, results


def _processor_s() -> float:
    """Of this process and of those that it has waited for, the assembler."""
    of_others = os.times()
    return time.process_time() + of_others.children_user + of_others.children_system


@contextlib.contextmanager
def _compiling_for(capability: tuple[int, int]) -> Iterator[dict[int, tuple[str, float, int]]]:
    """Launches within compile for a card instead; what was compiled, by identity: name, seconds, shared memory."""
    made: dict[int, tuple[str, float, int]] = {}
    launch = JITFunction.run

    def compile_alone(self: Any, *args: Any, **options: Any) -> Any:
        started = _processor_s()
        kernel = launch(self, *args, **{**options, "warmup": True})
        made.setdefault(id(kernel), (self.__name__, _processor_s() - started, kernel.metadata.shared))
        return kernel

    triton.runtime.driver.set_active(_Target(capability))  # for good: there may be no other
    JITFunction.run = compile_alone
    try:
        yield made
    finally:
        JITFunction.run = launch


@torch.inference_mode()
def compiled(
    config: ModelConfig,
    capability: tuple[int, int],
    *,
    precision: Precision | None = None,
    shapes: Sequence[Shape] = SHAPES,
    wishes: Sequence[tuple[OutputName, ...]] = WISHES,
) -> list[Compiled]:
    """What runs of one step of some shapes and outputs make Triton compile for a card, in the order of the shapes.

    precision: bfloat16 unless given, float16 for cards without it.
    """
    half: Precision = "bfloat16" if capability >= FIRST_WITH_BFLOAT16 else "float16"
    model = on_device(config, precision or half, kernels="triton")
    found: list[Compiled] = []
    with simulation(), _compiling_for(capability) as made:
        for shape in shapes:
            for outputs in wishes:
                key = ProgramKey.of(model.plan(steps=1, outputs=outputs), *shape, levels=True)
                build_program(model, key, DEVICE, _Recorder(), Supplies(model, DEVICE))
            new = list(made.values())[len(found) :]
            found += [Compiled(name, shape, seconds, shared) for name, seconds, shared in new]
    return found


def told(capability: tuple[int, int], found: Sequence[Compiled]) -> tuple[bool, str]:
    """Whether all of it has room on such a card, and a line that says so."""
    room = SHARED_BYTES[capability]
    too_large = sorted({f"{each.name} ({each.shared_bytes})" for each in found if each.shared_bytes > room})
    largest = max(each.shared_bytes for each in found)
    line = (
        f"compute capability {capability[0]}.{capability[1]}: {len(found)} compilations, "
        f"{sum(each.seconds for each in found):.0f} s of one processor, shared memory at most {largest} of {room} bytes"
    )
    return not too_large, f"{line}; WITHOUT ROOM: {', '.join(too_large)}" if too_large else line


def main(arguments: Sequence[str]) -> int:
    """Compile for every card of the table or those named. Returns 0 if all compiles and fits, 2 for unknown words."""
    cards = {f"{major}.{minor}": (major, minor) for major, minor in SHARED_BYTES}
    if unknown := [word for word in arguments if word not in PRESETS and word not in cards]:
        accepted = f"a preset ({', '.join(PRESETS)}) nor a compute capability ({', '.join(cards)})"
        print(f"{', '.join(unknown)}: neither {accepted}", file=sys.stderr)
        return 2
    presets = [word for word in arguments if word in PRESETS] or list(PRESETS)
    named = [cards[word] for word in arguments if word in cards] or list(SHARED_BYTES)
    all_fit = True
    for preset in presets:
        for capability in named:
            fits, line = told(capability, compiled(PRESETS[preset], capability))
            all_fit &= fits
            print(f"{preset}, {line}", flush=True)
    return 0 if all_fit else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
