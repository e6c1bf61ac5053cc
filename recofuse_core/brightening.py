"""Brightening: a dark thermogram beside a night that was lit.

Lighting brings a night up to what a photograph of it would show. Infrared that is dark but for a few hot places is
hidden behind that: of a warm man the face stays bright and his clothes are black, and trees and houses that infrared
alone shows are gone. So it is made brighter for the fused picture, as much as it is dark and as far as the visible
frame was lit. Days stay as they are, and so do the levels of the restored infrared picture, for which the curve is
undone. docs/decisions/0046 tells how well.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

AIM = 0.18  # mean of an infrared frame that is bright enough
MOST = 2.0  # of the amount: blacks, and the noise in them, become three times as bright at most
LIT = (1.3, 2.0)  # how many times as bright the visible frame became: from where a night was lit, and certainly


class Brightening(NamedTuple):
    """A curve for each infrared frame of a batch: x (1 + a) / (1 + a x), from black to black and from white to white.

    amount: a, (B, 1, 1, 1), 0 or more, of torch or numpy, as are the frames.
    """

    amount: Any

    def __call__(self, ir: Any) -> Any:
        """Infrared frames (B, C, H, W) in [0, 1] to brighter ones."""
        raised = self.amount * ir
        return (ir + raised) / (1 + raised)

    def undone(self, brighter: Any) -> Any:
        """What it was given, of what it gave: (B, C, H, W) in [0, 1] to the same."""
        return brighter / (1 + self.amount * (1 - brighter))


def brightening(ir: Tensor, seen: Tensor, lit: Tensor) -> Brightening:
    """How much brighter infrared (B, 1, H, W) has to be beside `lit`, which was `seen` before, both (B, 3, H, W)."""
    level, before, after = (frames.mean(dim=(1, 2, 3), keepdim=True) for frames in (ir, seen, lit))
    wanted = ((AIM / level.clamp_min(1e-3) - 1) / (1 - AIM)).clamp(0.0, MOST)  # brings a frame of one level to the aim
    is_lit = ((after / before.clamp_min(1e-3) - LIT[0]) / (LIT[1] - LIT[0])).clamp(0.0, 1.0)
    return Brightening(wanted * is_lit)
