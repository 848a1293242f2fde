"""Makes a file for the model zoo of a training checkpoint: its weights and plain metadata."""

import argparse
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
from hat_mm.weights.fileio import sha256

__all__ = ['NOT_VALIDATED', 'Published', 'check_published', 'plain', 'publish']

_HASH = 8  # digits of the sha256 in a file's name, as in OpenMMLab
NOT_VALIDATED = 'as trained, not the average (EMA), which is what validation measures'


@dataclass(frozen=True)
class Published:
    """A published file.

    Attributes:
        path: Where it is; the name ends with a hyphen and the first eight digits of ``sha256``.
        sha256: Its checksum.
        tensors: Number of tensors.
        dropped: What the checkpoint held beside the weights and was left out.
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

    With the same versions of hat_mm and torch the same checkpoint gives the same bytes, so that
    publishing it again changes nothing.

    Args:
        source: Checkpoint of mmengine, or a file of ours; it is not changed.
        target: The file's name without the hash, as ``model.pth``: ``model-1a2b3c4d.pth`` is
            written. Its suffix, one of :data:`hat_mm.weights.fileio.SUFFIXES`, is the format.
        averaged: Takes the averaged weights of a training with mmengine's ``EMAHook``, which are
            those that validation has measured. Off takes the others.
        force: Overwrites another file of the resulting name.

    Raises:
        pickle.UnpicklingError: ``source`` is damaged or carries code.
        ValueError: It holds no weights, or ``target`` has another suffix.
        FileExistsError: The resulting name belongs to another file.
        OSError: A file or folder is missing.
    """
    source, target = Path(source), Path(target)
    fileio.check_target(target, force=True)  # the file itself has another name
    suffix = next(s for s in fileio.SUFFIXES if target.name.endswith(s))
    stem = target.name.removesuffix(suffix)
    _check_name(target.name)
    checkpoint = fileio.read(source)
    state, weights = _weights(checkpoint, source, averaged)
    meta, dropped = _plain_meta(checkpoint.get('meta'), weights)
    dropped = [str(key) for key in checkpoint if key not in ('state_dict', 'meta')] + dropped

    part = target.with_name(f'.{stem}.{os.getpid()}{suffix}')
    try:
        fileio.write(part, {'meta': meta, 'state_dict': state}, force=True)
        digest = sha256(part)
        path = target.with_name(f'{stem}-{digest[:_HASH]}{suffix}')
        if not path.is_file() or sha256(path) != digest:
            if path.exists() and path.samefile(source):
                raise FileExistsError(f'{path} is the checkpoint itself: choose another name')
            fileio.check_target(path, force)
            os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return Published(path, digest, len(state), tuple(dropped), weights)


def check_published(weights: Path) -> str:
    """The checksum of a published file, which its name has to bear.

    Raises:
        ValueError: It is no such file.
        OSError: It cannot be read.
    """
    stem = weights.name
    _check_name(stem)
    for suffix in fileio.SUFFIXES:
        stem = stem.removesuffix(suffix)
    digest = sha256(weights)
    if not stem.endswith(f'-{digest[:_HASH]}'):
        raise ValueError(
            f'{weights} is no published file: its name does not end with the first digits of its '
            f'sha256, {digest[:_HASH]}; tools/model_converters/publish_model.py makes one'
        )
    return digest


def _check_name(name: str) -> None:
    if not re.fullmatch(r'\w[\w.+-]*', name, re.ASCII):
        raise ValueError(f'{name!r} cannot end an address: letters, digits and _ . + - can')


def _weights(checkpoint: Any, path: Path, averaged: bool) -> tuple[Mapping[str, Tensor], str]:
    """The weights to publish, and which ones they are."""
    state = _tensors(checkpoint, 'state_dict', path)
    if not checkpoint.get('ema_state_dict'):
        if not averaged:
            raise ValueError(f'{path} has no averaged weights: there is nothing to choose')
        meta = checkpoint.get('meta')
        before = meta.get('published') if isinstance(meta, Mapping) else None
        known = before.get('weights') if isinstance(before, Mapping) else None
        return state, known or 'as trained (no EMA)'
    # The average counts its steps beside the weights of its `module`.
    other = _tensors(checkpoint, 'ema_state_dict', path)
    last = {k.removeprefix('module.'): v for k, v in other.items() if k.startswith('module.')}
    strange = [k for k in last if k not in state or state[k].shape != last[k].shape]
    if strange or not last:
        raise ValueError(
            f'{path}: ema_state_dict does not belong to state_dict ({", ".join(strange[:3])})'
        )
    if averaged:
        # EMAHook has put the average into state_dict when it saved, and the rest there.
        return state, 'the average (EMA)'
    return {**state, **last}, NOT_VALIDATED


def _tensors(checkpoint: Any, key: str, path: Path) -> Mapping[str, Tensor]:
    """A state dict in a checkpoint, or an error that says what is there instead."""
    state = checkpoint.get(key) if isinstance(checkpoint, Mapping) else None
    if not isinstance(state, Mapping) or not state:
        found = f'it holds a {type(checkpoint).__name__}'
        if isinstance(checkpoint, Mapping):
            found = f'it holds {", ".join(map(repr, list(checkpoint)[:4])) or "nothing"}'
        if isinstance(state, Mapping):
            found = f'its {key!r} is empty'
        raise ValueError(
            f'{path} is no checkpoint of a training ({key!r} with weights): {found}; '
            "tools/model_converters/convert_weights.py takes the authors' files"
        )
    for name, value in state.items():
        if not isinstance(name, str):
            raise ValueError(f'{path} is no checkpoint of a model: {key} has the name {name!r}')
        if not isinstance(value, Tensor):
            raise ValueError(
                f'{path} is no checkpoint of a model: {name!r} in its {key} is '
                f'{type(value).__name__}, no tensor'
            )
    return state


def plain(value: Any) -> Any:
    """The same in Python's own types, which any program may unpickle or write as JSON.

    Arrays and tensors become nested lists, NumPy's scalars Python's, sets sorted lists, classes
    of tuples and dictionaries the plain ones.

    Raises:
        TypeError: There is no such form.
    """
    if value is None or isinstance(value, bool):
        return value
    for kind in (int, float, str):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, np.generic | np.ndarray | Tensor):
        return plain(value.tolist())
    if isinstance(value, argparse.Namespace):
        return plain(vars(value))
    if isinstance(value, Mapping):
        keys = [int(key) if isinstance(key, int | np.integer) else str(key) for key in value]
        return dict(zip(keys, map(plain, value.values()), strict=True))
    if isinstance(value, set | frozenset):
        return sorted((plain(item) for item in value), key=repr)
    if isinstance(value, list | tuple):
        items = [plain(item) for item in value]
        return tuple(items) if isinstance(value, tuple) else items
    raise TypeError(f'{type(value).__name__} has no plain form')


def _plain_meta(meta: Any, weights: str) -> tuple[dict[str, Any], list[str]]:
    """Metadata without classes; and the names of what is left out."""
    kept, dropped = {}, []
    for key, value in (meta if isinstance(meta, Mapping) else {}).items():
        if key == 'hook_msgs':  # of mmcv 1: the machine's paths
            dropped.append(f'meta.{key}')
            continue
        try:
            kept[str(key)] = plain(value)
        except (TypeError, RecursionError):
            dropped.append(f'meta.{key}')
    if kept.get('mmengine_version'):
        # mmengine appends the commit of whatever repository the training was started in.
        version = re.sub(r'([0-9a-f]{40}|unknown|None)$', '', str(kept['mmengine_version']))
        kept['mmengine_version'] = version
    kept['published'] = {
        'hat_mm_version': hat_mm.__version__,
        'torch_version': str(torch.__version__),
        'weights': weights,
    }
    return kept, dropped
