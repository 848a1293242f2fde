"""Convolutions whose gradients and outputs have the memory layout that other code expects."""

import torch.nn.functional as F
from torch import Tensor, nn


class Conv2d(nn.Conv2d):
    """Convolution whose weight and its gradient have equal strides, on maps of any memory layout.

    In channels last, PyTorch gives the gradients of 1x1 and depthwise weights other strides on axes
    of length 1; DistributedDataParallel then warns, and copies the gradients in every step.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to (B, C', H', W')."""
        weight: Tensor = self.weight
        if weight.requires_grad:
            # The gradient passes back through two reshapes; the second makes plain strides.
            weight = weight.flatten().view_as(weight)
        return self._conv_forward(x, weight, self.bias)


class PointwiseConv(nn.Conv2d):
    """1x1 convolution as a matrix product; its output is in channels last.

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
