"""The fusion module (TIM) on our kernels: 26 launches, of which six are the convolutions of cuDNN and one attention."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recofuse_core.errors import ConfigError
from recofuse_core.kernels import fusion_operations as operations
from recofuse_core.layers import HEAD_MULTIPLE, ConvBlockAttention, context_square
from recofuse_core.networks import LatentFusion, NormActConv

Parts = list[Tensor]


class Moments(NamedTuple):
    """Rows (n, B, N, W), and what `tile_sums` says of them plus a bias (W), if they have none of their own."""

    rows: Tensor
    sums: Tensor
    bias: Tensor | None = None


class FusedLatentFusion(nn.Module):
    """`LatentFusion` for inference, with one time step for the whole batch.

    Biases of convolutions are added by what reads their results; both branches go through each kernel together,
    infrared first, as the time vector has them.
    """

    def __init__(self, block: LatentFusion) -> None:
        super().__init__()
        self.time = block.time
        self.uses_time = block.uses_time
        intro = block.intro
        self.width = intro.out_channels
        self.pool = block.vis_attention.pool
        asking = (block.vis_attention, block.ir_attention)
        self.head = -(-block.vis_attention.query.in_channels // HEAD_MULTIPLE) * HEAD_MULTIPLE
        self._keep_projection("query", *([attention.query] for attention in asking))
        self._keep_projection("context", *([attention.key, attention.value] for attention in asking))
        self.register_buffer("intro_weight", _last(intro.weight))
        self.register_buffer("intro_bias", _bias(intro))
        self.shared = _Stage([block.shared], [block.shared_attention])
        self.branches = _Stage(
            [block.ir_branch, block.vis_branch], [block.ir_branch_attention, block.vis_branch_attention]
        )
        self.heads = _Convolutions([block.ir_weight, block.vis_weight])
        self.register_buffer("nothing", intro.weight.new_zeros(1, 2, self.width))

    def _keep_projection(self, name: str, *of_each: list[nn.Conv2d]) -> None:
        """Pointwise layers of both attentions beside each other, each filled with zeros up to a whole head."""
        for kind in ("weight", "bias"):
            made = torch.stack([torch.cat([_filled(conv, kind, self.head) for conv in convs], -1) for convs in of_each])
            self.register_buffer(f"{name}_{kind}", made.contiguous())

    def conditioning(self, timesteps: Tensor) -> tuple[Tensor, ...]:
        """What one step, (1,), makes of both branches, shift and scale each, in one tensor (2, 2, width)."""
        if len(timesteps) != 1:
            raise ConfigError("the fused fusion module takes one time step for the whole batch")
        steps = timesteps if self.uses_time else torch.zeros_like(timesteps)
        return (self.time(steps).to(self.get_buffer("nothing").dtype).view(2, 2, self.width),)

    def fuse(self, vis: Tensor, ir: Tensor, conditioning: tuple[Tensor, ...]) -> Tensor:
        """See LatentFusion.fuse. conditioning: of this module, or of that one."""
        get = self.get_buffer
        channels, size = vis.shape[1], list(vis.shape[2:])
        modulation = torch.cat([part.flatten() for part in conditioning]) if len(conditioning) > 1 else conditioning[0]
        square = context_square(self.pool, *size)
        query = operations.project(vis, ir, get("query_weight"), get("query_bias"), 1, False)
        context = operations.project(vis, ir, get("context_weight"), get("context_bias"), square, True)
        key, value = context.flatten(0, 1)[:, None].chunk(2, dim=-1)  # (2 B, 1, M, head)
        mixed = F.scaled_dot_product_attention(query.flatten(0, 1)[:, None], key, value, scale=channels**-0.5)
        rows = operations.beside(mixed.view_as(query), vis, ir)
        rows = convolved(rows, get("intro_weight"), size)
        sums = operations.tile_sums(rows, get("intro_bias"))
        x = self.shared(Moments(rows[None], sums, get("intro_bias")), get("nothing"), size)
        x = self.branches(x, modulation.view(2, 2, -1), size)
        of_ir, of_vis = self.heads(x, size)
        fused: Tensor = operations.weigh(of_ir, of_vis, self.heads.get_buffer("bias"), vis, ir)
        return fused


class _Convolutions(nn.Module):
    """`NormActConv` of every branch, its bias left for what follows."""

    def __init__(self, branches: list[NormActConv]) -> None:
        super().__init__()
        norms, convs = [], []
        for branch in branches:
            norm, _, conv = branch
            assert isinstance(norm, nn.GroupNorm)
            assert isinstance(conv, nn.Conv2d)
            norms.append(norm)
            convs.append(conv)
        self.groups, self.eps = norms[0].num_groups, norms[0].eps
        self.register_buffer("gain", torch.stack([norm.weight for norm in norms]))
        self.register_buffer("shift", torch.stack([norm.bias for norm in norms]))
        self.register_buffer("bias", torch.stack([_bias(conv) for conv in convs]))
        self.register_buffer("none", torch.zeros_like(self.get_buffer("gain")))
        self.num_branches = len(branches)
        for index, conv in enumerate(convs):
            self.register_buffer(f"weight{index}", _last(conv.weight))

    def forward(self, x: Moments, size: list[int]) -> Parts:
        """The branches' rows (B, N, D)."""
        gain, shift = self.get_buffer("gain"), self.get_buffer("shift")
        bias = self.get_buffer("none") if x.bias is None else x.bias.expand_as(gain).contiguous()
        num_rows = x.rows.shape[2]
        coefficients = operations.norm_coefficients(x.sums, gain, shift, bias, self.groups, self.eps, num_rows)
        active = operations.norm_silu(x.rows, coefficients)
        return [convolved(active[index], self.get_buffer(f"weight{index}"), size) for index in range(self.num_branches)]


class _Stage(nn.Module):
    """Norm, SiLU and convolution, modulation, and CBAM, of every branch."""

    def __init__(self, branches: list[NormActConv], attentions: list[ConvBlockAttention]) -> None:
        super().__init__()
        self.convolutions = _Convolutions(branches)
        self.register_buffer("squeeze", torch.stack([a.squeeze.weight.flatten(1).mT for a in attentions]).contiguous())
        self.register_buffer("excite", torch.stack([a.excite.weight.flatten(1).mT for a in attentions]).contiguous())
        self.register_buffer("spatial", torch.stack([a.spatial.weight[0] for a in attentions]).contiguous())
        self.register_buffer("offset", torch.cat([_bias(a.spatial) for a in attentions]))

    def forward(self, x: Moments, modulation: Tensor, size: list[int]) -> Moments:
        get = self.get_buffer
        parts = self.convolutions(x, size)
        modulated = (parts, self.convolutions.get_buffer("bias"), modulation)
        pools = operations.channel_pools(*modulated)
        attention = operations.channel_attention(pools, get("squeeze"), get("excite"), size[0] * size[1])
        maps = operations.spatial_maps(*modulated, attention)
        return Moments(*operations.spatial_gate(*modulated, attention, maps, get("spatial"), get("offset"), *size))


def convolved(rows: Tensor, weight: Tensor, size: list[int]) -> Tensor:
    """A 3x3 convolution without bias of rows (B, N, C) of frames of a size: (B, N, D)."""
    images = rows.view(len(rows), *size, -1).permute(0, 3, 1, 2)  # channels last
    return F.conv2d(images, weight, padding=1).permute(0, 2, 3, 1).flatten(1, 2).contiguous()


def _filled(conv: nn.Conv2d, kind: str, width: int) -> Tensor:
    """(C, width) of a pointwise layer's weight, or (width) of its bias."""
    part = conv.weight.flatten(1).mT if kind == "weight" else _bias(conv)
    return F.pad(part, (0, width - part.shape[-1]))


def _last(weight: Tensor) -> Tensor:
    return weight.detach().contiguous(memory_format=torch.channels_last)


def _bias(conv: nn.Conv2d) -> Tensor:
    assert conv.bias is not None, "every layer here has a bias"
    return conv.bias.detach()
