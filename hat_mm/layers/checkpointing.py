"""Activation checkpointing that updates the running statistics of norms only once."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def checkpoint_block(block: nn.Module, *args: Any) -> Any:
    """Runs ``block`` without keeping its activations; the backward pass recomputes them.

    Non-reentrant, so it works under DDP and when no input needs a gradient. The recomputation does
    not update the running statistics of norms, so they are the same as without checkpointing.
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
    # Momentum 0 instead of turning running statistics off: checkpointing requires that the second
    # pass saves the same tensors as the first.
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
