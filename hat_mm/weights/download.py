"""Checkpoint files from elsewhere: a folder, PyTorch's cache or their address, always verified.

The addresses of configs go through :func:`load_from_hat_mm`, which :mod:`hat_mm.registry` registers
with mmengine.
"""

import http.client
import logging
import os
import pickle
import re
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import torch
from mmengine.dist import barrier, get_rank
from mmengine.logging import print_log

from . import fileio
from .addresses import check_address, shown
from .official import official_file

__all__ = ['DownloadError', 'fetch', 'load_from_hat_mm']

FOLDER_VARIABLE = 'HAT_MM_WEIGHTS'

# OpenMMLab puts the first 8 digits of a file's sha256 at the end of its name, where others put a
# date.
_HASH_IN_NAME = re.compile(r'-(?!20\d{6}\.)([0-9a-f]{8})\.(pth|pth\.tar|pt|safetensors)$')


class DownloadError(OSError):
    """A file cannot be fetched, or is not the right one; the message names it and the cause."""

    filename = ''  # as of any OSError that names its file


def fetch(url: str, sha256: str | None = None) -> Path:
    """Finds or downloads a checkpoint file.

    It is looked for, by the name with which the path of ``url`` ends, in the folder that the
    environment variable ``HAT_MM_WEIGHTS`` names, and in the cache that PyTorch and mmengine use
    (``checkpoints`` in ``torch.hub.get_dir()``); then it is downloaded to this cache. A wrong file
    in the folder is an error, one in the cache is downloaded again.

    What is returned has been verified: by the sha256 if it is known, otherwise by reading it as a
    checkpoint. Several processes may fetch the same file.

    Args:
        url: Address of the file: https, file, or http to this machine.
        sha256: Checksum of the file in hexadecimal digits. If it is None, that of an official file
            counts, or the 8 digits that end a name such as ``model_20261121-1a2b3c4d.pth``.

    Returns:
        The verified file; that of a ``file:`` address in its place.

    Raises:
        DownloadError: It cannot be fetched, or is a wrong one.
        ValueError: The address is not allowed or ends with no file name.
        hat_mm.compat.DependencyError: It has to be read, and safetensors is not installed.
    """
    check_address(url)
    parts = urlsplit(url)
    name = parts.path.rpartition('/')[2]
    if name in ('', '.', '..'):
        raise ValueError(f'{shown(url)} must end with the name of a file')
    official = official_file(url)
    if sha256 is None and official is not None:
        sha256 = official.sha256
    if sha256 is None and (found := _HASH_IN_NAME.search(name)):
        sha256 = found[1]

    if folder := os.environ.get(FOLDER_VARIABLE):
        path = Path(folder).expanduser() / name
        if path.is_file():
            return _verified(path, sha256)
        print_log(f'{FOLDER_VARIABLE} has no {path}', logger='current', level=logging.WARNING)
    if parts.scheme == 'file':
        return _verified(Path(url2pathname(parts.path)), sha256)
    cached = Path(torch.hub.get_dir(), 'checkpoints', name)
    if cached.is_file():
        try:
            return _verified(cached, sha256)
        except DownloadError as error:
            print_log(f'downloading again: {error}', logger='current', level=logging.WARNING)
    _download(url, cached)
    try:
        return _verified(cached, sha256)
    except DownloadError:
        cached.unlink(missing_ok=True)  # others that use the cache do not verify it
        raise


def _download(url: str, target: Path) -> None:
    print_log(f'Downloading {shown(url)} to {target}', logger='current')
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(target), progress=sys.stderr.isatty())
    except (OSError, http.client.HTTPException) as error:
        raise DownloadError(
            f'{shown(url)} was not downloaded: {error}. A file named {target.name!r} in a folder '
            f'that the environment variable {FOLDER_VARIABLE} names is used without a network'
        ) from error


def _verified(path: Path, digest: str | None) -> Path:
    """Returns the path; raises DownloadError unless the file is a checkpoint, and the right one.

    Args:
        path: The file.
        digest: Its sha256 or the first digits of that; None if it is not known.
    """
    try:
        if digest is None:
            fileio.read(path)
            return path
        found = fileio.sha256(path)
    except (OSError, pickle.UnpicklingError) as error:
        raise DownloadError(str(error)) from error
    if not found.startswith(digest.lower()):
        raise DownloadError(f'{path} is truncated or altered: its sha256 is {found}, not {digest}')
    return path


def load_from_hat_mm(filename: str, map_location: Any = None) -> Any:
    """Loads a checkpoint for mmengine: an official file by its address, or a safetensors file.

    In a distributed run every process has to call it, as with mmengine's own loaders: the first of
    each machine downloads, then the others find the file in the cache. If the download fails, each
    process tries, and fails, by itself.

    Args:
        filename: Path, or address that :func:`fetch` allows.
        map_location: See :func:`hat_mm.weights.fileio.read`.

    Returns:
        What :func:`hat_mm.weights.fileio.read` returns.

    Raises:
        DownloadError, ValueError: See :func:`fetch`.
        OSError, pickle.UnpicklingError: See :func:`hat_mm.weights.fileio.read`.
    """
    if '://' not in filename:
        return fileio.read(Path(filename).expanduser(), map_location)
    path = None
    try:
        if int(os.environ.get('LOCAL_RANK', get_rank())) == 0:
            path = fetch(filename)
    finally:
        barrier()
    return fileio.read(path or fetch(filename), map_location)
