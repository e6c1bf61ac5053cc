"""Processes that train together: what they average, agree on and gather."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class ProcessGroup:
    """The processes that train together: torch.distributed's default group, or this process alone."""

    def __init__(self) -> None:
        is_shared = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if is_shared else 0
        self.size = dist.get_world_size() if is_shared else 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def average(self, tensors: list[Tensor]) -> None:
        """Replace tensors by their means over the group."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        flat /= self.size
        means = torch.split(flat, [tensor.numel() for tensor in tensors])
        for tensor, mean in zip(tensors, means, strict=True):
            tensor.copy_(mean.view_as(tensor))

    def of_first(self, value: float, device: torch.device) -> float:
        """The first process's value, so that all take the same decisions."""
        if self.size == 1:
            return value
        shared = torch.tensor([value], dtype=torch.float64, device=device)
        dist.broadcast(shared, src=0)
        return float(shared)

    def gather(self, state: Tensor) -> list[Tensor]:
        """The generator states of all processes, in the order of their ranks."""
        if self.size == 1:
            return [state]
        states: list[Any] = [None] * self.size
        dist.all_gather_object(states, state)
        return states
