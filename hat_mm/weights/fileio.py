"""Reads and writes checkpoint files: torch's formats and safetensors, without running code.

In memory a checkpoint is a dictionary as in OpenMMLab: ``state_dict``, ``meta`` (plain data) and
whatever else a training put there. A converted file also has ``unused``: tensors of the official
file that the network does not use, kept for converting back.
"""

import contextlib
import errno
import hashlib
import json
import os
import pickle
import secrets
import tarfile
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mmengine.logging  # noqa: F401  so that hat_mm.compat allows the log history of a training
import torch
from mmengine.utils import apply_to
from torch import Tensor

from hat_mm import compat

from . import sharded
from .names import UNUSED, UNUSED_PREFIX

SUFFIXES = ('.pth', '.pth.tar', '.pt', '.safetensors')

_META = 'hat_mm'  # key of the JSON text in the header of a safetensors file
# First bytes of files that are often mistaken for a checkpoint.
_MISTAKEN = {
    b'<!doctype html': 'it is a web page',
    b'<html': 'it is a web page',
    b'version https://git-lfs': 'it only points to the file (git lfs pull brings that)',
}


def read(path: str | Path, map_location: Any = None) -> Any:
    """Reads a checkpoint file.

    Args:
        path: A file that ``torch.save`` wrote, one whose name ends with ``.safetensors``, or the
            folder of a sharded training (:mod:`hat_mm.weights.sharded`), whose sharded tensors are
            read to the CPU.
        map_location: Device of the tensors, as in ``torch.load``; by default the CPU. All tensors
            of a safetensors file count as saved from the CPU, and a function is called once, with
            an empty storage.

    Returns:
        What the file holds; for safetensors a dictionary with ``state_dict`` and, if not empty,
        ``meta`` and ``unused``.

    Raises:
        pickle.UnpicklingError: The file is damaged, is not a checkpoint, or carries code.
        OSError: The file cannot be read.
        hat_mm.compat.DependencyError: safetensors is not installed.
    """
    path = Path(path)
    if map_location is None:
        map_location = 'cpu'
    if sharded.is_sharded(path):
        return sharded.fill(read(path / sharded.REST, map_location), path)
    with open(path, 'rb'):
        pass  # its error names the file, safetensors' is a text alone
    try:
        if path.name.endswith('.safetensors'):
            return _read_safetensors(path, map_location)
        with compat.reading(str(path)), warnings.catch_warnings(action='ignore'):
            return torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        if mistake := _mistaken(path):
            raise pickle.UnpicklingError(f'{path} was not loaded: {mistake}') from error
        raise


def _mistaken(path: Path) -> str | None:
    """Says what a file that is not a checkpoint is; None if that is not known."""
    with contextlib.suppress(EOFError):  # the start of a compressed file
        if tarfile.is_tarfile(path):
            return 'it is a tar archive, no checkpoint; unpack it first'
    with open(path, 'rb') as file:
        start = file.read(64).lstrip().lower()
    return next((what for how, what in _MISTAKEN.items() if start.startswith(how)), None)


def _read_safetensors(path: Path, map_location: Any) -> dict[str, Any]:
    library = compat.require('safetensors')
    if callable(map_location):
        storage = map_location(torch.UntypedStorage(), 'cpu')
        map_location = 'cpu' if storage is None else storage.device
    elif isinstance(map_location, Mapping):
        map_location = map_location.get('cpu', 'cpu')
    device = torch.device(map_location)
    checkpoint: dict[str, Any] = {'state_dict': {}, 'meta': {}, UNUSED: {}}
    try:
        with library.safe_open(path, framework='pt') as file:
            meta = json.loads((file.metadata() or {}).get(_META, '{}'))
            if not isinstance(meta, dict):
                raise ValueError(f'its metadata are {type(meta).__name__}')
            checkpoint['meta'] = meta
            for name in file.keys():  # noqa: SIM118  (no mapping)
                part = UNUSED if name.startswith(UNUSED_PREFIX) else 'state_dict'
                tensor = file.get_tensor(name).to(device)
                checkpoint[part][name.removeprefix(UNUSED_PREFIX)] = tensor
    except (ValueError, RecursionError, library.SafetensorError) as error:
        raise pickle.UnpicklingError(
            f'{path} was not loaded: it is no safetensors file, or is damaged ({error})'
        ) from error
    return {key: value for key, value in checkpoint.items() if value or key == 'state_dict'}


def check_whole(path: str | Path) -> Any:
    """Reads a checkpoint of a training, and compares its checksums, which torch does not.

    Files of safetensors, as in the folder of a sharded training, have none: of these it is checked
    that none is missing or shortened.

    Raises:
        pickle.UnpicklingError, OSError: See :func:`read`.
    """
    if sharded.is_sharded(path):
        checkpoint = check_whole(Path(path, sharded.REST))
        sharded.check_shards(path, checkpoint)
        return checkpoint
    checkpoint = read(path)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if part := archive.testzip():
                raise pickle.UnpicklingError(f'{path} was not loaded: {part} in it is damaged')
    return checkpoint


_RESUMABLE = {'meta', 'message_hub', 'optimizer'}


def whole_checkpoints(*folders: str | Path) -> Iterator[Path]:
    """Yields the checkpoints in these folders from which a training can go on, the latest first."""
    iterations = {}
    for path in {path for folder in folders for path in Path(folder).glob('*.pth')}:
        with contextlib.suppress(OSError, pickle.UnpicklingError):
            checkpoint = check_whole(path)
            if isinstance(checkpoint, dict) and checkpoint.keys() >= _RESUMABLE:
                iterations[path] = checkpoint['meta'].get('iter', 0)
    yield from sorted(iterations, key=lambda path: iterations[path], reverse=True)


def latest_whole(work_dir: str | Path) -> tuple[Path | None, str]:
    """Finds the checkpoint from which an interrupted training can be resumed.

    Args:
        work_dir: Folder with the file ``last_checkpoint`` of mmengine.

    Returns:
        The checkpoint that ``last_checkpoint`` names; if it cannot be read, the newest one that
        can, and what is wrong with the former. None if there is none.
    """
    pointer = Path(work_dir, 'last_checkpoint')
    if not pointer.exists():
        return None, ''
    named = Path(pointer.read_text(encoding='utf-8', errors='replace').strip())
    try:
        if not named.name:
            raise pickle.UnpicklingError(f'{pointer} is empty')
        check_whole(named)
        return named, ''
    except (OSError, pickle.UnpicklingError) as error:
        problem = ' '.join(str(error).split())
    return next(whole_checkpoints(work_dir, named.parent), None), problem


def sha256(path: str | Path) -> str:
    """The checksum of a file, in hexadecimal digits."""
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def check_target(path: str | Path, force: bool) -> Path:
    """Raises unless a checkpoint could be written there; to be called before hours of work.

    Raises:
        ValueError: The suffix is none of :data:`SUFFIXES`.
        FileExistsError: The file exists and ``force`` is off.
        OSError: The folder does not exist, or the target is one.
        hat_mm.compat.DependencyError: safetensors is not installed.
    """
    path = Path(path)
    if not path.name.endswith(SUFFIXES):
        raise ValueError(f'{path} must end with one of {", ".join(SUFFIXES)}')
    if path.is_dir():
        raise IsADirectoryError(f'{path} is a folder')
    if path.exists() and not force:
        raise FileExistsError(f'{path} exists; --force overwrites it')
    if not path.parent.is_dir():
        raise FileNotFoundError(f'folder {str(path.parent)!r} does not exist')
    if path.name.endswith('.safetensors'):
        compat.require('safetensors')
    return path


def sync(path: Path) -> None:
    """Waits until a file is on the disk, so that a power failure after its renaming is harmless."""
    with open(path, 'rb') as file:
        os.fsync(file.fileno())


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yields the path of a temporary file, which replaces ``path`` if nothing fails.

    Yields:
        A path in the same folder with the same suffix. A link is followed.
    """
    path = Path(path).resolve()
    part = path.with_name(f'.{secrets.token_hex(4)}.{path.name}')
    try:
        yield part
        sync(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write(path: str | Path, checkpoint: Mapping[str, Any], force: bool = False) -> None:
    """Writes a checkpoint whole or not at all: to a temporary file that is then renamed.

    Args:
        path: Ends with one of :data:`SUFFIXES`, which decides the format.
        checkpoint: ``state_dict`` or, for the authors' DINO, ``model``, and optionally ``meta`` and
            ``unused``.
        force: Overwrites an existing file.

    Raises:
        ValueError, OSError: See :func:`check_target`.
    """
    path = check_target(path, force)
    with replacing(path) as part:
        try:
            if path.name.endswith('.safetensors'):
                _write_safetensors(part, checkpoint)
            else:
                _write_torch(part, checkpoint)
        except (OSError, RuntimeError) as error:  # if the disk is full, torch raises the latter
            code = getattr(error, 'errno', None) or errno.EIO
            raise OSError(code, f'not written ({error})', str(path)) from error


def _write_torch(path: Path, checkpoint: Mapping[str, Any]) -> None:
    state = checkpoint.get('state_dict')
    checkpoint = apply_to(dict(checkpoint), torch.is_tensor, _owned)
    # Versions of modules, by which some modules rename old tensors.
    if (versions := getattr(state, '_metadata', None)) is not None:
        checkpoint['state_dict']._metadata = versions
    with open(path, 'wb') as file:  # given a path, torch would write its name into the file
        torch.save(checkpoint, file)


def _owned(tensor: Tensor) -> Tensor:
    """The tensor on the CPU, copied if it is part of a larger storage."""
    tensor = tensor.detach().cpu()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _write_safetensors(path: Path, checkpoint: Mapping[str, Any]) -> None:
    library = compat.require('safetensors.torch')
    tensors = dict(checkpoint.get('state_dict') or checkpoint['model'])
    tensors |= {UNUSED_PREFIX + k: v for k, v in checkpoint.get(UNUSED, {}).items()}
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f'safetensors holds tensors alone, but {name!r} is {type(value).__name__}: '
                'choose .pth'
            )
        # The format supports neither shared memory nor strides.
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
    # A single key: the library writes several keys in any order, so the bytes would differ.
    header = {_META: json.dumps(checkpoint.get('meta', {}), ensure_ascii=False)}
    path.write_bytes(library.save(tensors, metadata=header))
