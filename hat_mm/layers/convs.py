"""Convolutional parts: stem, block and down-sampler of FasterViT, inverted residual of HAT-Net.

Sources: https://arxiv.org/abs/2306.06189 and https://arxiv.org/abs/2106.03180. All maps are
(B, C, H, W).
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .common import (
    DropPath,
    LayerNorm2d,
    NormFactory,
    learns_on_cpu,
    num_parts,
    predicts_on_cpu,
)
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
        # takes half as much time again to differentiate).
        x = x.contiguous(memory_format=torch.channels_last)
        others = (self.norm1, self.act1, self.norm2, self.act2)
        if len(self) != 6 or not _divisible((self.conv1, self.conv2), others):
            return super().forward(x)
        return _by_strips(
            x,
            self.conv1,
            lambda rows: self.act1(self.norm1(rows)),
            self.conv2,
            lambda rows: self.act2(self.norm2(rows)),
        )


def _divisible(convs: Sequence[nn.Module], others: Sequence[nn.Module]) -> bool:
    """Whether nobody can tell if these are run at once or by strips of rows.

    Convolutions have to be padded by half their odd kernel, with zeros, the others to treat each
    pixel by itself, and nothing may hang on any: a hook would see strips, or is how pruning and
    weight norm make the weights.
    """
    return (
        not any(
            module._forward_hooks or module._forward_pre_hooks or 'forward' in vars(module)
            for module in (*convs, *others)
        )
        and all(
            type(conv) in (Conv2d, nn.Conv2d)
            and conv.padding_mode == 'zeros'
            and conv.padding == tuple((side - 1) / 2 for side in conv.kernel_size)
            and conv.dilation == (1, 1)
            for conv in convs
        )
        and all(
            type(module) in (nn.Identity, nn.ReLU, nn.GELU, nn.SiLU, LayerNorm2d, DropPath)
            or (
                isinstance(module, _BatchNorm)
                and not module.training
                and module.running_mean is not None
            )
            for module in others
        )
    )


def _by_strips(
    x: Tensor,
    conv1: nn.Conv2d,
    between: Callable[[Tensor], Tensor],
    conv2: nn.Conv2d,
    behind: Callable[[Tensor], Tensor],
    skip: Tensor | None = None,
) -> Tensor:
    """``behind(conv2(between(conv1(x))))``, strip by strip of rows, so that no inner map is large.

    The rows of the inner map that two strips need are computed for both.

    Args:
        x: Map, (B, C, H, W), whose channels are last in memory, as those of the result.
        conv1: Convolution padded by half its odd kernel.
        between: Function of each pixel.
        conv2: Convolution padded by half its odd kernel.
        behind: Function of each pixel.
        skip: What is added to the result, of its shape; None for nothing.
    """
    height, width = (_length(conv1, side) for side in x.shape[2:])
    rows = _length(conv2, height)
    parts = num_parts(x.shape[0] * conv1.out_channels * height * width)
    result = None
    step = -(-rows // parts)
    for first in range(0, rows, step):
        last = min(first + step, rows)
        start, end = _rows_needed(conv2, first, last)
        start, end = max(start, 0), min(end, height)
        inner = between(_rows(conv1, x, 0, start, end))
        part = behind(_rows(conv2, inner, start, first, last))
        if parts == 1:
            return part if skip is None else skip + part
        if result is None:
            shape = (*part.shape[:2], rows, part.shape[3])
            dtype = part.dtype if skip is None else torch.result_type(skip, part)
            like = {'dtype': dtype, 'device': part.device}
            result = torch.empty(shape, memory_format=torch.channels_last, **like)
        if skip is None:
            result[:, :, first:last] = part
        else:
            torch.add(skip[:, :, first:last], part, out=result[:, :, first:last])
    return result


def contiguous_norm(norm: nn.Module | None, x: Tensor) -> Tensor:
    """``norm(x).contiguous()``, strip by strip of rows where that saves a large tensor between.

    Args:
        norm: Norm of maps; None for none.
        x: Map, (B, C, H, W).
    """
    norm = nn.Identity() if norm is None else norm
    parts = num_parts(x.numel()) if predicts_on_cpu(x) else 1
    if parts == 1 or x.is_contiguous() or not _divisible((), (norm,)):
        return norm(x).contiguous()
    result = torch.empty(x.shape, dtype=norm(x[:, :, :1]).dtype, device=x.device)
    for rows, part in zip(result.tensor_split(parts, 2), x.tensor_split(parts, 2), strict=True):
        rows.copy_(norm(part))
    return result


def _length(conv: nn.Conv2d, side: int) -> int:
    """Side of what a convolution makes of a side."""
    return (side - 1) // conv.stride[0] + 1


def _rows_needed(conv: nn.Conv2d, first: int, last: int) -> tuple[int, int]:
    """Rows from which a convolution makes its rows ``first`` to ``last``, beyond the map, too."""
    top = conv.stride[0] * first - conv.padding[0]
    return top, top + conv.stride[0] * (last - 1 - first) + conv.kernel_size[0]


def _rows(conv: nn.Conv2d, x: Tensor, start: int, first: int, last: int) -> Tensor:
    """Rows ``first`` to ``last`` of what a convolution makes of a map.

    Args:
        conv: The convolution.
        x: Rows of the map, (B, C, rows, W), to where ``last`` needs them or to its end.
        start: Row of the map with which ``x`` begins.
        first: First row of the result.
        last: Row behind the last one of the result.
    """
    top, bottom = (row - start for row in _rows_needed(conv, first, last))
    rows = x[:, :, max(top, 0) : bottom]
    if top < 0 or bottom > x.shape[2]:
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
        if (
            predicts_on_cpu(x)
            and not self.drop_path.training  # strips leave it out
            and _divisible(
                (self.conv1, self.conv2), (self.norm1, self.act, self.norm2, self.drop_path)
            )
        ):
            return _by_strips(
                x, self.conv1, lambda rows: self.act(self.norm1(rows)), self.conv2, self.norm2, x
            )
        y = self.norm2(self.conv2(self.act(self.norm1(self.conv1(x)))))
        return x + self.drop_path(y)


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
        # On a CPU, gradients whose channels are last cost the convolutions before and after this
        # one half as much time again.
        learns = learns_on_cpu(x)
        if learns and x.is_contiguous():
            # The gradient goes back through two reshapes, of which one makes plain strides.
            x = x.flatten().view_as(x)
        x = self.norm(x)
        if learns or torch.compiler.is_compiling():
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
        if predicts_on_cpu(x) and _divisible((self.conv1, self.conv2, self.conv3), (self.act,)):
            x = _by_strips(x, self.conv1, self.act, self.conv2, lambda y: self.conv3(self.act(y)))
        else:
            x = self.conv3(self.act(self.conv2(self.act(self.conv1(x)))))
        return self.norm2(x)
