"""Compares a block of hierarchical attention with blocks of full attention.

The block is that of stage 2 of FasterViT-0 (256 channels, 8 heads, windows of 7x7 tokens, 2x2
carriers each), in eval mode on one map. It is compared with the same block without carriers, where
windows exchange nothing, and with the same layer with attention of all tokens to all tokens, with
and without FasterViT's position bias. The bias is a number for each head and pair of tokens; for
many tokens it is made for one chunk of queries at a time. Other blocks can be candidates, too:
attention/carriers:dim=512,heads=16. A size is that of the map, in tokens.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from hat_mm.backbones.fastervit import HATStage
from hat_mm.layers import SelfAttention, TransformerLayer

SIZES = [(14, 14), (28, 28), (56, 56), (80, 112), (112, 160), (160, 224)]
FORMS = ('carriers', 'windows', 'full', 'full-no-bias')


class FusedAttention(SelfAttention):
    """Self-attention without a position bias, so that the kernel reads only tokens.

    Args:
        dim: Channels C, a multiple of ``num_heads``.
        num_heads: Heads G.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__(dim, num_heads, nn.Identity())

    def forward(self, x: Tensor, grid_size: tuple[int, int], mask: Tensor | None = None) -> Tensor:
        """Maps (B, N, C) to (B, N, C)."""
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.num_heads, dim // self.num_heads)
        x = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4))
        return self.proj(x.transpose(1, 2).reshape(batch, tokens, dim))


class FullBlock(nn.Module):
    """The window layer of a hierarchical block, applied to all tokens of a map at once.

    Args:
        dim: Channels C.
        num_heads: Heads G.
        bias: Whether attention has a position bias.
    """

    def __init__(self, dim: int, num_heads: int, bias: bool) -> None:
        super().__init__()
        self.layer = TransformerLayer(dim, num_heads)
        if not bias:
            self.layer.attn = FusedAttention(dim, num_heads)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to the same shape."""
        grid_size = (x.shape[2], x.shape[3])
        tokens = x.permute(0, 2, 3, 1).flatten(1, 2)
        tokens = self.layer(tokens + self.layer.pos_embed(grid_size), grid_size)
        return tokens.unflatten(1, grid_size).permute(0, 3, 1, 2)


def build(form: str, dim: int = 256, heads: int = 8) -> nn.Module:
    """Makes the block of one of :data:`FORMS`, with random weights, in eval mode."""
    if form not in FORMS:
        raise ValueError(f'unknown form {form!r}; choices: {", ".join(FORMS)}')
    if form.startswith('full'):
        return FullBlock(dim, heads, bias=form == 'full').eval()
    carrier_size = 2 if form == 'carriers' else 0
    return HATStage(nn.Identity(), dim, heads, window_size=7, carrier_size=carrier_size).eval()
