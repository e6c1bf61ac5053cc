"""The networks in the form in which other runtimes are fast: what the trained ones compute, written differently.

Runtimes for processors keep the channels of a frame in blocks, and every layer that cannot work on blocks makes them
copy all of it twice. So a block of ours is written in what does: convolutions, and products of equal shapes. A gate's
halves are layers of their own, since nothing splits blocks. A norm over channels is two 1x1 convolutions to one
channel, for the mean and the mean square, and one back; its mean is taken out and its gain brought in by the weights
of the convolution behind it, and the residual gains by those of the last one, whose sum with the input is then free.

All of that is made of the trained parameters in the graph itself, under their own names: a runtime computes it once
when it loads the graph, and the weights stay those of the checkpoint.
"""

import copy

from torch import Tensor, nn
from torch.nn import functional as F

from recofuse_core.layers import NORM_EPS, GatedConvBlock, Modulation
from recofuse_core.model import ReCoFuse
from recofuse_core.networks import Denoiser, GatedAutoencoder


class PortableBlock(nn.Module):
    """A `GatedConvBlock` written for other runtimes; it takes the block's parameters over under their names.

    is_step_fixed: whether what modulates the norms is known when the graph is loaded, so that it goes into the weights
    as well. Where it is not, a norm is a layer norm, whose gain and bias may be computed. is_entered: whether what
    comes before does not keep its channels in blocks.
    """

    def __init__(self, block: GatedConvBlock, *, is_step_fixed: bool, is_entered: bool = False) -> None:
        super().__init__()
        self.is_step_fixed = is_step_fixed
        self.is_entered = is_entered
        self.channels = block.expand1.in_channels
        for name, module in block.named_children():
            self.add_module(name, module)
        self.beta, self.gamma = block.beta, block.gamma
        self.modulation = block.modulation

    def forward(self, x: Tensor, modulation: tuple[Modulation, Modulation] | None = None) -> Tensor:
        """See GatedConvBlock. modulation: of one step for the whole batch."""
        if self.is_entered:
            x = F.max_pool2d(x, 1)  # x itself, in blocks: without a layer that makes them, sums with it have none
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
        return x * self._reciprocal_std(x), weight - weight.mean(dim=1, keepdim=True), bias

    def _reciprocal_std(self, x: Tensor) -> Tensor:
        """1 / sqrt(variance over the channels + eps), in as many channels as x."""
        average = x.new_full((1, self.channels, 1, 1), 1 / self.channels)
        mean, square = F.conv2d(x, average), F.conv2d(x * x, average)
        variance = (square - mean * mean).clamp(min=0.0)  # rounding may leave it below
        return F.conv2d((variance + NORM_EPS).rsqrt(), x.new_ones(self.channels, 1, 1, 1))

    def _depthwise(self, x: Tensor, channels: slice) -> Tensor:
        conv: nn.Conv2d = self.get_submodule("depthwise")  # type: ignore[assignment]
        return F.conv2d(x, conv.weight[channels], _bias(conv)[channels], padding=1, groups=self.channels)

    def _projected(self, x: Tensor, name: str, gain: Tensor) -> Tensor:
        conv: nn.Conv2d = self.get_submodule(name)  # type: ignore[assignment]
        return F.conv2d(x, conv.weight * gain.view(-1, 1, 1, 1), _bias(conv) * gain.flatten())


class PortableAutoencoder(GatedAutoencoder):
    """A `GatedAutoencoder` that takes the layers of another over, under their names."""

    def __init__(self, autoencoder: GatedAutoencoder) -> None:
        nn.Module.__init__(self)
        for name, module in autoencoder.named_children():
            self.add_module(name, module)

    def stemmed(self, image: Tensor) -> Tensor:
        """See GatedAutoencoder: as one convolution of the image, since runtimes move every pixel on its own else."""
        factor, (out, _, rows, columns) = self.stem_factor, self.stem.weight.shape
        weight = self.stem.weight.view(out, -1, factor, factor, rows, columns).permute(0, 1, 4, 2, 5, 3)
        weight = weight.reshape(out, -1, rows * factor, columns * factor)
        return F.conv2d(image, weight, self.stem.bias, stride=factor, padding=factor)


def portable_copy(model: ReCoFuse, *, is_step_fixed: bool) -> ReCoFuse:
    """A model for export alone, its blocks written for other runtimes; `model` stays as it is and keeps its memory."""
    memo = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}  # shared, not copied
    portable = copy.deepcopy(model, memo).requires_grad_(False).eval()
    entered = _after_shuffles(portable, is_step_fixed)
    for module in list(portable.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, GatedConvBlock):
                block = PortableBlock(child, is_step_fixed=is_step_fixed, is_entered=id(child) in entered)
                setattr(module, name, block)
            elif isinstance(child, GatedAutoencoder):
                setattr(module, name, PortableAutoencoder(child))
    return portable


def _after_shuffles(model: ReCoFuse, is_step_fixed: bool) -> set[int]:
    """The ids of the blocks that a pixel shuffle comes before; not of those whose norms leave the blocks anyhow."""
    levels: list[nn.Module] = []
    for module in model.modules():
        if isinstance(module, Denoiser) and is_step_fixed:
            levels += module.decoders
        elif isinstance(module, GatedAutoencoder):
            levels.append(module.decoder_quarter)
    return {id(block) for level in levels for block in list(level.children())[:1]}


def _bias(conv: nn.Conv2d) -> Tensor:
    assert conv.bias is not None
    return conv.bias
