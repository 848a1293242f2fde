"""Building blocks in plain torch, shared by all backbones."""

from .attention import (
    CarrierTokenizer,
    HierarchicalBlock,
    HierarchicalSelfAttention,
    SelfAttention,
    TransformerLayer,
)
from .cache import EvalCache
from .common import DropPath, MapNorm, Mlp, NormFactory, checkpoint_block, guard_group_norm
from .convs import Conv2d, ConvBlock, ConvStem, Downsample, InvertedResidual, PointwiseConv
from .position import AbsolutePositionEmbedding, RelativePositionBias
from .windows import (
    BorderMask,
    average_windows,
    crop,
    merge_windows,
    pad_to_windows,
    split_windows,
    window_grid,
)

__all__ = [
    'AbsolutePositionEmbedding',
    'BorderMask',
    'CarrierTokenizer',
    'Conv2d',
    'ConvBlock',
    'ConvStem',
    'Downsample',
    'DropPath',
    'EvalCache',
    'HierarchicalBlock',
    'HierarchicalSelfAttention',
    'InvertedResidual',
    'MapNorm',
    'Mlp',
    'NormFactory',
    'PointwiseConv',
    'RelativePositionBias',
    'SelfAttention',
    'TransformerLayer',
    'average_windows',
    'checkpoint_block',
    'crop',
    'guard_group_norm',
    'merge_windows',
    'pad_to_windows',
    'split_windows',
    'window_grid',
]
