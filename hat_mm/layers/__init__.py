"""Building blocks in plain torch, shared by all backbones."""

from .attention import CarrierTokenizer, HierarchicalBlock, SelfAttention, TransformerLayer
from .common import DropPath, Mlp, NormFactory, checkpoint_block
from .convs import ConvBlock, ConvStem, Downsample
from .position import AbsolutePositionEmbedding, EvalCache, RelativePositionBias
from .windows import crop, merge_windows, pad_to_windows, split_windows, window_grid

__all__ = [
    'AbsolutePositionEmbedding',
    'CarrierTokenizer',
    'ConvBlock',
    'ConvStem',
    'Downsample',
    'DropPath',
    'EvalCache',
    'HierarchicalBlock',
    'Mlp',
    'NormFactory',
    'RelativePositionBias',
    'SelfAttention',
    'TransformerLayer',
    'checkpoint_block',
    'crop',
    'merge_windows',
    'pad_to_windows',
    'split_windows',
    'window_grid',
]
