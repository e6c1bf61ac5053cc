"""Errors of torch and CUDA by their words, and what a failed run holds."""

import gc
import weakref

import pytest
import torch

from recofuse_core.errors import NumericsError
from recofuse_core.faults import Fault, fault_of, let_go


class Held:
    """Stands for a tensor on a device."""


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), Fault.MEMORY),
        (MemoryError(), Fault.MEMORY),
        (RuntimeError("CUDA error: out of memory"), Fault.MEMORY),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), Fault.MEMORY),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: not enough memory"), Fault.MEMORY),
        (RuntimeError("CUDA error: operation not permitted when stream is capturing"), Fault.CAPTURE),
        (RuntimeError("CUDA error: operation failed due to a previous error during capture"), Fault.CAPTURE),
        (RuntimeError("Cannot copy between CPU and CUDA tensors during CUDA graph capture"), Fault.CAPTURE),
        (
            RuntimeError("CUDA error: operation would make the legacy stream depend on a capturing blocking stream"),
            Fault.CAPTURE,
        ),
        (RuntimeError("CUDA error: misaligned address\nC++ CapturedTraceback:\n#4 c10::Error"), Fault.BROKEN),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), Fault.BROKEN),
        (RuntimeError("CUDA error: device-side assert triggered"), Fault.BROKEN),
        (RuntimeError("CUDA error: uncorrectable ECC error encountered"), Fault.BROKEN),
        (RuntimeError("CUDA error: unspecified launch failure"), Fault.BROKEN),
        (RuntimeError("CUDA error: no kernel image is available for execution on the device"), Fault.BROKEN),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), Fault.BROKEN),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"), Fault.BROKEN),
        (RuntimeError("CUDA error: invalid configuration argument"), Fault.OTHER),
        (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), Fault.OTHER),
        (NumericsError("CUDA error: not really"), Fault.OTHER),
        (ValueError("out of memory"), Fault.OTHER),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_an_error_means(error: Exception, expected: Fault) -> None:
    assert fault_of(error) is expected


def test_an_error_lets_go_of_what_its_run_held() -> None:
    known: list[weakref.ref[Held]] = []

    def run(depth: int) -> None:
        held = Held()
        known.append(weakref.ref(held))
        if depth:
            run(depth - 1)
        raise RuntimeError("CUDA error: out of memory")

    def translated() -> None:
        try:
            run(3)
        except RuntimeError as error:
            raise ValueError("as another") from error

    gc.disable()
    try:
        try:
            translated()
        except ValueError as error:
            assert all(held() is not None for held in known)
            let_go(error)
            assert [held() for held in known] == [None] * 4
    finally:
        gc.enable()
