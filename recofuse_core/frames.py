"""What a runtime is given: images as one tensor, or frames by themselves as files and cameras have them.

Frames by themselves need not be stacked. They are copied once, to where a recorded run takes them from the host.
Letters: B frames, C channels, H and W size.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recofuse_core.errors import ShapeError
from recofuse_core.model import require_pair

Levels = NDArray[np.uint8]
Images = Tensor | Sequence[Levels] | Levels  # (B, C, H, W), or B of (H, W, C), or of (H, W) for one channel


def require_images(vis: Images, ir: Images) -> tuple[int, int, int]:
    """(B, H, W) of a valid pair; ShapeError otherwise, and for frames that differ."""
    return require_pair(_outline(vis), _outline(ir))


def are_levels(images: Images) -> bool:
    """Whether they are levels, not floats."""
    return not isinstance(images, Tensor) or images.dtype == torch.uint8


def is_on_host(images: Images) -> bool:
    """Whether the host can read them."""
    return not isinstance(images, Tensor) or images.device.type == "cpu"


def together(images: Images) -> Tensor:
    """All of them as one tensor (B, C, H, W), frames channel beside channel in memory."""
    if isinstance(images, Tensor):
        return images
    is_array = isinstance(images, np.ndarray) and images.flags.writeable  # torch dislikes what may not be written
    return _planes(torch.from_numpy(images if is_array else np.stack(list(images))))


def filled(images: Images, count: int) -> Images:
    """The last one appended `count` times."""
    if not count:
        return images
    if isinstance(images, Tensor):
        return torch.cat([images, images[-1:].expand(count, -1, -1, -1)])
    return [*images, *[images[-1]] * count]


def put(images: Images, buffer: Tensor) -> None:
    """Copy them into a buffer of the host (B, C, H, W): frames that lie as it does at the speed of memory."""
    if isinstance(images, Tensor):
        buffer.copy_(images)
        return
    for place, frame in zip(buffer.permute(0, 2, 3, 1).numpy(), images, strict=True):
        np.copyto(place, frame[..., None] if frame.ndim == 2 else frame)


def _outline(images: Images) -> Tensor:
    """A tensor of their shape and type, which may have no data."""
    if isinstance(images, Tensor):
        return images
    kinds = {(frame.shape, frame.dtype) for frame in images}
    if len(kinds) != 1:
        raise ShapeError(f"the frames of a batch must be alike, got {len(kinds)} kinds in {len(images)} frames")
    ((shape, dtype),) = kinds
    if dtype != np.uint8 or len(shape) not in (2, 3):
        raise ShapeError(f"frames must be uint8, (H, W, C) or (H, W), got {dtype} and {shape}")
    return _planes(torch.empty((len(images), *shape), dtype=torch.uint8, device="meta"))


def _planes(frames: Tensor) -> Tensor:
    """(B, H, W, C) or (B, H, W) to (B, C, H, W)."""
    return frames.unsqueeze(1) if frames.ndim == 3 else frames.permute(0, 3, 1, 2)
