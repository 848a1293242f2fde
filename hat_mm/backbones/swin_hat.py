"""SwinHAT: a Swin Transformer in which carrier tokens take the place of shifted windows.

Sources: "Swin Transformer", https://arxiv.org/abs/2103.14030, and "FasterViT",
https://arxiv.org/abs/2306.06189, which proposes carrier tokens for other networks. Swin's parts
compute the same as in the OpenMMLab toolboxes, for any height and width.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.logging import print_log
from torch import Tensor, nn

from hat_mm.layers import (
    CarrierTokenizer,
    DropPath,
    LayerNorm2d,
    Mlp,
    NormFactory,
    RelativePositionTable,
    SelfAttention,
    TransformerLayer,
    checkpoint_block,
    count_windows,
    merge_windows,
    pad_to_windows,
    shift_mask,
    split_windows,
    tracing,
)
from hat_mm.registry import MODELS
from hat_mm.weights.loading import unwrap
from hat_mm.weights.names import SWIN_NAMES

from .base import (
    HierarchicalBackbone,
    check_carriers,
    check_heads,
    check_int,
    check_ints,
    check_ratio,
    check_stages,
    drop_path_rates,
    per_stage,
)

MODELS.register_module(module=LayerNorm2d)

_NUM_STAGES = 4
_PATCH = 4
_OUT_NORM_CFG = {'type': 'hat_mm.LayerNorm2d'}


@dataclass(frozen=True)
class SwinHATArch:
    """One variant of SwinHAT.

    Attributes:
        embed_dims: Channels of stage 0; stage i has ``embed_dims * 2**i``.
        depths: Blocks of each stage.
        num_heads: Attention heads of each stage.
        window_size: Window size in tokens, one int or one for each stage.
        carrier_size: Carrier size c, one int or one for each stage; each window has c x c carriers.
            In stage 0 the default is one carrier per window, because it has many windows.
        hat_stages: Stages with carriers, whose windows are not shifted; () for Swin itself.
        mlp_ratio: Hidden width of the MLPs as a multiple of the channels.
        drop_path_rate: Drop-path rate of the last block in training.
    """

    embed_dims: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    window_size: int | tuple[int, ...] = 7
    carrier_size: int | tuple[int, ...] = (1, 2, 2, 2)
    hat_stages: tuple[int, ...] = (0, 1, 2)
    mlp_ratio: float = 4
    drop_path_rate: float = 0.2

    def __post_init__(self) -> None:
        given = {
            'depths': self.depths,
            'num_heads': self.num_heads,
            'window_size': per_stage(self.window_size, _NUM_STAGES),
            'carrier_size': per_stage(self.carrier_size, _NUM_STAGES),
        }
        for name, values in given.items():
            check_ints(name, values, _NUM_STAGES)
            object.__setattr__(self, name, tuple(values))
        check_int('embed_dims', self.embed_dims)
        stages = self.hat_stages
        stages = () if stages in ((), []) else check_stages('hat_stages', stages, _NUM_STAGES)
        object.__setattr__(self, 'hat_stages', stages)
        check_ratio('mlp_ratio', self.mlp_ratio, self.embed_dims)
        check_heads(self.dims, self.num_heads, range(_NUM_STAGES))
        check_carriers(given['window_size'], given['carrier_size'], self.hat_stages)

    @property
    def dims(self) -> tuple[int, ...]:
        """Channels of each stage."""
        return tuple(self.embed_dims * 2**i for i in range(_NUM_STAGES))


SWIN_HAT_ARCHS = MappingProxyType(
    {
        'tiny': SwinHATArch(),
        'small': SwinHATArch(depths=(2, 2, 18, 2), drop_path_rate=0.3),
        'base': SwinHATArch(
            embed_dims=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32), drop_path_rate=0.5
        ),
    }
)


class PatchEmbed(nn.Module):
    """A linear layer on each patch of 4x4 pixels, and a norm.

    Args:
        in_channels: Channels of the image.
        embed_dims: Channels of the resulting map.
        norm_layer: Makes the norm.
    """

    def __init__(self, in_channels: int, embed_dims: int, norm_layer: NormFactory) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, embed_dims, _PATCH, stride=_PATCH)
        self.norm = norm_layer(embed_dims, 1e-5)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, in_channels, H, W) to (B, C, ceil(H / 4), ceil(W / 4))."""
        x = pad_to_windows(x, count_windows(x.shape[-2:], _PATCH), _PATCH)
        return self.norm(self.conv(x))


class PatchMerging(nn.Module):
    """Stacks the pixels of each 2x2 square along the channels; then a norm and a linear layer.

    Args:
        in_dim: Channels in.
        out_dim: Channels out.
        norm_layer: Makes the norm.
    """

    def __init__(self, in_dim: int, out_dim: int, norm_layer: NormFactory) -> None:
        super().__init__()
        self.norm = norm_layer(4 * in_dim, 1e-5)
        self.reduction = nn.Linear(4 * in_dim, out_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to (B, C', ceil(H / 2), ceil(W / 2))."""
        x = pad_to_windows(x, count_windows(x.shape[-2:], 2), 2)
        x = self.norm(F.pixel_unshuffle(x, 2))
        return self.reduction(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class SwinBlock(nn.Module):
    """Attention inside windows, and an MLP.

    Information from other windows comes in through shifted windows, or through carrier tokens that
    have attended to each other. Incomplete windows at the border are padded with zeros after the
    norm, as in Swin.

    Args:
        dim: Channels C.
        num_heads: Heads G of all attentions.
        window_size: Window size w.
        shift: Tokens by which windows are shifted; 0 for no shift.
        carrier_size: Carrier size c; 0 for no carriers.
        exchange: Whether the carriers attend to each other first.
        keep_carriers: Whether a later block needs the carriers.
        mlp_ratio: Hidden width of the MLPs as a multiple of C.
        drop_path_rate: Probability that an image skips a branch in training.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        window_size: int,
        shift: int,
        carrier_size: int,
        exchange: bool,
        keep_carriers: bool,
        mlp_ratio: float,
        drop_path_rate: float,
    ) -> None:
        super().__init__()
        self.window_size = window_size
        self.shift = shift
        self.carrier_size = carrier_size
        self.keep_carriers = keep_carriers
        self.carrier_attn = None
        if exchange:
            self.carrier_attn = TransformerLayer(
                dim, num_heads, drop_path_rate=drop_path_rate, mlp_ratio=mlp_ratio
            )
        self.norm1 = nn.LayerNorm(dim)
        table = RelativePositionTable(num_heads, window_size, carrier_size**2)
        self.attn = SelfAttention(dim, num_heads, table)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, mlp_ratio)
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: Tensor, carriers: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Runs the block.

        Args:
            x: Map, (B, H, W, C).
            carriers: Carriers in raster order, (B, nh * c, nw * c, C); None for none.

        Returns:
            Tensors of the shapes of ``x`` and ``carriers``; None for carriers that no later block
            needs.
        """
        if self.carrier_attn is not None and carriers is not None:
            grid_size = carriers.shape[1:3]
            tokens = carriers.flatten(1, 2)
            tokens = tokens + self.carrier_attn.pos_embed(grid_size).to(tokens.dtype)
            carriers = self.carrier_attn(tokens, grid_size).unflatten(1, grid_size)
        change, carrier_change = self._attend(x, carriers)
        x = self._add(x, change)
        if carriers is None or carrier_change is None or not self.keep_carriers:
            return x, None
        return x, self._add(carriers, carrier_change)

    def _add(self, x: Tensor, change: Tensor) -> Tensor:
        """Adds the result of attention, then runs the MLP."""
        x = x + self.drop_path(change)
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def _attend(self, x: Tensor, carriers: Tensor | None) -> tuple[Tensor, Tensor | None]:
        height, width = x.shape[1:3]
        w, c = self.window_size, self.carrier_size
        num_windows = count_windows((height, width), w)
        # A map that is exactly one window wide is not shifted, as in mmpretrain. The last stage has
        # such a map for 224 pixels and windows of 7, and the published weights were trained so.
        shift = self.shift if min(height, width) != w else 0
        y = pad_to_windows(self.norm1(x).permute(0, 3, 1, 2), num_windows, w).permute(0, 2, 3, 1)
        mask = None
        if shift:
            y = y.roll((-shift, -shift), (1, 2))
            mask = shift_mask(num_windows, w, shift, x.device).repeat(x.shape[0], 1, 1, 1)
        tokens = split_windows(y, num_windows, w)
        if carriers is not None:
            tokens = torch.cat([split_windows(self.norm1(carriers), num_windows, c), tokens], 1)
        tokens = self.attn(tokens, (w, w), mask)
        if carriers is not None:
            carriers = merge_windows(tokens[:, : c * c], num_windows, c)
        y = merge_windows(tokens[:, c * c :], num_windows, w)
        if shift:
            y = y.roll((shift, shift), (1, 2))
        return tracing.crop(y, height, width), carriers


class SwinStage(nn.Module):
    """A downsampler and Swin blocks, with or without carriers.

    Args:
        downsample: Module before the blocks.
        tokenizer: Makes the carriers; None for no carriers.
        blocks: The blocks.
        with_cp: Recomputes the blocks' activations in the backward pass, which saves memory.
    """

    def __init__(
        self,
        downsample: nn.Module,
        tokenizer: CarrierTokenizer | None,
        blocks: Sequence[SwinBlock],
        *,
        with_cp: bool,
    ) -> None:
        super().__init__()
        self.downsample = downsample
        self.tokenizer = tokenizer
        self.blocks = nn.ModuleList(blocks)
        self.with_cp = with_cp

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to the stage's feature map."""
        x = self.downsample(x)
        carriers = None
        if self.tokenizer is not None:
            window_size = self.tokenizer.window_size
            num_windows = count_windows(x.shape[-2:], window_size)
            carriers = self.tokenizer(pad_to_windows(x, num_windows, window_size), num_windows)
            carriers = merge_windows(carriers, num_windows, self.tokenizer.carrier_size)
        x = x.permute(0, 2, 3, 1)
        for block in self.blocks:
            args = (x, carriers)
            x, carriers = checkpoint_block(block, *args) if self.with_cp else block(*args)
        return x.permute(0, 3, 1, 2)


@MODELS.register_module()
class SwinHAT(HierarchicalBackbone):
    """Swin Transformer with carrier tokens in place of shifted windows.

    In the stages in ``hat_stages`` no window is shifted. Each window has a few carrier tokens that
    take part in its attention in every block. In every second block, where Swin shifts, all
    carriers of the image first attend to each other. The other stages are Swin's.

    Swin's ImageNet weights fill all that the two networks share, whether a file has the names of
    the official repository, of mmpretrain or of mmdet; tables of another window size are
    interpolated. The carriers' tensors are then new, initialized as for training from scratch; the
    logged report says so.

    Sources: https://arxiv.org/abs/2103.14030 and https://arxiv.org/abs/2306.06189.

    Args:
        arch: Variant: ``'tiny'``, ``'small'``, ``'base'``, or a dict of fields of
            :class:`SwinHATArch`.
        in_channels: Channels of the images.
        window_size: Window size in tokens, one int or one for each stage; None for the arch's, 7.
        drop_path_rate: Drop-path rate of the last block, in [0, 1); None for the arch's.
        hat_stages: Stages with carriers; None for the arch's, (0, 1, 2); () for Swin itself.
        out_indices: Stages whose maps are returned, in this order. Strides are 4, 8, 16, 32.
        out_norm_cfg: Config of the norm of each returned map; that of stage 3 is the published
            model's ``norm``. None for raw maps.
        norm_cfg: Changes the type of the norms of the stem and the downsamplers; each keeps its
            own eps unless ``eps`` is given. Blocks keep layer norms, output norms follow
            ``out_norm_cfg``.
        frozen_stages: Freezes nothing (-1), the stem (0), or the stem and the first k stages with
            their output norms (k).
        norm_eval: Keeps batch norms, which only ``norm_cfg`` and ``out_norm_cfg`` bring in, in
            eval mode during training.
        with_cp: Recomputes the blocks' activations in the backward pass, which saves memory.
        init_cfg: mmengine's initialization config; ``dict(type='Pretrained', checkpoint=FILE)``
            takes Swin's files and native ones (with hat_mm's own names).

    Raises:
        ValueError: A value is out of range; the message names the choices.
        TypeError: ``arch`` is neither a name nor a dict.
    """

    archs = SWIN_HAT_ARCHS
    arch_type = SwinHATArch
    name_map = SWIN_NAMES
    published_norm = dict(type='hat_mm.LayerNorm2d')
    published_out_norm = LayerNorm2d
    from_scratch = [dict(type='TruncNormal', layer='Linear', std=0.02, bias=0.0)]

    def __init__(
        self,
        arch: str | dict = 'tiny',
        in_channels: int = 3,
        window_size: int | Sequence[int] | None = None,
        drop_path_rate: float | None = None,
        hat_stages: Sequence[int] | None = None,
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
            overrides={
                'window_size': window_size,
                'drop_path_rate': drop_path_rate,
                'hat_stages': hat_stages,
            },
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
        self.stem = PatchEmbed(self.in_channels, spec.embed_dims, norm_layer)
        self.stages = nn.ModuleList()
        for i in range(num_stages):
            dim, window_size = spec.dims[i], spec.window_size[i]
            carrier_size = spec.carrier_size[i] if i in spec.hat_stages else 0
            downsample = PatchMerging(spec.dims[i - 1], dim, norm_layer) if i else nn.Identity()
            tokenizer = CarrierTokenizer(dim, window_size, carrier_size) if carrier_size else None
            blocks = [
                SwinBlock(
                    dim,
                    spec.num_heads[i],
                    window_size=window_size,
                    shift=window_size // 2 if j % 2 and not carrier_size else 0,
                    carrier_size=carrier_size,
                    exchange=carrier_size > 0 and j % 2 == 1,
                    keep_carriers=carrier_size > 0 and j < spec.depths[i] - 1,
                    mlp_ratio=spec.mlp_ratio,
                    drop_path_rate=rate,
                )
                for j, rate in enumerate(rates[i])
            ]
            self.stages.append(SwinStage(downsample, tokenizer, blocks, with_cp=self.with_cp))

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

    def init_weights(self) -> None:
        """Initializes from scratch even if a file is loaded then: no Swin file has the carriers."""
        given = self.init_cfg
        configs = [given] if isinstance(given, dict) else given or ()
        if any('Pretrained' in str(config.get('type')) for config in configs):
            self.init_cfg = [*self.from_scratch, *configs]  # mmengine loads files last
        try:
            super().init_weights()
        finally:
            self.init_cfg = given

    def _adapt(self, state: dict[str, Any]) -> dict[str, Any]:
        """Resizes position tables to this window size, then maps names to ours."""
        state, resized = dict(unwrap(state)), 0
        for name, table in state.items():
            stage = re.match(r'(?:layers|stages)\.(\d)\..*\.relative_position_bias_table$', name)
            if stage is None or int(stage[1]) >= _NUM_STAGES or not isinstance(table, Tensor):
                continue
            side = 2 * self.spec.window_size[int(stage[1])] - 1
            old = round(len(table) ** 0.5) if table.ndim == 2 else side
            if old not in (0, side) and old * old == len(table):
                # As mmdet does.
                grid = table.float().t().unflatten(1, (old, old))[None]
                grid = F.interpolate(grid, (side, side), mode='bicubic')
                state[name] = grid[0].flatten(1).t().contiguous().to(table.dtype)
                resized += 1
        if resized:
            print_log(
                f'{type(self).__name__} {self.arch}: {resized} position tables interpolated for '
                f'window_size {self.spec.window_size}',
                logger='current',
            )
        return super()._adapt(state)
