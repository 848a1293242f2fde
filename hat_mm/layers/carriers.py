"""Carrier tokens, which stand for the windows of a map (https://arxiv.org/abs/2306.06189).

Letters: B batch, C channels, w window size, c carrier size, nh nw windows along each axis.
"""

import torch
from torch import Tensor, nn

from .convs import Conv2d
from .windows import averaging_matrix, split_windows


class CarrierTokenizer(nn.Module):
    """Makes the carrier tokens of a map: a depthwise convolution, then average pooling.

    An axis of n windows of w tokens becomes c * n cells. As in the published model, the cells have
    stride ``w // c`` and the width that the last one needs to reach the end of the axis, so cells
    overlap more on larger maps.

    Args:
        dim: Channels C.
        window_size: Window size w.
        carrier_size: Carrier size c.
    """

    def __init__(self, dim: int, window_size: int, carrier_size: int) -> None:
        super().__init__()
        self.conv = Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.window_size = window_size
        self.carrier_size = carrier_size

    def forward(self, x: Tensor, num_windows: tuple[int, int]) -> Tensor:
        """Maps (B, C, nh * w, nw * w) to carriers in window order, (B * nh * nw, c * c, C)."""
        # As one matrix product per axis: with pooling kernels that depend on the size,
        # torch.compile recompiles for every size, and torch 2.13 then silently returns wrong
        # values.
        x = self.conv(x).permute(0, 2, 3, 1)
        rows, cols = (self.pooling(n, x) for n in num_windows)
        # The rows first, as one product for each image.
        x = cols @ (rows @ x.flatten(2)).unflatten(2, x.shape[2:])
        return split_windows(x, num_windows, self.carrier_size)

    def pooling(self, n: int, like: Tensor) -> Tensor:
        """The (c * n, n * w) matrix that averages an axis of n windows to its carriers."""
        size, cells = n * self.window_size, n * self.carrier_size
        stride = self.window_size // self.carrier_size
        width = size - (cells - 1) * stride
        start = stride * torch.arange(cells, device=like.device)
        return averaging_matrix(start, start + width, size, like.dtype)
