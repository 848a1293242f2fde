"""What ``tools/train.py`` and ``tools/test.py`` do, for configs of mmdet, mmseg and mmpretrain.

The config's ``default_scope`` decides the toolbox; :data:`TOOLBOXES` holds what the toolboxes' own
tools do differently. An error that the user can fix is a :class:`UserError`, shown as one line
without a traceback. So are missing packages, missing files and refused checkpoints. Other
exceptions keep their traceback.
"""

import argparse
import copy
import errno
import functools
import importlib
import os
import pickle
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import hat_mm
from hat_mm import compat, configs
from hat_mm.configs import innermost_dataset
from hat_mm.layers import Deployable
from hat_mm.weights.sharded import is_sharded
from hat_mm_runtime import ENDS, ModelError, PictureError

from .allocator import tune_allocator


class UserError(Exception):
    """An error that the user can fix; shown as one line.

    Args:
        message: What is wrong, with the value and the choices.
        status: Exit status, 2 for a wrong command line.
    """

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


# --- what the toolboxes' tools do differently ------------------------------------------------


@dataclass(frozen=True)
class Toolbox:
    """What the tools' flags mean in one toolbox.

    Attributes:
        show: Setting that turns the visualization hook on, for ``--show`` and ``--show-dir``.
        show_dir: Setting of that hook for the folder; None if it is the visualizer's ``save_dir``.
        dump: Metric that writes ``--out`` as a pickle of predictions; None if ``--out`` is the
            folder for the prediction files that the toolbox's metric writes.
        tta_model: Default of ``tta_model``; None if the config must have one.
        tta_pack: Last transform of the default ``tta_pipeline``; None keeps that of the test
            pipeline.
        loader_defaults: Whether dataloaders get pinned memory, persistent workers and
            ``default_collate`` if the config does not set them.
    """

    show: str = 'draw'
    show_dir: str | None = None
    dump: str | None = 'mmengine.DumpResults'
    tta_model: dict | None = None
    tta_pack: dict | None = None
    loader_defaults: bool = False


TOOLBOXES = {
    'mmdet': Toolbox(
        show_dir='test_out_dir',
        dump='mmdet.DumpDetResults',
        tta_model=dict(
            type='DetTTAModel',  # mmdet registers it in mmengine's scope
            tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100),
        ),
        tta_pack=dict(type='PackDetInputs'),  # its default keeps the flip of an image
    ),
    'mmseg': Toolbox(dump=None),
    'mmpretrain': Toolbox(
        show='enable',
        show_dir='out_dir',
        tta_model=dict(type='mmpretrain.AverageClsScoreTTA'),
        loader_defaults=True,
    ),
}


# --- command lines -------------------------------------------------------------------------------


def key_value(text: str) -> str:
    """Refuses anything but ``KEY=VALUE``, which mmengine's action parses."""
    key, equals, _ = text.partition('=')
    if not (key and equals):
        raise argparse.ArgumentTypeError(f'expected KEY=VALUE, got {text!r}')
    return text


def _parser(prog: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description=description)
    parser.add_argument('config', help='config file of mmdet, mmseg or mmpretrain')
    parser.add_argument('--work-dir', help='folder for logs, checkpoints and metrics')
    add_cfg_options(parser)
    launchers = ['none', 'pytorch', 'slurm', 'mpi']
    parser.add_argument('--launcher', choices=launchers, default='none', help='job launcher')
    # torch.distributed.launch passes --local-rank since torch 2.0, --local_rank before.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)
    return parser


def add_cfg_options(parser: argparse.ArgumentParser) -> None:
    """Adds OpenMMLab's ``--cfg-options`` to a command line."""
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        type=key_value,
        action=compat.require('mmengine').DictAction,
        default={},
        metavar='KEY=VALUE',
        help='override settings of the config; lists and tuples as KEY="[a,b]" or KEY=a,b, nested '
        'ones as KEY="[(a,b),(c,d)]", without white space',
    )


def train_parser() -> argparse.ArgumentParser:
    """The command line of ``tools/train.py``."""
    parser = _parser('train.py', 'Train a model.')
    flag = functools.partial(parser.add_argument, action='store_true')
    flag('--amp', help='train with automatic mixed precision (needs a GPU)')
    flag(
        '--auto-scale-lr',
        help='scale the learning rate with the batch size, by auto_scale_lr of the config',
    )
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='CHECKPOINT',
        help='resume from this checkpoint; without one, from the latest in the work dir',
    )
    return parser


def test_parser() -> argparse.ArgumentParser:
    """The command line of ``tools/test.py``."""
    parser = _parser('test.py', 'Test (and evaluate) a model.')
    parser.add_argument('checkpoint', help='checkpoint file or URL, or an exported .onnx or .xml')
    option = parser.add_argument
    flag = functools.partial(option, action='store_true')
    option('--out', help='pickle file for the predictions; mmseg: folder for the prediction maps')
    items = ['metrics', 'pred']
    option('--out-item', choices=items, help='mmpretrain: what --out holds (default: pred)')
    flag('--show', help='show predictions in a window')
    option('--show-dir', help='folder for painted images')
    option('--wait-time', type=float, default=2, help='seconds that --show shows an image')
    flag('--tta', help='test time augmentation')
    flag('--deploy', help='fold what only training needs: faster, the same predictions')
    return parser


# --- configs -------------------------------------------------------------------------------------


def read_config(path: str, options: dict[str, Any] | None = None, scope: bool = True) -> Any:
    """Reads a config and imports its toolbox.

    Args:
        path: The config file.
        options: Settings that override the config's, by dotted name.
        scope: Whether the config must name its toolbox as ``default_scope``.

    Raises:
        UserError: The file is missing or broken, an option does not fit, or the config has no model
            or scope.
    """
    if not os.path.isfile(path):
        raise UserError(f'config file {path!r} does not exist')
    try:
        cfg = configs.read(path)
    except (OSError, SyntaxError) as error:  # in a base, too
        raise UserError(f'config {path!r} cannot be read: {error}') from error
    try:
        cfg.merge_from_dict(options or {})
    except (TypeError, LookupError) as error:
        raise UserError(f'--cfg-options do not fit the config: {error}', status=2) from error
    for key in ('model', 'default_scope')[: 1 + scope]:
        if cfg.get(key) is None:
            raise UserError(f'config {path!r} has no {key!r}')
    if scope:
        compat.require(cfg.default_scope)
    importlib.import_module('hat_mm.registry')
    return cfg


def _load_config(args: argparse.Namespace) -> tuple[Any, Toolbox]:
    """Reads the config with the command line's options; checks toolbox and work dir."""
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    cfg = read_config(args.config, args.cfg_options)
    cfg.launcher = args.launcher
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = os.path.join('./work_dirs', Path(args.config).stem)
    make_writable(cfg.work_dir, 'work dir')
    toolbox = TOOLBOXES.get(cfg.default_scope, Toolbox())
    if toolbox.loader_defaults:
        _set_loader_defaults(cfg)
    return cfg, toolbox


def make_writable(folder: str, name: str) -> None:
    """Creates a folder and tries to write into it, before hours of work depend on it."""
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f'cannot write to {name} {folder!r}: {error.strerror}') from error


def _check_checkpoint(path: str, cfg: Any) -> None:
    if is_sharded(path):
        if not str(cfg.get('runner_type')).endswith('FSDP2Runner'):
            raise UserError(
                f'{path!r} is the folder of a sharded training: runner_type=hat_mm.FSDP2Runner '
                'loads it, and tools/model_converters/publish_model.py makes a file of its weights'
            )
    elif '://' not in path and not os.path.isfile(os.path.expanduser(path)):
        raise UserError(f'checkpoint {path!r} does not exist')


def _set_loader_defaults(cfg: Any) -> None:
    for name in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        loader = cfg.get(name)
        if loader is None:
            continue
        loader.setdefault('pin_memory', torch.cuda.is_available())
        loader.setdefault('persistent_workers', loader.get('num_workers', 0) > 0)
        loader.setdefault('collate_fn', dict(type='default_collate'))


def _set_amp(cfg: Any) -> None:
    if importlib.import_module('mmengine.device').get_device() == 'cpu':
        raise UserError('--amp needs a GPU: mmengine has no mixed precision training on the CPU')
    kind = cfg.optim_wrapper.get('type', 'OptimWrapper')
    if kind not in ('OptimWrapper', 'AmpOptimWrapper'):
        raise UserError(
            f"--amp needs optim_wrapper.type='OptimWrapper', but the config has {kind!r}"
        )
    cfg.optim_wrapper.type = 'AmpOptimWrapper'
    cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')


def _set_show(cfg: Any, toolbox: Toolbox, args: argparse.Namespace) -> None:
    hook = cfg.get('default_hooks', {}).get('visualization')
    if hook is None:
        raise UserError(
            "--show and --show-dir need a visualization hook in the config's default_hooks, such "
            "as visualization=dict(type='DetVisualizationHook')"
        )
    hook[toolbox.show] = True
    if args.show:
        hook.update(show=True, wait_time=args.wait_time)
    if args.show_dir and toolbox.show_dir is not None:
        hook[toolbox.show_dir] = args.show_dir
    elif args.show_dir:
        cfg.visualizer.save_dir = args.show_dir


def _set_tta(cfg: Any, toolbox: Toolbox) -> None:
    """Wraps the model for test time augmentation; if the config has no pipeline, flips images."""
    if toolbox.tta_model is None and None in (cfg.get('tta_model'), cfg.get('tta_pipeline')):
        raise UserError('--tta needs tta_model and tta_pipeline in the config')
    dataset = innermost_dataset(cfg.test_dataloader)
    if cfg.get('tta_pipeline') is None:
        pipeline = copy.deepcopy(dataset.pipeline)
        flips = [dict(type='RandomFlip', prob=1.0), dict(type='RandomFlip', prob=0.0)]
        pack = toolbox.tta_pack or pipeline[-1]
        pipeline[-1] = dict(type='TestTimeAug', transforms=[flips, [pack]])
        cfg.tta_pipeline = pipeline
    dataset.pipeline = cfg.tta_pipeline
    tta_model: Any = cfg.get('tta_model') or toolbox.tta_model
    cfg.model = dict(tta_model, module=cfg.model)


def _drop_averaging(cfg: Any) -> None:
    """Removes EMAHook if the model is not the one that it averaged.

    A checkpoint holds the averaged weights as the model's own anyway. mmpretrain's hook with
    ``evaluate_on_ema=False`` would test the unaveraged weights, so these are loaded instead.
    """
    hooks = []
    for hook in cfg.get('custom_hooks') or []:
        if getattr(hook.type, '__name__', hook.type).rpartition('.')[2] != 'EMAHook':
            hooks.append(hook)
        elif not hook.get('evaluate_on_ema', True):
            hooks.append(dict(type='hat_mm.UnaveragedWeightsHook'))
    cfg.custom_hooks = hooks


def _set_out(cfg: Any, toolbox: Toolbox, args: argparse.Namespace) -> None:
    """Checks ``--out``; for toolboxes whose metrics write their own files, sets their folder."""
    if args.out_item == 'metrics':
        if not args.out.endswith(('.json', '.yaml', '.yml', '.pkl', '.pickle')):
            raise UserError(
                f'--out must end with .json, .yaml or .pkl for metrics, got {args.out!r}', status=2
            )
    elif toolbox.dump is None:
        metrics = cfg.test_evaluator
        for metric in metrics if isinstance(metrics, list) else [metrics]:
            metric.update(output_dir=args.out, keep_results=True)
        make_writable(args.out, '--out folder')
        return
    elif not args.out.endswith(('.pkl', '.pickle')):
        raise UserError(f'--out must end with .pkl or .pickle, got {args.out!r}', status=2)
    make_writable(os.path.dirname(args.out) or '.', 'the folder of --out')


# --- the tools -----------------------------------------------------------------------------------


def set_memory_format(model: torch.nn.Module) -> None:
    """Makes FasterViT compute in channels last on a CPU, where its convolutions are then faster.

    Its outputs stay contiguous. Those of necks and heads would not, but mmcv's RoI operators read
    any memory as if it were contiguous. HAT-Net computes in channels last by itself.
    """
    for module in model.modules():
        if isinstance(module, hat_mm.FasterViT) and next(module.parameters()).device.type == 'cpu':
            module.to(memory_format=torch.channels_last)


def maps_warnings(cfg: Any, model: Any) -> list[str]:
    """Checks that the maps of a backbone of hat_mm suit the heads; returns warnings."""
    # FlexibleRunner has a config until it runs; sharded parts cannot run one by one.
    if not cfg.get('check_maps', True) or not isinstance(model, torch.nn.Module):
        return []
    if any('FullySharded' in type(module).__name__ for module in model.modules()):
        return []
    try:
        return importlib.import_module('hat_mm.engine.maps').check_maps(model)
    except UserError:
        raise
    except Exception as error:  # of a neck that takes more than maps, for example
        text = f'{type(error).__name__}: {error}'
        return [f'the strides of the maps were not checked (check_maps=False skips it): {text}']


def _accumulated(cfg: Any) -> int:
    """Number of forward passes per optimizer step."""
    return (cfg.get('optim_wrapper') or {}).get('accumulative_counts', 1)


def _check_learning_rate(cfg: Any, runner: Any) -> None:
    """Warns of a learning rate that is meant for another number of images per step."""
    scaling, loader = cfg.get('auto_scale_lr') or {}, cfg.get('train_dataloader') or {}
    base, images = scaling.get('base_batch_size'), loader.get('batch_size')
    steps = _accumulated(cfg)
    if scaling.get('enable') or None in (base, images):
        return
    found = runner.world_size * images * steps
    if found != base:
        runner.logger.warning(
            f'the learning rate is meant for {base} images a step, this run takes {found} '
            f'({runner.world_size} process(es) x {images} images x {steps} accumulated): '
            '--auto-scale-lr scales it unless images are accumulated, '
            'optim_wrapper.optimizer.lr sets it, train_dataloader.batch_size changes the images'
        )


def _run(run: Callable[[], Any], loader: Any) -> Any:
    """Calls ``run``; if a file is missing because its data folder is, the error says so."""
    try:
        return run()
    except FileNotFoundError as error:
        root = innermost_dataset(loader).get('data_root') if loader else None
        if not root or os.path.isdir(root):
            raise
        raise UserError(
            f'data folder {root!r} does not exist (docs/datasets.md says what belongs there and '
            f'how to point data_root to another folder): {error}'
        ) from error


def _fileio() -> ModuleType:
    return importlib.import_module('hat_mm.weights.fileio')


def _find_latest(cfg: Any) -> str:
    """Sets ``load_from`` to the newest checkpoint of the work dir that is whole.

    Returns:
        What is wrong with a newer one, or nothing.

    Raises:
        UserError: The work dir has checkpoints, none of which is whole.
    """
    path, problem = _fileio().latest_whole(cfg.work_dir)
    if path is None and problem:
        raise UserError(
            f'{problem}; no checkpoint in {cfg.work_dir!r} is whole: train without --resume'
        )
    cfg.load_from = None if path is None else str(path)
    return problem


def train(argv: Sequence[str] | None = None) -> None:
    """Trains as ``tools/train.py`` does.

    Args:
        argv: Arguments of the command line, by default the process's.

    Raises:
        UserError: The user can fix the error.
    """
    args = train_parser().parse_args(argv)
    cfg, _ = _load_config(args)
    if args.amp:
        _set_amp(cfg)
    scaling = cfg.get('auto_scale_lr') or {}
    if args.auto_scale_lr:
        if not {'enable', 'base_batch_size'} <= set(scaling):
            raise UserError(
                '--auto-scale-lr needs auto_scale_lr=dict(enable=…, base_batch_size=…) in the '
                'config'
            )
        scaling['enable'] = True
    if scaling.get('enable') and _accumulated(cfg) != 1:
        raise UserError(
            '--auto-scale-lr (auto_scale_lr.enable) does not count '
            f'optim_wrapper.accumulative_counts={_accumulated(cfg)}: use one of them, and where '
            'both are needed set optim_wrapper.optimizer.lr by hand'
        )
    if args.resume is not None:
        cfg.resume = True
        cfg.load_from = None if args.resume == 'auto' else args.resume
    problem = ''
    if cfg.get('load_from') is not None:
        _check_checkpoint(cfg.load_from, cfg)
    elif cfg.get('resume'):
        problem = _find_latest(cfg)
    runner = compat.require('mmengine.registry').RUNNERS.build(cfg)
    # mmengine does not log these versions; tools/misc/make_metafile_entry.py reads the line.
    modules = [hat_mm, *map(importlib.import_module, sorted({'mmcv', cfg.default_scope}))]
    versions = ', '.join(f'{module.__name__} {module.__version__}' for module in modules)
    runner.logger.info(f'Software: {versions}')
    _check_learning_rate(cfg, runner)
    for warning in maps_warnings(cfg, runner.model):
        runner.logger.warning(warning)
    if problem:
        runner.logger.warning(f'{problem}; resuming from {cfg.load_from}')
    try:
        _run(runner.train, cfg.get('train_dataloader'))
    except pickle.UnpicklingError as error:
        if not cfg.get('resume') or str(cfg.load_from) not in str(error):
            raise
        whole = next(_fileio().whole_checkpoints(Path(cfg.load_from).parent), None)
        raise UserError(f'{error}; {whole or "no other"} beside it is whole') from error


def test(argv: Sequence[str] | None = None) -> dict:
    """Tests as ``tools/test.py`` does.

    Args:
        argv: Arguments of the command line, by default the process's.

    Returns:
        The metrics by name.

    Raises:
        UserError: The user can fix the error.
    """
    parser = test_parser()
    args = parser.parse_args(argv)
    if args.out_item is not None and args.out is None:
        parser.error('--out-item needs --out')
    cfg, toolbox = _load_config(args)
    _check_checkpoint(args.checkpoint, cfg)
    cfg.load_from = args.checkpoint
    cfg.resume = False
    if args.checkpoint.endswith(ENDS):
        if args.deploy:
            raise UserError('--deploy is for checkpoints; an exported file is in deploy form')
        cfg.load_from = None
        cfg.model = dict(type='hat_mm.ExportedModel', module=cfg.model, file=args.checkpoint)
        _drop_averaging(cfg)
    if args.show or args.show_dir:
        _set_show(cfg, toolbox, args)
    if args.out is not None:
        _set_out(cfg, toolbox, args)
    if args.tta:
        _set_tta(cfg, toolbox)
    if args.tta or args.deploy:
        _drop_averaging(cfg)
    runner = compat.require('mmengine.registry').RUNNERS.build(cfg)
    if isinstance(runner.model, torch.nn.Module):  # FlexibleRunner has a config until it runs
        set_memory_format(runner.model)
    for warning in maps_warnings(cfg, runner.model):
        runner.logger.warning(warning)
    if args.deploy:
        if not isinstance(runner.model, torch.nn.Module):
            raise UserError(f'--deploy does not work with {type(runner).__name__}')
        if not any(isinstance(module, Deployable) for module in runner.model.modules()):
            raise UserError('--deploy: the model has no backbone or plugin of hat_mm')
        runner.register_hook(hat_mm.SwitchToDeployHook())
    if args.out is not None and toolbox.dump is not None and args.out_item != 'metrics':
        dump = dict(type=toolbox.dump, out_file_path=args.out)
        metrics = compat.require('mmengine.registry').METRICS
        runner.test_evaluator.metrics.append(metrics.build(dump))
    results = _run(runner.test, cfg.test_dataloader)
    if args.out_item == 'metrics':
        compat.require('mmengine').dump(results, args.out)
    return results


def explain(error: Exception) -> str | None:
    """Describes in one line an error that the user can fix; None for any other error."""
    text = str(error).strip()
    from_worker = text.startswith('Caught ')  # torch adds the traceback of the worker
    if from_worker:
        text = text.splitlines()[-1].partition(': ')[2]
    text = ' '.join(text.split())
    known = isinstance(
        error,
        UserError | ModelError | PictureError | compat.DependencyError | pickle.UnpicklingError,
    )
    if known and not from_worker:
        return text
    if isinstance(error, AssertionError) and text.startswith('failed to load image'):  # mmcv
        return f'{text} (it is no image, or is damaged; hat_mm.LoadImageOrSkip leaves it out)'
    if isinstance(error, OSError):
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
        named = error.filename is not None or re.fullmatch(r"\[Errno .*'", text)
        return text if full or named else None
    if from_worker:
        return None
    return _explain_end_of_process(text) if isinstance(error, RuntimeError) else None


def _explain_end_of_process(text: str) -> str | None:
    """Explains what torch says when a process of the run is gone."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if re.match(r'DataLoader worker \(pid.*\) (exited|is killed)', text):
        what = 'a process that loads data has died'
        if re.search('exited unexpectedly|signal: Killed', text):
            what += ', most often for lack of memory (fewer train_dataloader.num_workers take less)'
    elif distributed and re.search(
        r'gloo/transport/.*(closed|reset) by peer|ncclRemoteError|NCCL.*remote process exited', text
    ):
        what = 'another process of this training has ended; its own message says why'
    else:
        return None
    return f'{what}: {text}; --resume continues from the last checkpoint'


def run_tool(tool: Callable[[], Any], name: str) -> int:
    """Runs a tool and returns its exit status.

    Without a GPU the process keeps the memory that it frees, see :func:`hat_mm.tune_allocator`;
    nothing large may be allocated before this call.

    Errors that :func:`explain` can explain are printed to stderr as one line; others propagate.

    Args:
        tool: Called without arguments.
        name: Name of the tool, with which the line starts.

    Returns:
        0 for success, 1 for an explained error, 2 for a wrong command line.
    """
    if not torch.cuda.is_available():
        tune_allocator()
    try:
        tool()
    except Exception as error:
        line = explain(error)
        if line is None:
            raise
        print(f'{name}: error: {line}', file=sys.stderr)
        return error.status if isinstance(error, UserError) else 1
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return 0
