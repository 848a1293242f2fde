"""Checkpoint files from elsewhere: a folder, the cache, mirrors or their address, always verified.

The addresses of configs go through :func:`load_from_hat_mm`, which :mod:`hat_mm.registry` registers
with mmengine.
"""

import http.client
import logging
import os
import re
import secrets
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import torch
from mmengine.dist import barrier, get_rank
from mmengine.logging import print_log

import hat_mm
from hat_mm import compat

from . import fileio
from .addresses import check_address, shown
from .official import official_file

__all__ = ['DownloadError', 'fetch', 'load_from_hat_mm']

FOLDER_VARIABLE = 'HAT_MM_WEIGHTS'
MIRRORS_VARIABLE = 'HAT_MM_MIRRORS'

_TIMEOUT = 30.0  # seconds that a server may keep silent
_REPORT_EVERY = 10.0  # seconds
_ABANDONED_AFTER = 3600.0  # seconds
_CHUNK = 1 << 20  # bytes
_NAME = re.compile(r'\w[\w.+-]*', re.ASCII)
# OpenMMLab puts the first 8 digits of a file's sha256 at the end of its name, where others put a
# date.
_HASH_IN_NAME = re.compile(
    r'.+-(?!20\d\d(?:0[1-9]|1[0-2])[0-3]\d)([0-9a-f]{8})(?:'
    + '|'.join(map(re.escape, fileio.SUFFIXES))
    + ')'
)
# How files start that are often found in the place of a checkpoint.
_MISTAKEN = {
    b'<!doctype html': 'it is a web page, no checkpoint',
    b'<html': 'it is a web page, no checkpoint',
    b'version https://git-lfs': 'it only points to the file (git-lfs pull brings that)',
}


class DownloadError(OSError):
    """No source has the file; the message names each one and what was wrong with it.

    Args:
        message: The message, in one line.
        filename: Name of the file.
    """

    def __init__(self, message: str, filename: str = '') -> None:
        super().__init__(message)
        self.filename = filename

    def __str__(self) -> str:
        return self.args[0]


# --- fetching ------------------------------------------------------------------------------------


def fetch(url: str, sha256: str | None = None, mirrors: Sequence[str] = ()) -> Path:
    """Finds or downloads a checkpoint file.

    Sources, in this order: the folder that the environment variable ``HAT_MM_WEIGHTS`` names, the
    cache that PyTorch and mmengine use (``checkpoints`` in ``torch.hub.get_dir()``), the base
    addresses in ``HAT_MM_MIRRORS`` (separated by commas), ``mirrors``, ``url``. Files are looked
    for by the name with which the path of ``url`` ends. If a source fails, a line in the log says
    why, and the next one is tried; but a wrong file in the folder is an error.

    What is returned has been verified: by the sha256 if it is known, otherwise by reading it as a
    checkpoint. A download, moreover, has to be as long as the server announces. It gets its name
    in the cache only then, so several processes may fetch the same file.

    Args:
        url: Address of the file: https, file, or http to this machine.
        sha256: Checksum of the file, 64 hexadecimal digits. If it is None, that of an official file
            counts, or the 8 digits that end a name such as ``model_20261121-1a2b3c4d.pth``.
        mirrors: Other addresses of the same file, beside those of an official one.

    Returns:
        The verified file; that of a ``file:`` address in its place.

    Raises:
        DownloadError: No source has the file, or the folder has a wrong one.
        ValueError: An address is not allowed or ends with no plain file name, or ``sha256`` is no
            checksum.
        TypeError: ``url`` is no string, or ``mirrors`` is one.
        hat_mm.compat.DependencyError: It has to be read, and safetensors is not installed.
    """
    name = _file_name(url)
    official = official_file(url)
    if official is not None:
        sha256, mirrors = sha256 or official.sha256, (*mirrors, *official.mirrors)
    digest = _known_digest(name, sha256)
    if isinstance(mirrors, str):
        raise TypeError(f'mirrors must be a sequence of addresses, got {mirrors!r}')
    bases = [base.strip() for base in os.environ.get(MIRRORS_VARIABLE, '').split(',')]
    sources = [f'{base.rstrip("/")}/{quote(name)}' for base in bases if base]
    sources += [*mirrors, url]
    for source in sources:
        check_address(source)

    failures: list[str] = []

    def failed(source: str, reason: str) -> None:
        failures.append(f'{source}: {reason}')
        print_log(f'{name}: not from {failures[-1]}', logger='current', level=logging.WARNING)

    if folder := os.environ.get(FOLDER_VARIABLE):
        path = Path(os.path.expanduser(folder)) / name
        if path.is_file():
            if fault := _fault(path, digest):
                raise DownloadError(f'{path} (in {FOLDER_VARIABLE}) is wrong: {fault}', name)
            print_log(f'{name}: from {FOLDER_VARIABLE}, {path}', logger='current')
            return path
        failed(
            f'{FOLDER_VARIABLE}, {path.parent}',
            'has no such file' if path.parent.is_dir() else 'is no folder',
        )
    cached = Path(torch.hub.get_dir(), 'checkpoints', name)
    # A local file needs no cache, where a file of another origin may have its name.
    if urlsplit(url).scheme != 'file' and cached.is_file():
        fault = _fault(cached, digest)
        if fault is None:
            print_log(f'{name}: from the cache, {cached}', logger='current')
            return cached
        failed(f'the cache, {cached}', fault)
    for source in sources:
        try:
            if urlsplit(source).scheme == 'file':
                return _local(source, digest)
            return _download(source, cached, digest)
        except (OSError, http.client.HTTPException, ValueError) as error:
            failed(shown(source), _reason(error))
    raise DownloadError(
        f'no source has a good {name}: {"; ".join(failures)}. A file of this name in a folder that '
        f'the environment variable {FOLDER_VARIABLE} names is used without a network',
        name,
    )


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.URLError) and not isinstance(error, urllib.error.HTTPError):
        error = error.reason  # str(error) has brackets around it
    text = ' '.join(str(error).split())[:300] or type(error).__name__
    return ''.join(c if c.isprintable() else '?' for c in text)  # servers say what they like


def _file_name(url: str) -> str:
    if not isinstance(url, str):
        raise TypeError(f'an address must be a string, got {url!r}')
    name = unquote(urlsplit(url).path.rpartition('/')[2])
    if not _NAME.fullmatch(name):
        raise ValueError(
            f'{shown(url)} must end with a plain file name (letters, digits, _ . + -; a letter, '
            f'digit or _ first), not with {name!r}'
        )
    return name


def _known_digest(name: str, sha256: str | None) -> str | None:
    """The checksum of a file or its start, in lower case; None if it is not known."""
    if sha256 is None:
        found = _HASH_IN_NAME.fullmatch(name)
        return found and found[1]
    if not re.fullmatch('[0-9a-fA-F]{64}', sha256):
        raise ValueError(f'sha256 of {name} must be 64 hexadecimal digits, got {sha256!r}')
    return sha256.lower()


# --- sources -------------------------------------------------------------------------------------


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to what is allowed, and never from https to http."""

    def redirect_request(
        self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> Any:
        target = urlsplit(newurl)
        try:
            check_address(newurl)
            allowed = target.scheme in ('https', req.type)
        except ValueError:
            allowed = False
        if not allowed:
            fp.close()
            raise urllib.error.URLError(
                f'it redirects to {target.scheme}://{target.hostname or ""}, which is not allowed'
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)

    def http_error_302(self, req: Any, fp: Any, code: int, msg: str, headers: Any) -> Any:
        # The base class refuses other schemes with the whole address, which may hold a key.
        target = urlsplit(headers.get('location', ''))
        if target.scheme not in ('', 'http', 'https'):
            return self.redirect_request(req, fp, code, msg, headers, target.geturl())
        return super().http_error_302(req, fp, code, msg, headers)

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


def _open(url: str) -> Any:
    # No proxy for http: the proxy's machine is not this one.
    proxies = {k: v for k, v in urllib.request.getproxies().items() if k == 'https'}
    opener = urllib.request.build_opener(urllib.request.ProxyHandler(proxies), _Redirects())
    request = urllib.request.Request(url, headers={'User-Agent': f'hat_mm/{hat_mm.__version__}'})
    return opener.open(request, timeout=_TIMEOUT)


def _download(url: str, target: Path, digest: str | None) -> Path:
    """Downloads into a file beside the target, which takes its name once it is verified."""
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(target)
    # The end of the name says the format.
    part = target.with_name(f'.part-{secrets.token_hex(8)}-{target.name}')
    try:
        with _open(url) as response, open(part, 'xb') as file:
            announced = response.length  # None if the server does not say
            _copy(response, file, f'{target.name} from {shown(url)}')
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
        if announced is not None and size != announced:
            raise OSError(f'the download is truncated: {size:,} of {announced:,} bytes came')
        if fault := _fault(part, digest):
            raise OSError(fault)
        os.replace(part, target)
    except http.client.IncompleteRead as error:
        raise OSError('the download is truncated: its end is missing') from error
    finally:
        part.unlink(missing_ok=True)
    return target


def _remove_abandoned(target: Path) -> None:
    """Removes what downloads of the same file left that were killed."""
    for part in target.parent.glob(f'.part-{"[0-9a-f]" * 16}-{target.name}'):
        try:
            if time.time() - part.stat().st_mtime > _ABANDONED_AFTER:
                part.unlink()
        except OSError:  # another process was faster, or it is another user's
            continue


def _copy(response: Any, file: Any, what: str) -> None:
    size = '' if response.length is None else f' ({response.length / 1e6:.1f} MB)'
    print_log(f'Downloading {what}{size}', logger='current')
    due = time.monotonic() + _REPORT_EVERY
    while data := response.read(_CHUNK):
        file.write(data)
        if time.monotonic() > due:
            due += _REPORT_EVERY
            print_log(f'{what}: {file.tell() / 1e6:.1f} MB', logger='current')


def _local(url: str, digest: str | None) -> Path:
    path = Path(urllib.request.url2pathname(urlsplit(url).path))
    if fault := _fault(path, digest):
        raise OSError(fault)
    return path


def _fault(path: Path, digest: str | None) -> str | None:
    """Says what is wrong with a file; None if it is a checkpoint, the one with this checksum."""
    try:
        with open(path, 'rb') as file:
            start = file.read(256).lstrip().lower()
        fault = _unreadable(path) if digest is None else _altered(path, digest)
    except OSError as error:
        return error.strerror or str(error)
    if fault is not None:
        for beginning, mistake in _MISTAKEN.items():
            if start.startswith(beginning):
                return mistake
    return fault


def _altered(path: Path, digest: str) -> str | None:
    found = fileio.sha256(path)[: len(digest)]
    if found == digest:
        return None
    starts = ' starts with' if len(digest) < 64 else ' is'
    return f'it is truncated or altered: its sha256{starts} {found}, not {digest}'


def _unreadable(path: Path) -> str | None:
    """Reads the file: what is cut off cannot be read."""
    try:
        fileio.read(path)
    except (OSError, compat.DependencyError):
        raise
    except Exception as error:  # torch meets garbage with any exception
        return str(error).rpartition(' was not loaded: ')[2] or type(error).__name__
    return None


# --- mmengine's loader ---------------------------------------------------------------------------


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
    path = _fetch_once(filename) if '://' in filename else Path(os.path.expanduser(filename))
    return fileio.read(path, map_location)


def _fetch_once(url: str) -> Path:
    """:func:`fetch` with one download a machine."""
    first = int(os.environ.get('LOCAL_RANK', get_rank())) == 0
    try:
        if first:
            return fetch(url)
    finally:
        barrier()
    return fetch(url)
