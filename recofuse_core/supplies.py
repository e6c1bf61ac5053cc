"""What all recorded runs of a model share and read where it lies: noise, conditioning, and the numbers of steps."""

import functools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from recofuse_core.model import Conditioning, ReCoFuse, noise_like
from recofuse_core.picture import FusionPlan
from recofuse_core.stepping import table


class NoiseCache:
    """The noise of seeds, drawn once and kept on the device: most requests name no seed, and so the same one."""

    def __init__(self, device: torch.device, max_bytes: int = 256 * 1024**2) -> None:
        self._device = device
        self._max_bytes = max_bytes
        self._drawn: OrderedDict[tuple[int, int, tuple[int, ...]], Tensor] = OrderedDict()  # used longest ago first

    def __call__(self, seed: int, count: int, shape: Sequence[int]) -> Tensor:
        """(count, 2, *shape): what `noise_like` draws for one item of `shape` (C, h, w), vis and ir."""
        key = (seed, count, tuple(shape))
        if key not in self._drawn:
            draw = noise_like([seed], torch.empty(1, *shape))
            self._keep(key, torch.stack([torch.cat(draw()) for _ in range(count)]).to(self._device))
        self._drawn.move_to_end(key)
        return self._drawn[key]

    def one_by_one(self, seeds: Sequence[int], count: int, shape: Sequence[int]) -> Iterator[dict[int, Tensor]]:
        """The same by draw: (2, *shape) for every seed, drawn when it is wanted. One new seed is kept, if it has room.

        What is drawn here is long: the seeds of a batch may be too much for the device at once.
        """
        different = list(dict.fromkeys(seeds))
        size = 4 * count * 2 * torch.Size(shape).numel()
        new = [seed for seed in different if (seed, count, tuple(shape)) not in self._drawn]
        kept = new[0] if new and size <= self._max_bytes else None
        sources = {seed: self._drawn_in_turn(seed, count, shape, keep=seed == kept) for seed in different}
        for _ in range(count):
            yield {seed: next(source) for seed, source in sources.items()}
        for source in sources.values():
            next(source, None)  # so that what is to be kept is

    def _drawn_in_turn(self, seed: int, count: int, shape: Sequence[int], *, keep: bool) -> Iterator[Tensor]:
        key = (seed, count, tuple(shape))
        if (known := self._drawn.get(key)) is not None:
            self._drawn.move_to_end(key)
            yield from known
            return
        draw = noise_like([seed], torch.empty(1, *shape))
        all_of_it: list[Tensor] = []
        for _ in range(count):
            drawn = torch.cat(draw()).to(self._device, non_blocking=True)
            if keep:
                all_of_it.append(drawn)
            yield drawn
        if keep:
            self._keep(key, torch.stack(all_of_it))

    def _keep(self, key: tuple[int, int, tuple[int, ...]], drawn: Tensor) -> None:
        self._drawn[key] = drawn
        while len(self._drawn) > 1 and num_bytes(self._drawn.values()) > self._max_bytes:
            self._drawn.popitem(last=False)


class ScheduleCache:
    """The conditioning of every time step that was asked for: at most T + 1 entries, for weights that never change.

    The tensors of an entry lie in one block, `packed`, so that another step is put in place by a single copy. Recorded
    runs read where they lie: no entry may go while a program lives.
    """

    ALIGNMENT = 128  # bytes; products and kernels want whole vectors

    def __init__(self, model: ReCoFuse) -> None:
        self._model = model
        self._made: dict[int, tuple[Tensor, Conditioning]] = {}

    def __call__(self, t: int) -> Conditioning:
        """The conditioning of step t for the whole batch."""
        return self._entry(t)[1]

    def packed(self, t: int) -> Tensor:
        """The bytes of it."""
        return self._entry(t)[0]

    def seen_in(self, block: Tensor) -> Conditioning:
        """What a copy of `packed` holds."""
        offsets = iter(self._offsets(self._entry(0)[1]))
        return _mapped(self._entry(0)[1], lambda like: _view(block, next(offsets), like))  # type: ignore[no-any-return]

    def _entry(self, t: int) -> tuple[Tensor, Conditioning]:
        if t not in self._made:
            made = self._model.condition(t)
            block = torch.cat([self._padded_bytes(tensor) for tensor in _leaves(made)])
            offsets = iter(self._offsets(made))
            self._made[t] = block, _mapped(made, lambda like: _view(block, next(offsets), like))
        return self._made[t]

    def _offsets(self, conditioning: Conditioning) -> Iterator[int]:
        offset = 0
        for tensor in _leaves(conditioning):
            yield offset
            offset += -(-num_bytes([tensor]) // self.ALIGNMENT) * self.ALIGNMENT

    def _padded_bytes(self, tensor: Tensor) -> Tensor:
        content = tensor.contiguous().flatten().view(torch.uint8)
        return torch.cat([content, content.new_zeros(-len(content) % self.ALIGNMENT)])


def _mapped(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A tree of tuples with every tensor changed."""
    if isinstance(tree, Tensor):
        return change(tree)
    parts = [_mapped(part, change) for part in tree]
    return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)


def _leaves(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
        return
    for part in tree:
        yield from _leaves(part)


def _view(block: Tensor, offset: int, like: Tensor) -> Tensor:
    return block[offset : offset + num_bytes([like])].view(like.dtype).view(like.shape)


class Tables:
    """The numbers of the steps of runs (stepping.py), on the device."""

    MAX_KEPT = 64

    def __init__(self, model: ReCoFuse, device: torch.device) -> None:
        self._of = functools.partial(table, model.sde, kind=model.config.denoiser.prediction)
        self._device = device
        self._made: OrderedDict[FusionPlan, Tensor] = OrderedDict()

    def __call__(self, plan: FusionPlan) -> Tensor:
        """(steps, numbers)."""
        if plan not in self._made:
            rows = self._of(sampler=plan.sampler, timesteps=plan.timesteps)
            self._made[plan] = torch.from_numpy(rows).to(self._device)
            while len(self._made) > self.MAX_KEPT:
                self._made.popitem(last=False)
        self._made.move_to_end(plan)
        return self._made[plan]


class Supplies:
    """What all programs of a model share."""

    def __init__(self, model: ReCoFuse, device: torch.device) -> None:
        self.conditions = ScheduleCache(model)
        self.noise = NoiseCache(device)
        self.tables = Tables(model, device)


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the elements of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
