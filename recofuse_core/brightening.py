"""Brightening: a dark thermogram beside a night that was lit.

Lighting brings a night up to what a photograph of it would show. Infrared that is dark but for a few hot places is
hidden behind that: of a warm man the face stays bright and his clothes are black, and trees and houses that infrared
alone shows are gone. So it is made brighter for the fused picture, as much as it is dark and as far as the visible
frame was lit. Days stay as they are, and so do the levels of the restored infrared picture, for which the curve is
undone. How much that is, `recofuse_core.exposure` says; nothing here needs torch. docs/decisions/0046 tells how well.
"""

from typing import Any, NamedTuple


class Brightening(NamedTuple):
    """A curve for each infrared frame of a batch: x (1 + a) / (1 + a x), from black to black and from white to white.

    amount: a, (B, 1, 1, 1), 0 or more, of torch or numpy, as are the frames. lit: how far the visible frame is a night
    that was lit, the same, 0 to 1.
    """

    amount: Any
    lit: Any

    def __call__(self, ir: Any) -> Any:
        """Infrared frames (B, C, H, W) in [0, 1] to brighter ones."""
        raised = self.amount * ir
        return (ir + raised) / (1 + raised)

    def undone(self, brighter: Any) -> Any:
        """What it was given, of what it gave: (B, C, H, W) in [0, 1] to the same."""
        return brighter / (1 + self.amount * (1 - brighter))
