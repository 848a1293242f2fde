"""Hierarchical attention for other networks, as residual modules that start as the identity.

They follow the protocol of mmcv's plugin layers: a network such as mmdet's or mmseg's ResNet gives
``in_channels``, the config gives the rest. They also work in ``nn.Sequential``, in necks, or
anywhere else on a map (B, C, H, W).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hat_mm.backbones.base import check_int, check_ratio
from hat_mm.backbones.fastervit import HATStage
from hat_mm.layers import Deployable, HierarchicalMHSA, MapNorm, PointwiseConv
from hat_mm.registry import MODELS

_MAX_DIMS = 256
_HEAD_DIM = 32


class ZeroPointwiseConv(nn.Module):
    """1x1 convolution that starts at zero, however the network around it is initialized.

    It is not an ``nn.Conv2d``, because networks initialize those by type.

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


class _Plugin(Deployable):
    """``x + expand(attn(reduce(x)))``, where ``expand`` is zero until it is trained."""

    def __init__(self, in_channels: int, embed_dims: int | None) -> None:
        super().__init__()
        check_int('in_channels', in_channels)
        if embed_dims is None:
            embed_dims = min(in_channels, _MAX_DIMS)
        check_int('embed_dims', embed_dims)
        self.in_channels = in_channels
        self.embed_dims = embed_dims
        self.reduce = PointwiseConv(in_channels, embed_dims)
        self.expand = ZeroPointwiseConv(embed_dims, in_channels)
        self.attn: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to the same shape, dtype and memory layout, for any H, W >= 1."""
        if x.ndim != 4 or x.shape[1] != self.in_channels or 0 in x.shape[2:]:
            raise ValueError(
                f'{type(self).__name__} takes maps of shape (batch, {self.in_channels}, height, '
                f'width) with at least one pixel, not {tuple(x.shape)}'
            )
        change = self.expand(self.attn(self.reduce(x))).to(x.dtype)
        # The sum takes the memory layout of its first operand.
        return x + change


def _check_divides(name: str, value: int, embed_dims: int) -> None:
    check_int(name, value)
    if embed_dims % value:
        raise ValueError(
            f'{name} = {value} does not divide the {embed_dims} channels of the attention; choose '
            'another or embed_dims (a multiple of it)'
        )


def _initialize(plugin: nn.Module) -> None:
    """Initializes layers so that activations keep their scale, and distant pixels count at once.

    The last layer of a position MLP, which has no bias, keeps PyTorch's initialization.
    """
    for module in plugin.modules():
        if isinstance(module, nn.Linear | PointwiseConv) and module.bias is not None:
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)


def _default_heads(embed_dims: int) -> int:
    """The largest number of equal heads of at least 32 channels each."""
    most = max(embed_dims // _HEAD_DIM, 1)
    return max(heads for heads in range(1, most + 1) if embed_dims % heads == 0)


@MODELS.register_module()
class HATPlugin(_Plugin):
    """FasterViT's hierarchical attention: windows whose carrier tokens attend to each other.

    Added to a network it changes nothing until it is trained: its last layer starts at zero. Its
    cost is linear in the number of pixels, except for the attention of all carriers to all
    carriers. Through the latter, windows that hold only padding have an effect, too.

    Source: https://arxiv.org/abs/2306.06189.

    Args:
        in_channels: Channels C of the map.
        num_heads: Attention heads, a divisor of ``embed_dims``; None for the most heads that have
            32 channels or more.
        window_size: Window size in pixels of the map.
        carrier_size: Carrier size c; each window has c x c carriers.
        mlp_ratio: Hidden width of the MLPs as a multiple of ``embed_dims``.
        embed_dims: Channels of the attention; None for C, at most 256.

    Raises:
        ValueError: A value is out of range; the message names it.
    """

    def __init__(
        self,
        in_channels: int,
        num_heads: int | None = None,
        window_size: int = 7,
        carrier_size: int = 2,
        mlp_ratio: float = 4,
        embed_dims: int | None = None,
    ) -> None:
        super().__init__(in_channels, embed_dims)
        if num_heads is None:
            num_heads = _default_heads(self.embed_dims)
        _check_divides('num_heads', num_heads, self.embed_dims)
        check_int('window_size', window_size)
        check_int('carrier_size', carrier_size)
        if window_size < carrier_size:
            raise ValueError(
                f'window_size = {window_size} is smaller than carrier_size = {carrier_size}'
            )
        check_ratio('mlp_ratio', mlp_ratio, self.embed_dims)
        self.attn = HATStage(
            nn.Identity(),
            self.embed_dims,
            num_heads,
            window_size=window_size,
            carrier_size=carrier_size,
            carrier_bias=8.0,  # level with the tokens at the start
            propagate=True,
            mlp_ratio=mlp_ratio,
        )
        _initialize(self)


@MODELS.register_module()
class HMHSAPlugin(_Plugin):
    """HAT-Net's hierarchical attention: inside windows, then of all pixels to the pooled result.

    Added to a network it changes nothing until it is trained: its last layer starts at zero. Its
    norms span the whole map, so an image's padding has an effect. Each pixel attends to
    ``H * W / ds_ratio**2`` averages, so the cost grows with ``(H * W)**2 / ds_ratio**2``.

    Source: https://arxiv.org/abs/2106.03180.

    Args:
        in_channels: Channels C of the map.
        head_dim: Channels of an attention head, a divisor of ``embed_dims``; None for the smallest
            that is 32 or more.
        grid: Window size in pixels of the map; 1 for attention of all pixels to all pixels.
        ds_ratio: Side in pixels of the squares that are averaged to one key; must be 1 if ``grid``
            is 1.
        embed_dims: Channels of the attention; None for C, at most 256.

    Raises:
        ValueError: A value is out of range; the message names it.
    """

    def __init__(
        self,
        in_channels: int,
        head_dim: int | None = None,
        grid: int = 8,
        ds_ratio: int = 4,
        embed_dims: int | None = None,
    ) -> None:
        super().__init__(in_channels, embed_dims)
        if head_dim is None:
            head_dim = self.embed_dims // _default_heads(self.embed_dims)
        _check_divides('head_dim', head_dim, self.embed_dims)
        check_int('grid', grid)
        check_int('ds_ratio', ds_ratio)
        if grid == 1 and ds_ratio != 1:
            raise ValueError(
                f'grid = 1 makes every pixel a key, so ds_ratio must be 1, not {ds_ratio}'
            )
        self.attn = HierarchicalMHSA(
            self.embed_dims,
            self.embed_dims // head_dim,
            window_size=grid,
            ds_ratio=ds_ratio,
            norm_layer=MapNorm,
        )
        _initialize(self)
