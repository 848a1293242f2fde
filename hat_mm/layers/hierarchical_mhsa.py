"""HAT-Net's H-MHSA: attention in windows, then to a pooled map (https://arxiv.org/abs/2106.03180).

Letters: B batch, C channels, H W map size, w window size (the paper's grid size), G heads,
d = C / G channels of a head.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import tracing
from .convs import PointwiseConv
from .norms import NormFactory
from .windows import (
    average_windows,
    border_mask,
    count_windows,
    merge_windows,
    pad_to_windows,
    split_windows,
)


class HierarchicalMHSA(nn.Module):
    """H-MHSA: attention inside windows, then of every token to the pooled result.

    If windows do not divide a map, the last ones are smaller: their padding is masked as a key and
    is not part of any norm. Pooling squares at the border average only the tokens that exist.

    Args:
        dim: Channels C, a multiple of ``num_heads``.
        num_heads: Heads G.
        window_size: Window size w; 1 for plain global attention.
        ds_ratio: Side in tokens of the squares that are averaged to one key.
        norm_layer: Makes the norms from channels and eps.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        window_size: int,
        ds_ratio: int,
        norm_layer: NormFactory,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.window_size = window_size
        self.ds_ratio = ds_ratio
        self.norm = norm_layer(dim, 1e-6)
        self.qkv = PointwiseConv(dim, 3 * dim)
        if window_size > 1:
            self.grid_norm = norm_layer(dim, 1e-6)
            self.ds_norm = norm_layer(dim, 1e-6)
            self.q = PointwiseConv(dim, dim)
            self.kv = PointwiseConv(dim, 2 * dim)
        self.proj = PointwiseConv(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to the same shape."""
        # The fused attention kernels need channels last.
        x = x.contiguous(memory_format=torch.channels_last)
        y = self.norm(x)
        if self.window_size == 1:
            return self.proj(self._attend(*self._tokens(self.qkv(y), 3), map_size=y.shape[-2:]))
        y = self.grid_norm(x + self._attend_in_windows(y))
        q, kv = self.q(y), self.kv(self.ds_norm(average_windows(y, self.ds_ratio)))
        z = self._attend(*self._tokens(q, 1), *self._tokens(kv, 2), map_size=y.shape[-2:])
        return self.proj(z + y)

    def _tokens(self, x: Tensor, parts: int) -> Tensor:
        """(B, parts * C, H, W) to (parts, B, G, H * W, d), where the channels are (parts, G, d)."""
        x = x.flatten(2).unflatten(1, (parts, self.num_heads, -1))
        return x.permute(1, 0, 2, 4, 3)

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        map_size: Sequence[int],
        mask: Tensor | None = None,
    ) -> Tensor:
        """Attention of all queries to all keys that the mask allows, as a map (B, C, *map_size)."""
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return x.transpose(2, 3).flatten(1, 2).unflatten(2, map_size)

    def _attend_in_windows(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        w = self.window_size
        num_windows = count_windows((height, width), w)
        mask = border_mask(height, width, w, x.device)
        if mask is not None:
            mask = mask.repeat(batch, 1, 1, 1)
        x = pad_to_windows(x, num_windows, w).permute(0, 2, 3, 1)
        x = split_windows(x, num_windows, w)
        # Each window as a map of its own, (B * nh * nw, C, w, w).
        qkv = self.qkv(x.transpose(1, 2).unflatten(2, (w, w)))
        x = (
            self._attend(*self._tokens(qkv, 3), map_size=(w, w), mask=mask)
            .flatten(2)
            .transpose(1, 2)
        )
        x = merge_windows(x, num_windows, w)
        return tracing.crop(x, height, width).permute(0, 3, 1, 2)
