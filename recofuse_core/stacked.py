"""Both denoising branches in one pass: what they do alike as batched products over (2, B, h, w, C)."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recofuse_core.errors import ConfigError
from recofuse_core.layers import NORM_EPS, GatedConvBlock
from recofuse_core.networks import Denoiser, DenoiserConfig, DualDenoiser, pad_to_multiple

StackedModulations = tuple[tuple[Tensor, Tensor, Tensor, Tensor], ...]


class StackedDenoiser(nn.Module):
    """Both branches of a `DualDenoiser` at once, on tensors (2, B, h, w, C): pointwise layers as batched products.

    It takes `dual` over: what is stacked is released there, so the branches can no longer be run one by one. Half the
    kernels, twice the work in each: it wins where launching or reading weights binds (a GPU), not on a CPU.
    """

    def __init__(self, dual: DualDenoiser) -> None:
        super().__init__()
        self.config: DenoiserConfig = dual.config
        self.branches = dual
        pair = (dual.vis, dual.ir)
        self.multiple = dual.vis.multiple
        self.encoders = nn.ModuleList(map(_stack_blocks, dual.vis.encoders, dual.ir.encoders))
        self.middle = _stack_blocks(dual.vis.middle, dual.ir.middle)
        self.decoders = nn.ModuleList(map(_stack_blocks, dual.vis.decoders, dual.ir.decoders))
        self.num_levels = len(dual.vis.downs)
        for level in range(self.num_levels):
            # A 2x2 convolution of stride 2 is a product over the four positions' channels: (row, column, channel).
            downs = [_conv(branch.downs[level]) for branch in pair]
            weight = torch.stack([conv.weight.permute(2, 3, 1, 0).flatten(0, 2) for conv in downs])
            self.register_buffer(f"down_weight{level}", weight.contiguous())
            self.register_buffer(f"down_bias{level}", _stacked_bias(downs))
            ups = [_conv(branch.ups[level]) for branch in pair]
            self.register_buffer(f"up_weight{level}", _stacked_weight(ups))
        for branch in pair:
            _release(branch)

    def conditioning(self, timesteps: Tensor) -> StackedModulations:
        """What one step for the whole batch, (1,), makes of every block: (scale1, shift1, scale2, shift2) stacked."""
        if len(timesteps) != 1:
            raise ConfigError("stacked branches take one time step for the whole batch")
        stacked = []
        for vis, ir in zip(*self.branches.conditioning(timesteps), strict=True):
            parts = (torch.stack([v, i])[:, None, None, None] for v, i in zip(_flat(vis), _flat(ir), strict=True))
            stacked.append(tuple(parts))
        return tuple(stacked)  # type: ignore[arg-type]  # four entries each

    def denoise(
        self, vis: Tensor, vis_mu: Tensor, ir: Tensor, ir_mu: Tensor, conditioning: StackedModulations
    ) -> tuple[Tensor, Tensor]:
        """See DualDenoiser.denoise."""
        height, width = vis.shape[-2:]
        modulations = iter(conditioning)
        intros = []
        for branch, x, mu in ((self.branches.vis, vis, vis_mu), (self.branches.ir, ir, ir_mu)):
            both = torch.cat([x - mu, mu], dim=1).to(branch.intro.weight.dtype)
            intros.append(branch.intro(pad_to_multiple(both, self.multiple, "constant")).permute(0, 2, 3, 1))
        first = x = torch.stack(intros)  # (2, B, h, w, C)
        kept = []
        for level in range(self.num_levels):
            x = _through(self.encoders[level], x, modulations)
            kept.append(x)
            x = self._down(x, level)
        x = _through(self.middle, x, modulations)
        for level in range(self.num_levels):
            x = _through(self.decoders[level], kept.pop() + self._up(x, level), modulations)
        x = x + first
        endings = (
            branch.ending(part.permute(0, 3, 1, 2))[..., :height, :width].float()
            for branch, part in zip((self.branches.vis, self.branches.ir), x, strict=True)
        )
        vis_out, ir_out = endings
        return vis_out, ir_out

    def _down(self, x: Tensor, level: int) -> Tensor:
        _, batch, height, width, channels = x.shape
        quads = x.view(2, batch, height // 2, 2, width // 2, 2, channels).transpose(3, 4)
        rows = quads.reshape(2, -1, 4 * channels)
        weight, bias = self.get_buffer(f"down_weight{level}"), self.get_buffer(f"down_bias{level}")
        return torch.baddbmm(bias, rows, weight).view(2, batch, height // 2, width // 2, -1)

    def _up(self, x: Tensor, level: int) -> Tensor:
        """1x1 convolution and pixel shuffle: a channel is (output channel, row, column)."""
        _, batch, height, width, channels = x.shape
        rows = torch.bmm(x.reshape(2, -1, channels), self.get_buffer(f"up_weight{level}"))
        quads = rows.view(2, batch, height, width, -1, 2, 2).permute(0, 1, 2, 5, 3, 6, 4)
        return quads.reshape(2, batch, 2 * height, 2 * width, -1)


class StackedBlock(nn.Module):
    """`GatedConvBlock` of both branches; the residual gains are folded into the last products."""

    def __init__(self, vis: GatedConvBlock, ir: GatedConvBlock) -> None:
        super().__init__()
        pair = (vis, ir)
        self.channels = vis.expand1.in_channels
        for name in ("expand1", "attention", "expand2"):
            convs = [getattr(block, name) for block in pair]
            self.register_buffer(f"{name}_weight", _stacked_weight(convs))
            self.register_buffer(f"{name}_bias", _stacked_bias(convs))
        for name, gain in (("project1", "beta"), ("project2", "gamma")):
            convs = [getattr(block, name) for block in pair]
            gains = torch.stack([getattr(block, gain).flatten() for block in pair])[:, None]
            self.register_buffer(f"{name}_weight", _stacked_weight(convs) * gains)
            self.register_buffer(f"{name}_bias", _stacked_bias(convs) * gains)
        self.register_buffer("depthwise_weight", torch.cat([block.depthwise.weight for block in pair]))
        biases = [block.depthwise.bias for block in pair]
        self.register_buffer("depthwise_bias", torch.cat([bias for bias in biases if bias is not None]))

    def forward(self, x: Tensor, modulation: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
        """x: (2, B, h, w, C). modulation: scale1, shift1, scale2, shift2, each (2, 1, 1, 1, C)."""
        scale1, shift1, scale2, shift2 = modulation
        _, batch, height, width, channels = x.shape
        u = torch.addcmul(shift1, F.layer_norm(x, (channels,), eps=NORM_EPS), scale1)
        wide = self._product(u.view(2, -1, channels), "expand1").view(2, batch, height, width, 2 * channels)
        planes = wide.permute(1, 0, 4, 2, 3).reshape(batch, 4 * channels, height, width)
        weight, bias = self.get_buffer("depthwise_weight"), self.get_buffer("depthwise_bias")
        mixed = F.conv2d(planes, weight, bias, padding=1, groups=4 * channels)
        halves = mixed.view(batch, 2, 2, channels, height, width)
        gated = halves[:, :, 0] * halves[:, :, 1]  # (B, 2, C, h, w)
        pooled = gated.mean(dim=(3, 4)).transpose(0, 1)  # (2, B, C)
        attention = self._product(pooled, "attention")[:, :, None, None]
        rows = (gated.permute(1, 0, 3, 4, 2) * attention).reshape(2, -1, channels)
        y = x + self._product(rows, "project1").view_as(x)
        v = torch.addcmul(shift2, F.layer_norm(y, (channels,), eps=NORM_EPS), scale2)
        left, right = self._product(v.view(2, -1, channels), "expand2").chunk(2, dim=-1)
        return y + self._product(left * right, "project2").view_as(y)

    def _product(self, rows: Tensor, name: str) -> Tensor:
        return torch.baddbmm(self.get_buffer(f"{name}_bias"), rows, self.get_buffer(f"{name}_weight"))


def _through(blocks: nn.Module, x: Tensor, modulations: Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]) -> Tensor:
    for block in blocks.children():
        x = block(x, next(modulations))
    return x


def _stack_blocks(vis: nn.Module, ir: nn.Module) -> nn.ModuleList:
    return nn.ModuleList(map(StackedBlock, vis.children(), ir.children()))  # type: ignore[arg-type]


def _release(branch: Denoiser) -> None:
    """Give back the memory of the weights that have been stacked."""
    for block in branch.blocks():
        for conv in (block.expand1, block.depthwise, block.attention, block.project1, block.expand2, block.project2):
            conv.to("meta")
    for conv in (*branch.downs, *branch.ups):
        conv.to("meta")


def _conv(module: nn.Module) -> nn.Conv2d:
    assert isinstance(module, nn.Conv2d)
    return module


def _stacked_weight(convs: Sequence[nn.Conv2d]) -> Tensor:
    """(2, in, out) of 1x1 convolutions."""
    return torch.stack([conv.weight.flatten(1).T for conv in convs]).contiguous()


def _stacked_bias(convs: Sequence[nn.Conv2d]) -> Tensor:
    """(2, 1, out)."""
    return torch.stack([conv.bias for conv in convs if conv.bias is not None])[:, None]


def _flat(modulations: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]) -> tuple[Tensor, ...]:
    return (*modulations[0], *modulations[1])
