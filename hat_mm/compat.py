"""Repairs for known breakages between OpenMMLab's releases and today's torch, NumPy and others.

``import hat_mm`` calls :func:`apply`. Each row of :data:`BREAKAGES` names the module that it
concerns. Its repair runs when that module has been imported (at once if it already was), and does
nothing if it is not needed. So this module imports nothing heavy, and toolboxes may be imported
before or after it. ``HAT_MM_NO_COMPAT=1`` turns all repairs off, ``HAT_MM_NO_COMPAT=name,name``
those of these names; docs/compat.md lists them.

:func:`require` checks at run time for the toolboxes, none of which is a hard dependency.
"""

import argparse
import ast
import errno
import functools
import importlib
import importlib.abc
import importlib.metadata
import importlib.util
import logging
import os
import pickle
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from torch.torch_version import TorchVersion

__all__ = ['BREAKAGES', 'Breakage', 'DependencyError', 'apply', 'reading', 'require']

MINIMUM_TORCH = '2.6'
# Package that is not required -> extra of the hat_mm distribution that installs it.
EXTRAS = {
    'mmdet': 'det',
    'mmseg': 'seg',
    'mmpretrain': 'cls',
    'mmengine': 'det',
    'onnxscript': 'deploy',
    'onnxruntime': 'deploy',
    'openvino': 'deploy',
    'nncf': 'deploy',
    'gradio': 'demo',
    'sahi': 'large',
    'supervision': 'data',
    'torchmetrics': 'panoptic',
    'timm': 'interop',
    'huggingface_hub': 'interop',
    'pytorch_grad_cam': 'vis',
}

logger = logging.getLogger(__name__)


# --- the run-time check of toolboxes -----------------------------------------------------------


class DependencyError(ImportError):
    """A package is missing, too old or incomplete; the message gives the command that fixes it."""


def _check_torch() -> None:
    if TorchVersion(torch.__version__) < MINIMUM_TORCH:
        raise DependencyError(
            f'hat_mm needs torch>={MINIMUM_TORCH}, but torch {torch.__version__} is installed: '
            f"run `pip install 'torch>={MINIMUM_TORCH}'`"
        )


def has_module(name: str) -> bool:
    """Whether a package is installed, or a module of one, which imports the package."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def require(name: str) -> ModuleType:
    """Imports a package that is not required, such as a toolbox, or says how to get it.

    Returns:
        The imported package.

    Raises:
        DependencyError: torch is too old, the package or mmcv is missing, mmcv has no compiled
            operators although the package needs them, or the package refuses the versions found.
    """
    _check_torch()
    package = name.partition('.')[0]
    extra = EXTRAS.get(package)
    cure = f'install the package that provides {name!r}'
    if extra is not None:
        target = 'web' if extra == 'demo' else 'setup'
        cure = f"run `make {target}` in a checkout of hat_mm, or `pip install 'hat_mm[{extra}]'`"
    if not has_module(package):
        raise DependencyError(f'{package} is not installed: {cure}')
    if package in ('mmdet', 'mmseg') and has_module('mmcv') and not has_module('mmcv._ext'):
        raise DependencyError(
            f'{package} needs the compiled operators of mmcv, but the installed mmcv has none '
            f'(mmcv-lite?): uninstall it, then {cure}'
        )
    try:
        return importlib.import_module(name)
    except (ImportError, AssertionError) as error:  # the toolboxes assert the versions they accept
        cause = ' '.join(str(error).split())
        raise DependencyError(f'{name} cannot be imported ({cause}): {cure}') from error


# --- the table of repairs ------------------------------------------------------------------------


@dataclass(frozen=True)
class Breakage:
    """A known breakage, or something about hat_mm that a toolbox cannot know, and its repair.

    Attributes:
        name: Its name in docs/compat.md, ``HAT_MM_NO_COMPAT``, the log and bug reports.
        module: The module whose import triggers the repair; None repairs at once.
        repair: Called with the imported module and a function, which the repair calls with a
            description as soon as it changes something.
    """

    name: str
    module: str | None
    repair: Callable[..., None]


BREAKAGES: list[Breakage] = []  # in the order of their definition below

_told: set[str] = set()
_telling = threading.Lock()


def _acted(name: str, change: str) -> None:
    """Logs once, at debug level, that a repair has changed something."""
    with _telling:
        if name in _told:
            return
        _told.add(name)
    logger.debug('%s: %s', name, change)


def _repairs(name: str, module: str | None = None) -> Callable[[Callable], Callable]:
    """Adds the decorated function to the table."""

    def register(repair: Callable) -> Callable:
        BREAKAGES.append(Breakage(name, module, repair))
        return repair

    return register


def _altered(module: ModuleType, **names: Any) -> ModuleType:
    """Returns a view of a module in which some names are replaced.

    Only the module that is given the view calls the replacements.
    """
    view = ModuleType(module.__name__)
    vars(view).update(names, __getattr__=functools.partial(getattr, module))
    return view


# --- checkpoints ---------------------------------------------------------------------------------

_HISTORY_BUFFER = 'mmengine.logging.history_buffer'


@_repairs('numpy-in-checkpoints')
def _allow_plain_data(_: None, acted: Callable[[str], None]) -> None:
    """Allows what training checkpoints hold beside tensors: NumPy numbers, argparse namespaces."""
    multiarray = (getattr(np, '_core', None) or np.core).multiarray
    allowed: list[Any] = [argparse.Namespace, slice, np.ndarray, np.dtype]
    # A file written under NumPy 1 names numpy.core, one written under NumPy 2 numpy._core.
    for package in ('numpy.core', 'numpy._core'):
        for name in ('_reconstruct', 'scalar'):
            allowed.append((getattr(multiarray, name), f'{package}.multiarray.{name}'))
    allowed += {type(np.dtype(code)) for code in '?bBhHiIlLqQefdgFDGSU'}  # no object dtype
    torch.serialization.add_safe_globals(allowed)
    acted('torch.load reads NumPy data and argparse.Namespace')


def _history_statistic(owner: Any, name: Any) -> Callable:
    """Stands in for ``builtins.getattr`` in checkpoints: HistoryBuffer's statistics, nothing else.

    mmengine's message hub pickles ``HistoryBuffer.min`` and the like as ``getattr(HistoryBuffer,
    'min')``. Allowing the real ``getattr`` would give a file access to any attribute.
    """
    module = sys.modules.get(_HISTORY_BUFFER)
    known = module is not None and owner is module.HistoryBuffer
    if known and name in ('min', 'max', 'mean', 'current'):
        return getattr(owner, name)
    label = owner.__qualname__ if isinstance(owner, type) else type(owner).__qualname__
    raise pickle.UnpicklingError(f'it asks for the attribute {str(name)[:80]!r} of {label}')


@_repairs('history-buffer-in-checkpoints', _HISTORY_BUFFER)
def _allow_history_buffer(module: Any, acted: Callable[[str], None]) -> None:
    """Allows mmengine's log history, with the stand-in for the ``getattr`` that it pickles."""
    torch.serialization.add_safe_globals(
        [module.HistoryBuffer, (_history_statistic, 'builtins.getattr')]
    )
    acted("torch.load reads mmengine's log history")


@_repairs('unsafe-loading', 'mmengine.runner.checkpoint')
def _load_weights_only(module: Any, acted: Callable[[str], None]) -> None:
    """Makes mmengine's loaders refuse files that carry code, and say so in one line.

    mmengine leaves ``weights_only`` to torch's default, which an environment variable can reverse,
    and asks torch.hub to load URLs unsafely. onedl-mmengine allows the real ``getattr`` and falls
    back to unsafe loading after a refusal. Other code in the process is not affected.
    """

    def weights_only(load: Callable) -> Callable:
        @functools.wraps(load)
        def load_weights(file: Any, *args: Any, **kwargs: Any) -> Any:
            acted('mmengine loads with weights_only=True')
            with reading(file):
                return load(file, *args, **{**kwargs, 'weights_only': True})

        return load_weights

    module.load_url = weights_only(module.load_url)
    module.torch = _altered(torch, load=weights_only(torch.load))
    if hasattr(module, '_safe_torch_load'):
        module._safe_torch_load = module.torch.load


@contextmanager
def reading(file: Any) -> Iterator[None]:
    """Turns torch's read errors into a ``pickle.UnpicklingError`` that says why in one line."""
    name = file if isinstance(file, str | os.PathLike) else 'the checkpoint'
    try:
        yield
    except Exception as error:  # on garbage, torch raises any exception
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # a seek to nowhere
            raise
        out_of_memory = 'allocate memory|out of memory'  # of torch, mostly a RuntimeError
        if isinstance(error, MemoryError) or re.search(out_of_memory, str(error)):
            raise
        if 'deserialize object on' in str(error):  # of a missing device; torch says what to do
            raise
        raise pickle.UnpicklingError(f'{name} was not loaded: {_refusal(error)}') from error


def _refusal(error: Exception) -> str:
    """Says in one line why torch did not read a file."""
    text = str(error)
    if 'TorchScript' in text:
        return 'it carries code (TorchScript)'
    unreadable = 'Unsupported (operand|class)|persistent|magic number|invalid load key'
    if not isinstance(error, pickle.UnpicklingError) or re.search(unreadable, text):
        return 'it is no checkpoint, or is damaged'
    if found := re.search(r'it asks for .*', text):
        return f'it carries code ({found[0]})'
    found = re.search(r'GLOBAL (\S+) (was not an allowed|whose module)', text)
    return 'it carries code or objects other than weights' + (f' ({found[1]})' if found else '')


_DATA_NODES = (
    ast.Module, ast.Assign, ast.Name, ast.Load, ast.Store, ast.Constant, ast.Dict, ast.List,
    ast.Tuple, ast.Set, ast.Call, ast.keyword, ast.UnaryOp, ast.USub, ast.UAdd,
)  # fmt: skip
_DATA_CALLS = ('dict', 'list', 'tuple', 'set', 'float')


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


@_repairs('code-in-checkpoint-configs', 'mmengine.config.config')
def _read_configs_of_checkpoints_as_data(module: Any, acted: Callable[[str], None]) -> None:
    """Refuses to execute the config text that a checkpoint carries unless it is plain data.

    ``Runner.resume`` and the inferencers pass it to ``Config.fromstring``, which runs it as Python.
    """
    fromstring = module.Config.fromstring

    @functools.wraps(fromstring)
    def checked(cfg_str: str, file_format: str) -> Any:
        caller = sys._getframe(1).f_globals.get('__name__', '')
        of_checkpoint = caller.startswith(('mmengine.runner', 'mmengine.infer'))
        if of_checkpoint and file_format == '.py' and not _is_plain_data(cfg_str):
            acted('the config text of a checkpoint is not executed')
            raise pickle.UnpicklingError(
                'the checkpoint was refused: the config text it carries is code, not plain settings'
            )
        return fromstring(cfg_str, file_format)

    module.Config.fromstring = staticmethod(checked)


@_repairs('partial-checkpoints', 'mmengine.runner.checkpoint')
def _write_checkpoints_whole(module: Any, acted: Callable[[str], None]) -> None:
    """Makes mmengine write local checkpoints whole or not at all.

    It writes to the final name, so a full disk or a kill leaves a damaged file there.
    """
    get_file_backend = module.get_file_backend
    local = importlib.import_module('mmengine.fileio').LocalBackend

    class WholeFiles(local):  # type: ignore[misc, valid-type]
        def put(self, obj: bytes, filepath: Any) -> None:
            acted('checkpoints are written to a file .NAME.part, which is then renamed')
            path = os.path.realpath(filepath)
            # Always the same name: the next attempt overwrites what a kill has left.
            part = os.path.join(os.path.dirname(path), f'.{os.path.basename(path)}.part')
            try:
                os.makedirs(os.path.dirname(path), exist_ok=True)
                with open(part, 'wb') as file:
                    file.write(obj)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(part, path)
            except OSError as error:
                with suppress(OSError):
                    os.unlink(part)
                why = f'checkpoint not written ({error.strerror}), earlier ones are intact'
                raise OSError(error.errno, why, str(filepath)) from error

    @functools.wraps(get_file_backend)
    def whole(*args: Any, **kwargs: Any) -> Any:
        backend = get_file_backend(*args, **kwargs)
        return WholeFiles() if type(backend) is local else backend

    module.get_file_backend = whole


@_repairs('checkpoints-removed-early', 'mmengine.hooks.checkpoint_hook')
def _remove_checkpoints_late(module: Any, acted: Callable[[str], None]) -> None:
    """Makes ``CheckpointHook`` remove outdated checkpoints after it has written the new one.

    With ``max_keep_ckpts=1`` a kill or a full disk in between leaves none.
    """

    def removing_last(save: Callable) -> Callable:
        @functools.wraps(save)
        def save_then_remove(self: Any, *args: Any, **kwargs: Any) -> None:
            backend = self.file_backend
            outdated: list[Any] = []

            class Later:
                """The backend, but for what it is asked to remove."""

                remove = rmtree = staticmethod(outdated.append)

                def __getattr__(self, name: str) -> Any:
                    return getattr(backend, name)

            self.file_backend = Later()
            try:
                save(self, *args, **kwargs)
            finally:
                self.file_backend = backend
            best = getattr(self, 'best_ckpt_path_dict', {}).values()
            written = {self.last_ckpt, getattr(self, 'best_ckpt_path', None), *best}
            for path in set(outdated) - written:  # the new one may have the name of the old one
                acted('an outdated checkpoint is removed after the new one is written')
                (backend.rmtree if backend.isdir(path) else backend.remove)(path)

        return save_then_remove

    hook = module.CheckpointHook
    for name in ('_save_checkpoint_with_step', '_save_best_checkpoint'):
        setattr(hook, name, removing_last(getattr(hook, name)))


# --- torchvision ---------------------------------------------------------------------------------

_torchvision_library: list[torch.library.Library] = []  # schemas live as long as their library


@_repairs('torchvision-without-ops', 'torchvision.extension')
def _define_torchvision_schemas(_: ModuleType, acted: Callable[[str], None]) -> None:
    """Lets torchvision be imported where its compiled operators cannot be loaded.

    A CUDA build of torchvision beside a CPU build of torch finds no libcudart.
    ``torchvision.extension`` continues without its operators, but the next module raises
    RuntimeError because it registers functions for two that do not exist.
    """
    missing = [name for name in ('nms', 'qnms') if not hasattr(torch.ops.torchvision, name)]
    if missing:
        library = torch.library.Library('torchvision', 'FRAGMENT')
        for name in missing:
            library.define(f'{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')
        _torchvision_library.append(library)
        acted(f'described the missing operators {", ".join(missing)}')


# --- distributed runs on CPUs --------------------------------------------------------------------


@_repairs('init-dist-without-cuda', 'mmengine.dist.utils')
def _init_dist_without_cuda(module: Any, acted: Callable[[str], None]) -> None:
    """Lets process groups start on machines without an accelerator, over gloo instead of nccl."""

    def set_device(device: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.set_device(device)
        else:
            acted('init_dist uses no CUDA device, and gloo for nccl')

    def init_process_group(backend: str | None = None, *args: Any, **kwargs: Any) -> None:
        if backend == 'nccl' and not torch.cuda.is_available():
            backend = 'gloo'
        torch.distributed.init_process_group(backend, *args, **kwargs)

    module.torch = _altered(torch, cuda=_altered(torch.cuda, set_device=set_device))
    module.torch_dist = _altered(torch.distributed, init_process_group=init_process_group)


@functools.cache  # a model may be wrapped in parts
def _warn_of_reverted_norms() -> None:
    importlib.import_module('mmengine.logging').print_log(
        'SyncBN is BN here: it has no implementation for processes on CPUs, so each process '
        'normalizes with the statistics of its own images',
        logger='current',
        level=logging.WARNING,
    )


@_repairs('ddp-and-syncbn-on-cpu', 'mmengine.model.wrappers.distributed')
def _wrap_cpu_models(module: Any, acted: Callable[[str], None]) -> None:
    """Wraps models on the CPU in DDP without ``device_ids``, and with BN in place of SyncBN."""
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
                acted('a model on the CPU is wrapped as one')
            if had_sync_bn:
                _warn_of_reverted_norms()
        init(self, module, *args, **kwargs)

    wrapper.__init__ = __init__


# --- where mmengine finds packages and their configs ---------------------------------------------


def _top_level_modules(package: str) -> list[str]:
    try:
        listed = importlib.metadata.distribution(package).read_text('top_level.txt') or ''
    except importlib.metadata.PackageNotFoundError:
        listed = ''
    return listed.split()


@_repairs('pkg-resources', 'mmengine.utils.package_utils')
def _find_packages_without_pkg_resources(module: Any, acted: Callable[[str], None]) -> None:
    """Finds installed packages by importlib.metadata instead of pkg_resources.

    setuptools 82 removed pkg_resources; earlier ones warn, and mmengine reloads it in each call.
    """
    if 'pkg_resources' not in module.get_installed_path.__code__.co_names:
        return

    def get_installed_path(package: str) -> str:
        for name in (package, *_top_level_modules(package)):
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
        for name in _top_level_modules(package):
            return name
        raise ValueError(f'can not infer the module name of {package}')

    new = {
        function.__name__: function
        for function in (get_installed_path, is_installed, package2module)
    }
    old = {getattr(module, name): name for name in new}
    # Modules that were imported before hold references to the functions.
    for user in [loaded for name, loaded in sys.modules.items() if name.startswith('mmengine')]:
        for attribute, value in list(vars(user).items()):
            if isinstance(value, FunctionType) and value in old:
                setattr(user, attribute, new[old[value]])
    acted('mmengine finds packages by importlib.metadata')


@_repairs('configs-of-forks', 'mmengine.config.utils')
def _find_configs_of_forks(module: Any, acted: Callable[[str], None]) -> None:
    """Lets ``mmseg::`` in a config find a fork, which has the same module in another distribution.

    mmengine looks only for the distribution mmsegmentation, or a module of that name.
    """
    for name, package in module.MODULE2PACKAGE.items():
        if name == package or importlib.util.find_spec(name) is None:
            continue
        try:
            importlib.metadata.distribution(package)
        except importlib.metadata.PackageNotFoundError:
            module.MODULE2PACKAGE[name] = name
            acted('bases of configs are found in forks of the toolboxes')


@_repairs('configs-of-hat-mm', 'mmengine.config.utils')
def _know_configs_of_hat_mm(module: Any, acted: Callable[[str], None]) -> None:
    """Lets ``hat_mm::`` in a config name a config of this package, as ``mmdet::`` does for mmdet.

    mmengine has a fixed list of packages whose configs it finds.
    """
    module.MODULE2PACKAGE['hat_mm'] = 'hat_mm'
    acted('configs can have bases named hat_mm::')


@_repairs('scope-of-hat-mm-configs', 'mmengine.config.config')
def _keep_scope_of_hat_mm_bases(module: Any, acted: Callable[[str], None]) -> None:
    """Reads a ``hat_mm::`` base as if it were named by its path.

    mmengine marks what an external base defines with the scope of its package. Our configs define
    models and pipelines of the toolboxes, which are not registered in the scope ``hat_mm``; our own
    classes have their scope in the name (``hat_mm.FasterViT``).
    """
    get_cfg_path = module.Config._get_cfg_path

    @functools.wraps(get_cfg_path)
    def without_our_scope(cfg_path: str, filename: str) -> tuple[str, str | None]:
        path, scope = get_cfg_path(cfg_path, filename)
        if scope != 'hat_mm':
            return path, scope
        acted('bases named hat_mm:: keep the scope of the config')
        return path, None

    module.Config._get_cfg_path = staticmethod(without_our_scope)


# --- toolboxes -----------------------------------------------------------------------------------


@_repairs('numpy-in1d', 'mmpretrain.evaluation.metrics.retrieval')
def _restore_in1d(_: ModuleType, acted: Callable[[str], None]) -> None:
    """Gives NumPy >= 2.4 back the name ``in1d``, which mmpretrain's retrieval metrics call."""
    if not hasattr(np, 'in1d'):
        vars(np)['in1d'] = np.isin
        acted('numpy.in1d is numpy.isin')


@_repairs('numpy-float', 'lvis.eval')
def _restore_float(module: Any, acted: Callable[[str], None]) -> None:
    """Gives the evaluation of LVIS the name ``numpy.float``, which NumPy 1.24 removed."""
    if not hasattr(np, 'float'):
        module.np = _altered(np, float=float)
        acted('in lvis.eval numpy.float is float')


@_repairs('panoptic-without-segments', 'mmdet.visualization.local_visualizer')
def _draw_no_segments(module: Any, acted: Callable[[str], None]) -> None:
    """Has mmdet's visualizer leave a picture as it is if a panoptic prediction is empty."""
    draw = module.DetLocalVisualizer._draw_panoptic_seg

    @functools.wraps(draw)
    def draw_segments(
        self: Any, image: Any, panoptic_seg: Any, classes: Any, *args: Any, **kwargs: Any
    ) -> Any:
        names = panoptic_seg.metainfo.get('label_names')  # of models with an open vocabulary
        void = len(classes)
        if names is not None:
            void = panoptic_seg.metainfo.get('ignore_index', len(names))
        if (panoptic_seg.sem_seg == void).all():
            acted('empty panoptic predictions are not drawn')
            return image
        return draw(self, image, panoptic_seg, classes, *args, **kwargs)

    module.DetLocalVisualizer._draw_panoptic_seg = draw_segments


@_repairs('models-in-mmpretrain', 'mmpretrain.apis.model')
def _add_models_to_mmpretrain(module: Any, acted: Callable[[str], None]) -> None:
    """Adds the models of this package to mmpretrain's ``list_models`` and ``get_model``."""
    if importlib.import_module('hat_mm.zoo.models').add_to_mmpretrain(module):
        acted("mmpretrain's functions know the models of hat_mm")


# --- applying them -------------------------------------------------------------------------------


class _AfterImport(importlib.abc.MetaPathFinder):
    """Calls functions with a module that has just been imported."""

    def __init__(self) -> None:
        self.functions: dict[str, list[Callable[[ModuleType], None]]] = {}

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname not in self.functions:
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        found = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is None or spec.loader is None:
            return spec
        exec_module = spec.loader.exec_module

        def exec_and_call(module: ModuleType) -> None:
            exec_module(module)
            for function in self.functions[fullname]:
                function(module)

        # The loader itself stays, so that inspect and importlib.resources keep working.
        vars(spec.loader)['exec_module'] = exec_and_call
        return spec


_finder = _AfterImport()


def _switched_off() -> set[str]:
    """Names of the repairs that ``HAT_MM_NO_COMPAT`` turns off."""
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
    """Applies all repairs, now or when their module is imported; a second call does nothing.

    Raises:
        DependencyError: torch is older than 2.6, and its loading cannot be made safe.
    """
    if _finder in sys.meta_path:
        return
    off = _switched_off()
    wanted = [breakage for breakage in BREAKAGES if breakage.name not in off]
    if not wanted:
        return
    _check_torch()
    sys.meta_path.insert(0, _finder)
    for breakage in wanted:
        repair = functools.partial(breakage.repair, acted=functools.partial(_acted, breakage.name))
        if breakage.module is None:
            repair(None)
            continue
        _finder.functions.setdefault(breakage.module, []).append(repair)
        if breakage.module in sys.modules:
            repair(sys.modules[breakage.module])
