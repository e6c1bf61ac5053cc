"""What a failure of torch or of the device means for whoever goes on afterwards.

torch has one class for the memory of its own allocator; whatever cuBLAS, cuDNN, graphs and the driver report comes as
a RuntimeError (its subclass AcceleratorError) that only its words tell apart.

What a newcomer would get wrong: after most errors of a kernel (an illegal address, an assertion, uncorrectable memory)
every later call of the process fails, too. CUDA calls them sticky; only a new process helps. An error is also reported
late, by whichever call comes next, so it says nothing about that call.
"""

import traceback
from enum import StrEnum

import torch


class Fault(StrEnum):
    """What may be done after an error."""

    MEMORY = "memory"  # too little of it; less work may fit
    CAPTURE = "capture"  # a run could not be recorded; the same run works unrecorded
    BROKEN = "broken"  # the device is lost to this process
    OTHER = "other"  # a fault of this run alone


OUT_OF_MEMORY = (
    "out of memory",  # CUDA's own word, also through torch.AcceleratorError
    "_STATUS_ALLOC_FAILED",  # cuBLAS, cuDNN, cuSPARSE
    "not enough memory",  # torch's CPU allocator, which has no class of its own
    "can't allocate memory",
)
NOT_RECORDED = ("captur", "cudaErrorStreamCapture")  # capture, capturing: CUDA's words and torch's
LOST = (
    "CUDA error",
    "CUDA driver error",
    "CUBLAS_STATUS_EXECUTION_FAILED",
    "CUBLAS_STATUS_INTERNAL_ERROR",
    "CUBLAS_STATUS_NOT_INITIALIZED",
    "CUDNN_STATUS_EXECUTION_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR",
)
# Errors of one call's arguments: CUDA reports them at once, and they leave the process as it was.
OF_ONE_CALL = ("invalid argument", "invalid configuration argument", "too many resources requested for launch")


def fault_of(error: BaseException) -> Fault:
    """What an error that came out of the model means."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return Fault.MEMORY
    if not isinstance(error, RuntimeError):
        return Fault.OTHER
    message = str(error).partition("\n")[0]  # advice, and perhaps a stack, follow
    if _has_any(message, OUT_OF_MEMORY):
        return Fault.MEMORY
    if _has_any(message, NOT_RECORDED):
        return Fault.CAPTURE
    if _has_any(message, LOST) and not _has_any(message, OF_ONE_CALL):
        return Fault.BROKEN
    return Fault.OTHER


def let_go(error: BaseException) -> None:
    """Release what the frames of a failed run hold: its tensors lie on the device for as long as the error is known."""
    seen: set[int] = set()
    one: BaseException | None = error
    while one is not None and id(one) not in seen:
        seen.add(id(one))
        traceback.clear_frames(one.__traceback__)
        one = one.__cause__ or one.__context__


def _has_any(message: str, words: tuple[str, ...]) -> bool:
    return any(word in message for word in words)
