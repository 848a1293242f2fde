"""Fetches checkpoint files from a folder, PyTorch's cache or their URL, and verifies them.

mmengine loads the URLs in configs with :func:`load_from_hat_mm`, which :mod:`hat_mm.registry`
registers.
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

# OpenMMLab ends the names of files with the first 8 digits of their sha256; others end them with a
# date.
_HASH_IN_NAME = re.compile(r'-(?!20\d{6}\.)([0-9a-f]{8})\.(pth|pth\.tar|pt|safetensors)$')


class DownloadError(OSError):
    """A file cannot be fetched, or is the wrong one; the message names it and the cause."""

    filename = ''  # not None, as of any OSError that names a file: the tools show one line of it


def fetch(url: str, sha256: str | None = None) -> Path:
    """Finds or downloads a checkpoint file.

    The function looks for the file name at the end of ``url`` in the folder that the environment
    variable ``HAT_MM_WEIGHTS`` names, and in the cache that PyTorch and mmengine use
    (``checkpoints`` in ``torch.hub.get_dir()``), and otherwise downloads the file to this cache. A
    wrong file in the folder is an error; one in the cache is downloaded again.

    The returned file has been verified: by its sha256 if that is known, otherwise by reading it as
    a checkpoint. Several processes may fetch the same file.

    Args:
        url: URL of the file: https, file, or http to this machine.
        sha256: Checksum of the file in hexadecimal digits, or the first digits of it. None uses
            that of an official file, or the 8 digits at the end of a name such as
            ``model_20261121-1a2b3c4d.pth``.

    Returns:
        The verified file; a ``file:`` URL is not copied.

    Raises:
        DownloadError: The file cannot be fetched, or is the wrong one.
        ValueError: The URL is not allowed, or does not end with a file name, or ``sha256`` is not a
            checksum.
        hat_mm.compat.DependencyError: The file has to be read, and safetensors is not installed.
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
    known = sha256 is not None
    if known and not (isinstance(sha256, str) and re.fullmatch('[0-9a-fA-F]{8,64}', sha256)):
        raise ValueError(f'the sha256 of {name} must be 8 to 64 hexadecimal digits, not {sha256!r}')

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
        cached.unlink(missing_ok=True)  # other users of the cache do not verify it
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
    """Returns the path; raises DownloadError unless it is a checkpoint, and the right one.

    Args:
        path: The file.
        digest: Its sha256 or the first digits of it; None if it is not known.
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
    """Loads a checkpoint for mmengine: an official file by its URL, or a safetensors file.

    In a distributed run every process has to call it, as with mmengine's own loaders: the first on
    each machine downloads, then the others find the file in the cache. If the download fails, each
    process tries itself.

    Args:
        filename: Path, or a URL that :func:`fetch` allows.
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
