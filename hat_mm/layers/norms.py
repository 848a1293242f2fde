"""Norms of maps, and drop path."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from . import tracing

NormFactory = Callable[[int, float], nn.Module]
"""Makes the norm of a map from its channels and its eps."""


class DropPath(nn.Module):
    """Stochastic depth: zeroes a residual branch for random samples in training.

    A sample is an entry of the first axis: an image for (B, ...) input, a window for window tokens.
    Source: https://arxiv.org/abs/1603.09382.

    Args:
        rate: Probability that a sample is dropped, in [0, 1). Kept samples are scaled by
            1 / (1 - rate).
    """

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Drops samples of ``x``, a tensor of any shape with samples on its first axis."""
        if self.rate == 0 or not self.training:
            return x
        keep = 1 - self.rate
        mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep)
        return x * mask.div_(keep)

    def extra_repr(self) -> str:
        """Shows the rate in the module's printed form."""
        return f'rate={self.rate:g}'


def guard_group_norm(norm: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
    """Forward pre-hook of group norms that avoids a crash in their backward pass.

    On the CPU, torch 2.13 kills the process if a channels-last input needs no gradient, which is
    what a trainable norm after frozen layers gets.
    """
    [x] = args
    if torch.is_grad_enabled() and not x.requires_grad:
        return (x.clone(memory_format=torch.contiguous_format),)
    return None


class MapNorm(nn.GroupNorm):
    """Group norm with one group: normalizes each image over all its channels and pixels.

    Args:
        dim: Channels.
        eps: Added to the variance.
    """

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__(1, dim, eps)
        self.register_forward_pre_hook(guard_group_norm)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to the same shape."""
        return tracing.group_norm(x, self.weight, self.bias, self.eps)


class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of each pixel.

    Args:
        dim: Channels.
        eps: Added to the variance.
    """

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__(dim, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to the same shape, in channels last."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
