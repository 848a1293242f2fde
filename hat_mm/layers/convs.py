"""The convolutional half of FasterViT: stem, conv block and down-sampler.

Source: https://arxiv.org/abs/2306.06189. All maps are (B, C, H, W).
"""

import torch
from torch import Tensor, nn

from .common import DropPath, NormFactory


class ConvStem(nn.Sequential):
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


class ConvBlock(nn.Module):
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

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to the same shape."""
        y = self.act(self.norm1(self.conv1(x)))
        return x + self.drop_path(self.norm2(self.conv2(y)))


class Downsample(nn.Module):
    """LayerNorm over the channels of each pixel, then a 3x3 convolution of stride 2.

    Args:
        in_dim: Channels in.
        out_dim: Channels out.
    """

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(in_dim, eps=1e-6)
        self.conv = nn.Conv2d(in_dim, out_dim, 3, stride=2, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to (B, C', ceil(H / 2), ceil(W / 2))."""
        x = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        if torch.compiler.is_compiling():
            # With the channels last, inductor of torch 2.13 fails on some symbolic sizes
            # ("ValueRangeError: Invalid ranges"). The copy is fused into the norm.
            x = x.clone(memory_format=torch.contiguous_format)
        return self.conv(x)
