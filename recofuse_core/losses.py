"""Training losses: restoration in the latent, fusion in the image, reorganisation of the autoencoder's features.

Images are RGB in [0, 1], (B, 3, H, W); luma and chroma follow BT.601 with the published factors (docs/model.md, 7).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F


def luma(image: Tensor) -> Tensor:
    """Y = 0.299 R + 0.587 G + 0.114 B. (B, 3, H, W) to (B, 1, H, W)."""
    if torch.compiler.is_exporting():  # one product instead of a copy of every channel
        shares = torch.tensor([[0.299, 0.587, 0.114]])
        return (shares @ image.flatten(2)).view(image.shape[0], 1, *image.shape[2:])
    red, green, blue = image[:, 0:1], image[:, 1:2], image[:, 2:3]
    return torch.lerp(torch.lerp(red, green, 0.587 / 0.886), blue, 0.114)  # 0.886 = 0.299 + 0.587; greys stay exact


def chroma(image: Tensor) -> Tensor:
    """[Cb; Cr] = [0.564 (B - Y); 0.713 (R - Y)]. (B, 3, H, W) to (B, 2, H, W)."""
    y = luma(image)
    return torch.cat([0.564 * (image[:, 2:3] - y), 0.713 * (image[:, 0:1] - y)], dim=1)


def sobel(y: Tensor) -> tuple[Tensor, Tensor]:
    """Horizontal and vertical Sobel responses, signed, with replicated borders. (B, 1, H, W) each."""
    kernel = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]], device=y.device, dtype=y.dtype)
    padded = F.pad(y, (1, 1, 1, 1), "replicate")
    return F.conv2d(padded, kernel[None, None]), F.conv2d(padded, kernel.T[None, None])


def matching_loss(estimate: Tensor, target: Tensor) -> Tensor:
    """L1, mean per sample and then over samples (the score-matching loss of IR-SDE in its maximum-likelihood form)."""
    return (estimate - target).abs().flatten(1).mean(dim=1).mean()


@dataclass(frozen=True)
class FusionWeights:
    """Weights of the fusion loss; the defaults are the published ones."""

    intensity: float = 1.0
    gradient: float = 6.0
    colour: float = 8.0


IntensityTarget = Literal["maximum", "mean"]
GradientTarget = Literal["maximum", "mean", "signed"]


@dataclass(frozen=True)
class FusionTargets:
    """What the fused image is compared with, from both sources; "maximum" is published, "mean" are ablations.

    The published gradient term compares absolute values, which any texture of the right strength meets: where the true
    one cannot be known, a made-up grid costs less than a smooth area. "signed" compares with the stronger gradient and
    its sign, which a made-up texture misses (docs/decisions/0012).
    """

    intensity: IntensityTarget = "maximum"
    gradient: GradientTarget = "maximum"


@dataclass(frozen=True)
class FusionTerms:
    """Weighted terms of the fusion loss, scalars."""

    intensity: Tensor
    gradient: Tensor
    colour: Tensor

    @property
    def total(self) -> Tensor:
        """Sum of the terms."""
        return self.intensity + self.gradient + self.colour


def log_error(image: Tensor, target: Tensor) -> Tensor:
    """Mean over images of log10 of the squared error, a tenth of the negative PSNR. (B, C, H, W) each.

    It gives every image an equal say, where L1 is ruled by the hard ones and lets dark and easy ones be damaged.
    """
    return log_errors(image, target).mean()


def log_errors(image: Tensor, target: Tensor) -> Tensor:
    """log10 of the squared error of each image, (B,). (B, C, H, W) each."""
    squared = (image - target).square().flatten(1).mean(dim=1)
    return torch.log10(squared + 1e-5)


def image_loss(image: Tensor, target: Tensor, log_weight: float) -> Tensor:
    """L1 plus `log_weight` times `log_error`."""
    return F.l1_loss(image, target) + log_weight * log_error(image, target)


def strongest(vis: Tensor, ir: Tensor) -> Tensor:
    """The picture that intensity and colour term aim at: the larger luma with the visible chroma. (B, 3, H, W) each."""
    y_vis = luma(vis)
    return vis + (torch.maximum(y_vis, luma(ir)) - y_vis)


def fusion_loss(
    fused: Tensor,
    vis: Tensor,
    ir: Tensor,
    weights: FusionWeights | None = None,
    targets: FusionTargets | None = None,
) -> FusionTerms:
    """The fused image should have the stronger intensity and gradient of both sources and the visible's colour.

    fused, vis, ir: (B, 3, H, W), ir with equal channels. The colour term uses vis alone: grey ir would desaturate.
    """
    weights, targets = weights or FusionWeights(), targets or FusionTargets()
    y, y_vis, y_ir = luma(fused), luma(vis), luma(ir)
    intensity = F.l1_loss(y, _target(y_vis, y_ir, targets.intensity))
    gradient = torch.zeros((), device=y.device)
    for ours, of_vis, of_ir in zip(sobel(y), sobel(y_vis), sobel(y_ir), strict=True):
        if targets.gradient == "signed":
            gradient = gradient + F.l1_loss(ours, torch.where(of_vis.abs() >= of_ir.abs(), of_vis, of_ir))
        else:
            gradient = gradient + F.l1_loss(ours.abs(), _target(of_vis.abs(), of_ir.abs(), targets.gradient))
    cb_cr, cb_cr_vis = chroma(fused), chroma(vis)
    colour = F.l1_loss(cb_cr[:, 0], cb_cr_vis[:, 0]) + F.l1_loss(cb_cr[:, 1], cb_cr_vis[:, 1])
    return FusionTerms(weights.intensity * intensity, weights.gradient * gradient, weights.colour * colour)


def _target(vis: Tensor, ir: Tensor, kind: IntensityTarget) -> Tensor:
    return torch.maximum(vis, ir) if kind == "maximum" else (vis + ir) / 2
