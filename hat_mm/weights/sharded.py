"""Checkpoints of sharded trainings: folders to which each process writes its part.

A folder holds a safetensors file of each process, by ``torch.distributed.checkpoint``, and
``rest.pth`` with all else: a checkpoint in which names stand for the sharded tensors, and their
sizes. The rest is written last; a part that is lost later is noticed by the sizes.
"""

import copy
import math
import pickle
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hat_mm import compat

REST = 'rest.pth'
SIZES = 'sharded_sizes'
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
        What :data:`REST` holds, which has the sizes of the sharded tensors as :data:`SIZES`; and
        these tensors by name.
    """
    from torch.distributed.tensor import DTensor

    shards: dict[str, Tensor] = {}

    def name(path: tuple, leaf: Any) -> Any:
        if not isinstance(leaf, DTensor):
            return leaf
        key = '/'.join(map(str, path))
        shards[key] = leaf
        return (_SCALAR if is_scalar(path) else _SHARD) + key

    rest = replaced(checkpoint, name)
    rest[SIZES] = {key: list(shard.shape) for key, shard in shards.items()}
    return rest, shards


def write_shards(folder: Path, shards: dict[str, Tensor]) -> None:
    """Writes the part of this process; all processes call it with the same names."""
    import torch.distributed.checkpoint as dcp

    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    dcp.save(shards, storage_writer=writer)


def check_shards(folder: str | Path, checkpoint: Any) -> dict[str, torch.dtype]:
    """Checks that the files of a folder have all sharded tensors, without reading these.

    Args:
        folder: The folder.
        checkpoint: What its :data:`REST` holds.

    Returns:
        The dtypes of the tensors by name.

    Raises:
        pickle.UnpicklingError: A file is missing or damaged.
    """
    import torch.distributed.checkpoint as dcp

    safetensors = compat.require('safetensors')
    try:
        metadata: Any = dcp.HuggingFaceStorageReader(str(folder)).read_metadata()
        sizes = checkpoint[SIZES]
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise pickle.UnpicklingError(f'{folder} was not loaded: {error}') from error
    found = metadata.state_dict_metadata
    for name, size in sizes.items():
        chunks = found[name].chunks if name in found else []
        if sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(size):
            raise pickle.UnpicklingError(
                f'{folder} was not loaded: it lacks a part of {name!r}; was the file of a process '
                'lost, or written to a disk that the machines do not share?'
            )
    return {name: found[name].properties.dtype for name in sizes}


def fill(checkpoint: Any, folder: str | Path, mesh: Any = None, with_optimizer: bool = True) -> Any:
    """Puts the sharded tensors back into what :data:`REST` holds.

    Args:
        checkpoint: What :data:`REST` holds.
        folder: The folder of the checkpoint, which may be of another number of processes.
        mesh: Device mesh of one dimension, for tensors that are sharded over it; None for whole
            ones on the CPU.
        with_optimizer: Whether to read the optimizer's state, the largest part.

    Raises:
        pickle.UnpicklingError: A file is missing or damaged.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.tensor import Shard, empty

    dtypes = check_shards(folder, checkpoint)
    checkpoint = dict(checkpoint)
    sizes = checkpoint.pop(SIZES)
    if not with_optimizer:
        checkpoint.pop('optimizer', None)
    make: Any = torch.empty
    if mesh is not None:
        make = partial(empty, device_mesh=mesh, placements=[Shard(0)])
    shards = {
        name: make(size, dtype=dtypes[name])
        for name, size in sizes.items()
        if with_optimizer or not name.startswith('optimizer/')
    }
    reader = dcp.HuggingFaceStorageReader(str(folder))
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'torch.distributed is disabled')
        dcp.load(shards, storage_reader=reader, no_dist=mesh is None)

    def find(_: tuple, leaf: Any) -> Any:
        if isinstance(leaf, str) and leaf.startswith(_SHARD):
            return shards[leaf.removeprefix(_SHARD)]
        if isinstance(leaf, str) and leaf.startswith(_SCALAR):
            shard = shards[leaf.removeprefix(_SCALAR)]
            return shard.reshape(()) if mesh is None else shard
        return leaf

    return replaced(checkpoint, find)
