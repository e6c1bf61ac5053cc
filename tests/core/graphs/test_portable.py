"""The networks as they are written for other runtimes compute what the trained ones do."""

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from recofuse_core.checkpoint import load_pretrained
from recofuse_core.graphs.portable import portable_copy, turned
from tests.core.tiny import pairs


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("channels", [2, 5, 64])
def test_turned_channels_begin_with_their_sum_and_keep_their_squares(channels: int) -> None:
    x = noise(channels, 7)
    assert_close(turned(x)[0], x.sum(dim=0) / math.sqrt(channels))
    assert_close(turned(x).square().sum(dim=0), x.square().sum(dim=0))
    assert_close(turned(turned(x)), x)


def test_weights_that_read_and_write_turned_channels_do_what_they_did() -> None:
    first, second, x = noise(6, 4, 1, 1), noise(3, 6, 1, 1), noise(1, 4, 2, 2)
    through = torch.conv2d(torch.conv2d(x, first), second)
    assert_close(torch.conv2d(torch.conv2d(x, turned(first)), turned(second, dim=1)), through)


@torch.no_grad()
def test_the_autoencoder_is_that_of_the_shipped_weights() -> None:
    model = load_pretrained("compact")
    mine, expected = portable_copy(model, is_step_fixed=False).autoencoder, model.autoencoder
    vis, ir = pairs(2, 48, 64)
    encoded = expected.encode(vis), expected.encode(ir.expand(-1, 3, -1, -1))
    for image, (latent, skips) in zip((vis, ir), encoded, strict=True):
        assert_close(mine.encode(image), (latent, skips), atol=2e-5, rtol=1e-5)
    (latent, vis_skips), (_, ir_skips) = encoded
    skips = expected.fuse_skips(vis_skips, ir_skips)
    assert_close(mine.fuse_skips(vis_skips, ir_skips), skips, atol=1e-5, rtol=1e-5)
    image = expected.decode(latent, skips, (48, 64))
    assert_close(mine.decode(latent, skips, (48, 64)), image, atol=1e-5, rtol=1e-5)
