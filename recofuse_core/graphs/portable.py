"""The networks in the form in which other runtimes are fast: what the trained ones compute, written differently.

Runtimes for processors keep the channels of a frame in blocks, and every layer that cannot work on blocks makes them
copy all of it twice. So a block of ours is written in what does: convolutions, and products of equal shapes. A gate's
halves are layers of their own, since nothing splits blocks, and what reads two tensors behind one another is two layers
and their sum. A norm over channels is two 1x1 convolutions to one channel, for the mean and the mean square, and one
back; its mean is taken out and its gain brought in by the weights of the convolution behind it, and the residual gains
by those of the last one, whose sum with the input is then free.

Where all that reads and writes a stream of blocks is ours to write, its channels are turned (`turned`): the mean over
them is the first, and the norm needs no convolution for it.

All of that is made of the trained parameters in the graph itself, under their own names: a runtime computes it once
when it loads the graph, and the weights stay those of the checkpoint.
"""

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recofuse_core.layers import NORM_EPS, GatedConvBlock, Modulation, doubled_by
from recofuse_core.model import ReCoFuse
from recofuse_core.networks import Denoiser, GatedAutoencoder, Skips


class PortableBlock(nn.Module):
    """A `GatedConvBlock` written for other runtimes; it takes the block's parameters over under their names.

    is_step_fixed: whether what modulates the norms is known when the graph is loaded, so that it goes into the weights
    as well. Where it is not, a norm is a layer norm, whose gain and bias may be computed. is_entered: whether what
    comes before does not keep its channels in blocks. is_turned: whether it takes and gives its channels `turned`.
    """

    def __init__(
        self, block: GatedConvBlock, *, is_step_fixed: bool, is_entered: bool = False, is_turned: bool = False
    ) -> None:
        super().__init__()
        self.is_step_fixed = is_step_fixed
        self.is_entered = is_entered
        self.is_turned = is_turned
        self.channels = block.expand1.in_channels
        for name, module in block.named_children():
            self.add_module(name, module)
        self.beta, self.gamma = block.beta, block.gamma
        self.modulation = block.modulation

    def forward(self, x: Tensor, modulation: tuple[Modulation, Modulation] | None = None) -> Tensor:
        """See GatedConvBlock. modulation: of one step for the whole batch."""
        if self.is_entered:
            x = _in_blocks(x)
        first, second = modulation or (None, None)
        half = self.channels
        u, weight, bias = self._normed(x, "1", first)
        left, right = F.conv2d(u, weight[:half], bias[:half]), F.conv2d(u, weight[half:], bias[half:])
        u = self._depthwise(left, slice(0, half)) * self._depthwise(right, slice(half, 2 * half))
        attention: nn.Conv2d = self.get_submodule("attention")  # type: ignore[assignment]
        u = u * attention(u.mean(dim=(2, 3), keepdim=True))
        y = x + self._projected(u, "project1", self.beta)
        v, weight, bias = self._normed(y, "2", second)
        v = F.conv2d(v, weight[:half], bias[:half]) * F.conv2d(v, weight[half:], bias[half:])
        return y + self._projected(v, "project2", self.gamma)

    def _normed(self, x: Tensor, which: str, modulation: Modulation | None) -> tuple[Tensor, Tensor, Tensor]:
        """The norm's output as far as it is computed, and weight and bias of the convolution that ends it."""
        expand: nn.Conv2d = self.get_submodule(f"expand{which}")  # type: ignore[assignment]
        weight, bias = expand.weight, _bias(expand)
        if modulation is not None and not self.is_step_fixed:
            rows = F.layer_norm(x.permute(0, 2, 3, 1), (self.channels,), modulation.scale, modulation.shift, NORM_EPS)
            return rows.permute(0, 3, 1, 2), weight, bias
        gain: Tensor = self.get_parameter(f"norm{which}.gain") if modulation is None else modulation.scale
        if modulation is not None:
            bias = bias + (weight.flatten(1) * modulation.shift).sum(dim=1)
        weight = weight * gain[:, None, None]
        # The mean over the channels, which the weights take out: they sum to zero for every output.
        if self.is_turned:
            weight = turned(weight, dim=1) * _all_but_first(weight, self.channels)
        else:
            weight = weight - weight.mean(dim=1, keepdim=True)
        return x * self._reciprocal_std(x), weight, bias

    def _reciprocal_std(self, x: Tensor) -> Tensor:
        """1 / sqrt(variance over the channels + eps), in as many channels as x."""
        if self.is_turned:
            variance = F.conv2d(x * x, _all_but_first(x, self.channels) / self.channels)
        else:
            average = x.new_full((1, self.channels, 1, 1), 1 / self.channels)
            mean, square = F.conv2d(x, average), F.conv2d(x * x, average)
            variance = (square - mean * mean).clamp(min=0.0)  # rounding may leave it below
        return F.conv2d((variance + NORM_EPS).rsqrt(), x.new_ones(self.channels, 1, 1, 1))

    def _depthwise(self, x: Tensor, channels: slice) -> Tensor:
        conv: nn.Conv2d = self.get_submodule("depthwise")  # type: ignore[assignment]
        return F.conv2d(x, conv.weight[channels], _bias(conv)[channels], padding=1, groups=self.channels)

    def _projected(self, x: Tensor, name: str, gain: Tensor) -> Tensor:
        conv: nn.Conv2d = self.get_submodule(name)  # type: ignore[assignment]
        weight, bias = conv.weight * gain.view(-1, 1, 1, 1), _bias(conv) * gain.flatten()
        return F.conv2d(x, turned(weight), turned(bias)) if self.is_turned else F.conv2d(x, weight, bias)


class PortableAutoencoder(GatedAutoencoder):
    """A `GatedAutoencoder` that takes the layers of another over, under their names.

    Its images have whole sides. The streams at an eighth, and the decoder's at a quarter, are turned.
    """

    def __init__(self, autoencoder: GatedAutoencoder) -> None:
        nn.Module.__init__(self)
        for name, module in autoencoder.named_children():
            self.add_module(name, module)

    def encode(self, image: Tensor) -> tuple[Tensor, Skips]:
        """See GatedAutoencoder. An image of three equal channels may come as one."""
        skip = self.stemmed(image)
        for block in self.encoder_quarter:
            skip = block(skip)
        x = F.conv2d(skip, turned(self.down.weight), turned(_bias(self.down)), stride=2)
        for block in self.encoder_eighth:
            x = block(x)
        return F.conv2d(x, turned(self.to_latent.weight, dim=1), self.to_latent.bias), (skip,)

    def stemmed(self, image: Tensor) -> Tensor:
        """See GatedAutoencoder: as one convolution of the image, since runtimes move every pixel on its own else."""
        image = image - self.rows.middle
        factor, (out, _, rows, columns) = self.stem_factor, self.stem.weight.shape
        weight = self.stem.weight.view(out, -1, factor, factor, rows, columns).permute(0, 1, 4, 2, 5, 3)
        weight = weight.reshape(out, -1, rows * factor, columns * factor)
        if image.shape[1] == 1:
            weight = weight.sum(dim=1, keepdim=True)
        return F.conv2d(image, weight, self.stem.bias, stride=factor, padding=factor)

    def decode(self, latent: Tensor, skips: Skips, size: tuple[int, int]) -> Tensor:
        """See GatedAutoencoder."""
        x = F.conv2d(latent, turned(self.from_latent.weight), turned(_bias(self.from_latent)), padding=1)
        for block in self.decoder_eighth:
            x = block(x)
        quarter = self.skip_mix.out_channels
        wide = turned(self.up.weight, dim=1)  # four outputs for each channel that it is shuffled to
        x = doubled_by(x, turned(wide.view(quarter, -1)).view_as(wide))
        x, skip = _in_blocks(x), _in_blocks(skips[0])
        of_x, of_skip = self.skip_gate.weight.chunk(2, dim=1)
        trust = F.conv2d(x, turned(of_x, dim=1), self.skip_gate.bias, padding=1)
        trust = (trust + F.conv2d(skip, of_skip, padding=1)).sigmoid()
        of_x, of_skip = self.skip_mix.weight.chunk(2, dim=1)
        of_x = of_x + torch.eye(quarter)[:, :, None, None]  # x itself
        x = F.conv2d(x, turned(turned(of_x, dim=1)), turned(_bias(self.skip_mix)))
        x = x + F.conv2d(trust * skip, turned(of_skip))
        for block in self.decoder_quarter:
            x = block(x)
        pixels = F.conv2d(x, turned(self.head.weight, dim=1), self.head.bias, padding=1)
        return F.pixel_shuffle(pixels, 4)[..., : size[0], : size[1]] + 0.5

    def fuse_skips(self, vis: Skips, ir: Skips) -> Skips:
        """See GatedAutoencoder."""
        pair = [_in_blocks(skip) for skip in (vis[0], ir[0])]
        parts = []
        rows = zip(self.skip_fusion.weight.chunk(2), _bias(self.skip_fusion).chunk(2), strict=True)
        for skip, (weight, bias) in zip(pair, rows, strict=True):
            of_vis, of_ir = weight.chunk(2, dim=1)
            parts.append((F.conv2d(pair[0], of_vis, bias) + F.conv2d(pair[1], of_ir)).sigmoid() * skip)
        return (parts[0] + parts[1],)


def turned(weights: Tensor, dim: int = 0) -> Tensor:
    """Weights that read (dim 1) or write (dim 0) channels x as those that do so with the reflected Q x; the same back.

    Q mirrors at the plane between (1, ..., 1) and the first axis: (Q x)[0] is the sum over x by the root of their
    number, and squares sum to the same, so that what is left of them behind the first is the variance. Q Q = 1.
    """
    channels = weights.shape[dim]
    share = 1 / math.sqrt(channels)
    normal = torch.cat([torch.full((1,), 1 - share), torch.full((channels - 1,), -share)])  # of the plane
    normal = normal.view(-1, *(1,) * (weights.ndim - dim - 1))
    return weights - (weights * normal).sum(dim=dim, keepdim=True) * normal / (1 - share)


def portable_copy(model: ReCoFuse, *, is_step_fixed: bool) -> ReCoFuse:
    """A model for export alone, its blocks written for other runtimes; `model` stays as it is and keeps its memory."""
    memo = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}  # shared, not copied
    portable = copy.deepcopy(model, memo).requires_grad_(False).eval()
    entered = _after_doubling(portable) if is_step_fixed else set()  # norms leave the blocks anyhow where it is not
    turned_blocks = _turned_blocks(portable)
    for module in list(portable.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, GatedConvBlock):
                block = PortableBlock(
                    child,
                    is_step_fixed=is_step_fixed,
                    is_entered=id(child) in entered,
                    is_turned=id(child) in turned_blocks,
                )
                setattr(module, name, block)
            elif isinstance(child, GatedAutoencoder):
                setattr(module, name, PortableAutoencoder(child))
    return portable


def _turned_blocks(model: ReCoFuse) -> set[int]:
    """The ids of the blocks whose channels are turned: what reads or writes them is `PortableAutoencoder`'s own."""
    encoders = [module for module in model.modules() if isinstance(module, GatedAutoencoder)]
    levels = [level for it in encoders for level in (it.encoder_eighth, it.decoder_eighth, it.decoder_quarter)]
    return {id(block) for level in levels for block in level.children()}


def _after_doubling(model: ReCoFuse) -> set[int]:
    """The ids of a denoiser's blocks that doubled sides come before, which leaves no blocks of channels."""
    levels = [level for module in model.modules() if isinstance(module, Denoiser) for level in module.decoders]
    return {id(block) for level in levels for block in list(level.children())[:1]}


def _in_blocks(x: Tensor) -> Tensor:
    """The same: without a layer that makes blocks, sums and products with it have none."""
    return F.max_pool2d(x, 1)


def _all_but_first(like: Tensor, channels: int) -> Tensor:
    """Ones for every channel but the first, (1, channels, 1, 1)."""
    return torch.cat([like.new_zeros(1), like.new_ones(channels - 1)]).view(1, -1, 1, 1)


def _bias(conv: nn.Conv2d) -> Tensor:
    assert conv.bias is not None
    return conv.bias
