"""Turns a training checkpoint into a file for the model zoo: its weights and plain metadata."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import hat_mm
from hat_mm.weights import fileio

__all__ = ['NOT_VALIDATED', 'Published', 'check_published', 'publish']

_HASH = 8  # digits of the sha256 in a file's name, as in OpenMMLab
NOT_VALIDATED = 'as trained, not the average (EMA), which is what validation measures'


@dataclass(frozen=True)
class Published:
    """A published file.

    Attributes:
        path: The file; its name ends with a hyphen and the first eight digits of ``sha256``.
        sha256: Its checksum.
        tensors: Number of tensors.
        dropped: What else the checkpoint held and was left out.
        weights: Which weights they are, in words.
    """

    path: Path
    sha256: str
    tensors: int
    dropped: tuple[str, ...]
    weights: str


def publish(
    source: str | Path, target: str | Path, *, averaged: bool = True, force: bool = False
) -> Published:
    """Publishes a training checkpoint: its weights and plain metadata, nothing else.

    With the same versions of hat_mm and torch, the same checkpoint gives the same bytes, so
    publishing it again changes nothing.

    Args:
        source: Checkpoint of mmengine, or a file of hat_mm; it is not changed.
        target: Name of the file without the hash, such as ``model.pth``, for which
            ``model-1a2b3c4d.pth`` is written. Its suffix, one of
            :data:`hat_mm.weights.fileio.SUFFIXES`, decides the format.
        averaged: After a training with mmengine's ``EMAHook``, True publishes the averaged weights,
            which validation has measured, and False the others.
        force: Overwrites another file of the resulting name.

    Raises:
        pickle.UnpicklingError: ``source`` is damaged or carries code.
        ValueError: ``source`` holds no weights or no averaged ones to choose from, or ``target``
            has another suffix.
        FileExistsError: Another file has the resulting name.
        OSError: A file or folder is missing.
    """
    source, target = Path(source), Path(target)
    fileio.check_target(target, force=True)  # the written file gets another name
    suffix = next(s for s in fileio.SUFFIXES if target.name.endswith(s))
    stem = target.name.removesuffix(suffix)
    checkpoint = fileio.read(source)
    state, weights = _weights(checkpoint, source, averaged)
    meta, dropped = _plain_meta(checkpoint.get('meta') or {})
    meta['published'] = {
        'hat_mm_version': hat_mm.__version__,
        'torch_version': str(torch.__version__),
        'weights': weights,
    }
    dropped = [key for key in checkpoint if key not in ('state_dict', 'meta')] + dropped

    part = target.with_name(f'.{stem}.{os.getpid()}{suffix}')
    try:
        fileio.write(part, {'meta': meta, 'state_dict': state}, force=True)
        digest = fileio.sha256(part)
        path = target.with_name(f'{stem}-{digest[:_HASH]}{suffix}')
        if not path.is_file() or fileio.sha256(path) != digest:
            fileio.check_target(path, force)
            os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return Published(path, digest, len(state), tuple(dropped), weights)


def check_published(weights: Path) -> str:
    """Returns the sha256 of a published file, after checking it against the file's name.

    Raises:
        ValueError: The name does not end with the first digits of the sha256.
        OSError: It cannot be read.
    """
    stem = weights.name
    for suffix in fileio.SUFFIXES:
        stem = stem.removesuffix(suffix)
    digest = fileio.sha256(weights)
    if not stem.endswith(f'-{digest[:_HASH]}'):
        raise ValueError(
            f'{weights} is no published file: its name does not end with the first digits of its '
            f'sha256, {digest[:_HASH]}; tools/model_converters/publish_model.py makes one'
        )
    return digest


def _weights(checkpoint: Any, path: Path, averaged: bool) -> tuple[dict[str, Tensor], str]:
    """The weights to publish, and a description of which they are."""
    state = checkpoint.get('state_dict') if isinstance(checkpoint, Mapping) else None
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(
            f"{path} is no checkpoint of a training ('state_dict' with weights); "
            "tools/model_converters/convert_weights.py takes the authors' files"
        )
    other = checkpoint.get('ema_state_dict')
    if not other:
        if not averaged:
            raise ValueError(f'{path} has no averaged weights: there is nothing to choose')
        before = (checkpoint.get('meta') or {}).get('published') or {}
        return state, before.get('weights', 'as trained (no EMA)')
    if averaged:
        # When saving, EMAHook puts the average into state_dict, the other weights into
        # ema_state_dict.
        return state, 'the average (EMA)'
    # Beside the weights of its `module`, the average holds a step counter.
    last = {k.removeprefix('module.'): v for k, v in other.items() if k.startswith('module.')}
    return {**state, **last}, NOT_VALIDATED


def _plain_meta(meta: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Metadata in plain types that any program can unpickle, and the names of what was dropped."""
    kept, dropped = {}, []
    for key, value in meta.items():
        try:
            kept[key] = _plain(value)
        except TypeError:
            dropped.append(f'meta.{key}')
    if 'mmengine_version' in kept:
        # mmengine appends the commit of the repository in which the training was started.
        version = re.sub(r'([0-9a-f]{40}|unknown|None)$', '', kept['mmengine_version'])
        kept['mmengine_version'] = version
    return kept, dropped


def _plain(value: Any) -> Any:
    """The value in Python's own types; arrays and tensors become nested lists."""
    if isinstance(value, np.generic | np.ndarray | Tensor):
        return value.tolist()
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    for kind in (list, tuple):
        if isinstance(value, kind):
            return kind(map(_plain, value))
    if value is not None and type(value) not in (bool, int, float, str):
        raise TypeError(f'{type(value).__name__} has no plain form')
    return value
