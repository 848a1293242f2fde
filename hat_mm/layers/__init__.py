"""Building blocks in plain torch, shared by all backbones."""

from .attention import (
    AttentionStage,
    CarrierTokenizer,
    HierarchicalBlock,
    HierarchicalSelfAttention,
    SelfAttention,
    TransformerLayer,
)
from .cache import EvalCache
from .common import (
    DropPath,
    LayerNorm2d,
    MapNorm,
    Mlp,
    NormFactory,
    checkpoint_block,
    guard_group_norm,
)
from .convs import (
    Conv2d,
    ConvBlock,
    ConvStem,
    Downsample,
    InvertedResidual,
    PointwiseConv,
    ZeroPointwiseConv,
    contiguous_norm,
)
from .deploy import Deployable, FixedPositions, folded_norm, switch_to_deploy
from .position import AbsolutePositionEmbedding, RelativePositionBias, RelativePositionTable
from .windows import (
    BorderMask,
    ShiftMask,
    average_windows,
    crop,
    merge_windows,
    pad_to_windows,
    split_windows,
    window_grid,
)

__all__ = [
    'AbsolutePositionEmbedding',
    'AttentionStage',
    'BorderMask',
    'CarrierTokenizer',
    'Conv2d',
    'ConvBlock',
    'ConvStem',
    'Deployable',
    'Downsample',
    'DropPath',
    'EvalCache',
    'FixedPositions',
    'HierarchicalBlock',
    'HierarchicalSelfAttention',
    'InvertedResidual',
    'LayerNorm2d',
    'MapNorm',
    'Mlp',
    'NormFactory',
    'PointwiseConv',
    'RelativePositionBias',
    'RelativePositionTable',
    'SelfAttention',
    'ShiftMask',
    'TransformerLayer',
    'ZeroPointwiseConv',
    'average_windows',
    'checkpoint_block',
    'contiguous_norm',
    'crop',
    'folded_norm',
    'guard_group_norm',
    'merge_windows',
    'pad_to_windows',
    'split_windows',
    'switch_to_deploy',
    'window_grid',
]
