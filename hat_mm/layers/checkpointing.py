"""Activation checkpointing that leaves the running statistics of norms alone."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def checkpoint_block(block: nn.Module, *args: Any) -> Any:
    """Runs ``block`` without keeping its activations; they are computed again for the gradient.

    Non-reentrant, so it works under DDP and when no input needs a gradient. Batch statistics of the
    second forward pass are not counted again, so the running statistics are those of a plain run.
    """
    return checkpoint(
        block,
        *args,
        use_reentrant=False,
        context_fn=lambda: (nullcontext(), _running_statistics_kept(block)),
    )


@contextmanager
def _running_statistics_kept(module: nn.Module) -> Iterator[None]:
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.training]
    # A momentum of 0 rather than no running statistics at all: checkpointing wants the second pass
    # to save the same tensors as the first.
    kept: list[Any] = [
        (m, m.momentum, m.num_batches_tracked) for m in norms if m.track_running_stats
    ]
    try:
        for norm, _, count in kept:
            norm.momentum = 0.0
            norm.num_batches_tracked = count.clone()
        yield
    finally:
        for norm, momentum, count in kept:
            norm.momentum = momentum
            norm.num_batches_tracked = count
