"""Positions as functions of coordinates: absolute embedding, relative bias.

FasterViT's are small MLPs of normalised coordinates, so one set of weights serves every grid and
nothing that is stored depends on the input size (https://arxiv.org/abs/2306.06189). Swin's bias is
a table of the offsets in a window (https://arxiv.org/abs/2103.14030).

Letters: a b sides of a grid in tokens, N = a * b, G heads, C channels, p prefix tokens (the
carriers that stand in front of a window's tokens and have no position).
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cache import EvalCache
from .common import num_parts, predicts_on_cpu
from .deploy import FixedPositions

_HIDDEN = 512
# Numbers that a fixed bias may have and be kept as a whole (4 MiB in float32).
_WHOLE = 2**20


class _Positions(nn.Module):
    """A function of a grid's sides, whose result is cached in eval mode."""

    def __init__(self, num_prefix: int, cache: EvalCache | None) -> None:
        super().__init__()
        self.num_prefix = num_prefix
        self._cache = EvalCache() if cache is None else cache

    def forward(self, sides: tuple[int, int]) -> Tensor:
        return self._cache.get(self, sides, lambda: self._compute(*sides))

    def _compute(self, a: int, b: int) -> Tensor:
        raise NotImplementedError

    def fixed(self, sides: tuple[int, int]) -> nn.Module:
        """What takes the place of this module where the grid has these sides for good."""
        values = FixedPositions(self(sides))
        self._cache.drop(self)
        return values

    def train(self, mode: bool = True) -> '_Positions':
        self._cache.drop(self)
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> '_Positions':
        self._cache.drop(self)
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._cache.drop(self)
        super()._load_from_state_dict(*args, **kwargs)


class _PositionMlp(_Positions):
    """MLP 2 -> 512 -> ``out_dim`` of coordinates."""

    def __init__(self, out_dim: int, num_prefix: int, cache: EvalCache | None) -> None:
        super().__init__(num_prefix, cache)
        self.fc1 = nn.Linear(2, _HIDDEN)
        self.fc2 = nn.Linear(_HIDDEN, out_dim, bias=False)

    def _precise(self) -> dict[str, Any]:
        """Type and device of coordinates: float32 or the model's finer type."""
        weight = self.fc1.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return {'dtype': dtype, 'device': weight.device}

    def _mlp(self, rows: Tensor, cols: Tensor) -> Tensor:
        """Maps coordinates (a,) and (b,) to (a, b, out_dim), in the type of the coordinates.

        The results steer a softmax or are added to every token: a half-precision rounding here
        would show in every output, and the sums are too small to be worth it.
        """
        with torch.autocast(rows.device.type, enabled=False):
            weight, bias = self.fc1.weight.to(rows.dtype), self.fc1.bias.to(rows.dtype)
            last = self.fc2.weight.to(rows.dtype)

            def part(rows: Tensor) -> Tensor:
                # First layer by axis: the coordinates of a grid are a sum of a row and a column
                # part.
                hidden = (rows[:, None] * weight[:, 0])[:, None] + cols[:, None] * weight[:, 1]
                return F.linear(F.relu(hidden + bias), last)

            parts = num_parts(len(rows) * len(cols) * _HIDDEN) if predicts_on_cpu(rows) else 1
            if parts == 1:
                return part(rows)
            return torch.cat([part(some) for some in rows.tensor_split(min(parts, len(rows)))])


def _to_unit(offset: Tensor) -> Tensor:
    # Divided by a tensor: by a number that follows from the size, torch.compile compiles twice.
    # A single cell stays at 0.
    return offset / offset.abs().amax().clamp(min=1)


class AbsolutePositionEmbedding(_PositionMlp):
    """A vector for each token of a grid.

    Args:
        dim: Channels C.
        num_prefix: Tokens p in front of the grid; their vectors are zero.
        cache: Cache shared with other modules. Defaults to one of its own.

    Shape:
        Called with ``(a, b)``, returns (p + a * b, C), row-major, in float32 or the model's
        finer type.
    """

    def __init__(self, dim: int, num_prefix: int = 0, cache: EvalCache | None = None) -> None:
        super().__init__(dim, num_prefix, cache)

    def _compute(self, a: int, b: int) -> Tensor:
        def centred(side: int) -> Tensor:
            index = torch.arange(side, **self._precise())
            return _to_unit(index - side // 2)

        vectors = self._mlp(centred(a), centred(b)).flatten(0, 1)
        return F.pad(vectors, (0, 0, self.num_prefix, 0)) if self.num_prefix else vectors


class RelativePositions(_Positions):
    """A number for each pair of tokens and each head, by the offset of the two."""

    prefix_bias = 0.0

    def pairs(self, sides: tuple[int, int]) -> Tensor:
        """The numbers as a view of those by offset, which takes no memory of its own.

        Args:
            sides: Sides (a, b) of the grid.

        Returns:
            (G, a, b, a, b): head, row and column of the query, row and column of the key, the
            rows and columns of keys counted from the last one. Without the prefix.
        """
        table = self._cache.get(self, ('table', sides), lambda: self._table(*sides))
        return table.unfold(1, sides[0], 1).unfold(2, sides[1], 1)

    def _table(self, a: int, b: int) -> Tensor:
        """The numbers by offset, (G, 2a - 1, 2b - 1)."""
        raise NotImplementedError

    def fixed(self, sides: tuple[int, int]) -> nn.Module:
        """As for other positions; a large bias is fixed by offset.

        In a network with windows of 48x48 tokens those of all blocks would take gigabytes.
        """
        if not self.follows_offsets():
            return super().fixed(sides)
        table = self._table(*sides)
        if len(table) * (sides[0] * sides[1]) ** 2 <= _WHOLE:
            return super().fixed(sides)
        self._cache.drop(self)
        return FixedOffsets(table, self._cache)

    def follows_offsets(self) -> bool:
        """Whether :meth:`pairs` is all there is to it: no prefix, no hook, no other computation."""
        own = (RelativePositionBias, RelativePositionTable, FixedOffsets)
        hooked = self._forward_hooks or self._forward_pre_hooks or 'forward' in vars(self)
        return type(self) in own and not self.num_prefix and not hooked

    def _compute(self, a: int, b: int) -> Tensor:
        table = self._table(a, b).flatten(1)

        def differences(side: int) -> Tensor:
            index = torch.arange(side, device=table.device)
            return index[:, None] - index + side - 1

        # (a, b, a, b): row and column of the query, row and column of the key.
        index = differences(a)[:, None, :, None] * (2 * b - 1) + differences(b)[None, :, None, :]
        bias = table.index_select(1, index.flatten()).view(-1, a * b, a * b)
        p = self.num_prefix
        return F.pad(bias, (p, 0, p, 0), value=self.prefix_bias) if p else bias


class FixedOffsets(RelativePositions):
    """The bias of a grid without prefix, from its numbers by offset.

    Args:
        table: The numbers, (G, 2a - 1, 2b - 1).
        cache: Cache shared with other modules.

    Shape:
        Called with ``(a, b)``, returns (G, a * b, a * b): head, query, key.
    """

    def __init__(self, table: Tensor, cache: EvalCache) -> None:
        super().__init__(0, cache)
        self.register_buffer('table', table.clone())
        self.eval()

    def _table(self, a: int, b: int) -> Tensor:
        return self.table


class RelativePositionBias(RelativePositions, _PositionMlp):
    """A number for each pair of tokens and each head, added to the attention logits.

    Args:
        num_heads: Heads G.
        num_prefix: Tokens p in front of the grid.
        cache: Cache shared with other modules. Defaults to one of its own.

    Attributes:
        prefix_bias: Bias of pairs with prefix tokens; 0 as published. Those of the grid are between
            0 and 16 and start at about 8, so with 0 the prefix is hardly seen at first.

    Shape:
        Called with ``(a, b)``, returns (G, p + a * b, p + a * b): head, query, key, in float32
        or the model's finer type.
    """

    def __init__(self, num_heads: int, num_prefix: int = 0, cache: EvalCache | None = None) -> None:
        super().__init__(num_heads, num_prefix, cache)

    def _table(self, a: int, b: int) -> Tensor:
        def log_offsets(side: int) -> Tensor:
            offset = torch.arange(1 - side, side, **self._precise())
            offset = 8 * _to_unit(offset)
            return offset.sign() * torch.log2(offset.abs() + 1) / math.log2(8)

        # The bias depends on the offset only: the MLP sees (2a - 1)(2b - 1) offsets, not N * N
        # pairs, which on a large map would take gigabytes.
        table = self._mlp(log_offsets(a), log_offsets(b))
        return 16 * torch.sigmoid(table.permute(2, 0, 1))


class RelativePositionTable(RelativePositions):
    """Swin's bias: a learned number for each offset of two tokens in a window, and each head.

    Args:
        num_heads: Heads G.
        window: Window side w, the only side that it serves.
        num_prefix: Tokens p in front of the window's; pairs with them have bias 0.
        cache: Cache shared with other modules. Defaults to one of its own.

    Shape:
        Called with ``(w, w)``, returns (G, p + w * w, p + w * w): head, query, key.
    """

    def __init__(
        self, num_heads: int, window: int, num_prefix: int = 0, cache: EvalCache | None = None
    ) -> None:
        super().__init__(num_prefix, cache)
        table = torch.empty((2 * window - 1) ** 2, num_heads)
        self.relative_position_bias_table = nn.Parameter(nn.init.trunc_normal_(table, std=0.02))

    def _table(self, a: int, b: int) -> Tensor:
        table = self.relative_position_bias_table
        # Through a vector, so that the gradient gets the strides of the table.
        return table.flatten().view_as(table).t().unflatten(1, (2 * a - 1, 2 * b - 1))
