"""The model as one would write it first: what `recofuse bench engine` measures everything against.

The same weights and, but for rounding, the same pictures. Attention matrices are materialised, every norm is written
out, tensors are NCHW. What `Runtime` adds (half precision, schedules made once, stacked branches, recorded runs) is not
there either, because this is a `ReCoFuse` and is run as one. It stays a handful of subclasses without state of their
own, so that whatever changes in the networks changes in the baseline too.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from torch.nn import functional as F

from recofuse_core.layers import NORM_EPS, ChannelNorm, CrossAttention, LinearAttention, Modulation
from recofuse_core.model import ReCoFuse
from recofuse_core.networks import Rows, unit_range


class MaterialisedAttention(CrossAttention):
    """The softmax of an (h w) x (h w) matrix in memory."""

    def forward(self, query: Tensor, context: Tensor) -> Tensor:
        """See CrossAttention."""
        context = self.pooled(context)
        q, k, v = (part.flatten(2) for part in (self.query(query), self.key(context), self.value(context)))  # (B, C, n)
        weights = (q.transpose(1, 2) @ k * q.shape[1] ** -0.5).softmax(dim=-1)  # (B, n, n)
        mixed: Tensor = (v @ weights.transpose(1, 2)).view_as(query) + query
        return mixed


class WrittenNorm(ChannelNorm):
    """Mean and variance as two reductions, and every factor applied on its own."""

    def forward(self, x: Tensor, modulation: Modulation | None = None) -> Tensor:
        """See ChannelNorm."""
        variance = x.var(dim=1, unbiased=False, keepdim=True)
        y = (x - x.mean(dim=1, keepdim=True)) * (variance + NORM_EPS).rsqrt() * self.gain[:, None, None]
        return y if modulation is None else y * modulation.scale + modulation.shift

    def modulation(self, shift: Tensor, scale: Tensor) -> Modulation:
        """See ChannelNorm."""
        return Modulation((scale + 1)[:, :, None, None], shift[:, :, None, None])


class WrittenLinearAttention(LinearAttention):
    """The same, step by step, in float32 and as NCHW."""

    def forward(self, x: Tensor) -> Tensor:
        """See LinearAttention."""
        batch, _, height, width = x.shape
        q, k, v = self.to_qkv(x).view(batch, 3, self.HEADS, self.HEAD_DIM, height * width).unbind(1)
        q = q.softmax(dim=-2) * self.HEAD_DIM**-0.5
        context = k.softmax(dim=-1) @ (v / (height * width)).transpose(-1, -2)
        mixed = (context.transpose(-1, -2) @ q).reshape(batch, -1, height, width)
        attended: Tensor = self.out_norm(self.to_out(mixed))
        return attended


class PlainRows(Rows):
    """Of an image as NCHW."""

    def forward(self, image: Tensor, dtype: torch.dtype) -> Tensor:
        """See Rows."""
        pixels = unit_range(image.contiguous()) - self.middle
        return F.pixel_unshuffle(pixels, self.factor).to(dtype)


WRITTEN_OUT: dict[type, type] = {
    CrossAttention: MaterialisedAttention,
    ChannelNorm: WrittenNorm,
    LinearAttention: WrittenLinearAttention,
    Rows: PlainRows,
}


def straightforward(model: ReCoFuse, *, fused_attention: bool = False) -> ReCoFuse:
    """A copy of a model that computes the same the straightforward way, but for attention if asked."""
    plain = copy.deepcopy(model).requires_grad_(False).eval()
    for module in plain.modules():
        if type(module) in WRITTEN_OUT and not (fused_attention and type(module) is CrossAttention):
            module.__class__ = WRITTEN_OUT[type(module)]  # the subclasses above have no state of their own
    return plain.to(memory_format=torch.contiguous_format)  # type: ignore[no-any-return, call-overload]
