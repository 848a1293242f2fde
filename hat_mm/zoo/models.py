"""Models by name: what ``model-index.yml`` lists, and indexes that users add.

An index is as trustworthy as a program: the configs that it names are Python. Nothing is read
before it is asked for, and nothing is downloaded unless ``pretrained`` says so.
"""

import copy
import difflib
import fnmatch
import functools
import importlib
import logging
import os
import reprlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any

import torch

from hat_mm import compat
from hat_mm.weights.addresses import check_address
from hat_mm.weights.official import OFFICIAL_FILES

from . import metafiles

__all__ = ['ModelInfo', 'Result', 'get_model', 'list_models', 'register_model_index']

logger = logging.getLogger(__name__)

INDEX = Path(__file__).parents[1] / '.mim' / 'model-index.yml'

# --- indexes --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """What was measured of a model.

    Attributes:
        task: Task, in the words of model indexes, such as ``'Object Detection'``.
        dataset: Data set.
        metrics: Figures by name; names that end with ``(authors)`` are the networks' authors'.
    """

    task: str
    dataset: str
    metrics: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelInfo:
    """An entry of a model index.

    Attributes:
        name: Name of the model.
        config: Its config.
        weights: Address of its weights, None if there are none.
        results: What was measured, None if the entry says nothing.
        metadata: Facts of its training.
        filepath: The metafile that has the entry.
    """

    name: str
    config: Path
    weights: str | None
    results: tuple[Result, ...] | None
    metadata: Mapping[str, Any]
    filepath: Path


_registered: dict[str, ModelInfo] = {}
# mmengine's default scope and its logger's level, which building changes, are the process's.
_lock = threading.RLock()


def _models() -> dict[str, ModelInfo]:
    """All models by their names in lower case."""
    return _shipped() | _registered


@functools.cache
def _shipped() -> dict[str, ModelInfo]:
    return _read_index(INDEX, INDEX.parent)


def _read_index(path: Path, prefix: Path) -> dict[str, ModelInfo]:
    """Reads an index and the metafiles that it imports.

    Raises:
        ValueError: The file is no index, or an entry of it is wrong.
        OSError: A file cannot be read.
    """
    models: dict[str, ModelInfo] = {}
    data = metafiles.read(path)
    files = [(path, data)]
    for imported in _list_of(data, 'Import', path):
        metafile = path.parent / _inside(imported, path)
        content = metafiles.read(metafile)
        if content.get('Import'):
            raise ValueError(f'{metafile} has Import, which only {path.name} may have here')
        files.append((metafile, content))
    for file, content in files:
        for entry in _list_of(content, 'Models', file):
            info = _info(entry, file, prefix)
            if info.name.lower() in models:
                raise ValueError(f'{file}: several models are named {info.name!r}')
            models[info.name.lower()] = info
    if not models:
        raise ValueError(f'{path} is no model index: it lists no Models, nor do what it has Import')
    return models


def _list_of(data: dict[str, Any], key: str, path: Path) -> list[Any]:
    value = data.get(key) or []
    if not isinstance(value, list):
        raise ValueError(f'{path}: {key} must be a list, not {value!r}')
    return value


def _inside(name: Any, path: Path) -> Path:
    """A path of an index, which must lead to nothing outside of its folder."""
    if not isinstance(name, str) or not name:
        raise ValueError(f'{path}: {name!r} is no path')
    parts = PurePosixPath(name.replace('\\', '/'))
    if parts.is_absolute() or '..' in parts.parts or ':' in name:
        raise ValueError(f'{path}: {name!r} must be a relative path that stays in the folder')
    return Path(parts)


def _info(entry: Any, path: Path, prefix: Path) -> ModelInfo:
    name = entry.get('Name') if isinstance(entry, dict) else None
    if not isinstance(name, str) or not name:
        raise ValueError(f'{path}: a model has no Name: {reprlib.repr(entry)}')
    try:
        config = prefix / _inside(entry.get('Config'), path)
        weights = entry.get('Weights')
        if weights is not None:
            check_address(weights)
        results = entry.get('Results')
        if results is not None:
            results = [results] if isinstance(results, dict) else results
            results = tuple(
                Result(r['Task'], r['Dataset'], r.get('Metrics') or {}) for r in results
            )
        metadata = entry.get('Metadata') or {}
        if not isinstance(metadata, dict):
            raise ValueError(f'Metadata must be fields, not {reprlib.repr(metadata)}')
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        said = f'its Results lack {error}' if isinstance(error, KeyError) else error
        raise ValueError(f'model {name!r}: {said} ({path})') from error
    return ModelInfo(name, config, weights, results, metadata, path)


def register_model_index(
    path: str | os.PathLike, config_prefix: str | os.PathLike | None = None
) -> None:
    """Adds the models of an index to those that :func:`get_model` knows.

    Args:
        path: A model index, whose ``Import`` lists metafiles, or a metafile.
        config_prefix: Folder that the configs in it are relative to; None is the index's own.

    Raises:
        ValueError: The file is no index, an entry is wrong or has no config, or a name is taken.
        OSError: A file cannot be read.
    """
    path = Path(path).absolute()
    prefix = path.parent if config_prefix is None else Path(config_prefix).absolute()
    models = _read_index(path, prefix)
    known = _models()
    for name, info in models.items():
        if name in known:
            raise ValueError(
                f'{info.filepath}: the name {info.name!r} is taken by {known[name].filepath}'
            )
        if not info.config.is_file():
            raise ValueError(
                f'{info.filepath}: the config of {info.name!r} does not exist: {info.config}; '
                'config_prefix is the folder that configs are relative to'
            )
    _registered.update(models)


def add_to_mmpretrain(module: ModuleType) -> bool:
    """Makes our models known to mmpretrain's ``list_models`` and ``get_model``.

    Args:
        module: ``mmpretrain.apis.model``.

    Returns:
        Whether it does know them; if not, a line in the log says why.
    """
    try:
        module.ModelHub.register_model_index(INDEX, config_prefix=INDEX.parent)
    except Exception as error:  # it must not keep mmpretrain from being imported
        logger.warning('mmpretrain does not know the models of hat_mm: %s', error)
        return False
    return True


# --- names ----------------------------------------------------------------------------------------


def list_models(
    pattern: str | None = None,
    exclude_patterns: Sequence[str] | None = None,
    task: str | None = None,
) -> list[str]:
    """Lists the names of models, as mmpretrain's function of this name does.

    Args:
        pattern: What names begin with; ``*``, ``?`` and ``[...]`` are wildcards.
        exclude_patterns: The same for names to leave out.
        task: Only models for this task, such as ``'Object Detection'``,
            ``'Instance Segmentation'``, ``'Semantic Segmentation'`` and ``'Image Classification'``;
            ``'null'``: only those that do not say what they are for.

    Returns:
        Names in lower case, sorted.

    Raises:
        TypeError: ``exclude_patterns`` is a single pattern.
    """
    if isinstance(exclude_patterns, str):
        raise TypeError(f'exclude_patterns must be a list, not {exclude_patterns!r}')
    models = _models()
    names = set(models)
    if pattern is not None:
        names = set(fnmatch.filter(names, pattern.lower() + '*'))
    for excluded in exclude_patterns or ():
        names -= set(fnmatch.filter(names, excluded.lower() + '*'))
    if task is not None:
        names = {name for name in names if task in _tasks(models[name])}
    return sorted(names)


def _tasks(info: ModelInfo) -> set[str]:
    return {'null'} if info.results is None else {result.task for result in info.results}


def _find(name: str) -> ModelInfo:
    if not isinstance(name, str):
        raise TypeError(f'the name of a model must be a str, not {name!r}')
    models = _models()
    if name.lower() in models:
        return models[name.lower()]
    near = list_models(name)[:3] if name else []
    near = near or difflib.get_close_matches(name.lower(), models, n=3, cutoff=0.5)
    hint = f'did you mean {" or ".join(map(repr, near))}? ' if near else ''
    raise ValueError(
        f'there is no model {name!r}; {hint}hat_mm.list_models() lists all {len(models)}'
    )


# --- models ---------------------------------------------------------------------------------------


def get_model(
    name: str,
    pretrained: bool | str | os.PathLike = False,
    device: Any = None,
    **overrides: Any,
) -> Any:
    """Builds a model by its name, in eval mode.

    Args:
        name: One of :func:`list_models`.
        pretrained: True loads the weights of the model, which may be downloaded; an address or a
            path loads other ones. With False the weights are random, and nothing is downloaded.
        device: Where to move the model, such as ``'cuda'``.
        **overrides: Settings merged into the config's ``model``, such as
            ``backbone=dict(window_size=14)``. A dict that replaces another, such as one for
            ``arch``, needs ``_delete_=True``, as in configs.

    Returns:
        The model of mmdet, mmseg or mmpretrain. It has ``_config``, ``_metainfo`` (a
        :class:`ModelInfo`) and ``_dataset_meta``, which mmpretrain's inferencers look for, and
        ``cfg`` and ``dataset_meta``, which mmdet's and mmseg's functions for inference do. (These
        need ``mmengine.registry.init_default_scope(model.cfg.default_scope)`` before.)

    Raises:
        ValueError: There is no such model, it has no weights, or the weights do not fill it. Parts
            that are overridden, such as ``head``, need not be filled; the log says what was not.
        TypeError: An override is no setting of the model.
        hat_mm.compat.DependencyError: The toolbox of the model is not installed.
        hat_mm.weights.download.DownloadError: The weights cannot be fetched.
    """
    info = copy.deepcopy(_find(name))
    if not isinstance(pretrained, bool | str | os.PathLike):
        raise TypeError(f'pretrained must be a bool, an address or a path, not {pretrained!r}')
    if pretrained is True and info.weights is None:
        raise ValueError(_no_weights(info))
    config = _config(info)
    scope = config.get('default_scope')
    if scope is None:
        raise ValueError(f'the config of {info.name!r} has no default_scope: {info.config}')
    compat.require(scope)
    # With it come hat_mm's classes, and its loader of safetensors.
    importlib.import_module('hat_mm.registry')
    file = _weights(info, pretrained) if pretrained is not False else None
    _drop_weights(config.model, overrides)
    if overrides:
        config.merge_from_dict({'model': copy.deepcopy(overrides)})
    # Tensors of inference mode could neither be trained nor loaded into.
    with _lock, torch.inference_mode(False):
        model = _build(config, scope)
        meta = _dataset_meta(config, scope)
        if file is not None:
            meta = _load(model, file, info, frozenset(overrides)) or meta
    if device is not None:
        model.to(device)
    model._config = model.cfg = config
    model._metainfo = info
    model._dataset_meta = model.dataset_meta = meta
    return model.eval()


def _config(info: ModelInfo) -> Any:
    config = compat.require('mmengine').Config
    try:
        return config.fromfile(info.config)
    except ModuleNotFoundError as error:  # of a base, such as mmdet::..., named by its distribution
        for toolbox in compat.TOOLBOXES:
            if str(error).startswith(toolbox):
                compat.require(toolbox)
        raise


def _no_weights(info: ModelInfo) -> str:
    """Words for an error: models with weights that have the same config or backbone."""
    backbones = {file.backbone for file in OFFICIAL_FILES}
    words = backbones & {*info.name.lower().split('_')}
    others = [
        repr(other.name)
        for other in _models().values()
        if other.weights
        and (other.config == info.config or words & {*other.name.lower().split('_')})
    ]
    hint = f'; models like it that have: {", ".join(sorted(others))}' if others else ''
    return f'there are no weights of {info.name!r} yet{hint}'


def _weights(info: ModelInfo, pretrained: Any) -> Path:
    """The verified local file of weights."""
    where = info.weights if pretrained is True else os.fspath(pretrained)
    if '://' not in where:
        path = Path(os.path.expanduser(where))
        if not path.is_file():
            raise FileNotFoundError(f'the weights {where!r} do not exist')
        return path
    digest = info.metadata.get('SHA256') if where == info.weights else None
    return importlib.import_module('hat_mm.weights.download').fetch(where, digest)


def _drop_weights(settings: Any, overrides: Any) -> None:
    """Takes out what would load weights while a model is initialized, unless it is overridden."""
    if isinstance(settings, list | tuple):
        for item in settings:
            _drop_weights(item, None)
    if not isinstance(settings, dict):
        return
    chosen = overrides if isinstance(overrides, Mapping) else {}
    for key, value in settings.items():
        if key == 'init_cfg' and key not in chosen:
            several = value if isinstance(value, list | tuple) else [value]
            rest = [c for c in several if not (isinstance(c, dict) and _is_pretrained(c))]
            if len(rest) < len(several):
                settings[key] = rest or None
        elif key == 'pretrained' and isinstance(value, str) and key not in chosen:
            settings[key] = None
        else:
            _drop_weights(value, chosen.get(key))


def _is_pretrained(init_cfg: dict[str, Any]) -> bool:
    kind = init_cfg.get('type')
    name = kind if isinstance(kind, str) else getattr(kind, '__name__', '')
    return name.rpartition('.')[2] in ('Pretrained', 'PretrainedInit')


def _build(config: Any, scope: str) -> Any:
    """Builds and initializes: a few models of mmdet have memory that is not, before."""
    importlib.import_module(f'{scope}.utils').register_all_modules(init_default_scope=False)
    if config.get('data_preprocessor') is not None:  # as mmengine's runner does
        config.model.setdefault('data_preprocessor', config.data_preprocessor)
    scopes = importlib.import_module('mmengine.registry').DefaultScope
    with scopes.overwrite_default_scope(scope):
        model = importlib.import_module(f'{scope}.registry').MODELS.build(config.model)
        with _quiet():
            model.init_weights()
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep mmengine from saying how each parameter was initialized."""
    current = importlib.import_module('mmengine.logging').MMLogger.get_current_instance()
    level = current.level
    current.setLevel(logging.WARNING)
    try:
        yield
    finally:
        current.setLevel(level)


def _dataset_meta(config: Any, scope: str) -> dict[str, Any]:
    """The classes of the config's test data."""
    dataset = (config.get('test_dataloader') or {}).get('dataset') or {}
    while 'dataset' in dataset:  # wrapped
        dataset = dataset['dataset']
    kind = dataset.get('type')
    if isinstance(kind, str):
        with importlib.import_module('mmengine.registry').DefaultScope.overwrite_default_scope(
            scope
        ):
            kind = importlib.import_module(f'{scope}.registry').DATASETS.get(kind)
    return {**getattr(kind, 'METAINFO', {}), **(dataset.get('metainfo') or {})}


def _load(model: Any, file: Path, info: ModelInfo, overridden: frozenset[str]) -> dict[str, Any]:
    """Loads weights and returns what the checkpoint says of its data.

    Only parts of the model that are overridden may stay as they were initialized.
    """
    # Torch writes to these itself where a file has none.
    tensors = {
        name: tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if not name.endswith('num_batches_tracked')
    }
    versions = {name: tensor._version for name, tensor in tensors.items()}
    load_checkpoint = importlib.import_module('mmengine.runner').load_checkpoint
    try:
        checkpoint = load_checkpoint(model, str(file), map_location='cpu', strict=not overridden)
    except RuntimeError as error:
        raise ValueError(f'{file} does not fill the model {info.name!r}: {_cut(error)}') from error
    # Torch counts how often a tensor was written to.
    left = [name for name, tensor in tensors.items() if tensor._version == versions[name]]
    wrong = [name for name in left if name.partition('.')[0] not in overridden]
    if wrong or len(left) == len(tensors):
        raise ValueError(
            f'{file} does not fill the model {info.name!r}, where nothing is overridden: it lacks '
            f'{_cut(", ".join(wrong or left))}'
        )
    if left:
        importlib.import_module('mmengine.logging').print_log(
            f'{file.name}: not in it, or of another shape, and so at random: {", ".join(left)}',
            logger='current',
            level=logging.WARNING,
        )
    meta = checkpoint.get('meta')
    found = meta.get('dataset_meta') if isinstance(meta, dict) else None
    return dict(found) if isinstance(found, Mapping) else {}


def _cut(text: Any) -> str:
    """Long text in one line."""
    line = ' '.join(str(text).split())
    return line if len(line) <= 1000 else f'{line[:1000]} …'
