"""Checkpoints of sharded trainings: folders to which each process writes its part.

A folder holds a safetensors file of each process, by ``torch.distributed.checkpoint``, and
``rest.pth`` with all else: a checkpoint in which names stand for the sharded tensors. The rest is
written last, so a folder that has it is whole.
"""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

REST = 'rest.pth'
# Stand for a sharded tensor in the rest. FSDP2 takes no scalars: they are sharded as one element.
_SHARD, _SCALAR = 'sharded tensor ', 'sharded scalar '


def is_sharded(path: str | Path) -> bool:
    """Whether a path is a folder with the checkpoint of a sharded training."""
    return Path(path, REST).is_file()


def replaced(tree: Any, change: Callable, path: tuple = ()) -> Any:
    """A copy of nested dictionaries and lists with other leaves.

    Args:
        tree: The dictionaries and lists. Those of state dicts keep their metadata.
        change: Gets the path of a leaf and the leaf; returns what takes its place.
        path: Keys and indices that lead to ``tree``.
    """
    if isinstance(tree, dict):
        new = copy.copy(tree)
        new.update({key: replaced(value, change, (*path, key)) for key, value in tree.items()})
        return new
    if isinstance(tree, list):
        return [replaced(value, change, (*path, i)) for i, value in enumerate(tree)]
    return change(path, tree)


def split(checkpoint: Any, is_scalar: Callable[[tuple], bool]) -> tuple[Any, dict[str, Tensor]]:
    """Takes the sharded tensors out of a checkpoint.

    Args:
        checkpoint: The checkpoint of a process.
        is_scalar: Tells by the path of a tensor if it is a scalar that was made one element.

    Returns:
        What :data:`REST` holds, and the sharded tensors by name.
    """
    from torch.distributed.tensor import DTensor

    shards: dict[str, Tensor] = {}

    def name(path: tuple, leaf: Any) -> Any:
        if not isinstance(leaf, DTensor):
            return leaf
        key = '/'.join(map(str, path))
        shards[key] = leaf
        return (_SCALAR if is_scalar(path) else _SHARD) + key

    return replaced(checkpoint, name), shards


def write_shards(folder: Path, shards: dict[str, Tensor]) -> None:
    """Writes the part of this process; all processes call it with the same names."""
    import torch.distributed.checkpoint as dcp

    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    dcp.save(shards, storage_writer=writer)


def fill(checkpoint: Any, folder: str | Path, mesh: Any = None) -> Any:
    """Puts the sharded tensors back into what :data:`REST` holds.

    Args:
        checkpoint: What :data:`REST` holds.
        folder: The folder of the checkpoint, which may be of another number of processes.
        mesh: Device mesh of one dimension, for tensors that are sharded over it; None for whole
            ones on the CPU.

    Raises:
        OSError, KeyError, RuntimeError: Files are missing or damaged.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.tensor import Shard, empty

    metadata: Any = dcp.HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    how: dict[str, Any] = {} if mesh is None else dict(device_mesh=mesh, placements=[Shard(0)])
    shards = {
        name: (torch.empty if mesh is None else empty)(
            tensor.size, dtype=tensor.properties.dtype, **how
        )
        for name, tensor in metadata.items()
    }
    reader = dcp.HuggingFaceStorageReader(str(folder))
    with warnings.catch_warnings(action='ignore'):  # of a single process
        dcp.load(shards, storage_reader=reader, no_dist=mesh is None)

    def find(_: tuple, leaf: Any) -> Any:
        if isinstance(leaf, str) and leaf.startswith(_SHARD):
            return shards[leaf.removeprefix(_SHARD)]
        if isinstance(leaf, str) and leaf.startswith(_SCALAR):
            shard = shards[leaf.removeprefix(_SCALAR)]
            return shard.reshape(()) if mesh is None else shard
        return leaf

    return replaced(checkpoint, find)
