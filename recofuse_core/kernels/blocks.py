"""The blocks of the networks that run on our kernels, each made of the ordinary one that it stands in for."""

import torch
from torch import Tensor, nn

from recofuse_core.kernels import operations
from recofuse_core.layers import NORM_EPS, GatedConvBlock, Modulation, gate
from recofuse_core.stacked import StackedBlock


class FusedBlock(nn.Module):
    """`StackedBlock` in four kernels, or six where its rows are wide."""

    def __init__(self, block: StackedBlock) -> None:
        super().__init__()
        self.channels = channels = block.channels
        depthwise = block.get_buffer("depthwise_weight")  # (n 2C, 1, 3, 3)
        self.branches = depthwise.shape[0] // (2 * channels)
        self.register_buffer("taps", depthwise.view(self.branches, 2 * channels, 9).mT.contiguous())
        self.register_buffer("taps_bias", block.get_buffer("depthwise_bias").view(self.branches, -1))
        for name in ("expand1", "attention", "project1", "expand2", "project2"):
            self.register_buffer(f"{name}_weight", block.get_buffer(f"{name}_weight"))
            self.register_buffer(f"{name}_bias", block.get_buffer(f"{name}_bias")[:, 0].contiguous())

    def forward(self, x: Tensor, modulation: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
        """x: (n, B, h, w, C). modulation: scale1, shift1, scale2, shift2, each of n times C numbers."""
        channels, height, width = self.channels, *x.shape[2:4]
        scale1, shift1, scale2, shift2 = (part.reshape(self.branches, channels) for part in modulation)
        get = self.get_buffer
        planes = x.contiguous().view(-1, height * width, channels)
        wide = operations.norm_product(
            planes.view(self.branches, -1, channels), scale1, shift1, *self._of("expand1"), NORM_EPS, False
        )
        gated, sums = operations.depthwise_gate(
            wide.view(-1, height * width, 2 * channels), get("taps"), get("taps_bias"), height, width
        )
        attention = operations.attend(sums, *self._of("attention"), height * width)
        if channels <= operations.WIDEST_WHOLE:
            names = ("project1", "expand2", "project2")
            weights, biases = zip(*map(self._of, names), strict=True)
            out = operations.finish(gated, attention, planes, weights, biases, scale2, shift2, NORM_EPS)
        else:
            y = operations.product_add(gated, attention, *self._of("project1"), planes)
            y = y.view(self.branches, -1, channels)
            v = operations.norm_product(y, scale2, shift2, *self._of("expand2"), NORM_EPS, True)
            out = operations.product_add(v, None, *self._of("project2"), y)
        whole: Tensor = out.view(x.shape)
        return whole

    def _of(self, name: str) -> tuple[Tensor, Tensor]:
        return self.get_buffer(f"{name}_weight"), self.get_buffer(f"{name}_bias")


class FusedConvBlock(nn.Module):
    """`GatedConvBlock` as a `FusedBlock` of one branch, with one time step for the whole batch, or none."""

    def __init__(self, block: GatedConvBlock) -> None:
        super().__init__()
        self.block = FusedBlock(StackedBlock(block))
        self.time_projection = block.time_projection
        self.norm1, self.norm2 = block.norm1, block.norm2
        gains = torch.stack([block.norm1.gain, block.norm2.gain]).to(block.expand1.weight.dtype)
        self.register_buffer("gains", gains)
        self.register_buffer("nothing", torch.zeros_like(gains[0]))

    def modulation(self, time: Tensor) -> tuple[Modulation, Modulation]:
        """See GatedConvBlock.modulation."""
        assert self.time_projection is not None, "this block was built without a time vector"
        projected = self.time_projection(gate(time)).to(self.get_buffer("gains").dtype)
        shift1, scale1, shift2, scale2 = projected.chunk(4, dim=1)
        return self.norm1.modulation(shift1, scale1), self.norm2.modulation(shift2, scale2)

    def forward(self, x: Tensor, modulation: tuple[Modulation, Modulation] | None = None) -> Tensor:
        """x: (B, C, h, w)."""
        gains, nothing = self.get_buffer("gains"), self.get_buffer("nothing")
        (scale1, shift1), (scale2, shift2) = modulation or ((gains[0], nothing), (gains[1], nothing))
        made: Tensor = self.block(x.permute(0, 2, 3, 1)[None], (scale1, shift1, scale2, shift2))
        return made[0].permute(0, 3, 1, 2)
