"""Hierarchical attention (HAT): windows that talk to each other through carrier tokens.

Source: https://arxiv.org/abs/2306.06189. Letters: B batch, C channels, N tokens, G heads, w window
side, c carrier side, nh nw windows along each axis.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .common import DropPath, Mlp
from .position import AbsolutePositionEmbedding, EvalCache, RelativePositionBias
from .windows import merge_windows, split_windows


class SelfAttention(nn.Module):
    """Multi-head self-attention with a relative position bias.

    Args:
        dim: Channels C, a multiple of ``num_heads``.
        num_heads: Heads G.
        num_prefix: Tokens in front of the grid that have no position.
        cache: Where position biases are kept in eval mode.
    """

    def __init__(
        self, dim: int, num_heads: int, num_prefix: int = 0, cache: EvalCache | None = None
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.bias = RelativePositionBias(num_heads, num_prefix, cache)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, sides: tuple[int, int]) -> Tensor:
        """Maps (B, N, C) to (B, N, C), the tokens being a grid of ``sides`` behind the prefix."""
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.num_heads, dim // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        # Four axes: the fused kernels take no mask of three.
        bias = self.bias(sides).to(q.dtype)[None]
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.proj(x.transpose(1, 2).reshape(batch, tokens, dim))


class TransformerLayer(nn.Module):
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
        self.attn = SelfAttention(dim, num_heads, num_prefix, cache)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, mlp_ratio)
        self.drop_path = DropPath(drop_path_rate)
        for name in ('gamma1', 'gamma2'):
            gamma = None if layer_scale is None else nn.Parameter(torch.full((dim,), layer_scale))
            self.register_parameter(name, gamma)

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
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.window = window
        self.carrier_size = carrier_size

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Maps (B, C, nh * w, nw * w) to carriers in window order, (B * nh * nw, c * c, C)."""
        # As matrix products by axis: pooling kernels computed from the size make torch.compile
        # recompile for every size, and torch 2.13 then returns wrong values without a word.
        if torch.is_grad_enabled():
            # Else the gradient of the weight has strides that DistributedDataParallel warns of.
            x = x.contiguous()
        x = self.conv(x)
        rows, cols = (self._pooling(windows, x) for windows in grid)
        x = rows @ (x @ cols.t())
        return split_windows(x.permute(0, 2, 3, 1), grid, self.carrier_size)

    def _pooling(self, windows: int, like: Tensor) -> Tensor:
        """The (c * n, n * w) matrix that averages an axis of n ``windows`` to its carriers."""
        side, cells = windows * self.window, windows * self.carrier_size
        stride = self.window // self.carrier_size
        width = side - (cells - 1) * stride
        start = stride * torch.arange(cells, device=like.device)[:, None]
        index = torch.arange(side, device=like.device)
        inside = ((index >= start) & (index < start + width)).to(like.dtype)
        return inside / inside.sum(1, keepdim=True)


class HierarchicalBlock(nn.Module):
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
        x = self.window(tokens, sides)
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
        tokens = x[:, c * c :] + _scaled(upsampled, self.carrier.gamma1)
        return torch.cat([x[:, : c * c], tokens], 1)
