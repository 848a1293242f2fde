"""Building blocks in plain torch that several families share."""

from . import tracing
from .attention import Mlp, SelfAttention, TransformerLayer, scaled
from .carriers import CarrierTokenizer
from .checkpointing import checkpoint_block
from .convs import Conv2d, PointwiseConv
from .deploy import Deployable, folded_norm, switch_to_deploy
from .hierarchical_mhsa import HierarchicalMHSA
from .norms import DropPath, LayerNorm2d, MapNorm, NormFactory, guard_group_norm
from .position import (
    AbsolutePositionEmbedding,
    FixedPositions,
    RelativePositionBias,
    RelativePositionTable,
)
from .windows import (
    average_windows,
    border_mask,
    count_windows,
    merge_windows,
    pad_to_windows,
    shift_mask,
    split_windows,
)

__all__ = [
    'AbsolutePositionEmbedding',
    'CarrierTokenizer',
    'Conv2d',
    'Deployable',
    'DropPath',
    'FixedPositions',
    'HierarchicalMHSA',
    'LayerNorm2d',
    'MapNorm',
    'Mlp',
    'NormFactory',
    'PointwiseConv',
    'RelativePositionBias',
    'RelativePositionTable',
    'SelfAttention',
    'TransformerLayer',
    'average_windows',
    'border_mask',
    'checkpoint_block',
    'count_windows',
    'folded_norm',
    'guard_group_norm',
    'merge_windows',
    'pad_to_windows',
    'scaled',
    'shift_mask',
    'split_windows',
    'switch_to_deploy',
    'tracing',
]
