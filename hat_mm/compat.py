"""Repairs for known breakages between OpenMMLab's releases and today's torch and its neighbours.

``import hat_mm`` calls :func:`apply`. Each row of :data:`BREAKAGES` waits for the module that it
concerns: its repair runs when that module is imported (at once if it already was), looks whether it
is needed, and does nothing otherwise. So nothing heavy is imported here, and toolboxes may be
imported before or after. ``HAT_MM_NO_COMPAT=1`` turns all of it off, ``HAT_MM_NO_COMPAT=name,name``
the repairs of these names; docs/compat.md lists them.

:func:`require` is the run-time check of the toolboxes, none of which is a hard dependency.
"""

import argparse
import ast
import functools
import importlib
import importlib.metadata
import importlib.util
import logging
import os
import pickle
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

__all__ = ['BREAKAGES', 'Breakage', 'DependencyError', 'apply', 'reading', 'require']

MINIMUM_TORCH = (2, 6)

logger = logging.getLogger(__name__)


# --- the run-time check of toolboxes -----------------------------------------------------------


class DependencyError(ImportError):
    """A package is missing, too old or incomplete; the message says which command cures it."""


@dataclass(frozen=True)
class Toolbox:
    """What the package of a config's ``default_scope`` needs.

    Attributes:
        extra: Extra of the ``hat_mm`` distribution that installs it, None if none does.
        needs_ops: Whether it imports mmcv's compiled operators.
    """

    extra: str | None = None
    needs_ops: bool = False


TOOLBOXES = {
    'mmdet': Toolbox(extra='det', needs_ops=True),
    'mmseg': Toolbox(extra='seg', needs_ops=True),
    'mmpretrain': Toolbox(extra='cls'),
    'mmengine': Toolbox(extra='det'),
}


def _cure(name: str) -> str:
    extra = TOOLBOXES.get(name, Toolbox()).extra
    if extra is None:
        return f'install the package that provides {name!r}'
    return f"run `make setup` in a checkout of hat_mm, or `pip install 'hat_mm[{extra}]'`"


def _check_torch() -> None:
    found = tuple(int(part) for part in re.findall(r'\d+', torch.__version__)[:2])
    if found < MINIMUM_TORCH:
        wanted = '.'.join(map(str, MINIMUM_TORCH))
        raise DependencyError(
            f'hat_mm needs torch>={wanted}, but torch {torch.__version__} is installed: '
            f"run `pip install 'torch>={wanted}'`"
        )


def _has_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def require(name: str) -> ModuleType:
    """Import a toolbox (``mmdet``, ``mmseg``, ``mmpretrain``, ``mmengine``) or say how to get it.

    Returns:
        The imported package.

    Raises:
        DependencyError: torch is too old, the package or mmcv is missing, mmcv has no compiled
            operators although the package needs them, or the package refuses the versions found.
    """
    _check_torch()
    if not _has_module(name):
        raise DependencyError(f'{name} is not installed: {_cure(name)}')
    if name in TOOLBOXES and name != 'mmengine':
        if not _has_module('mmcv'):
            raise DependencyError(f'{name} needs mmcv, which is not installed: {_cure(name)}')
        if TOOLBOXES[name].needs_ops and not _has_module('mmcv._ext'):
            raise DependencyError(
                f'{name} needs the compiled operators of mmcv, but the installed mmcv has none '
                f'(mmcv-lite?): uninstall it, then {_cure(name)}'
            )
    try:
        return importlib.import_module(name)
    except (ImportError, AssertionError) as error:  # the toolboxes assert the versions they accept
        cause = ' '.join(str(error).split())
        raise DependencyError(f'{name} cannot be imported ({cause}): {_cure(name)}') from error


# --- repairs that wait for an import -----------------------------------------------------------


class _ImportHook:
    """A ``sys.meta_path`` finder that runs functions just before or after a module is executed."""

    def __init__(self) -> None:
        self.before: dict[str, list[Callable[[Any], None]]] = {}
        self.after: dict[str, list[Callable[[ModuleType], None]]] = {}

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        before, after = self.before.get(fullname, ()), self.after.get(fullname, ())
        if not before and not after:
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, 'find_spec'):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                break
        else:
            return None
        if spec.loader is None:
            return spec
        exec_module = spec.loader.exec_module

        def exec_with_repairs(module: ModuleType) -> None:
            for repair in before:
                repair(spec)
            exec_module(module)
            for repair in after:
                repair(module)

        # The loader itself stays, so that inspect and importlib.resources keep working.
        spec.loader.exec_module = exec_with_repairs
        return spec


_told: set[str] = set()


def _acted(name: str, change: str) -> None:
    """Say once, at debug level, that a repair has changed something."""
    if name not in _told:
        _told.add(name)
        logger.debug('%s: %s', name, change)


# --- 1. checkpoints ----------------------------------------------------------------------------

_HISTORY_BUFFER = 'mmengine.logging.history_buffer'
_STATISTICS = ('min', 'max', 'mean', 'current')


def _history_statistic(owner: Any, name: Any) -> Callable:
    """Stand in for ``builtins.getattr`` in checkpoints: HistoryBuffer's statistics, nothing else.

    mmengine's message hub pickles ``HistoryBuffer.min`` and the like as ``getattr(HistoryBuffer,
    'min')``. The real ``getattr`` in an allow-list would give a file access to any attribute.
    """
    module = sys.modules.get(_HISTORY_BUFFER)
    if module is not None and owner is module.HistoryBuffer and name in _STATISTICS:
        return getattr(owner, name)
    label = owner.__qualname__ if isinstance(owner, type) else type(owner).__qualname__
    raise pickle.UnpicklingError(f'it asks for the attribute {str(name)[:80]!r} of {label}')


def _allow_plain_data(_: Any = None) -> None:
    """Allow what training checkpoints hold beside tensors: NumPy numbers, argparse namespaces."""
    multiarray = getattr(np, '_core', None) or np.core
    multiarray = multiarray.multiarray
    allowed: list[Any] = [argparse.Namespace, slice, np.ndarray, np.dtype]
    # A file written under NumPy 1 names numpy.core, one written under NumPy 2 numpy._core.
    for package in ('numpy.core', 'numpy._core'):
        for name in ('_reconstruct', 'scalar'):
            allowed.append((getattr(multiarray, name), f'{package}.multiarray.{name}'))
    allowed += {type(np.dtype(code)) for code in '?bBhHiIlLqQefdgFDGSU'}  # no object dtype
    torch.serialization.add_safe_globals(allowed)
    _acted('numpy-in-checkpoints', 'torch.load reads NumPy data and argparse.Namespace')


def _allow_history_buffer(module: ModuleType) -> None:
    """Allow mmengine's log history, with the stand-in for the ``getattr`` that it pickles."""
    torch.serialization.add_safe_globals(
        [module.HistoryBuffer, (_history_statistic, 'builtins.getattr')]
    )
    _acted('history-buffer-in-checkpoints', "torch.load reads mmengine's log history")


def _load_weights_only(module: ModuleType) -> None:
    """Make every loader of mmengine refuse files that carry code, and say so in one line.

    mmengine leaves ``weights_only`` to torch's default, which an environment variable reverses, and
    asks torch.hub for unsafe loading of URLs. onedl-mmengine allow-lists the real ``getattr`` and
    falls back to unsafe loading after a refusal. What others call in the process stays theirs.
    """

    def weights_only(load: Callable) -> Callable:
        @functools.wraps(load)
        def load_weights(*args: Any, **kwargs: Any) -> Any:
            _acted('unsafe-loading', 'mmengine loads with weights_only=True')
            return load(*args, **{**kwargs, 'weights_only': True})

        return load_weights

    module.load_url = weights_only(module.load_url)
    if hasattr(module, '_safe_torch_load'):
        module._safe_torch_load = weights_only(module._safe_torch_load)
        listed = module.get_torch_safe_globals
        module.get_torch_safe_globals = lambda: [item for item in listed() if item is not getattr]
    # To this module alone, torch is one with another `load`.
    module.torch = ModuleType('torch')
    module.torch.__getattr__ = functools.partial(getattr, torch)
    module.torch.load = weights_only(torch.load)
    load_checkpoint = module.CheckpointLoader.load_checkpoint.__func__

    @functools.wraps(load_checkpoint)
    def load_and_explain(cls: type, filename: Any, *args: Any, **kwargs: Any) -> Any:
        with reading(filename):
            return load_checkpoint(cls, filename, *args, **kwargs)

    module.CheckpointLoader.load_checkpoint = classmethod(load_and_explain)


@contextmanager
def reading(filename: str) -> Iterator[None]:
    """Says in one line, as ``pickle.UnpicklingError``, why torch could not or would not read."""
    try:
        yield
    except pickle.UnpicklingError as error:
        if 'was not loaded: ' in str(error):  # said already
            raise
        raise pickle.UnpicklingError(f'{filename} was not loaded: {_refusal(error)}') from error
    except Exception as error:
        if 'TorchScript' in str(error):
            raise pickle.UnpicklingError(
                f'{filename} was not loaded: it carries code (TorchScript)'
            ) from error
        if not _is_unreadable(error):
            raise
        raise pickle.UnpicklingError(
            f'{filename} was not loaded: it is no checkpoint, or is damaged'
        ) from error


def _is_unreadable(error: Exception) -> bool:
    """Whether reading the bytes failed: torch meets garbage with any exception."""
    if isinstance(error, EOFError):
        return True
    # A file of another device is not damaged; torch says what to do.
    if isinstance(error, OSError) or 'deserialize object on' in str(error):
        return False
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    # So torch calls what applies a `map_location`, where a wrong one fails.
    if any(frame.f_code.co_name == 'restore_location' for frame in frames):
        return False
    return any(frame.f_globals.get('__name__') == 'torch.serialization' for frame in frames)


def _refusal(error: Exception) -> str:
    """Say in one line why torch's restricted unpickler refused a file."""
    text = str(error)
    for pattern in (r'GLOBAL (\S+) was not an allowed', r'unsupported GLOBAL (\S+) whose module'):
        if found := re.search(pattern, text):
            return f'it carries code or objects other than weights ({found[1]})'
    if found := re.search(r'it asks for .*', text):
        return f'it carries code ({found[0]})'
    if re.search(r'Unsupported (operand|class)|persistent|magic number|invalid load key', text):
        return 'it is no checkpoint, or is damaged'
    return 'it carries code or objects other than weights'


_DATA_NODES = (
    ast.Module, ast.Assign, ast.Name, ast.Load, ast.Store, ast.Constant, ast.Dict, ast.List,
    ast.Tuple, ast.Set, ast.Call, ast.keyword, ast.UnaryOp, ast.USub, ast.UAdd,
)  # fmt: skip
_DATA_CALLS = ('dict', 'list', 'tuple', 'set', 'float')
_CHECKPOINT_READERS = ('mmengine.runner', 'mmengine.infer')


def _is_plain_data(text: str) -> bool:
    """Whether a config's text only assigns literals, as ``Config.pretty_text`` writes it."""
    try:
        nodes = list(ast.walk(ast.parse(text)))
    except (SyntaxError, ValueError):
        return False
    return all(
        isinstance(node, _DATA_NODES)
        and (not isinstance(node, ast.Call) or getattr(node.func, 'id', None) in _DATA_CALLS)
        and (not isinstance(node, ast.Name) or not node.id.startswith('_base_'))
        for node in nodes
    )


def _read_configs_of_checkpoints_as_data(module: ModuleType) -> None:
    """Do not execute the config text that a checkpoint carries unless it is plain data.

    ``Runner.resume`` and the inferencers pass it to ``Config.fromstring``, which runs it as Python.
    """
    fromstring = module.Config.fromstring

    @functools.wraps(fromstring)
    def checked(cfg_str: str, file_format: str) -> Any:
        caller = sys._getframe(1).f_globals.get('__name__', '')
        if (
            file_format == '.py'
            and caller.startswith(_CHECKPOINT_READERS)
            and not _is_plain_data(cfg_str)
        ):
            _acted('code-in-checkpoint-configs', 'the config text of a checkpoint is not executed')
            raise pickle.UnpicklingError(
                'the checkpoint was refused: the config text it carries is code, not plain settings'
            )
        return fromstring(cfg_str, file_format)

    module.Config.fromstring = staticmethod(checked)


# --- 2. torchvision ----------------------------------------------------------------------------

_TORCHVISION_SCHEMAS = {
    'nms': '(Tensor dets, Tensor scores, float iou_threshold) -> Tensor',
    'qnms': '(Tensor dets, Tensor scores, float iou_threshold) -> Tensor',
}
_torchvision_library: list[torch.library.Library] = []  # a library's schemas end with the object


def _define_torchvision_schemas(spec: Any) -> None:
    """Let torchvision be imported where its compiled operators cannot be loaded.

    A CUDA build of torchvision beside a CPU-only torch finds no libcudart, goes on without its
    operators, and then raises RuntimeError because it describes two that do not exist. Its own
    library is tried first: if that loads, the pair matches and nothing is touched.
    """
    for folder in spec.submodule_search_locations or ():
        for library in sorted(Path(folder).glob('_C*.*')):
            try:
                torch.ops.load_library(library)
            except OSError:
                logger.debug('%s does not fit this torch', library)
    missing = [n for n in _TORCHVISION_SCHEMAS if not hasattr(torch.ops.torchvision, n)]
    if missing:
        library = torch.library.Library('torchvision', 'FRAGMENT')
        for name in missing:
            library.define(name + _TORCHVISION_SCHEMAS[name])
        _torchvision_library.append(library)
        _acted('torchvision-without-ops', f'described the missing operators {", ".join(missing)}')


# --- 3. and 4. distributed runs on CPUs ---------------------------------------------------------


def _on_cpu() -> bool:
    if torch.cuda.is_available():
        return False
    return importlib.import_module('mmengine.device').get_device() == 'cpu'


@contextmanager
def _no_cuda_device() -> Iterator[None]:
    set_device = torch.cuda.set_device
    torch.cuda.set_device = lambda device: None
    try:
        yield
    finally:
        torch.cuda.set_device = set_device


def _init_dist_without_cuda(module: ModuleType) -> None:
    """Start process groups on machines without an accelerator, over gloo instead of nccl."""

    def without_cuda(init: Callable) -> Callable:
        @functools.wraps(init)
        def wrapped(backend: str, *args: Any, **kwargs: Any) -> None:
            if not _on_cpu():
                return init(backend, *args, **kwargs)
            _acted('init-dist-without-cuda', 'init_dist uses no CUDA device, and gloo for nccl')
            with _no_cuda_device():
                return init('gloo' if backend == 'nccl' else backend, *args, **kwargs)

        return wrapped

    for name in ('_init_dist_pytorch', '_init_dist_mpi', '_init_dist_slurm'):
        setattr(module, name, without_cuda(getattr(module, name)))


@functools.cache  # a model may be wrapped in parts
def _warn_of_reverted_norms() -> None:
    importlib.import_module('mmengine.logging').print_log(
        'SyncBN is BN here: it has no implementation for processes on CPUs, so each process '
        'normalizes with the statistics of its own images',
        logger='current',
        level=logging.WARNING,
    )


def _wrap_cpu_models(module: ModuleType) -> None:
    """Wrap models on the CPU in DDP without GPU numbers, and with BN in place of SyncBN."""
    wrapper = module.MMDistributedDataParallel
    init = wrapper.__init__

    @functools.wraps(init)
    def __init__(self: Any, module: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        if all(parameter.device.type == 'cpu' for parameter in module.parameters()):
            had_gpus = kwargs.pop('device_ids', None) is not None
            before = set(module.modules())
            module = importlib.import_module('mmengine.model').revert_sync_batchnorm(module)
            had_sync_bn = not before.issubset(module.modules())
            if had_gpus or had_sync_bn:
                _acted('ddp-and-syncbn-on-cpu', 'a model on the CPU is wrapped as one')
            if had_sync_bn:
                _warn_of_reverted_norms()
        init(self, module, *args, **kwargs)

    wrapper.__init__ = __init__


# --- 5. setuptools without pkg_resources --------------------------------------------------------


def _replace_everywhere(old: Any, new: Any, package: str) -> None:
    """Rebind a function in every loaded module of a package that imported it by name."""
    for name, module in list(sys.modules.items()):
        if name.partition('.')[0] == package:
            for attribute, value in list(vars(module).items()):
                if value is old:
                    setattr(module, attribute, new)


def _top_level_modules(package: str) -> list[str]:
    try:
        listed = importlib.metadata.distribution(package).read_text('top_level.txt') or ''
    except importlib.metadata.PackageNotFoundError:
        listed = ''
    return [package, *listed.split()]


def _find_packages_without_pkg_resources(module: ModuleType) -> None:
    """Find installed packages by importlib.metadata instead of pkg_resources.

    setuptools 82 removed pkg_resources; earlier ones warn, and mmengine reloads it at each call.
    """
    if 'pkg_resources' not in module.get_installed_path.__code__.co_names:
        return

    def get_installed_path(package: str) -> str:
        for name in _top_level_modules(package):
            spec = importlib.util.find_spec(name)
            if spec is not None and spec.origin is not None:
                return os.path.dirname(spec.origin)
        raise ModuleNotFoundError(f'{package} is not installed')

    def is_installed(package: str) -> bool:
        try:
            get_installed_path(package)
        except ModuleNotFoundError:
            return False
        return True

    def package2module(package: str) -> str:
        modules = _top_level_modules(package)
        if len(modules) == 1:
            raise ValueError(f'can not infer the module name of {package}')
        return modules[1]

    for new in (get_installed_path, is_installed, package2module):
        old = getattr(module, new.__name__)
        setattr(module, new.__name__, new)
        _replace_everywhere(old, new, 'mmengine')
    _acted('pkg-resources', 'mmengine finds packages by importlib.metadata')


def _find_configs_of_forks(module: ModuleType) -> None:
    """Let ``mmseg::`` in a config find a fork, which has the module but another distribution.

    mmengine looks for the distribution that it knows, mmsegmentation, or a module of that name.
    """
    for name, package in module.MODULE2PACKAGE.items():
        if name == package or importlib.util.find_spec(name) is None:
            continue
        try:
            importlib.metadata.distribution(package)
        except importlib.metadata.PackageNotFoundError:
            module.MODULE2PACKAGE[name] = name
            _acted('configs-of-forks', 'bases of configs are found in forks of the toolboxes')


def _know_configs_of_hat_mm(module: ModuleType) -> None:
    """Let ``hat_mm::`` in a config name a config of this package, as ``mmdet::`` does for mmdet.

    mmengine has a fixed list of packages whose configs it finds.
    """
    module.MODULE2PACKAGE['hat_mm'] = 'hat_mm'
    _acted('configs-of-hat-mm', 'configs can have bases named hat_mm::')


def _keep_scope_of_hat_mm_bases(module: ModuleType) -> None:
    """Read a ``hat_mm::`` base as if it were named by its path.

    mmengine marks what an external base defines with the scope of its package. Our configs define
    models and pipelines of the toolboxes, which are not registered in the scope ``hat_mm``; what is
    ours they name in full (``hat_mm.FasterViT``).
    """
    get_cfg_path = module.Config._get_cfg_path

    @functools.wraps(get_cfg_path)
    def without_our_scope(cfg_path: str, filename: str) -> tuple[str, str | None]:
        path, scope = get_cfg_path(cfg_path, filename)
        if scope != 'hat_mm':
            return path, scope
        _acted('scope-of-hat-mm-configs', 'bases named hat_mm:: keep the scope of the config')
        return path, None

    module.Config._get_cfg_path = staticmethod(without_our_scope)


# --- 6. NumPy ----------------------------------------------------------------------------------


def _restore_in1d(_: ModuleType) -> None:
    """Give NumPy >= 2.4 back the name ``in1d``, which mmpretrain's retrieval metrics call."""
    if not hasattr(np, 'in1d'):
        np.in1d = np.isin
        _acted('numpy-in1d', 'numpy.in1d is numpy.isin')


# --- 7. mmpretrain's list of models --------------------------------------------------------------


def _add_models_to_mmpretrain(module: ModuleType) -> None:
    """Let mmpretrain's ``list_models`` and ``get_model`` know the models of this package."""
    if importlib.import_module('hat_mm.zoo.models').add_to_mmpretrain(module):
        _acted('models-in-mmpretrain', "mmpretrain's functions know the models of hat_mm")


# --- the table ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Breakage:
    """A known breakage, or something that a toolbox cannot know of itself, and its repair.

    Attributes:
        name: How docs/compat.md, ``HAT_MM_NO_COMPAT``, the log and bug reports call it.
        module: The module whose import triggers the repair; None repairs at once.
        repair: Called with the imported module (with its spec if ``before``).
        before: Repair before the module's code runs, instead of after.
    """

    name: str
    module: str | None
    repair: Callable[[Any], None]
    before: bool = False


BREAKAGES = (
    Breakage('numpy-in-checkpoints', None, _allow_plain_data),
    Breakage('history-buffer-in-checkpoints', _HISTORY_BUFFER, _allow_history_buffer),
    Breakage('unsafe-loading', 'mmengine.runner.checkpoint', _load_weights_only),
    Breakage(
        'code-in-checkpoint-configs', 'mmengine.config.config', _read_configs_of_checkpoints_as_data
    ),
    Breakage('torchvision-without-ops', 'torchvision', _define_torchvision_schemas, before=True),
    Breakage('init-dist-without-cuda', 'mmengine.dist.utils', _init_dist_without_cuda),
    Breakage('ddp-and-syncbn-on-cpu', 'mmengine.model.wrappers.distributed', _wrap_cpu_models),
    Breakage('pkg-resources', 'mmengine.utils.package_utils', _find_packages_without_pkg_resources),
    Breakage('configs-of-forks', 'mmengine.config.utils', _find_configs_of_forks),
    Breakage('configs-of-hat-mm', 'mmengine.config.utils', _know_configs_of_hat_mm),
    Breakage('scope-of-hat-mm-configs', 'mmengine.config.config', _keep_scope_of_hat_mm_bases),
    Breakage('numpy-in1d', 'mmpretrain.evaluation.metrics.retrieval', _restore_in1d),
    Breakage('models-in-mmpretrain', 'mmpretrain.apis.model', _add_models_to_mmpretrain),
)

_hook = _ImportHook()


def _after_import(module: str, function: Callable[[ModuleType], None]) -> None:
    """Call a function with a module, now if it was imported, or else when it is."""
    _hook.after.setdefault(module, []).append(function)
    if (loaded := sys.modules.get(module)) is not None:
        function(loaded)


def _switched_off() -> set[str]:
    """The names of the repairs that ``HAT_MM_NO_COMPAT`` turns off."""
    names = {breakage.name for breakage in BREAKAGES}
    asked = set(os.environ.get('HAT_MM_NO_COMPAT', '').lower().replace(',', ' ').split())
    if asked & {'1', 'true', 'yes', 'on'}:
        return names
    if unknown := sorted(asked - names - {'0', 'false', 'no', 'off'}):
        logger.warning(
            'HAT_MM_NO_COMPAT has no effect for %s: choose among %s, or 1 for all',
            ', '.join(map(repr, unknown)),
            ', '.join(sorted(names)),
        )
    return asked & names


def apply() -> None:
    """Apply all repairs, now or when their module is imported; a second call does nothing.

    Raises:
        DependencyError: torch is older than 2.6, whose loading of checkpoints cannot be made safe.
    """
    if _hook in sys.meta_path:
        return
    off = _switched_off()
    wanted = [breakage for breakage in BREAKAGES if breakage.name not in off]
    if not wanted:
        return
    _check_torch()
    for breakage in wanted:
        if breakage.module is None:
            breakage.repair(None)
        elif breakage.before:
            _hook.before.setdefault(breakage.module, []).append(breakage.repair)
        else:
            _after_import(breakage.module, breakage.repair)
    sys.meta_path.insert(0, _hook)
