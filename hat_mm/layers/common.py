"""Pieces of no single kind: drop path, norm, MLP, activation checkpointing."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

NormFactory = Callable[[int, float], nn.Module]
"""Makes the norm of a convolution from its channels and its eps."""


# Elements of a tensor that a processor's cache holds for each of its cores (2 MiB in float32).
_CACHED = 2**19


def predicts_on_cpu(x: Tensor) -> bool:
    """Whether ``x`` is computed with on a CPU at once, rather than traced, and for no gradient.

    There memory decides: a large new tensor costs more than what is computed in it, because the
    system hands its pages out one by one.
    """
    return _runs_on_cpu(x) and not torch.is_grad_enabled()


def learns_on_cpu(x: Tensor) -> bool:
    """Whether ``x`` is computed with on a CPU at once, rather than traced, for a gradient."""
    return _runs_on_cpu(x) and torch.is_grad_enabled()


def _runs_on_cpu(x: Tensor) -> bool:
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return x.device.type == 'cpu' and not traced


def num_parts(elements: int) -> int:
    """Parts of so many elements that the caches of the threads hold each."""
    return max(-(-elements // (_CACHED * torch.get_num_threads())), 1)


def in_parts(
    function: Callable[[Tensor], Tensor], x: Tensor, elements: int, out: Tensor | None = None
) -> Tensor:
    """``function(x)``, in parts of the first axis if :func:`predicts_on_cpu`.

    Args:
        function: Treats each entry of the first axis by itself, and keeps its shape.
        x: Tensor with an axis to split.
        elements: Elements of the largest tensor that ``function`` makes of the whole.
        out: Where the parts' results may go, of the shape of ``x``, such as ``x`` if nobody else
            needs it; None for a new tensor.
    """
    parts = num_parts(elements) if predicts_on_cpu(x) else 1
    if parts == 1:
        return function(x)
    out = torch.empty_like(x) if out is None else out
    # As many more parts as keep each, of whole entries, within the cache.
    parts = -(-len(x) // max(len(x) // parts, 1))
    for part, result in zip(x.tensor_split(parts), out.tensor_split(parts), strict=True):
        result.copy_(function(part))
    return out


class DropPath(nn.Module):
    """Stochastic depth: zeroes a residual branch for random samples while training.

    A sample is an entry of the first axis: an image for (B, ...) input, a window for window tokens.
    Source: https://arxiv.org/abs/1603.09382.

    Args:
        rate: Probability that a sample is dropped, in [0, 1). Kept samples grow by 1 / (1 - rate).
    """

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Drops samples of ``x``, a tensor of any shape with the samples on its first axis."""
        if self.rate == 0 or not self.training:
            return x
        keep = 1 - self.rate
        mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep)
        return x * mask.div_(keep)

    def extra_repr(self) -> str:
        """Shows the rate in the module's printed form."""
        return f'rate={self.rate:g}'


def guard_group_norm(norm: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
    """Forward pre-hook of group norms, against a crash in their backward pass.

    The one of torch 2.13 on the CPU ends the process for channels-last input that needs no
    gradient, which is what a trainable norm behind frozen layers gets.
    """
    [x] = args
    if torch.is_grad_enabled() and not x.requires_grad:
        return (x.clone(memory_format=torch.contiguous_format),)
    return None


class MapNorm(nn.GroupNorm):
    """Group norm of one group: each image is normalised over all its channels and positions.

    Args:
        dim: Channels.
        eps: Added to the variance.
    """

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__(1, dim, eps)
        self.register_forward_pre_hook(guard_group_norm)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to the same shape."""
        if not torch.compiler.is_compiling():
            # Not through nn.functional, which refuses a map of a single number.
            return torch.group_norm(x, 1, self.weight, self.bias, self.eps)
        # torch.compile's own decomposition flattens the map, and index expressions of a flattened
        # map of symbolic size take it many minutes.
        y = x.float()
        variance, mean = torch.var_mean(y, (1, 2, 3), correction=0, keepdim=True)
        scale = self.weight[:, None, None] * torch.rsqrt(variance + self.eps)
        return ((y - mean) * scale + self.bias[:, None, None]).type_as(x)


class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of each pixel.

    Args:
        dim: Channels.
        eps: Added to the variance.
    """

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__(dim, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to the same shape, channels last in memory."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Mlp(nn.Module):
    """Two linear layers with a GELU between them, applied to the last axis.

    Args:
        dim: Channels in and out.
        ratio: Width of the hidden layer as a multiple of ``dim``.
    """

    def __init__(self, dim: int, ratio: float = 4) -> None:
        super().__init__()
        hidden = int(dim * ratio)
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., C) to (..., C)."""
        tokens = x.reshape(-1, x.shape[-1])
        hidden = tokens.shape[0] * self.fc1.out_features  # len() would be a constant for export
        return in_parts(lambda part: self.fc2(self.act(self.fc1(part))), tokens, hidden).view(
            x.shape
        )


@contextmanager
def _running_statistics_kept(module: nn.Module) -> Iterator[None]:
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.training]
    # A momentum of 0 rather than no running statistics at all: checkpointing wants the second pass
    # to save the same tensors as the first.
    kept = [(m, m.momentum, m.num_batches_tracked) for m in norms if m.track_running_stats]
    try:
        for norm, _, count in kept:
            norm.momentum = 0.0
            norm.num_batches_tracked = count.clone()
        yield
    finally:
        for norm, momentum, count in kept:
            norm.momentum = momentum
            norm.num_batches_tracked = count


def checkpoint_block(block: nn.Module, *args: Any) -> Any:
    """Runs ``block`` without keeping its activations; they are computed again for the gradient.

    Non-reentrant, so it works under DDP and when no input needs a gradient. Batch statistics of the
    second forward pass are not counted again, so the running statistics are those of a plain run.
    """
    if not torch.is_grad_enabled():
        return block(*args)
    return checkpoint(
        block,
        *args,
        use_reentrant=False,
        context_fn=lambda: (nullcontext(), _running_statistics_kept(block)),
    )
