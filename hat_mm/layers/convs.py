"""Convolutions whose gradients and results have the memory layout that others expect."""

import torch.nn.functional as F
from torch import Tensor, nn


class Conv2d(nn.Conv2d):
    """Convolution whose weight gets a gradient of its own strides, on maps of any memory layout.

    With the channels last, those of 1x1 and depthwise convolutions differ on axes of length 1, and
    DistributedDataParallel warns and copies them in every step.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to (B, C', H', W')."""
        # The gradient goes back through two reshapes, of which the second makes plain strides.
        weight = self.weight.flatten().view_as(self.weight)
        return self._conv_forward(x, weight, self.bias)


class PointwiseConv(nn.Conv2d):
    """1x1 convolution by a matrix product, whose result has its channels last in memory.

    Args:
        in_dim: Channels in.
        out_dim: Channels out.
    """

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__(in_dim, out_dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to (B, C', H, W)."""
        x = F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias)
        return x.permute(0, 3, 1, 2)
