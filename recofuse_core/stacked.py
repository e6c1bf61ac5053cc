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
    kernels, twice the work in each: it wins where launching or reading weights binds (a GPU), not on a CPU. Nothing is
    differentiated here.
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
    """`GatedConvBlock` of both branches; the residual gains are folded into the last products.

    Its weights may be those of one branch, too, for what else runs such blocks (kernels/blocks.py).
    """

    def __init__(self, *pair: GatedConvBlock) -> None:
        super().__init__()
        self.channels = pair[0].expand1.in_channels
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

    @torch.no_grad()
    def forward(self, x: Tensor, modulation: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
        """x: (2, B, h, w, C). modulation: scale1, shift1, scale2, shift2, each (2, 1, 1, 1, C).

        Written for few kernels that move few bytes (benchmarks/kernels.json): biases ride on products, layouts change
        where something is written anyway, sums go into the result of an addition.
        """
        scale1, shift1, scale2, shift2 = modulation
        _, batch, height, width, channels = x.shape
        # The branches lie side by side at every position now, as one depthwise convolution over both wants them.
        beside = torch.cat(self._expanded(x, "expand1", scale1, shift1), dim=1)
        planes = beside.view(batch, height, width, 4 * channels).permute(0, 3, 1, 2)  # channels last
        weight, bias = self.get_buffer("depthwise_weight"), self.get_buffer("depthwise_bias")
        mixed = F.conv2d(planes, weight, bias, padding=1, groups=4 * channels)
        halves = mixed.permute(0, 2, 3, 1).reshape(batch, height, width, 2, 2, channels).permute(4, 3, 0, 1, 2, 5)
        gated = x.new_empty(x.shape)
        torch.mul(halves[0], halves[1], out=gated)
        pooled = gated.mean(dim=(2, 3))  # (2, B, C)
        attention = torch.baddbmm(self.get_buffer("attention_bias"), pooled, self.get_buffer("attention_weight"))
        y = x + self.get_buffer("project1_bias")[:, :, None, None]
        self._add_attended(y, gated, attention)
        sides = [rows.chunk(2, dim=1) for rows in self._expanded(y, "expand2", scale2, shift2)]
        rows = x.new_empty(2, y[0].numel() // channels, channels)
        for branch, (left, right) in enumerate(sides):
            torch.mul(left, right, out=rows[branch])
        out = y + self.get_buffer("project2_bias")[:, :, None, None]
        out.view(2, -1, channels).baddbmm_(rows, self.get_buffer("project2_weight"))
        return out

    def _expanded(self, x: Tensor, name: str, scale: Tensor, shift: Tensor) -> list[Tensor]:
        """Rows (B h w, 2C) of either branch: norm, modulation and product. Apart, since a norm has one gain a call."""
        shape = x.shape[-1:]
        made = []
        for branch, part in enumerate(x):
            rows = F.layer_norm(part, shape, scale[branch].flatten(), shift[branch].flatten(), NORM_EPS).flatten(0, 2)
            bias, weight = self.get_buffer(f"{name}_bias")[branch, 0], self.get_buffer(f"{name}_weight")[branch]
            made.append(torch.addmm(bias, rows, weight))
        return made

    def _add_attended(self, y: Tensor, gated: Tensor, attention: Tensor) -> None:
        """Add the product of (gated x attention) to y in place; both (2, B, h, w, C), attention (2, B, C)."""
        _, batch, height, width, channels = y.shape
        weight = self.get_buffer("project1_weight")
        if height * width > channels:  # every item's attention goes to the smaller side: here the weights
            weights = (attention[..., None] * weight[:, None]).flatten(0, 1)  # (2 B, C, C)
            y.view(2 * batch, -1, channels).baddbmm_(gated.view(2 * batch, -1, channels), weights)
        else:
            rows = (gated * attention[:, :, None, None]).view(2, -1, channels)
            y.view(2, -1, channels).baddbmm_(rows, weight)


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
