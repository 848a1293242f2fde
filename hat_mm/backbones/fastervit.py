"""FasterViT: convolutions at high resolution, hierarchical attention at low resolution.

Source: "FasterViT: Fast Vision Transformers with Hierarchical Attention",
https://arxiv.org/abs/2306.06189. Any height and width: windows, carriers, pooling and positions
adapt to the input of each call.

Letters: B batch, C channels, H W map size in tokens, w window size, c carrier size, nh nw windows
along each axis.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from hat_mm.layers import (
    CarrierTokenizer,
    Deployable,
    DropPath,
    FixedPositions,
    LayerNorm2d,
    NormFactory,
    TransformerLayer,
    checkpoint_block,
    count_windows,
    folded_norm,
    merge_windows,
    pad_to_windows,
    scaled,
    split_windows,
    tracing,
)
from hat_mm.registry import MODELS
from hat_mm.weights.names import FASTERVIT_NAMES

from .base import (
    HierarchicalBackbone,
    Stage,
    check_carriers,
    check_heads,
    check_int,
    check_ints,
    check_number,
    drop_path_rates,
    per_stage,
)

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
        num_heads: Attention heads of each stage; ignored in stages 0 and 1, which have none.
        window_size: Window size in tokens, one int or one for each stage.
        carrier_size: Carrier size c; each window has c x c carriers.
        carriers: True for carriers in stage 2, False for none, or the stages that have them.
        carrier_bias: Attention bias of pairs with a carrier. The biases between tokens start at
            about 8, so the published 0 gives carriers hardly any attention at first; 8 starts
            them level.
        layer_scale: Initial value of the per-channel factors of residual branches; None for none.
        propagate: Adds the carriers to their tokens at the end of a stage.
        drop_path_rate: Drop-path rate of the last block in training.
        pad_every_stage: Pads the maps of stages 0 and 1 to whole windows, too.
        positions_by_tokens: Measures absolute positions inside windows in halves of the number of
            tokens of a window, not of its size.
    """

    embed_dims: int = 64
    stem_dims: int = 64
    depths: tuple[int, ...] = (2, 3, 6, 5)
    num_heads: tuple[int, ...] = (2, 4, 8, 16)
    window_size: int | tuple[int, ...] = 7
    carrier_size: int = 2
    carriers: bool | tuple[int, ...] = True
    carrier_bias: float = 0.0
    layer_scale: float | None = None
    propagate: bool = False
    drop_path_rate: float = 0.2
    pad_every_stage: bool = False
    positions_by_tokens: bool = False

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
            check_int(name, getattr(self, name))
        if not isinstance(carriers, Sequence) or any(
            not isinstance(i, int) or i not in _ATTENTION_STAGES for i in carriers
        ):
            raise ValueError(
                f'carriers must be True, False or stages out of {_ATTENTION_STAGES}, '
                f'not {carriers!r}'
            )
        object.__setattr__(self, 'carriers', tuple(carriers))
        check_number('carrier_bias', self.carrier_bias)
        if self.layer_scale is not None:
            check_number('layer_scale', self.layer_scale)
            object.__setattr__(self, 'layer_scale', float(self.layer_scale))
        check_heads(self.dims, self.num_heads, _ATTENTION_STAGES)
        sizes = per_stage(self.carrier_size, _NUM_STAGES)
        check_carriers(given['window_size'], sizes, carriers)

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
_4_21K_224 = replace(_4_21K, window_size=(7, 7, 14, 7))

FASTERVIT_ARCHS = MappingProxyType(
    {
        '0': FasterViTArch(),
        '1': FasterViTArch(embed_dims=80, stem_dims=32, depths=(1, 3, 8, 5)),
        '2': FasterViTArch(embed_dims=96, depths=(3, 3, 8, 5)),
        '3': replace(_4, embed_dims=128, num_heads=(2, 4, 8, 16)),
        '4': _4,
        '5': replace(_4, embed_dims=320),
        '6': replace(_4, embed_dims=320, depths=(3, 3, 16, 8), drop_path_rate=0.5),
        '4-21k-224': _4_21K_224,
        # The authors' trained detector differs in two points: docs/dino.md.
        '4-21k-224-dino': replace(_4_21K_224, pad_every_stage=True, positions_by_tokens=True),
        '4-21k-384': replace(_4_21K, window_size=(7, 7, 24, 12)),
        '4-21k-512': replace(_4_21K, window_size=(7, 7, 32, 16)),
        '4-21k-768': replace(_4_21K, window_size=(7, 7, 48, 24)),
    }
)


class Stem(Deployable):
    """Two 3x3 convolutions of stride 2: reduces an image to a quarter of its size, rounded up.

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
        self.conv2 = nn.Conv2d(stem_dims, embed_dims, 3, stride=2, padding=1, bias=False)
        self.norm2 = norm_layer(embed_dims, 1e-4)
        self.act = nn.ReLU(inplace=True)

    def _fold(self) -> None:
        self.conv1, self.norm1 = folded_norm(self.conv1, self.norm1)
        self.conv2, self.norm2 = folded_norm(self.conv2, self.norm2)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, in_channels, H, W) to (B, C, ceil(H / 4), ceil(W / 4))."""
        x = self.act(self.norm1(self.conv1(x)))
        return self.act(self.norm2(self.conv2(x)))


class ConvBlock(Deployable):
    """Residual block of two 3x3 convolutions.

    Args:
        dim: Channels in and out.
        drop_path_rate: Probability that an image skips the block in training.
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
        y = self.norm2(self.conv2(y))
        return x + self.drop_path(y)


class HATBlock(Deployable):
    """Attention among the carrier tokens of all windows, then inside each window.

    With ``carrier_size=0`` there is only the attention inside windows.

    Args:
        dim: Channels C.
        num_heads: Heads of both attentions.
        window_size: Window size w.
        carrier_size: Carrier size c; 0 for no carriers.
        carrier_bias: As in :class:`FasterViTArch`.
        drop_path_rate: Probability that a window (for the carriers: an image) skips a branch in
            training.
        layer_scale: Initial value of the per-channel factors of the branches; None for none.
        propagate: Adds each carrier to the tokens of its cell at the end of the block.
        mlp_ratio: Hidden width of the MLPs as a multiple of C.
        positions_by_tokens: As in :class:`FasterViTArch`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        window_size: int,
        carrier_size: int = 0,
        carrier_bias: float = 0.0,
        drop_path_rate: float = 0.0,
        layer_scale: float | None = None,
        propagate: bool = False,
        mlp_ratio: float = 4,
        positions_by_tokens: bool = False,
    ) -> None:
        super().__init__()
        self.window_size = window_size
        self.carrier_size = carrier_size
        self.propagate = propagate
        options: Any = dict(
            drop_path_rate=drop_path_rate, layer_scale=layer_scale, mlp_ratio=mlp_ratio
        )
        self.carrier_attn = TransformerLayer(dim, num_heads, **options) if carrier_size else None
        self.window_attn = TransformerLayer(
            dim,
            num_heads,
            num_prefix=carrier_size**2,
            prefix_bias=carrier_bias,
            positions_by_tokens=positions_by_tokens,
            **options,
        )

    def _fold(self) -> None:
        w, layer = self.window_size, self.window_attn
        layer.pos_embed = FixedPositions(layer.pos_embed((w, w)))
        bias: Any = layer.attn.bias
        layer.attn.bias = bias.fixed(w)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Loads, after mapping the names that hat_mm 0.1 saved to today's."""
        for part in ('window', 'carrier'):
            old = f'{prefix}{part}.'
            for name in [name for name in state_dict if name.startswith(old)]:
                state_dict[f'{prefix}{part}_attn.{name.removeprefix(old)}'] = state_dict.pop(name)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(
        self, windows: Tensor, carriers: Tensor | None, num_windows: tuple[int, int]
    ) -> tuple[Tensor, Tensor | None]:
        """Runs the block.

        Args:
            windows: Tokens in window order, (B * nh * nw, w * w, C).
            carriers: Carriers in window order, (B * nh * nw, c * c, C); None for none.
            num_windows: Windows along the axes, (nh, nw).

        Returns:
            Tensors of the shapes of ``windows`` and ``carriers``.
        """
        w, c = self.window_size, self.carrier_size
        windows = windows + self.window_attn.pos_embed((w, w)).to(windows.dtype)
        if carriers is None or self.carrier_attn is None:
            return self.window_attn(windows, (w, w)), None

        # All carriers of an image attend to each other, in raster order over the whole map.
        grid_size = (num_windows[0] * c, num_windows[1] * c)
        carriers = merge_windows(carriers, num_windows, c).flatten(1, 2)
        carriers = carriers + self.carrier_attn.pos_embed(grid_size).to(carriers.dtype)
        carriers = self.carrier_attn(carriers, grid_size)
        carriers = split_windows(carriers.unflatten(1, grid_size), num_windows, c)

        # Each window attends to itself and its carriers, which are a prefix before its tokens.
        tokens = self.window_attn(torch.cat([carriers, windows], 1), (w, w))
        carriers, windows = tokens.split([c * c, w * w], 1)
        if self.propagate:
            windows = windows + scaled(self.nearest_carriers(carriers), self.carrier_attn.scale)
        return windows, carriers

    def nearest_carriers(self, carriers: Tensor) -> Tensor:
        """The nearest carrier of each token of a window: (N, c * c, ...) to (N, w * w, ...)."""
        w, c = self.window_size, self.carrier_size
        cell = torch.arange(w, device=carriers.device) * c // w
        return carriers[:, (cell[:, None] * c + cell).flatten()]


class PaddedStage(Stage):
    """A downsampler and convolution blocks on a map that is padded to whole windows.

    Zeros at the bottom and right, as in :class:`HATStage`; the blocks themselves have no windows.

    Args:
        downsample: Module before the blocks.
        blocks: The blocks.
        window_size: Window size w.
        with_cp: Recomputes the blocks' activations in the backward pass, which saves memory.
    """

    def __init__(
        self,
        downsample: nn.Module,
        blocks: Sequence[nn.Module],
        *,
        window_size: int,
        with_cp: bool = False,
    ) -> None:
        super().__init__(downsample, blocks, with_cp=with_cp)
        self.window_size = window_size

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to the stage's feature map."""
        x = self.downsample(x)
        height, width = x.shape[-2:]
        num_windows = count_windows((height, width), self.window_size)
        x = self.run_blocks(pad_to_windows(x, num_windows, self.window_size))
        return tracing.crop(x.permute(0, 2, 3, 1), height, width).permute(0, 3, 1, 2)


class HATStage(nn.Module):
    """A downsampler and transformer blocks on windows, with or without carrier tokens.

    The map is padded with zeros at the bottom and right to whole windows. As in the published
    models, padding takes part in attention.

    Args:
        downsample: Module before the blocks.
        dim: Channels C of the blocks.
        num_heads: Attention heads.
        window_size: Window size w.
        carrier_size: Carrier size c; 0 for no carriers.
        carrier_bias: As in :class:`FasterViTArch`.
        drop_path_rates: Drop-path rate of each block.
        layer_scale: Initial value of the per-channel factors; None for none.
        propagate: Adds the carriers to their tokens at the end of the stage.
        mlp_ratio: Hidden width of the MLPs as a multiple of C.
        positions_by_tokens: As in :class:`FasterViTArch`.
        with_cp: Recomputes the blocks' activations in the backward pass, which saves memory.
    """

    def __init__(
        self,
        downsample: nn.Module,
        dim: int,
        num_heads: int,
        *,
        window_size: int,
        carrier_size: int,
        carrier_bias: float = 0.0,
        drop_path_rates: Sequence[float] = (0.0,),
        layer_scale: float | None = None,
        propagate: bool = False,
        mlp_ratio: float = 4,
        positions_by_tokens: bool = False,
        with_cp: bool = False,
    ) -> None:
        super().__init__()
        self.window_size = window_size
        self.with_cp = with_cp
        self.downsample = downsample
        self.tokenizer = CarrierTokenizer(dim, window_size, carrier_size) if carrier_size else None
        last = len(drop_path_rates) - 1
        self.blocks = nn.ModuleList(
            HATBlock(
                dim,
                num_heads,
                window_size=window_size,
                carrier_size=carrier_size,
                carrier_bias=carrier_bias,
                drop_path_rate=rate,
                layer_scale=layer_scale,
                propagate=propagate and carrier_size > 0 and i == last,
                mlp_ratio=mlp_ratio,
                positions_by_tokens=positions_by_tokens,
            )
            for i, rate in enumerate(drop_path_rates)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to the stage's feature map."""
        x = self.downsample(x)
        height, width = x.shape[-2:]
        num_windows = count_windows((height, width), self.window_size)
        x = pad_to_windows(x, num_windows, self.window_size)
        carriers = None if self.tokenizer is None else self.tokenizer(x, num_windows)
        windows = split_windows(x.permute(0, 2, 3, 1), num_windows, self.window_size)
        for block in self.blocks:
            args = (windows, carriers, num_windows)
            windows, carriers = checkpoint_block(block, *args) if self.with_cp else block(*args)
        x = merge_windows(windows, num_windows, self.window_size)
        return tracing.crop(x, height, width).permute(0, 3, 1, 2)


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
        # The norm returns maps and gradients in channels last. For a contiguous map both are made
        # contiguous again, because otherwise the backward pass of the convolutions around it is
        # slower on a CPU.
        contiguous = x.is_contiguous()
        if contiguous:
            x = tracing.contiguous_gradient(x)
        return self.conv(tracing.contiguous_input(self.norm(x), wanted=contiguous))


@MODELS.register_module()
class FasterViT(HierarchicalBackbone):
    """FasterViT backbone for detection, segmentation and classification.

    Source: https://arxiv.org/abs/2306.06189.

    Args:
        arch: Variant: ``'0'`` to ``'6'`` (or the int), ``'4-21k-224'``, ``'4-21k-384'``,
            ``'4-21k-512'``, ``'4-21k-768'``, ``'4-21k-224-dino'`` (that of the authors' detector),
            or a dict of fields of :class:`FasterViTArch`.
        in_channels: Channels of the images.
        window_size: Window size in tokens, one int or one for each stage; None for the arch's.
        drop_path_rate: Drop-path rate of the last block, in [0, 1); None for the arch's.
        out_indices: Stages whose maps are returned, in this order. Strides are 4, 8, 16, 32.
        out_norm_cfg: Config of the norm of each returned map; that of stage 3 is the published
            model's ``norm``. None for raw maps.
        norm_cfg: Changes the type of the norms after convolutions, for example
            ``dict(type='SyncBN')``; each keeps its own eps unless ``eps`` is given. Output norms
            follow ``out_norm_cfg``.
        frozen_stages: Freezes nothing (-1), the stem (0), or the stem and the first k stages with
            their output norms (k).
        norm_eval: Keeps batch norms in eval mode during training.
        with_cp: Recomputes the blocks' activations in the backward pass, which saves memory.
        init_cfg: mmengine's initialization config; ``dict(type='Pretrained', checkpoint=FILE)``
            takes official files and native ones (with hat_mm's own names).

    Raises:
        ValueError: A value is out of range; the message names the choices.
        TypeError: ``arch`` is not a name, number or dict.
    """

    archs = FASTERVIT_ARCHS
    arch_type = FasterViTArch
    name_map = FASTERVIT_NAMES
    published_norm = dict(type='BN')
    # Linear layers as given here, norms one and zero, convolutions PyTorch's default.
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
        spec, norm_layer = self.spec, self.norm_layer
        rates = drop_path_rates(spec.drop_path_rate, spec.depths)
        self.stem = Stem(self.in_channels, spec.stem_dims, spec.embed_dims, norm_layer)
        self.stages = nn.ModuleList()
        stage: nn.Module
        for i in range(num_stages):
            dim = spec.dims[i]
            downsample = Downsample(spec.dims[i - 1], dim) if i else nn.Identity()
            if i in _ATTENTION_STAGES:
                stage = HATStage(
                    downsample,
                    dim,
                    spec.num_heads[i],
                    window_size=spec.window_size[i],
                    carrier_size=spec.carrier_size if i in spec.carriers else 0,
                    carrier_bias=spec.carrier_bias,
                    drop_path_rates=rates[i],
                    layer_scale=spec.layer_scale,
                    propagate=spec.propagate,
                    positions_by_tokens=spec.positions_by_tokens,
                    with_cp=self.with_cp,
                )
            else:
                blocks = [ConvBlock(dim, rate, norm_layer) for rate in rates[i]]
                if spec.pad_every_stage:
                    w = spec.window_size[i]
                    stage = PaddedStage(downsample, blocks, window_size=w, with_cp=self.with_cp)
                else:
                    stage = Stage(downsample, blocks, with_cp=self.with_cp)
            self.stages.append(stage)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Computes the maps of ``out_indices``, as :class:`HierarchicalBackbone` describes."""
        self.check_images(x)
        x = self.stem(x)
        maps = {}
        for i, stage in enumerate(self.stages):
            x = stage(x)
            if i in self.out_indices:
                maps[i] = self.output(x, i)
        return tuple(maps[i] for i in self.out_indices)
