"""HAT-Net: attention in windows and to a pooled map, with inverted residuals between.

Source: "Vision Transformers with Hierarchical Attention", https://arxiv.org/abs/2106.03180. Any
height and width: if windows do not divide a map, those at the bottom and right border are smaller.

Letters: B batch, C channels, H W map size in tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor, nn

from hat_mm.layers import (
    Conv2d,
    Deployable,
    DropPath,
    HierarchicalMHSA,
    MapNorm,
    NormFactory,
    folded_norm,
)
from hat_mm.registry import MODELS
from hat_mm.weights.names import HAT_NET_NAMES

from .base import HierarchicalBackbone, Stage, check_int, check_ints, drop_path_rates

MODELS.register_module(module=MapNorm)

_NUM_STAGES = 4
_STEM_DIMS = 16


@dataclass(frozen=True)
class HATNetArch:
    """One variant of HAT-Net; all fields but ``head_dim`` and ``drop_path_rate`` are per stage.

    Attributes:
        embed_dims: Channels.
        head_dim: Channels of an attention head, one int for all stages.
        depths: Blocks.
        expansions: Hidden width of the inverted residuals as a multiple of the channels.
        grids: Window size in tokens, the paper's grid size; 1 for plain global attention.
        ds_ratios: Side in tokens of the squares that are averaged to one key; 1 if the grid is 1.
        kernels: Kernel size of the depthwise convolutions, odd.
        drop_path_rate: Drop-path rate of the last block in training.
    """

    embed_dims: tuple[int, ...] = (48, 96, 240, 384)
    head_dim: int = 48
    depths: tuple[int, ...] = (2, 2, 6, 3)
    expansions: tuple[int, ...] = (8, 8, 4, 4)
    grids: tuple[int, ...] = (8, 7, 7, 1)
    ds_ratios: tuple[int, ...] = (8, 4, 2, 1)
    kernels: tuple[int, ...] = (3, 3, 3, 3)
    drop_path_rate: float = 0.1

    def __post_init__(self) -> None:
        for name in ('embed_dims', 'depths', 'expansions', 'grids', 'ds_ratios', 'kernels'):
            values = getattr(self, name)
            check_ints(name, values, _NUM_STAGES)
            object.__setattr__(self, name, tuple(values))
        check_int('head_dim', self.head_dim)
        for i in range(_NUM_STAGES):
            if self.embed_dims[i] % self.head_dim:
                raise ValueError(
                    f'head_dim = {self.head_dim} does not divide embed_dims[{i}] = '
                    f'{self.embed_dims[i]}'
                )
            if self.kernels[i] % 2 == 0:
                raise ValueError(f'kernels[{i}] must be odd, not {self.kernels[i]}')
            if self.grids[i] == 1 and self.ds_ratios[i] != 1:
                raise ValueError(
                    f'grids[{i}] = 1 makes every token of stage {i} a key, so ds_ratios[{i}] '
                    f'must be 1, not {self.ds_ratios[i]}'
                )

    @property
    def dims(self) -> tuple[int, ...]:
        """Channels of each stage."""
        return self.embed_dims


_SMALL = HATNetArch(embed_dims=(64, 128, 320, 512), head_dim=64, depths=(2, 3, 8, 3))

HAT_NET_ARCHS = MappingProxyType(
    {
        'tiny': HATNetArch(),
        'small': _SMALL,
        'medium': replace(_SMALL, depths=(3, 6, 18, 3), kernels=(5, 3, 5, 3), drop_path_rate=0.3),
        'large': replace(
            _SMALL, embed_dims=(64, 128, 320, 640), depths=(3, 8, 27, 3), drop_path_rate=0.3
        ),
    }
)


class Stem(Deployable):
    """Two 3x3 convolutions of stride 2: reduces an image to a quarter of its size, rounded up.

    Args:
        in_channels: Channels of the image.
        embed_dims: Channels of the resulting map.
        norm_layer: Makes the norm between the convolutions.
    """

    def __init__(self, in_channels: int, embed_dims: int, norm_layer: NormFactory) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, _STEM_DIMS, 3, stride=2, padding=1)
        self.norm = norm_layer(_STEM_DIMS, 1e-6)
        self.act = nn.SiLU(inplace=True)
        self.conv2 = nn.Conv2d(_STEM_DIMS, embed_dims, 3, stride=2, padding=1)

    def _fold(self) -> None:
        self.conv1, self.norm = folded_norm(self.conv1, self.norm)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, in_channels, H, W) to (B, C, ceil(H / 4), ceil(W / 4))."""
        return self.conv2(self.act(self.norm(self.conv1(x))))


class InvertedResidual(Deployable):
    """Norm, pointwise expansion, depthwise convolution, pointwise projection, norm; no skip.

    Args:
        dim: Channels C in and out.
        expansion: Channels of the depthwise convolution as a multiple of C.
        kernel: Kernel size of the depthwise convolution, odd.
        norm_layer: Makes the two norms.
    """

    def __init__(self, dim: int, expansion: int, kernel: int, norm_layer: NormFactory) -> None:
        super().__init__()
        hidden = dim * expansion
        self.norm1 = norm_layer(dim, 1e-6)
        self.conv1 = Conv2d(dim, hidden, 1, bias=False)
        self.act = nn.SiLU(inplace=True)
        self.conv2 = Conv2d(hidden, hidden, kernel, padding=kernel // 2, groups=hidden, bias=False)
        self.conv3: nn.Conv2d = Conv2d(hidden, dim, 1, bias=False)
        self.norm2 = norm_layer(dim, 1e-6)

    def _fold(self) -> None:
        self.conv3, self.norm2 = folded_norm(self.conv3, self.norm2)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to the same shape."""
        x = self.act(self.conv1(self.norm1(x)))
        x = self.act(self.conv2(x))
        return self.norm2(self.conv3(x))


class Block(nn.Module):
    """Hierarchical attention and an inverted residual, each with a skip connection.

    Args:
        dim: Channels C, a multiple of ``head_dim``.
        head_dim: Channels of an attention head.
        window_size: Window size in tokens (the paper's grid size); 1 for plain global attention.
        ds_ratio: Side in tokens of the squares that are averaged to one key.
        expansion: Hidden width of the inverted residual as a multiple of C.
        kernel: Kernel size of its depthwise convolution.
        drop_path_rate: Probability that an image skips a branch in training.
        norm_layer: Makes the norms.
    """

    def __init__(
        self,
        dim: int,
        head_dim: int,
        *,
        window_size: int,
        ds_ratio: int,
        expansion: int,
        kernel: int,
        drop_path_rate: float,
        norm_layer: NormFactory,
    ) -> None:
        super().__init__()
        self.attn = HierarchicalMHSA(
            dim,
            dim // head_dim,
            window_size=window_size,
            ds_ratio=ds_ratio,
            norm_layer=norm_layer,
        )
        self.conv = InvertedResidual(dim, expansion, kernel, norm_layer)
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to the same shape."""
        x = x + self.drop_path(self.attn(x))
        return x + self.drop_path(self.conv(x))


class Downsample(Deployable):
    """A 3x3 convolution of stride 2 and a norm.

    Args:
        in_dim: Channels in.
        out_dim: Channels out.
        norm_layer: Makes the norm.
    """

    def __init__(self, in_dim: int, out_dim: int, norm_layer: NormFactory) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_dim, out_dim, 3, stride=2, padding=1)
        self.norm = norm_layer(out_dim, 1e-6)

    def _fold(self) -> None:
        self.conv, self.norm = folded_norm(self.conv, self.norm)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to (B, C', ceil(H / 2), ceil(W / 2))."""
        return self.norm(self.conv(x))


@MODELS.register_module()
class HATNet(HierarchicalBackbone):
    """HAT-Net backbone for detection, segmentation and classification.

    Its norms span the whole map, so the features of an image depend on its padding.

    Source: https://arxiv.org/abs/2106.03180.

    Args:
        arch: Variant: ``'tiny'``, ``'small'``, ``'medium'``, ``'large'``, or a dict of fields of
            :class:`HATNetArch`. No tensor's shape depends on ``head_dim``, ``ds_ratios`` or the
            numbers above 1 in ``grids``, so an official file also loads where these differ.
        in_channels: Channels of the images.
        drop_path_rate: Drop-path rate of the last block, in [0, 1); None for the arch's.
        out_indices: Stages whose maps are returned, in this order. Strides are 4, 8, 16, 32.
        out_norm_cfg: Config of the norm of each returned map; None for raw maps, as published.
        norm_cfg: Changes the type of all other norms, for example ``dict(type='SyncBN')``; each
            keeps its own eps unless ``eps`` is given. None for group norm with one group, as
            published; official files need it.
        frozen_stages: Freezes nothing (-1), the stem (0), or the stem and the first k stages with
            their output norms (k).
        norm_eval: Keeps batch norms, which only ``norm_cfg`` and ``out_norm_cfg`` bring in, in
            eval mode during training.
        with_cp: Recomputes the blocks' activations in the backward pass, which saves memory.
        init_cfg: mmengine's initialization config; ``dict(type='Pretrained', checkpoint=FILE)``
            takes official files and native ones (with hat_mm's own names).

    Raises:
        ValueError: A value is out of range; the message names the choices.
        TypeError: ``arch`` is neither a name nor a dict.
    """

    archs = HAT_NET_ARCHS
    arch_type = HATNetArch
    name_map = HAT_NET_NAMES
    published_norm = dict(type='hat_mm.MapNorm')
    from_scratch = [dict(type='TruncNormal', layer='Conv2d', std=0.02, bias=0.0)]

    def __init__(
        self,
        arch: str | dict = 'tiny',
        in_channels: int = 3,
        drop_path_rate: float | None = None,
        out_indices: int | Sequence[int] = (0, 1, 2, 3),
        out_norm_cfg: dict | None = None,
        norm_cfg: dict | None = None,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(
            arch=arch,
            overrides={'drop_path_rate': drop_path_rate},
            in_channels=in_channels,
            out_indices=out_indices,
            out_norm_cfg=out_norm_cfg,
            norm_cfg=norm_cfg,
            frozen_stages=frozen_stages,
            norm_eval=norm_eval,
            with_cp=with_cp,
            init_cfg=init_cfg,
        )

    def _build(self, num_stages: int) -> None:
        spec, norm_layer = self.spec, self.norm_layer
        rates = drop_path_rates(spec.drop_path_rate, spec.depths)
        self.stem = Stem(self.in_channels, spec.dims[0], norm_layer)
        self.stages = nn.ModuleList()
        for i in range(num_stages):
            dim = spec.dims[i]
            downsample = Downsample(spec.dims[i - 1], dim, norm_layer) if i else nn.Identity()
            blocks = [
                Block(
                    dim,
                    spec.head_dim,
                    window_size=spec.grids[i],
                    ds_ratio=spec.ds_ratios[i],
                    expansion=spec.expansions[i],
                    kernel=spec.kernels[i],
                    drop_path_rate=rate,
                    norm_layer=norm_layer,
                )
                for rate in rates[i]
            ]
            self.stages.append(Stage(downsample, blocks, with_cp=self.with_cp))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Computes the maps of ``out_indices``, as :class:`HierarchicalBackbone` describes."""
        self.check_images(x)
        # Fused attention needs channels last, and depthwise convolutions are faster in it.
        x = self.stem(x).contiguous(memory_format=torch.channels_last)
        maps = {}
        for i, stage in enumerate(self.stages):
            x = stage(x)
            if i in self.out_indices:
                maps[i] = self.output(x, i)
        return tuple(maps[i] for i in self.out_indices)
