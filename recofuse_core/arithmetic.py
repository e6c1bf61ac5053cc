"""How a GPU computes what is float32: in float32.

Left alone, torch lets cuDNN round the operands of float32 convolutions to TF32 (10 bits of mantissa) on cards that have
it, which `paper` and the parts of a model that read and write pixels cannot afford. One setting is around every run,
recorded or not, so that both are one computation; what a program has set for itself is as before afterwards.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def full_float32(*, by_trial: bool = False) -> Iterator[None]:
    """No TF32 in products and convolutions within. by_trial: cuDNN tries its algorithms and keeps the fastest."""
    cudnn: Any = torch.backends.cudnn
    matmul: Any = torch.backends.cuda.matmul
    # torch knows the setting by two names, and refuses to say the older one where a program has used the newer alone.
    owners = [cudnn.conv, cudnn.rnn, matmul] if hasattr(cudnn, "conv") else []
    newer = [owner.fp32_precision for owner in owners]
    try:
        older = (cudnn.allow_tf32, matmul.allow_tf32)
    except RuntimeError:
        older = None
    benchmark = cudnn.benchmark
    if older is None:
        for owner in owners:
            owner.fp32_precision = "ieee"
    else:
        cudnn.allow_tf32 = matmul.allow_tf32 = False
    cudnn.benchmark = benchmark or by_trial
    try:
        yield
    finally:
        cudnn.benchmark = benchmark
        if older is not None:
            cudnn.allow_tf32, matmul.allow_tf32 = older
        for owner, precision in zip(owners, newer, strict=True):
            owner.fp32_precision = precision
