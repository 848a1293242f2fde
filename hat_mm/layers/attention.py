"""Hierarchical attention in both families' sense.

FasterViT's HAT (https://arxiv.org/abs/2306.06189): windows that talk to each other through carrier
tokens. HAT-Net's H-MHSA (https://arxiv.org/abs/2106.03180): windows first, then all tokens to a
pooled map.

Letters: B batch, C channels, H W map size, N tokens, G heads, d = C / G channels of a head, w
window side, c carrier side, nh nw windows along each axis.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cache import EvalCache
from .common import (
    DropPath,
    Mlp,
    NormFactory,
    checkpoint_block,
    in_parts,
    num_parts,
    predicts_on_cpu,
)
from .convs import Conv2d, PointwiseConv
from .deploy import Deployable, fold_scale
from .position import AbsolutePositionEmbedding, RelativePositionBias, RelativePositions
from .windows import (
    BorderMask,
    average_windows,
    crop,
    merge_windows,
    pad_to_windows,
    split_windows,
    window_grid,
)


class SelfAttention(nn.Module):
    """Multi-head self-attention with a relative position bias.

    Args:
        dim: Channels C, a multiple of ``num_heads``.
        num_heads: Heads G.
        bias: Gives the bias (G, N, N) of a grid's sides.
    """

    def __init__(self, dim: int, num_heads: int, bias: nn.Module) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.bias = bias
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, sides: tuple[int, int], mask: Tensor | None = None) -> Tensor:
        """Attends to the tokens of each entry of the first axis.

        Args:
            x: Tokens, (B, N, C): a prefix, then a grid.
            sides: Sides of the grid in tokens.
            mask: True where a query may see a key, (B, 1, N, N); None for everywhere.

        Returns:
            Tensor of the shape of ``x``.
        """
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.num_heads, dim // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        parts = self._bias_parts(sides) if predicts_on_cpu(x) and mask is None else 1
        if parts > 1:
            return self.proj(self._attend_by_rows(q, k, v, sides, parts).flatten(2))
        # Four axes: the fused kernels take no mask of three.
        bias = self.bias(sides).to(q.dtype)[None]
        if mask is not None:
            bias = bias.masked_fill(~mask, -torch.inf)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.proj(x.transpose(1, 2).reshape(batch, tokens, dim))

    def _bias_parts(self, sides: tuple[int, int]) -> int:
        """Parts to use the bias in; no part is less than a row of queries."""
        if not isinstance(self.bias, RelativePositions) or not self.bias.follows_offsets():
            return 1
        return num_parts(self.num_heads * (sides[0] * sides[1]) ** 2)

    def _attend_by_rows(
        self, q: Tensor, k: Tensor, v: Tensor, sides: tuple[int, int], parts: int
    ) -> Tensor:
        """Attention of (B, G, N, d), some rows of queries at a time, to (B, N, G, d).

        So the bias, which has a number for each pair of tokens, never is there as a whole.
        """
        # The order of the keys makes no difference, and in this one no index is needed.
        bias, k, v = self.bias.pairs(sides), k.flip(2), v.flip(2)
        x = q.new_empty(q.shape[0], q.shape[2], *q.shape[1::2])
        queries, results = (t.unflatten(1, sides) for t in (q.transpose(1, 2), x))
        rows = -(-sides[0] // parts)
        for first in range(0, sides[0], rows):
            part = slice(first, first + rows)
            found = F.scaled_dot_product_attention(
                queries[:, part].flatten(1, 2).transpose(1, 2),
                k,
                v,
                attn_mask=bias[:, part].flatten(3).flatten(1, 2)[None].to(q.dtype),
            )
            results[:, part] = found.transpose(1, 2).unflatten(1, (-1, sides[1]))
        return x


class TransformerLayer(Deployable):
    """Pre-norm attention and MLP on a grid of tokens, with the grid's absolute positions.

    The positions are separate (``pos_embed``), because prefix tokens join after they are added.

    Args:
        dim: Channels C.
        num_heads: Heads G.
        num_prefix: Tokens in front of the grid that have no position.
        drop_path_rate: Probability that an entry of the first axis skips a residual branch.
        layer_scale: Start value of the per-channel factors of both branches, or None for none.
        mlp_ratio: Hidden width of the MLP as a multiple of C.
        cache: Where position tensors are kept in eval mode.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_prefix: int = 0,
        drop_path_rate: float = 0.0,
        layer_scale: float | None = None,
        mlp_ratio: float = 4,
        cache: EvalCache | None = None,
    ) -> None:
        super().__init__()
        self.pos_embed = AbsolutePositionEmbedding(dim, num_prefix, cache)
        self.norm1 = nn.LayerNorm(dim)
        self.attn = SelfAttention(
            dim, num_heads, RelativePositionBias(num_heads, num_prefix, cache)
        )
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, mlp_ratio)
        self.drop_path = DropPath(drop_path_rate)
        for name in ('gamma1', 'gamma2'):
            gamma = None if layer_scale is None else nn.Parameter(torch.full((dim,), layer_scale))
            self.register_parameter(name, gamma)
        # The first factor after it has gone into the weights.
        self.register_buffer('folded_scale', None)

    def _fold(self) -> None:
        if self.gamma1 is not None:
            fold_scale(self.attn.proj, self.gamma1)
            fold_scale(self.mlp.fc2, self.gamma2)
            self.folded_scale = self.gamma1.detach().clone()
            self.gamma1 = self.gamma2 = None

    def forward(self, x: Tensor, sides: tuple[int, int]) -> Tensor:
        """Maps (B, N, C) to (B, N, C), the tokens being a grid of ``sides`` behind the prefix."""
        x = x + self.drop_path(_scaled(self.attn(self.norm1(x), sides), self.gamma1))
        return x + self.drop_path(_scaled(self.mlp(self.norm2(x)), self.gamma2))


def _scaled(x: Tensor, gamma: Tensor | None) -> Tensor:
    return x if gamma is None else x * gamma.to(x.dtype)


class CarrierTokenizer(nn.Module):
    """Births the carrier tokens: a depthwise convolution, then average pooling.

    An axis of n windows of w tokens becomes c * n cells. As in the published model their stride is
    ``w // c`` and their width what is left for the last cell, so cells overlap more the larger
    the map is.

    Args:
        dim: Channels C.
        window: Window side w.
        carrier_size: Carrier side c.
    """

    def __init__(self, dim: int, window: int, carrier_size: int) -> None:
        super().__init__()
        self.conv = Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.window = window
        self.carrier_size = carrier_size

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Maps (B, C, nh * w, nw * w) to carriers in window order, (B * nh * nw, c * c, C)."""
        # As matrix products by axis: pooling kernels computed from the size make torch.compile
        # recompile for every size, and torch 2.13 then returns wrong values without a word.
        x = self.conv(x).permute(0, 2, 3, 1)
        rows, cols = (self._pooling(windows, x) for windows in grid)
        # The axis of the rows first, as one product for an image.
        x = cols @ (rows @ x.flatten(2)).unflatten(2, x.shape[2:])
        return split_windows(x, grid, self.carrier_size)

    def _pooling(self, windows: int, like: Tensor) -> Tensor:
        """The (c * n, n * w) matrix that averages an axis of n ``windows`` to its carriers."""
        side, cells = windows * self.window, windows * self.carrier_size
        stride = self.window // self.carrier_size
        width = side - (cells - 1) * stride
        start = stride * torch.arange(cells, device=like.device)[:, None]
        index = torch.arange(side, device=like.device)
        inside = ((index >= start) & (index < start + width)).to(like.dtype)
        return inside / inside.sum(1, keepdim=True)


class HierarchicalBlock(Deployable):
    """Attention inside windows, after the windows' carrier tokens attended to each other.

    Works on window tokens alone as well (``carrier_size=0``).

    Args:
        dim: Channels C.
        num_heads: Heads G of both attentions.
        window: Window side w.
        carrier_size: Carrier side c; 0 for no carriers.
        drop_path_rate: Probability that a window (an image for the carriers) skips a branch.
        layer_scale: Start value of the per-channel factors of the branches, or None for none.
        propagate: Adds each carrier to the tokens of its cell at the end of the block.
        mlp_ratio: Hidden width of the MLPs as a multiple of C.
        cache: Where position tensors are kept in eval mode.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: int,
        carrier_size: int = 0,
        drop_path_rate: float = 0.0,
        layer_scale: float | None = None,
        propagate: bool = False,
        mlp_ratio: float = 4,
        cache: EvalCache | None = None,
    ) -> None:
        super().__init__()
        self.window_size = window
        self.carrier_size = carrier_size
        self.propagate = propagate
        options = (drop_path_rate, layer_scale, mlp_ratio, cache)
        self.carrier = TransformerLayer(dim, num_heads, 0, *options) if carrier_size else None
        self.window = TransformerLayer(dim, num_heads, carrier_size**2, *options)

    def _fold(self) -> None:
        sides = (self.window_size, self.window_size)
        self.window.pos_embed = self.window.pos_embed.fixed(sides)
        self.window.attn.bias = self.window.attn.bias.fixed(sides)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Runs the block.

        Args:
            x: Tokens by window, (B * nh * nw, c * c + w * w, C), carriers first.
            grid: Number of windows along the axes, (nh, nw).

        Returns:
            Tensor of the shape of ``x``.
        """
        sides = (self.window_size, self.window_size)
        tokens = x + self.window.pos_embed(sides).to(x.dtype)
        if self.carrier is not None:
            # Into the sum just made: putting the two together anew would be one more full copy.
            tokens[:, : self.carrier_size**2] = self._attend_carriers(x, grid)
        hidden = tokens.shape[0] * tokens.shape[1] * self.window.mlp.fc1.out_features
        x = in_parts(lambda windows: self.window(windows, sides), tokens, hidden, tokens)
        return self._propagate(x) if self.propagate else x

    def _attend_carriers(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        c = self.carrier_size
        sides = (grid[0] * c, grid[1] * c)
        carriers = merge_windows(x[:, : c * c], grid, c).flatten(1, 2)
        carriers = carriers + self.carrier.pos_embed(sides).to(x.dtype)
        carriers = self.carrier(carriers, sides)
        return split_windows(carriers.unflatten(1, sides), grid, c)

    def _propagate(self, x: Tensor) -> Tensor:
        w, c = self.window_size, self.carrier_size
        cell = torch.arange(w, device=x.device) * c // w
        upsampled = x[:, (cell[:, None] * c + cell).flatten()]
        scale = self.carrier.folded_scale if self.carrier.deploy else self.carrier.gamma1
        tokens = x[:, c * c :] + _scaled(upsampled, scale)
        return torch.cat([x[:, : c * c], tokens], 1)


class AttentionStage(nn.Module):
    """A down-sampler and transformer blocks on windows, with or without carrier tokens.

    The map is padded with zeros at the bottom and right to whole windows. As in the published
    models the padded tokens take part in attention.

    Args:
        downsample: Module in front of the blocks, or None.
        dim: Channels C of the blocks.
        num_heads: Attention heads.
        window: Window side w in tokens.
        carrier_size: Carrier side c in tokens, 0 for no carriers.
        layer_scale: Start value of the per-channel factors, or None for none.
        propagate: Adds the carriers to their tokens at the end of the stage.
        drop_paths: Drop-path rate of each block.
        cache: Where position tensors are kept in eval mode.
        with_cp: Recomputes the blocks' activations for the gradient.
        mlp_ratio: Hidden width of the MLPs as a multiple of C.
    """

    def __init__(
        self,
        downsample: nn.Module | None,
        dim: int,
        num_heads: int,
        window: int,
        carrier_size: int,
        layer_scale: float | None,
        propagate: bool,
        drop_paths: Sequence[float],
        cache: EvalCache,
        with_cp: bool,
        mlp_ratio: float = 4,
    ) -> None:
        super().__init__()
        self.downsample = downsample
        self.tokenizer = CarrierTokenizer(dim, window, carrier_size) if carrier_size else None
        self.blocks = nn.ModuleList(
            HierarchicalBlock(
                dim,
                num_heads,
                window,
                carrier_size,
                drop_path_rate=rate,
                layer_scale=layer_scale,
                propagate=propagate and carrier_size > 0 and i == len(drop_paths) - 1,
                mlp_ratio=mlp_ratio,
                cache=cache,
            )
            for i, rate in enumerate(drop_paths)
        )
        self.window_size = window
        self.num_carriers = carrier_size**2
        self.with_cp = with_cp

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to the stage's feature map."""
        if self.downsample is not None:
            x = self.downsample(x)
        height, width = x.shape[-2:]
        grid = window_grid(height, width, self.window_size)
        x = pad_to_windows(x, grid, self.window_size)
        tokens = split_windows(x.permute(0, 2, 3, 1), grid, self.window_size)
        if self.tokenizer is not None:
            tokens = torch.cat([self.tokenizer(x, grid), tokens], 1)
        for block in self.blocks:
            args = (tokens, grid)
            tokens = checkpoint_block(block, *args) if self.with_cp else block(*args)
        x = merge_windows(tokens[:, self.num_carriers :], grid, self.window_size)
        return crop(x, height, width).permute(0, 3, 1, 2)


class HierarchicalSelfAttention(nn.Module):
    """H-MHSA: attention inside windows, then of every token to the pooled result.

    Where a map ends inside its last windows these are smaller: what is added to fill them is no
    key, and no norm sees it. Pooling windows at the border average the tokens that exist.

    Args:
        dim: Channels C, a multiple of ``num_heads``.
        num_heads: Heads G.
        window: Window side w; 1 for global attention of all tokens to all tokens and nothing else.
        ds_ratio: Side in tokens of the squares that are pooled to one key.
        norm_layer: Makes the norms from channels and eps.
        cache: Where masks are kept in eval mode.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: int,
        ds_ratio: int,
        norm_layer: NormFactory,
        cache: EvalCache | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.window = window
        self.ds_ratio = ds_ratio
        self.norm = norm_layer(dim, 1e-6)
        self.qkv = PointwiseConv(dim, 3 * dim)
        if window > 1:
            self.mask = BorderMask(window, cache)
            self.grid_norm = norm_layer(dim, 1e-6)
            self.ds_norm = norm_layer(dim, 1e-6)
            self.q = PointwiseConv(dim, dim)
            self.kv = PointwiseConv(dim, 2 * dim)
        self.proj = PointwiseConv(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to the same shape."""
        # The fused attention kernels want the channels of a token side by side.
        x = x.contiguous(memory_format=torch.channels_last)
        y = self.norm(x)
        if self.window == 1:
            return self.proj(self._attend(*self._tokens(self.qkv(y), 3), y.shape[-2:]))
        y = self.grid_norm(x + self._attend_in_windows(y))
        q, kv = self.q(y), self.kv(self.ds_norm(average_windows(y, self.ds_ratio)))
        z = self._attend(*self._tokens(q, 1), *self._tokens(kv, 2), y.shape[-2:])
        return self.proj(z + y)

    def _tokens(self, x: Tensor, parts: int) -> Tensor:
        """(B, parts * C, H, W) to (parts, B, G, H * W, d), the channels being (parts, G, d)."""
        x = x.flatten(2).unflatten(1, (parts, self.num_heads, -1))
        return x.permute(1, 0, 2, 4, 3)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, sides: tuple[int, int], mask: Tensor | None = None
    ) -> Tensor:
        """Attention of all to all that the mask allows, back as a map (B, C, *sides)."""
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return x.transpose(2, 3).flatten(1, 2).unflatten(2, sides)

    def _attend_in_windows(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        w = self.window
        grid = window_grid(height, width, w)
        mask = self.mask(height, width, x.device)
        if mask is not None:
            mask = mask.repeat(batch, 1, 1, 1)
        x = split_windows(pad_to_windows(x, grid, w).permute(0, 2, 3, 1), grid, w)
        # Each window as a map of its own, (B * nh * nw, C, w, w).
        qkv = self.qkv(x.transpose(1, 2).unflatten(2, (w, w)))
        x = self._attend(*self._tokens(qkv, 3), (w, w), mask).flatten(2).transpose(1, 2)
        return crop(merge_windows(x, grid, w), height, width).permute(0, 3, 1, 2)
