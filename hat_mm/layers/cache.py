"""What depends on the input size alone, kept between the calls of a network that predicts."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class EvalCache:
    """Keeps the last result of each module that asks, while a network only predicts.

    Nothing is kept while gradients are enabled or the network is traced. An entry belongs to one
    grid: the next grid replaces it. Copies and pickles of a cache are empty.

    Args:
        limit: Bytes that all entries together may take; a result beyond it is not kept.
    """

    def __init__(self, limit: int = 32 * 2**20) -> None:
        self.limit = limit
        self._entries: dict[int, tuple[Any, Tensor]] = {}

    def __reduce__(self) -> tuple[type['EvalCache'], tuple[int]]:
        return type(self), (self.limit,)

    @property
    def nbytes(self) -> int:
        """Bytes in use."""
        return sum(t.numel() * t.element_size() for _, t in list(self._entries.values()))

    def drop(self, owner: nn.Module) -> None:
        """Forgets what ``owner`` has stored."""
        self._entries.pop(id(owner), None)

    def get(self, owner: nn.Module, key: tuple, compute: Callable[[], Tensor]) -> Tensor:
        """Returns ``compute()``, or what it returned last if ``owner`` stored it under ``key``."""
        traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
        if traced or owner.training or torch.is_grad_enabled():
            return compute()
        # In-place edits (an optimizer, copy_) show in the versions. Edits through ``.data`` do
        # not: for those every train() and eval() drops the entry.
        weights = [
            (p.data_ptr(), 0 if p.is_inference() else p._version) for p in owner.parameters()
        ]
        key = (key, weights)
        entry = self._entries.get(id(owner))
        if entry is not None and entry[0] == key:
            return entry[1]
        self.drop(owner)
        value = compute()
        if self.nbytes + value.numel() * value.element_size() <= self.limit:
            self._entries[id(owner)] = (key, value)
        return value
