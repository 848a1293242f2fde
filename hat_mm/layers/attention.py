"""Self-attention with a relative position bias, and the transformer layer around it.

Letters: B batch, C channels, N tokens, Q queries, G heads, d = C / G channels of a head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import tracing
from .deploy import Deployable, fold_scale
from .norms import DropPath
from .position import AbsolutePositionEmbedding, RelativePositionBias

# Largest bias that is made at once, in elements (heads times pairs of tokens): 128 MiB in float32.
# The bias of all carriers of an image of 4096x4096 pixels would take 0.96 GB.
_PAIRS = 2**25


class SelfAttention(nn.Module):
    """Multi-head self-attention with a relative position bias.

    If there are many tokens, the queries are processed in chunks, so that the bias of all pairs of
    tokens need not be in memory at once.

    Args:
        dim: Channels C, a multiple of ``num_heads``.
        num_heads: Heads G.
        bias: Returns the bias (G, Q, N) for a grid size and a slice of the tokens as queries.
    """

    def __init__(self, dim: int, num_heads: int, bias: nn.Module) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.bias = bias
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, grid_size: tuple[int, int], mask: Tensor | None = None) -> Tensor:
        """Lets the tokens of each entry of the first axis attend to each other.

        Args:
            x: Tokens, (B, N, C): a prefix, then a grid.
            grid_size: Size of the grid in tokens.
            mask: True where a query may see a key, (B, 1, N, N); None for no mask.

        Returns:
            Tensor of the shape of ``x``.
        """
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.num_heads, dim // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        outputs = []
        for queries in tracing.chunks(tokens, at_once=_PAIRS // (self.num_heads * tokens)):
            # Four axes, because the fused kernels accept no mask of three.
            bias = self.bias(grid_size, queries).to(q.dtype)[None]
            if mask is not None:
                bias = bias.masked_fill(~mask[:, :, queries], -torch.inf)
            y = F.scaled_dot_product_attention(q[:, :, queries], k, v, attn_mask=bias)
            outputs.append(y.transpose(1, 2).flatten(2))
        return self.proj(outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1))


class Mlp(nn.Module):
    """Two linear layers with a GELU between them, applied to the last axis.

    Args:
        dim: Channels in and out.
        ratio: Hidden width as a multiple of ``dim``.
    """

    def __init__(self, dim: int, ratio: float = 4) -> None:
        super().__init__()
        hidden = int(dim * ratio)
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., C) to (..., C)."""
        return self.fc2(self.act(self.fc1(x)))


class TransformerLayer(Deployable):
    """Pre-norm attention and MLP on a grid of tokens, with an absolute position embedding.

    The caller adds the embedding (``pos_embed``), because prefix tokens join only after that.

    Args:
        dim: Channels C.
        num_heads: Heads G.
        num_prefix: Prefix tokens before the grid, which have no position.
        prefix_bias: Attention bias of pairs with prefix tokens.
        drop_path_rate: Probability that an entry of the first axis skips a residual branch in
            training.
        layer_scale: Initial value of the per-channel factors of both branches; None for none.
        mlp_ratio: Hidden width of the MLP as a multiple of C.
        positions_by_tokens: See :class:`~hat_mm.layers.position.AbsolutePositionEmbedding`.
    """

    gamma1: Tensor | None
    gamma2: Tensor | None
    folded_scale: Tensor | None

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_prefix: int = 0,
        prefix_bias: float = 0.0,
        drop_path_rate: float = 0.0,
        layer_scale: float | None = None,
        mlp_ratio: float = 4,
        positions_by_tokens: bool = False,
    ) -> None:
        super().__init__()
        self.pos_embed: nn.Module = AbsolutePositionEmbedding(dim, positions_by_tokens)
        self.norm1 = nn.LayerNorm(dim)
        bias = RelativePositionBias(num_heads, num_prefix, prefix_bias)
        self.attn = SelfAttention(dim, num_heads, bias)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, mlp_ratio)
        self.drop_path = DropPath(drop_path_rate)
        for name in ('gamma1', 'gamma2'):
            gamma = None if layer_scale is None else nn.Parameter(torch.full((dim,), layer_scale))
            self.register_parameter(name, gamma)
        # Keeps gamma1 after it has been folded into the weights.
        self.register_buffer('folded_scale', None)

    def _fold(self) -> None:
        if self.gamma1 is not None and self.gamma2 is not None:
            fold_scale(self.attn.proj, self.gamma1)
            fold_scale(self.mlp.fc2, self.gamma2)
            self.folded_scale = self.gamma1.detach().clone()
            self.gamma1 = self.gamma2 = None

    @property
    def scale(self) -> Tensor | None:
        """Per-channel factors (C,) of the attention branch, folded or not; None for none."""
        return self.gamma1 if self.folded_scale is None else self.folded_scale

    def forward(self, x: Tensor, grid_size: tuple[int, int]) -> Tensor:
        """Maps (B, N, C) to (B, N, C): a prefix, then tokens of a grid of ``grid_size``."""
        x = x + self.drop_path(scaled(self.attn(self.norm1(x), grid_size), self.gamma1))
        return x + self.drop_path(scaled(self.mlp(self.norm2(x)), self.gamma2))


def scaled(x: Tensor, gamma: Tensor | None) -> Tensor:
    """Multiplies (..., C) by the per-channel factors (C,), if there are any."""
    return x if gamma is None else x * gamma.to(x.dtype)
