"""Reads and writes checkpoint files: torch's formats and safetensors, without running code.

In memory a checkpoint is a dictionary as in OpenMMLab: ``state_dict``, ``meta`` (plain data) and
whatever else a training put there, or under ``unused`` tensors of an official file that the network
has no use for, kept for the way back.
"""

import hashlib
import importlib.util
import json
import pickle
import pickletools
import tarfile
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hat_mm import compat

from .atomic import replacing
from .names import UNUSED, UNUSED_PREFIX

SUFFIXES = ('.pth', '.pth.tar', '.pt', '.safetensors')

_META = 'hat_mm'  # key of the JSON text in the header of a safetensors file
_PACKED = {b'\x1f\x8b': 'gzip', b'BZh': 'bzip2', b'\xfd7zXZ': 'xz', b'7z\xbc\xaf': '7z'}


def read(path: str | Path, map_location: Any = None) -> Any:
    """Reads a checkpoint file.

    Args:
        path: A file that ``torch.save`` wrote, or one whose name ends with ``.safetensors``.
        map_location: Where tensors go, as in ``torch.load``: a device; a dictionary from names of
            devices to others; or a function of a storage and its device's name that returns a
            storage, or None to leave it there. By default the CPU, from where all tensors of a
            safetensors file come.

    Returns:
        What the file holds; for safetensors a dictionary with ``state_dict``, ``meta`` and
        ``unused``.

    Raises:
        pickle.UnpicklingError: It is damaged, an archive of something else, or carries code.
        OSError: It cannot be read.
        hat_mm.compat.DependencyError: safetensors is not installed.
    """
    path = Path(path)
    if map_location is None:
        map_location = 'cpu'
    with open(path, 'rb') as file:
        start = file.read(512)
    if path.name.endswith('.safetensors'):
        return _read_safetensors(path, map_location)
    _refuse_archives(path, start)
    _allow_history_buffers()
    try:
        with compat.reading(str(path)), warnings.catch_warnings(action='ignore'):
            return torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        # To torch the name of a class that is cut off is one that is not allowed.
        if start.startswith(b'PK') or not _ends_early(path):
            raise
        raise _damaged(path) from error


def _damaged(path: Path) -> pickle.UnpicklingError:
    return pickle.UnpicklingError(
        f'{path} was not loaded: it is no checkpoint, or is damaged (cut off?)'
    )


def _ends_early(path: Path) -> bool:
    """Whether one of the five pickles, with which torch's old format starts, has no end."""
    with open(path, 'rb') as file:
        try:
            for _ in range(5):
                for _ in pickletools.genops(file):
                    pass
        except ValueError:
            return True
    return False


def _allow_history_buffers() -> None:
    """Lets the log history in mmengine's training checkpoints pass; importing it allows it."""
    if importlib.util.find_spec('mmengine') is not None:
        importlib.import_module('mmengine.logging.history_buffer')


def _refuse_archives(path: Path, start: bytes) -> None:
    for magic, kind in _PACKED.items():
        if start.startswith(magic):
            raise pickle.UnpicklingError(
                f'{path} was not loaded: it is a {kind} archive; unpack it first'
            )
    if start[257:262] == b'ustar' or (not start.startswith(b'PK') and _is_tar(path)):
        raise pickle.UnpicklingError(
            f'{path} was not loaded: it is a tar archive, no checkpoint; unpack it first'
        )
    if not start.startswith(b'PK'):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except OSError:
        raise
    except Exception as error:  # of names and sizes that make no sense, too
        raise _damaged(path) from error
    for name in names:
        if name.startswith('/') or '\\' in name or '..' in name.split('/'):
            raise pickle.UnpicklingError(
                f'{path} was not loaded: the name {name!r} in it leaves its folder'
            )
    if not any(name.endswith('/data.pkl') for name in names):
        raise pickle.UnpicklingError(
            f'{path} was not loaded: it is a zip archive, no checkpoint; unpack it first'
        )


def _is_tar(path: Path) -> bool:
    try:
        return tarfile.is_tarfile(path)
    except OSError:
        return False


def _safetensors() -> Any:
    if importlib.util.find_spec('safetensors') is None:
        raise compat.DependencyError(
            'files that end with .safetensors need a package: pip install safetensors'
        )
    importlib.import_module('safetensors.torch')
    return importlib.import_module('safetensors')


def _moved(tensor: Tensor, map_location: Any) -> Tensor:
    """A tensor on the CPU where ``torch.load`` would put it."""
    if isinstance(map_location, dict):
        map_location = map_location.get('cpu', 'cpu')
    if isinstance(map_location, str | torch.device):
        return tensor.to(map_location)
    storage = map_location(tensor.untyped_storage(), 'cpu')
    if storage is None:
        return tensor
    moved = tensor.new_empty(0, device=storage.device)
    return moved.set_(storage, tensor.storage_offset(), tensor.size(), tensor.stride())


def _read_safetensors(path: Path, map_location: Any) -> dict[str, Any]:
    library = _safetensors()
    checkpoint: dict[str, Any] = {'state_dict': {}, 'meta': {}, UNUSED: {}}
    try:
        with library.safe_open(path, framework='pt') as file:
            meta = json.loads((file.metadata() or {}).get(_META, '{}'))
            if not isinstance(meta, dict):
                raise ValueError(f'its metadata are {type(meta).__name__}')
            checkpoint['meta'] = meta
            for name in file.keys():  # noqa: SIM118  (no mapping)
                part = UNUSED if name.startswith(UNUSED_PREFIX) else 'state_dict'
                checkpoint[part][name.removeprefix(UNUSED_PREFIX)] = file.get_tensor(name)
    except OSError:
        raise
    except Exception as error:  # whatever a damaged header leads to
        raise pickle.UnpicklingError(
            f'{path} was not loaded: it is no safetensors file, or is damaged '
            f'({" ".join(str(error).split())[:200]})'
        ) from error
    for part in ('state_dict', UNUSED):
        checkpoint[part] = {k: _moved(v, map_location) for k, v in checkpoint[part].items()}
    return {key: value for key, value in checkpoint.items() if value or key == 'state_dict'}


def sha256(path: str | Path) -> str:
    """The checksum of a file, in hexadecimal digits."""
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def check_target(path: str | Path, force: bool) -> Path:
    """Raises unless a checkpoint could be written there; for asking before hours of work.

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
        _safetensors()
    return path


def write(path: str | Path, checkpoint: Mapping[str, Any], force: bool = False) -> None:
    """Writes a checkpoint whole or not at all: into a file beside it, which then takes its name.

    Args:
        path: Ends with one of :data:`SUFFIXES`, which decides the format.
        checkpoint: ``state_dict``, and as you like ``meta`` and ``unused``.
        force: Overwrites an existing file.

    Raises:
        ValueError, OSError: See :func:`check_target`.
    """
    path = check_target(path, force)
    is_safetensors = path.name.endswith('.safetensors')
    with replacing(path) as part:
        try:
            if is_safetensors:
                _write_safetensors(part, checkpoint)
            else:
                with open(part, 'wb') as file:
                    torch.save(_owned(checkpoint), file)
        except RuntimeError as error:  # what torch raises when a disk is full, too
            raise OSError(f'{path} was not written: {" ".join(str(error).split())}') from error
        check_target(path, force)


def _owned(value: Any) -> Any:
    """The same with tensors that own their memory: a view would bring its whole storage along."""
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        whole = value.untyped_storage().nbytes() == value.numel() * value.element_size()
        return value if whole and value.is_contiguous() else value.clone().contiguous()
    if isinstance(value, Mapping):
        owned = {key: _owned(item) for key, item in value.items()}
        versions = getattr(value, '_metadata', None)
        if versions is not None:  # of modules, by which some of them rename old tensors
            owned = OrderedDict(owned)
            owned._metadata = versions
        return owned
    return value


def _write_safetensors(path: Path, checkpoint: Mapping[str, Any]) -> None:
    tensors = dict(checkpoint['state_dict'])
    tensors |= {UNUSED_PREFIX + k: v for k, v in checkpoint.get(UNUSED, {}).items()}
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f'safetensors holds tensors alone, but {name!r} is {type(value).__name__}: '
                'choose .pth'
            )
    # A single key: the library writes several in any order, and the bytes would differ.
    header = {_META: json.dumps(checkpoint.get('meta', {}), ensure_ascii=False)}
    # Each tensor its own memory: the format has no shared ones.
    tensors = {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
    library = _safetensors()
    try:
        library.torch.save_file(tensors, path, metadata=header)
    except library.SafetensorError as error:
        raise OSError(f'safetensors: {error}') from error
