"""Convolutional parts: stem, block and down-sampler of FasterViT, inverted residual of HAT-Net.

Sources: https://arxiv.org/abs/2306.06189 and https://arxiv.org/abs/2106.03180. All maps are
(B, C, H, W).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .common import DropPath, LayerNorm2d, NormFactory, add, num_parts, predicts_on_cpu
from .deploy import Deployable, folded_norm


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


class ZeroPointwiseConv(nn.Module):
    """1x1 convolution that starts at zero, whatever initialises the network around it.

    It is no ``nn.Conv2d``, because networks give those start values by their type.

    Args:
        in_dim: Channels in.
        out_dim: Channels out.
    """

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(out_dim, in_dim))
        self.bias = nn.Parameter(torch.zeros(out_dim))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to (B, C', H, W)."""
        x = F.linear(x.permute(0, 2, 3, 1), self.weight, self.bias)
        return x.permute(0, 3, 1, 2)


class ConvStem(Deployable, nn.Sequential):
    """Two 3x3 convolutions of stride 2: an image to a map of a quarter of its size, rounded up.

    Args:
        in_channels: Channels of the image.
        stem_dims: Channels between the convolutions.
        embed_dims: Channels of the resulting map.
        norm_layer: Makes the norm after each convolution.
    """

    def __init__(
        self, in_channels: int, stem_dims: int, embed_dims: int, norm_layer: NormFactory
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, stem_dims, 3, stride=2, padding=1, bias=False)
        self.norm1 = norm_layer(stem_dims, 1e-4)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(stem_dims, embed_dims, 3, stride=2, padding=1, bias=False)
        self.norm2 = norm_layer(embed_dims, 1e-4)
        self.act2 = nn.ReLU(inplace=True)

    def _fold(self) -> None:
        self.conv1, self.norm1 = folded_norm(self.conv1, self.norm1)
        self.conv2, self.norm2 = folded_norm(self.conv2, self.norm2)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, in_channels, H, W) to (B, C, ceil(H / 4), ceil(W / 4))."""
        if not predicts_on_cpu(x):
            return super().forward(x)
        # All that follows keeps the layout, in which oneDNN convolves half as fast again (and
        # differentiates half as fast).
        x = x.contiguous(memory_format=torch.channels_last)
        if not all(map(_by_pixel, (self.norm1, self.norm2))):
            return super().forward(x)
        # The map between the convolutions would be the largest of the network.
        height = (x.shape[2] + 1) // 2
        inner = height * ((x.shape[3] + 1) // 2) * x.shape[0] * self.conv1.out_channels
        strips = torch.arange((height + 1) // 2).chunk(num_parts(inner))
        return torch.cat([self._rows(x, height, int(s[0]), int(s[-1]) + 1) for s in strips], 2)

    def _rows(self, x: Tensor, height: int, first: int, last: int) -> Tensor:
        """Rows of the result; ``height`` is that of the map between the convolutions."""
        top, bottom = max(2 * first - 1, 0), min(2 * last, height)
        y = self.act1(self.norm1(_conv_rows(self.conv1, x, 0, top, bottom)))
        return self.act2(self.norm2(_conv_rows(self.conv2, y, top, first, last)))


def _by_pixel(norm: nn.Module) -> bool:
    """Whether a norm in eval mode treats each pixel by itself."""
    return isinstance(norm, nn.Identity) or (
        isinstance(norm, _BatchNorm) and not norm.training and norm.running_mean is not None
    )


def _conv_rows(conv: nn.Conv2d, x: Tensor, start: int, first: int, last: int) -> Tensor:
    """Rows ``first`` to ``last`` of what a convolution gives, padded by half its odd kernel.

    Args:
        conv: The convolution.
        x: The map from its row ``start`` on, (B, C, rows, W), to where ``last`` needs it or to its
            end.
        start: Where ``x`` begins.
        first: First row of the result.
        last: Row behind the last one of the result.
    """
    [stride, _], [kernel, _], [pad, _] = conv.stride, conv.kernel_size, conv.padding
    top = stride * first - pad - start
    bottom = stride * (last - 1) - pad + kernel - start
    rows = x[:, :, max(top, 0) : bottom]
    rows = F.pad(rows, (0, 0, max(-top, 0), max(bottom - x.shape[2], 0)))
    padding = (0, conv.padding[1])
    return F.conv2d(rows, conv.weight, conv.bias, conv.stride, padding, groups=conv.groups)


class ConvBlock(Deployable):
    """Residual block of two 3x3 convolutions.

    Args:
        dim: Channels in and out.
        drop_path_rate: Probability that an image skips the block while training.
        norm_layer: Makes the norm after each convolution.
    """

    def __init__(self, dim: int, drop_path_rate: float, norm_layer: NormFactory) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1)
        self.norm1 = norm_layer(dim, 1e-5)
        self.act = nn.GELU()
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1)
        self.norm2 = norm_layer(dim, 1e-5)
        self.drop_path = DropPath(drop_path_rate)

    def _fold(self) -> None:
        self.conv1, self.norm1 = folded_norm(self.conv1, self.norm1)
        self.conv2, self.norm2 = folded_norm(self.conv2, self.norm2)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to the same shape."""
        y = self.act(self.norm1(self.conv1(x)))
        return add(x, self.drop_path(self.norm2(self.conv2(y))))


class Downsample(nn.Module):
    """LayerNorm over the channels of each pixel, then a 3x3 convolution of stride 2.

    Args:
        in_dim: Channels in.
        out_dim: Channels out.
    """

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.norm = LayerNorm2d(in_dim, eps=1e-6)
        self.conv = nn.Conv2d(in_dim, out_dim, 3, stride=2, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to (B, C', ceil(H / 2), ceil(W / 2))."""
        x = self.norm(x)
        if torch.compiler.is_compiling():
            # With the channels last, inductor of torch 2.13 fails on some symbolic sizes
            # ("ValueRangeError: Invalid ranges"). The copy is fused into the norm.
            x = x.clone(memory_format=torch.contiguous_format)
        return self.conv(x)


class InvertedResidual(Deployable):
    """Norm, pointwise expansion, depthwise convolution, pointwise projection, norm; no skip.

    Args:
        dim: Channels C in and out.
        expansion: Channels of the depthwise convolution as a multiple of C.
        kernel: Side of the depthwise convolution, odd.
        norm_layer: Makes the two norms.
    """

    def __init__(self, dim: int, expansion: int, kernel: int, norm_layer: NormFactory) -> None:
        super().__init__()
        hidden = dim * expansion
        self.norm1 = norm_layer(dim, 1e-6)
        self.conv1 = Conv2d(dim, hidden, 1, bias=False)
        self.act = nn.SiLU(inplace=True)
        self.conv2 = Conv2d(hidden, hidden, kernel, padding=kernel // 2, groups=hidden, bias=False)
        self.conv3 = Conv2d(hidden, dim, 1, bias=False)
        self.norm2 = norm_layer(dim, 1e-6)

    def _fold(self) -> None:
        self.conv3, self.norm2 = folded_norm(self.conv3, self.norm2)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to the same shape."""
        x = self.norm1(x)
        rows, hidden = x.shape[2], x[:, 0].numel() * self.conv1.out_channels
        if predicts_on_cpu(x) and num_parts(hidden) > 1:
            strips = torch.arange(rows).chunk(num_parts(hidden))
            return self.norm2(
                torch.cat([self._rows(x, int(s[0]), int(s[-1]) + 1) for s in strips], 2)
            )
        return self.norm2(self.conv3(self.act(self.conv2(self.act(self.conv1(x))))))

    def _rows(self, x: Tensor, first: int, last: int) -> Tensor:
        """Rows of what the second norm gets, from the result of the first."""
        reach = self.conv2.padding[0]
        start = max(first - reach, 0)
        y = self.act(self.conv1(x[:, :, start : last + reach]))
        return self.conv3(self.act(_conv_rows(self.conv2, y, start, first, last)))
