"""Positions as functions of coordinates: absolute embedding, relative bias.

FasterViT's are small MLPs of normalized coordinates, so one set of weights serves every grid size,
and nothing that is stored depends on the input size (https://arxiv.org/abs/2306.06189). Swin's bias
is a table of the offsets in a window (https://arxiv.org/abs/2103.14030).

Letters: (a, b) grid size in tokens, p prefix tokens (carriers before a window's tokens, without a
position), N = p + a * b tokens, Q queries, G heads, C channels.
"""

import math
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_HIDDEN = 512
_ALL = slice(None)


class PositionMlp(nn.Module):
    """MLP 2 -> 512 -> ``out_dim`` of coordinates.

    Its results go into a softmax or are added to every token, where half precision would affect
    every output. They are cheap to compute, so they are always in float32 or, if that is more
    precise, the model's dtype.

    Args:
        out_dim: Outputs for each coordinate.
    """

    def __init__(self, out_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(2, _HIDDEN)
        self.fc2 = nn.Linear(_HIDDEN, out_dim, bias=False)

    def range(self, start: int, end: int) -> Tensor:
        """The integers from ``start`` to ``end`` - 1, in the precision of the MLP."""
        weight = self.fc1.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return torch.arange(start, end, dtype=dtype, device=weight.device)

    def of_grid(self, rows: Tensor, cols: Tensor) -> Tensor:
        """Maps row coordinates (a,) and column coordinates (b,) to (a, b, out_dim)."""
        device, dtype = rows.device.type, rows.dtype
        # The meta device has no autocast to turn off. To ask torch about that would break the graph
        # of torch.compile up to torch 2.9.
        with nullcontext() if device == 'meta' else torch.autocast(device, enabled=False):
            grid = torch.stack(torch.meshgrid(rows, cols, indexing='ij'), -1)
            hidden = F.linear(grid, self.fc1.weight.to(dtype), self.fc1.bias.to(dtype))
            return F.linear(F.relu(hidden), self.fc2.weight.to(dtype))


def _to_unit(offset: Tensor) -> Tensor:
    # The divisor is a tensor: with a number computed from the size, torch.compile compiles twice.
    # A single cell stays at 0.
    return offset / offset.abs().amax(0).clamp(min=1)


class AbsolutePositionEmbedding(PositionMlp):
    """A vector for each token of a grid.

    Args:
        dim: Channels C.
        by_tokens: Centres and scales the coordinates of both axes by half the number of tokens,
            a * b // 2, not by half the size of the axis.

    Shape:
        Called with the grid size ``(a, b)``, returns (a * b, C), row-major, in float32 or, if that
        is more precise, the model's dtype.
    """

    def __init__(self, dim: int, by_tokens: bool = False) -> None:
        super().__init__(dim)
        self.by_tokens = by_tokens

    def forward(self, grid_size: tuple[int, int]) -> Tensor:
        """Computes the vectors for a grid size."""
        a, b = grid_size
        half_a, half_b = (a * b // 2, a * b // 2) if self.by_tokens else (a // 2, b // 2)
        rows, cols = _to_unit(self.range(0, a) - half_a), _to_unit(self.range(0, b) - half_b)
        return self.of_grid(rows, cols).flatten(0, 1)


class FixedPositions(nn.Module):
    """The vectors of an absolute position embedding for one grid size.

    Args:
        values: What the embedding returned for that grid size, (a * b, C).
    """

    values: Tensor

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.register_buffer('values', values.clone())

    def forward(self, grid_size: tuple[int, int]) -> Tensor:
        """Returns the values, whatever ``grid_size``."""
        return self.values


def bias_of_pairs(
    by_offset: Tensor,
    grid_size: tuple[int, int],
    queries: slice,
    *,
    num_prefix: int,
    prefix_bias: float,
) -> Tensor:
    """Looks up the bias of all pairs of tokens by their offset.

    Args:
        by_offset: Bias by offset, query minus key, (G, 2a - 1, 2b - 1).
        grid_size: Grid size (a, b). Recomputing it from the shape would slow torch.compile down,
            because symbolic sizes grow with every division.
        queries: Slice of all tokens, prefix included, that are queries.
        num_prefix: Prefix tokens p before the grid.
        prefix_bias: Bias of pairs with prefix tokens.

    Returns:
        (G, Q, p + a * b): head, query, key.
    """
    a, b = grid_size
    row = torch.arange(a, device=by_offset.device)[:, None].expand(a, b).flatten()
    col = torch.arange(b, device=by_offset.device).expand(a, b).flatten()
    asking = slice(None) if num_prefix else queries
    offset = (row[asking, None] - row + a - 1) * (2 * b - 1)
    offset += col[asking, None] - col + b - 1
    bias = by_offset.flatten(1).index_select(1, offset.flatten()).unflatten(1, offset.shape)
    if num_prefix:
        bias = F.pad(bias, (num_prefix, 0, num_prefix, 0), value=prefix_bias)[:, queries]
    return bias


class RelativePositionBias(PositionMlp):
    """FasterViT's bias, between 0 and 16: a function of the logarithm of the offset.

    Args:
        num_heads: Heads G.
        num_prefix: Prefix tokens p before the grid.
        prefix_bias: Bias of pairs with prefix tokens; 0 as published. The biases of other pairs
            start at about 8, so with 0 the prefix gets little attention at first.

    Shape:
        Called with the grid size ``(a, b)`` and a slice of the N = p + a * b tokens as the Q
        queries (by default all), returns (G, Q, N) in float32 or, if that is more precise, the
        model's dtype.
    """

    def __init__(self, num_heads: int, num_prefix: int = 0, prefix_bias: float = 0.0) -> None:
        super().__init__(num_heads)
        self.num_prefix = num_prefix
        self.prefix_bias = prefix_bias

    def forward(self, grid_size: tuple[int, int], queries: slice = _ALL) -> Tensor:
        """Computes the bias for a grid size."""
        return bias_of_pairs(
            self.by_offset(grid_size),
            grid_size,
            queries,
            num_prefix=self.num_prefix,
            prefix_bias=self.prefix_bias,
        )

    def by_offset(self, grid_size: tuple[int, int]) -> Tensor:
        """The bias by offset, (G, 2a - 1, 2b - 1).

        The MLP runs on these few offsets, not on all pairs, which take gigabytes on a large map.
        """
        rows, cols = (self._log_offsets(n) for n in grid_size)
        return 16 * torch.sigmoid(self.of_grid(rows, cols).permute(2, 0, 1))

    def _log_offsets(self, n: int) -> Tensor:
        offset = 8 * _to_unit(self.range(1 - n, n))
        return offset.sign() * torch.log2(offset.abs() + 1) / math.log2(8)

    def fixed(self, window_size: int) -> 'RelativePositionTable':
        """The same bias as a table for one window size, without the MLP."""
        table = RelativePositionTable(self.fc2.out_features, window_size, self.num_prefix)
        by_offset = self.by_offset((window_size, window_size))
        table.relative_position_bias_table = nn.Parameter(by_offset.flatten(1).t().contiguous())
        table.prefix_bias = self.prefix_bias
        return table


class RelativePositionTable(nn.Module):
    """Swin's bias: a learned number for each head and each offset of two tokens in a window.

    Args:
        num_heads: Heads G.
        window_size: Window size w, the only one that the table serves.
        num_prefix: Prefix tokens p before the window's tokens.

    Attributes:
        prefix_bias: Bias of pairs with prefix tokens, 0.

    Shape:
        Called with ``(w, w)`` and a slice of the N = p + w * w tokens as the Q queries (by default
        all), returns (G, Q, N).
    """

    def __init__(self, num_heads: int, window_size: int, num_prefix: int = 0) -> None:
        super().__init__()
        self.window_size = window_size
        self.num_prefix = num_prefix
        self.prefix_bias = 0.0
        table = torch.empty((2 * window_size - 1) ** 2, num_heads)
        self.relative_position_bias_table = nn.Parameter(nn.init.trunc_normal_(table, std=0.02))

    def forward(self, grid_size: tuple[int, int], queries: slice = _ALL) -> Tensor:
        """Returns the bias of a window."""
        offsets = 2 * self.window_size - 1
        table = self.relative_position_bias_table
        # Through a flat view, so that the gradient gets the strides of the table.
        by_offset = table.flatten().view_as(table).t().unflatten(1, (offsets, offsets))
        return bias_of_pairs(
            by_offset, grid_size, queries, num_prefix=self.num_prefix, prefix_bias=self.prefix_bias
        )
