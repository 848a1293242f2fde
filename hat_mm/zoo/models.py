"""Models by name: those that ``model-index.yml`` lists, and those of indexes that users add.

Trust an index only as you would a program: the configs that it names are Python. Nothing is read
before it is needed, and nothing is downloaded unless ``pretrained`` asks for it.
"""

import copy
import difflib
import fnmatch
import functools
import importlib
import logging
import os
import re
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.registry import DefaultScope
from mmengine.runner import load_checkpoint

import hat_mm.registry  # noqa: F401  our classes, and the loader of safetensors
from hat_mm import compat, configs
from hat_mm.weights.addresses import check_address
from hat_mm.weights.download import fetch
from hat_mm.weights.initialization import initialize

try:
    from modelindex.load_model_index import load
    from modelindex.models.Model import Model
except ImportError as error:
    raise compat.DependencyError('model indexes need a package: pip install model-index') from error

__all__ = ['get_model', 'list_models', 'register_model_index']

logger = logging.getLogger(__name__)

INDEX = Path(__file__).parents[1] / '.mim' / 'model-index.yml'

# --- indexes --------------------------------------------------------------------------------------

_registered: dict[str, Model] = {}
# mmengine's default scope is the same for all threads.
_lock = threading.RLock()


def _models() -> dict[str, Model]:
    """All models by their names in lower case."""
    return _shipped() | _registered


@functools.cache
def _shipped() -> dict[str, Model]:
    return _read_index(INDEX, INDEX.parent)


def _read_index(path: Path, prefix: Path) -> dict[str, Model]:
    """Reads an index and the metafiles that it imports.

    Raises:
        ValueError: The file is not an index, or one of its entries is wrong.
        OSError: A file cannot be read.
    """
    try:
        index = load(str(path))
        # What is not used here may be missing; READMEs, for example, are often named relative to
        # the repository.
        unused = re.compile('README|Image|Metrics')
        wrong = [fault for fault in index.check(silent=True) if not unused.search(fault)]
        models = list(index.models)
    except OSError:
        raise
    except Exception as error:  # the package does not check the types of fields
        raise ValueError(f'{path} is no model index: {error}') from error
    if wrong:
        raise ValueError(f'{path}: {"; ".join(wrong)}')
    if not models:
        raise ValueError(f'{path} is no model index: it lists no Models, nor do what it has Import')
    found: dict[str, Model] = {}
    for model in models:
        for field in (model.name, model.config, model.weights or ''):
            if field and not isinstance(field, str):
                raise ValueError(f'{model.filepath}: {field!r} in {model.name!r} must be a string')
        if not model.config:
            raise ValueError(f'{model.filepath}: {model.name!r} has no Config')
        if model.weights:
            check_address(model.weights)
        if model.name.lower() in found:
            raise ValueError(f'{model.filepath}: several models are named {model.name!r}')
        model.config = str(prefix / model.config)
        found[model.name.lower()] = model
    return found


def register_model_index(
    path: str | os.PathLike, config_prefix: str | os.PathLike | None = None
) -> None:
    """Adds the models of an index to those that :func:`get_model` knows.

    Args:
        path: A model index, whose ``Import`` lists metafiles, or a metafile.
        config_prefix: Folder that the configs in it are relative to; None for the index's own.

    Raises:
        ValueError: The file is not an index, an entry is wrong or has no config, or a name is
            taken.
        OSError: A file cannot be read.
    """
    path = Path(path).absolute()
    prefix = path.parent if config_prefix is None else Path(config_prefix).absolute()
    models = _read_index(path, prefix)
    known = _models()
    for name, model in models.items():
        if name in known:
            raise ValueError(
                f'{model.filepath}: the name {model.name!r} is taken by {known[name].filepath}'
            )
        if not Path(model.config).is_file():
            raise ValueError(
                f'{model.filepath}: the config of {model.name!r} does not exist: {model.config}; '
                'config_prefix is the folder that configs are relative to'
            )
    _registered.update(models)


def add_to_mmpretrain(module: ModuleType) -> bool:
    """Adds our models to mmpretrain's ``list_models`` and ``get_model``.

    Args:
        module: ``mmpretrain.apis.model``.

    Returns:
        Whether that worked; if not, a line in the log says why.
    """
    try:
        module.ModelHub.register_model_index(INDEX, config_prefix=INDEX.parent)
    except Exception as error:  # must not prevent the import of mmpretrain
        logger.warning('mmpretrain does not know the models of hat_mm: %s', error)
        return False
    return True


# --- names ----------------------------------------------------------------------------------------


def list_models(
    pattern: str | None = None,
    exclude_patterns: Sequence[str] | None = None,
    task: str | None = None,
) -> list[str]:
    """Lists the names of models, like mmpretrain's function of the same name.

    Args:
        pattern: Start of the names; ``*``, ``?`` and ``[...]`` are wildcards.
        exclude_patterns: Patterns of names to leave out.
        task: Only models for this task, such as ``'Object Detection'``,
            ``'Instance Segmentation'``, ``'Panoptic Segmentation'``, ``'Semantic Segmentation'``
            and ``'Image Classification'``; ``'null'`` for models without a task.

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


def _tasks(model: Model) -> set[str]:
    return {'null'} if model.results is None else {result.task for result in model.results.data}


def _find(name: str) -> Model:
    models = _models()
    if name.lower() in models:
        return copy.deepcopy(models[name.lower()])
    near = list_models(name)[:3] if name else []
    near = near or difflib.get_close_matches(name.lower(), models, n=3, cutoff=0.5)
    hint = f'did you mean {" or ".join(map(repr, near))}? ' if near else ''
    raise ValueError(
        f'there is no model {name!r}; {hint}hat_mm.list_models() lists all {len(models)}'
    )


# --- models ---------------------------------------------------------------------------------------


@torch.inference_mode(False)  # its tensors could not be trained or loaded into
def get_model(
    name: str | os.PathLike | Config,
    pretrained: bool | str | os.PathLike = False,
    device: Any = None,
    **overrides: Any,
) -> Any:
    """Builds a model by its name or from a config, in eval mode.

    Args:
        name: One of :func:`list_models`, the path of a config (``.py``), or a config.
        pretrained: True loads the weights of a named model, which may be downloaded; a URL or a
            path loads others. With False the weights are random, and nothing is downloaded.
        device: Where to move the model, such as ``'cuda'``.
        **overrides: Settings merged into the config's ``model``, such as
            ``backbone=dict(window_size=14)``. A dict that replaces another, such as one for
            ``arch``, needs ``_delete_=True``, as in configs.

    Returns:
        The model of mmdet, mmseg or mmpretrain. It has ``_config``, ``_metainfo`` (the entry of the
        index; None for a config) and ``_dataset_meta`` for mmpretrain's inferencers, and ``cfg``
        and ``dataset_meta`` for the inference functions of mmdet and mmseg. (Call
        ``mmengine.registry.init_default_scope(model.cfg.default_scope)`` before those.)

    Raises:
        OSError: There is no such config.
        ValueError: There is no such model, it has no weights, or the weights do not fill it. Parts
            that are overridden, such as ``head``, need not be filled; the log says what was not.
        TypeError: An override is not a setting of the model, or ``pretrained`` is something else.
        hat_mm.compat.DependencyError: The toolbox of the model is not installed.
        hat_mm.weights.download.DownloadError: The weights cannot be fetched.
    """
    if not isinstance(pretrained, bool | str | os.PathLike):
        raise TypeError(f'pretrained must be True, False, a URL or a path, not {pretrained!r}')
    info, config = _look_up(name)
    name = info.name if info else str(config.filename or 'the config')
    if pretrained is True and not (info and info.weights):
        having = [other.name for other in _models().values() if other.weights]
        near = difflib.get_close_matches(name, having, n=3, cutoff=0)
        raise ValueError(
            f'there are no weights of {name!r} yet; some that have are {", ".join(near)}'
            if info
            else f'{name} is a config, which names no weights of the whole model: give their file'
        )
    scope = config.get('default_scope')
    if scope is None:
        raise ValueError(f'the config of {name!r} has no default_scope: {config.filename}')
    if config.get('model') is None:
        raise ValueError(f'{name} has no model')
    compat.require(scope)
    file = None if pretrained is False else _weights(info, pretrained)
    _drop_weights(config.model, overrides)
    config.merge_from_dict({'model': copy.deepcopy(overrides)})
    if config.get('data_preprocessor') is not None:  # as mmengine's runner does
        config.model.setdefault('data_preprocessor', config.data_preprocessor)
    importlib.import_module(f'{scope}.utils').register_all_modules(init_default_scope=False)
    registry = importlib.import_module(f'{scope}.registry')
    with _lock, DefaultScope.overwrite_default_scope(scope):
        model = registry.MODELS.build(config.model)
        meta = configs.find_dataset_meta(config)
        initialize(model)
    if file is not None:
        meta = _load(model, file, name, overrides) or meta
    if device is not None:
        model.to(device)
    model._config = model.cfg = config
    model._metainfo = info
    model._dataset_meta = model.dataset_meta = meta
    model.eval()  # of some models it returns None
    return model


def _look_up(name: Any) -> tuple[Model | None, Config]:
    """The entry of the index, if it is a name, and the config."""
    if isinstance(name, Config):
        return None, copy.deepcopy(name)
    info = None if os.fspath(name).endswith('.py') else _find(os.fspath(name))
    return info, configs.read(info.config if info else name)


def _weights(info: Model | None, pretrained: Any) -> str:
    """The local file of the weights, downloaded and verified if a URL is given."""
    where: str = info.weights if info and pretrained is True else os.fspath(pretrained)
    if '://' not in where:
        return where
    recorded = info.metadata.data if info and info.metadata else {}
    return str(fetch(where, recorded.get('SHA256') if info and where == info.weights else None))


def _drop_weights(settings: Any, overrides: Mapping[str, Any]) -> None:
    """Removes settings that would load weights during initialization, unless overridden."""
    if isinstance(settings, list | tuple):
        for item in settings:
            _drop_weights(item, {})
    if not isinstance(settings, dict):
        return
    for key, value in settings.items():
        chosen = overrides.get(key)
        if key in configs.WEIGHTS and chosen is None:
            settings[key] = False if isinstance(value, bool) else None  # timm's are bools
        elif key == 'init_cfg' and chosen is None:
            several = value if isinstance(value, list) else [value]
            if any(init and _class_name(init['type']).startswith('Pretrained') for init in several):
                settings[key] = None
        else:
            _drop_weights(value, chosen if isinstance(chosen, Mapping) else {})


def _class_name(kind: Any) -> str:
    """Name of a class that a config names or, in mmengine's newer style, imports."""
    return (kind if isinstance(kind, str) else kind.__name__).rpartition('.')[2]


def _load(
    model: torch.nn.Module, file: str, name: str, overridden: Mapping[str, Any]
) -> dict[str, Any]:
    """Loads weights and returns the dataset metadata of the checkpoint.

    Only parts of the model that are overridden may stay as they were initialized.
    """
    # Torch's version counters tell which tensors were written to. Counters of batch norms are left
    # out, because torch sets them itself.
    tensors = model.state_dict(keep_vars=True)
    tensors = {k: v for k, v in tensors.items() if not k.endswith('num_batches_tracked')}
    versions = {key: tensor._version for key, tensor in tensors.items()}
    try:
        checkpoint = load_checkpoint(model, file, map_location='cpu', strict=not overridden)
    except RuntimeError as error:
        raise ValueError(f'{file} does not fill the model {name!r}: {error}') from error
    left = [key for key, tensor in tensors.items() if tensor._version == versions[key]]
    wrong = [key for key in left if key.partition('.')[0] not in overridden]
    if wrong or len(left) == len(tensors):
        raise ValueError(
            f'{file} does not fill the model {name!r}, where nothing is overridden: it lacks '
            f'{", ".join((wrong or left)[:10])}'
        )
    if left:
        print_log(
            f'{file}: not in it, or of another shape, and so at random: {", ".join(left)}',
            logger='current',
            level=logging.WARNING,
        )
    return (checkpoint.get('meta') or {}).get('dataset_meta') or {}
