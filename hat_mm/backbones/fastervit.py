"""FasterViT: convolutions at high resolution, hierarchical attention below.

Source: "FasterViT: Fast Vision Transformers with Hierarchical Attention",
https://arxiv.org/abs/2306.06189. Any height and width: windows, carrier grid, pooling and position
biases follow the input of each call.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from torch import nn

from hat_mm.checkpoints import FASTERVIT_NAMES
from hat_mm.layers import AttentionStage, ConvBlock, ConvStem, Downsample, EvalCache
from hat_mm.registry import MODELS

from .base import HierarchicalBackbone, Stage, check_ints, drop_path_rates, per_stage

_NUM_STAGES = 4
_ATTENTION_STAGES = (2, 3)
_OUT_NORM_CFG = {'type': 'BN'}


@dataclass(frozen=True)
class FasterViTArch:
    """One variant of FasterViT.

    Attributes:
        embed_dims: Channels of stage 0; stage i has ``embed_dims * 2**i``.
        stem_dims: Channels between the two convolutions of the stem.
        depths: Blocks of each stage.
        num_heads: Attention heads of each stage; stages 0 and 1 have none and ignore it.
        window_size: Window side in tokens, one int or one for each stage.
        carrier_size: Side in tokens of the square of carriers that stands for a window.
        carriers: True for carriers in stage 2, False for none, or the stages that have them.
        layer_scale: Start value of the per-channel factors of residual branches, None for none.
        propagate: Adds the carriers to their tokens at the end of a stage.
        drop_path_rate: Drop-path rate of the last block when training.
    """

    embed_dims: int = 64
    stem_dims: int = 64
    depths: tuple[int, ...] = (2, 3, 6, 5)
    num_heads: tuple[int, ...] = (2, 4, 8, 16)
    window_size: int | tuple[int, ...] = 7
    carrier_size: int = 2
    carriers: bool | tuple[int, ...] = True
    layer_scale: float | None = None
    propagate: bool = False
    drop_path_rate: float = 0.2

    def __post_init__(self) -> None:
        carriers = self.carriers
        if isinstance(carriers, bool):
            carriers = (2,) if carriers else ()
        given = {
            'depths': self.depths,
            'num_heads': self.num_heads,
            'window_size': per_stage(self.window_size, _NUM_STAGES),
        }
        for name, values in given.items():
            check_ints(name, values, _NUM_STAGES)
            object.__setattr__(self, name, tuple(values))
        for name in ('embed_dims', 'stem_dims', 'carrier_size'):
            check_ints(name, (getattr(self, name),), length=1)
        if not isinstance(carriers, Sequence) or not set(carriers) <= set(_ATTENTION_STAGES):
            raise ValueError(
                f'carriers must be True, False or stages out of {_ATTENTION_STAGES}, '
                f'not {carriers!r}'
            )
        object.__setattr__(self, 'carriers', tuple(carriers))
        for i in _ATTENTION_STAGES:
            if self.dims[i] % self.num_heads[i]:
                raise ValueError(
                    f'num_heads[{i}] = {self.num_heads[i]} does not divide the {self.dims[i]} '
                    f'channels of stage {i} (embed_dims * 2**{i})'
                )
            if i in self.carriers and self.window_size[i] < self.carrier_size:
                raise ValueError(
                    f'window_size[{i}] = {self.window_size[i]} is smaller than '
                    f'carrier_size = {self.carrier_size}'
                )

    @property
    def dims(self) -> tuple[int, ...]:
        """Channels of each stage."""
        return tuple(self.embed_dims * 2**i for i in range(_NUM_STAGES))


_4 = FasterViTArch(
    embed_dims=196,
    depths=(3, 3, 12, 5),
    num_heads=(4, 8, 16, 32),
    layer_scale=1e-5,
    propagate=True,
    drop_path_rate=0.3,
)
_4_21K = replace(_4, carriers=False, propagate=False, drop_path_rate=0.42)

FASTERVIT_ARCHS = MappingProxyType(
    {
        '0': FasterViTArch(),
        '1': FasterViTArch(embed_dims=80, stem_dims=32, depths=(1, 3, 8, 5)),
        '2': FasterViTArch(embed_dims=96, depths=(3, 3, 8, 5)),
        '3': replace(_4, embed_dims=128, num_heads=(2, 4, 8, 16)),
        '4': _4,
        '5': replace(_4, embed_dims=320),
        '6': replace(_4, embed_dims=320, depths=(3, 3, 16, 8), drop_path_rate=0.5),
        '4-21k-224': replace(_4_21K, window_size=(7, 7, 14, 7)),
        '4-21k-384': replace(_4_21K, window_size=(7, 7, 24, 12)),
        '4-21k-512': replace(_4_21K, window_size=(7, 7, 32, 16)),
        '4-21k-768': replace(_4_21K, window_size=(7, 7, 48, 24)),
    }
)


@MODELS.register_module()
class FasterViT(HierarchicalBackbone):
    """FasterViT backbone for detection, segmentation and classification.

    Source: https://arxiv.org/abs/2306.06189.

    Args:
        arch: Variant: ``'0'`` to ``'6'`` (or the int), ``'4-21k-224'``, ``'4-21k-384'``,
            ``'4-21k-512'``, ``'4-21k-768'``, or a dict of fields of :class:`FasterViTArch`.
        in_channels: Channels of the images.
        window_size: Window side in tokens, one int or one for each stage; None for the arch's.
        drop_path_rate: Drop-path rate of the last block, in [0, 1); None for the arch's.
        out_indices: Stages whose maps are returned, in this order. Strides are 4, 8, 16, 32.
        out_norm_cfg: Config of the norm of each returned map, the last of which is the published
            model's ``norm``; None for raw maps.
        norm_cfg: Changes the type of the norms of convolutions, for example
            ``dict(type='SyncBN')``; each keeps its own eps unless ``eps`` is given. Output norms
            follow ``out_norm_cfg``.
        frozen_stages: Freezes nothing (-1), the stem (0), or the stem and the first k stages with
            their output norms (k).
        norm_eval: Keeps batch norms in evaluation mode while training.
        with_cp: Recomputes the activations of blocks for the gradient, saving memory.
        init_cfg: mmengine's initialisation config; ``dict(type='Pretrained', checkpoint=FILE)``
            takes official files and native ones.

    Raises:
        ValueError: A value is out of range; the message names the choices.
        TypeError: ``arch`` is no name, number or dict.
    """

    archs = FASTERVIT_ARCHS
    arch_type = FasterViTArch
    name_map = FASTERVIT_NAMES
    published_norm = dict(type='BN')
    # Linear layers as here, norms one and zero, convolutions PyTorch's default.
    from_scratch = [dict(type='TruncNormal', layer='Linear', std=0.02, bias=0.0)]

    def __init__(
        self,
        arch: str | int | dict = '0',
        in_channels: int = 3,
        window_size: int | Sequence[int] | None = None,
        drop_path_rate: float | None = None,
        out_indices: int | Sequence[int] = (0, 1, 2, 3),
        out_norm_cfg: dict | None = _OUT_NORM_CFG,
        norm_cfg: dict | None = None,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(
            arch=arch,
            overrides={'window_size': window_size, 'drop_path_rate': drop_path_rate},
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
        spec, norm_layer, cache = self.spec, self.norm_layer, EvalCache()
        rates = drop_path_rates(spec.drop_path_rate, spec.depths)
        self.stem = ConvStem(self.in_channels, spec.stem_dims, spec.embed_dims, norm_layer)
        self.stages = nn.ModuleList()
        for i in range(num_stages):
            dim = spec.dims[i]
            downsample = Downsample(spec.dims[i - 1], dim) if i else None
            if i in _ATTENTION_STAGES:
                stage = AttentionStage(
                    downsample,
                    dim,
                    spec.num_heads[i],
                    spec.window_size[i],
                    spec.carrier_size if i in spec.carriers else 0,
                    spec.layer_scale,
                    spec.propagate,
                    rates[i],
                    cache,
                    self.with_cp,
                )
            else:
                blocks = (ConvBlock(dim, rate, norm_layer) for rate in rates[i])
                stage = Stage(downsample, blocks, self.with_cp)
            self.stages.append(stage)
