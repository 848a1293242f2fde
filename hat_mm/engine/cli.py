"""What ``tools/train.py`` and ``tools/test.py`` do, for configs of mmdet, mmseg and mmpretrain.

The config's ``default_scope`` decides the toolbox; what its own tools do differently stands in
:data:`TOOLBOXES`. Errors of the user end in one line and a non-zero exit status, bugs in a
traceback.
"""

import argparse
import copy
import difflib
import dis
import importlib
import os
import pickle
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import hat_mm
from hat_mm import compat

from .allocator import tune_allocator

__all__ = [
    'TOOLBOXES',
    'Toolbox',
    'UserError',
    'run_tool',
    'test',
    'test_parser',
    'train',
    'train_parser',
]


class UserError(Exception):
    """Something the user can put right; shown as one line.

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
    """The meaning of the tools' flags in one toolbox.

    Attributes:
        show: Settings of the visualization hook for ``--show``/``--show-dir``, from the arguments;
            None if the toolbox has no such hook.
        show_dir_of_visualizer: Whether ``--show-dir`` is the visualizer's ``save_dir``.
        dump: Metric that writes ``--out`` as a pickle of predictions; None if ``--out`` is the
            folder of the metric's own prediction files.
        tta_model: Default of ``tta_model``; None if the config must have one.
        tta_pack: Type and arguments of the last transform of the default ``tta_pipeline``; None
            keeps the last one of the test pipeline.
        loader_defaults: Whether dataloaders get pinned memory, persistent workers and
            ``default_collate`` where the config is silent.
    """

    show: Callable[[argparse.Namespace], dict] | None = None
    show_dir_of_visualizer: bool = False
    dump: str | None = 'mmengine.DumpResults'
    tta_model: dict | None = None
    tta_pack: dict | None = None
    loader_defaults: bool = False


def _show_mmdet(args: argparse.Namespace) -> dict:
    hook: dict[str, Any] = dict(draw=True)
    if args.show:
        hook.update(show=True, wait_time=args.wait_time)
    if args.show_dir:
        hook.update(test_out_dir=args.show_dir)
    return hook


def _show_mmseg(args: argparse.Namespace) -> dict:
    return dict(draw=True, **(dict(show=True, wait_time=args.wait_time) if args.show else {}))


def _show_mmpretrain(args: argparse.Namespace) -> dict:
    return dict(enable=True, show=args.show, wait_time=args.wait_time, out_dir=args.show_dir)


TOOLBOXES = {
    'mmdet': Toolbox(
        show=_show_mmdet,
        dump='mmdet.DumpDetResults',
        tta_model=dict(
            type='DetTTAModel',  # mmdet registers it in mmengine's scope
            tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100),
        ),
        tta_pack=dict(
            type='PackDetInputs',
            meta_keys=(
                'img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor', 'flip',
                'flip_direction',
            ),
        ),
    ),
    'mmseg': Toolbox(show=_show_mmseg, show_dir_of_visualizer=True, dump=None),
    'mmpretrain': Toolbox(
        show=_show_mmpretrain,
        tta_model=dict(type='mmpretrain.AverageClsScoreTTA'),
        loader_defaults=True,
    ),
}  # fmt: skip


# --- command lines -------------------------------------------------------------------------------


def _parser(prog: str, description: str) -> argparse.ArgumentParser:
    dict_action = compat.require('mmengine').DictAction

    class KeyValues(dict_action):
        """``KEY=VALUE`` pairs, a wrong one being an error of the command line."""

        def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
            for pair in values:
                if not pair.partition('=')[0] or '=' not in pair:
                    raise argparse.ArgumentError(self, f'expected KEY=VALUE, got {pair!r}')
            try:
                super().__call__(parser, namespace, values, option)
            except AssertionError as error:
                raise argparse.ArgumentError(self, str(error)) from error

    parser = argparse.ArgumentParser(prog=prog, description=description)
    parser.add_argument('config', help='config file of mmdet, mmseg or mmpretrain')
    parser.add_argument('--work-dir', help='folder for logs, checkpoints and metrics')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=KeyValues,
        metavar='KEY=VALUE',
        help='override settings of the config; lists and tuples as KEY="[a,b]" or KEY=a,b, nested '
        'ones as KEY="[(a,b),(c,d)]", without white space',
    )
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='job launcher',
    )
    # torch.distributed.launch passes --local-rank since torch 2.0 and --local_rank before.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)
    return parser


def train_parser() -> argparse.ArgumentParser:
    """The command line of ``tools/train.py``."""
    parser = _parser('train.py', 'Train a model.')
    parser.add_argument(
        '--amp', action='store_true', help='train with automatic mixed precision (needs a GPU)'
    )
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
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
    parser.add_argument('checkpoint', help='checkpoint file or URL')
    parser.add_argument(
        '--out',
        help='mmdet, mmpretrain: pickle file for the predictions; mmseg: folder for the prediction '
        'maps',
    )
    parser.add_argument(
        '--out-item',
        choices=['metrics', 'pred'],
        help='mmpretrain: what --out holds (default: pred)',
    )
    parser.add_argument('--show', action='store_true', help='show predictions in a window')
    parser.add_argument('--show-dir', help='folder for painted images')
    parser.add_argument(
        '--wait-time', type=float, default=2, help='seconds that --show shows an image'
    )
    parser.add_argument('--tta', action='store_true', help='test time augmentation')
    parser.add_argument(
        '--deploy',
        action='store_true',
        help='fold what the backbone needs for training alone: faster, the same predictions',
    )
    return parser


# --- configs -------------------------------------------------------------------------------------


def _load_config(args: argparse.Namespace) -> Any:
    """Read the config with the options of the command line; check toolbox and work dir."""
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    if not os.path.isfile(args.config):
        raise UserError(f'config file {args.config!r} does not exist')
    try:
        cfg = compat.require('mmengine').Config.fromfile(args.config)
    except Exception as error:
        raise UserError(
            f'config {args.config!r} cannot be read: {type(error).__name__}: {_text(error)}'
        ) from error
    try:
        cfg.merge_from_dict(args.cfg_options or {})
    except Exception as error:
        raise UserError(f'--cfg-options do not fit the config: {_text(error)}', 2) from error
    for key in ('model', 'default_scope'):
        if cfg.get(key) is None:
            raise UserError(f'config {args.config!r} has no {key!r}')
    compat.require(cfg.default_scope)
    importlib.import_module('hat_mm.registry')
    cfg.launcher = args.launcher
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = os.path.join('./work_dirs', Path(args.config).stem)
    _make_writable(cfg.work_dir, 'work dir')
    return cfg


def _make_writable(folder: str, name: str) -> None:
    """Create a folder and try to write into it, before hours of work depend on it."""
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f'cannot write to {name} {folder!r}: {error.strerror}') from error


def _innermost_dataset(loader: Any) -> Any:
    dataset = loader.dataset
    while 'dataset' in dataset:
        dataset = dataset.dataset
    return dataset


def _set_amp(cfg: Any) -> None:
    if importlib.import_module('mmengine.device').get_device() == 'cpu':
        raise UserError('--amp needs a GPU: mmengine has no mixed precision training on the CPU')
    wrapper = cfg.optim_wrapper
    kind = wrapper.get('type', 'OptimWrapper')
    if kind not in ('OptimWrapper', 'AmpOptimWrapper'):
        raise UserError(
            f"--amp needs optim_wrapper.type='OptimWrapper', but the config has {kind!r}"
        )
    wrapper.type = 'AmpOptimWrapper'
    wrapper.setdefault('loss_scale', 'dynamic')


def _set_loader_defaults(cfg: Any) -> None:
    for name in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        loader = cfg.get(name)
        if loader is None:
            continue
        loader.setdefault('pin_memory', torch.cuda.is_available())
        loader.setdefault('persistent_workers', loader.get('num_workers', 0) > 0)
        loader.setdefault('collate_fn', dict(type='default_collate'))


def _set_show(cfg: Any, toolbox: Toolbox, args: argparse.Namespace) -> None:
    hook = cfg.get('default_hooks', {}).get('visualization')
    if toolbox.show is None or hook is None:
        raise UserError(
            "--show and --show-dir need a visualization hook in the config's default_hooks, such "
            "as visualization=dict(type='DetVisualizationHook')"
        )
    hook.update(toolbox.show(args))
    if toolbox.show_dir_of_visualizer and args.show_dir:
        cfg.visualizer.save_dir = args.show_dir


def _set_tta(cfg: Any, toolbox: Toolbox) -> None:
    """Wrap the model for test time augmentation; where the toolbox has a default, flip images."""
    dataset = _innermost_dataset(cfg.test_dataloader)
    if cfg.get('tta_model') is None:
        if toolbox.tta_model is None:
            raise UserError('--tta needs tta_model and tta_pipeline in the config')
        cfg.tta_model = toolbox.tta_model
    if cfg.get('tta_pipeline') is None:
        if toolbox.tta_model is None:
            raise UserError('--tta needs tta_pipeline in the config')
        pipeline = copy.deepcopy(dataset.pipeline)
        flips = [dict(type='RandomFlip', prob=1.0), dict(type='RandomFlip', prob=0.0)]
        pack = toolbox.tta_pack or pipeline[-1]
        pipeline[-1] = dict(type='TestTimeAug', transforms=[flips, [pack]])
        cfg.tta_pipeline = pipeline
    dataset.pipeline = cfg.tta_pipeline
    cfg.model = dict(cfg.tta_model, module=cfg.model)
    _drop_averaging(cfg)


def _drop_averaging(cfg: Any) -> None:
    """Do without EMAHook where the model is not the one that it averaged.

    A checkpoint holds the averaged weights as the model's own anyway. mmpretrain's hook with
    ``evaluate_on_ema=False`` would test the others, so they are loaded instead.
    """
    hooks = []
    for hook in cfg.get('custom_hooks') or []:
        if getattr(hook.type, '__name__', hook.type).rpartition('.')[2] != 'EMAHook':
            hooks.append(hook)
        elif not hook.get('evaluate_on_ema', True):
            hooks.append(dict(type='hat_mm.UnaveragedWeightsHook'))
    cfg.custom_hooks = hooks


def _set_out(cfg: Any, toolbox: Toolbox, args: argparse.Namespace) -> None:
    """Check ``--out``, and for toolboxes whose metrics write their own files set their folder."""
    if toolbox.dump is None:
        metrics = (
            cfg.test_evaluator if isinstance(cfg.test_evaluator, list) else [cfg.test_evaluator]
        )
        for metric in metrics:
            metric.update(output_dir=args.out, keep_results=True)
        _make_writable(args.out, '--out folder')
        return
    if args.out_item != 'metrics' and not args.out.endswith(('.pkl', '.pickle')):
        raise UserError(f'--out must end with .pkl or .pickle, got {args.out!r}', 2)
    _make_writable(os.path.dirname(args.out) or '.', 'the folder of --out')


def _is_local(checkpoint: str) -> bool:
    return '://' not in checkpoint


def _check_checkpoint(path: str, flag: str) -> None:
    if _is_local(path) and not os.path.isfile(os.path.expanduser(path)):
        raise UserError(f'{flag} {path!r} does not exist')


# --- the tools -----------------------------------------------------------------------------------


def _build_runner(cfg: Any) -> Any:
    if 'runner_type' in cfg:
        return importlib.import_module('mmengine.registry').RUNNERS.build(cfg)
    return importlib.import_module('mmengine.runner').Runner.from_cfg(cfg)


def _set_deploy(runner: Any) -> None:
    layers = importlib.import_module('hat_mm.layers')
    if not any(isinstance(module, layers.Deployable) for module in runner.model.modules()):
        raise UserError('--deploy: the model has no backbone or plugin of hat_mm')
    runner.register_hook(importlib.import_module('hat_mm.engine.hooks').SwitchToDeployHook())


def _set_memory_format(model: torch.nn.Module) -> None:
    """Have FasterViT compute channels last on a CPU, where its convolutions are faster so.

    Its outputs stay contiguous. Those of necks and heads would not, and mmcv's RoI operators read
    any memory as if it were. HAT-Net computes channels last by itself.
    """
    backbone = importlib.import_module('hat_mm.backbones').FasterViT
    for module in model.modules():
        if isinstance(module, backbone) and next(module.parameters()).device.type == 'cpu':
            module.to(memory_format=torch.channels_last)


def _accumulated(cfg: Any) -> int:
    """Forward passes of a step."""
    return (cfg.get('optim_wrapper') or {}).get('accumulative_counts', 1)


def _check_scaling(cfg: Any) -> None:
    scaling = cfg.get('auto_scale_lr') or {}
    if scaling.get('enable') and _accumulated(cfg) != 1:
        raise UserError(
            '--auto-scale-lr (auto_scale_lr.enable) does not count '
            f'optim_wrapper.accumulative_counts={_accumulated(cfg)}: use one of them, and where '
            'both are needed set optim_wrapper.optimizer.lr by hand'
        )


def _batch_warning(cfg: Any, processes: int) -> str | None:
    """What to say of a learning rate that is meant for another number of images a step."""
    scaling = cfg.get('auto_scale_lr') or {}
    base, loader = scaling.get('base_batch_size'), cfg.get('train_dataloader')
    if not base or scaling.get('enable') or not isinstance(loader, dict):
        return None
    images, steps = loader.get('batch_size'), _accumulated(cfg)
    if images is None or processes * images * steps == base:
        return None
    accumulated = f' x {steps} accumulated' if steps != 1 else ''
    scale = '' if steps != 1 else '--auto-scale-lr scales it, '
    return (
        f'the learning rate is meant for {base} images a step, this run takes '
        f'{processes * images * steps} ({processes} process{"es" * (processes != 1)} x {images} '
        f'images{accumulated}): {scale}optim_wrapper.optimizer.lr sets it, '
        'train_dataloader.batch_size changes the number of images'
    )


def _versions(scope: str) -> str:
    """Versions that mmengine's log leaves out; tools/misc/make_metafile_entry.py reads the line."""
    names = [name for name in ('mmcv', scope) if name != 'mmengine']
    modules = [hat_mm, *(importlib.import_module(name) for name in names)]
    return ', '.join(f'{module.__name__} {module.__version__}' for module in modules)


def train(argv: Sequence[str] | None = None) -> None:
    """Train as ``tools/train.py`` does.

    Args:
        argv: Arguments of the command line, by default the process's.

    Raises:
        UserError: For whatever the user can put right; see :func:`run_tool` for the rest.
    """
    args = train_parser().parse_args(argv)
    cfg = _load_config(args)
    toolbox = TOOLBOXES.get(cfg.default_scope, Toolbox())
    if toolbox.loader_defaults:
        _set_loader_defaults(cfg)
    if args.amp:
        _set_amp(cfg)
    if args.auto_scale_lr:
        if not {'enable', 'base_batch_size'} <= set(cfg.get('auto_scale_lr') or ()):
            raise UserError(
                '--auto-scale-lr needs auto_scale_lr=dict(enable=…, base_batch_size=…) in the '
                'config'
            )
        cfg.auto_scale_lr.enable = True
    _check_scaling(cfg)
    if args.resume is not None:
        cfg.resume = True
        cfg.load_from = None if args.resume == 'auto' else args.resume
    if cfg.get('load_from') is not None:
        _check_checkpoint(cfg.load_from, 'checkpoint')
    runner = _build_runner(cfg)
    runner.logger.info(f'Software: {_versions(cfg.default_scope)}')
    warning = _batch_warning(cfg, runner.world_size)
    if warning:
        runner.logger.warning(warning)
    runner.train()


def test(argv: Sequence[str] | None = None) -> dict:
    """Test as ``tools/test.py`` does.

    Args:
        argv: Arguments of the command line, by default the process's.

    Returns:
        The metrics by name.

    Raises:
        UserError: For whatever the user can put right; see :func:`run_tool` for the rest.
    """
    parser = test_parser()
    args = parser.parse_args(argv)
    if args.out_item is not None and args.out is None:
        parser.error('--out-item needs --out')
    _check_checkpoint(args.checkpoint, 'checkpoint')
    cfg = _load_config(args)
    toolbox = TOOLBOXES.get(cfg.default_scope, Toolbox())
    cfg.load_from = args.checkpoint
    cfg.resume = False
    if toolbox.loader_defaults:
        _set_loader_defaults(cfg)
    if args.show or args.show_dir:
        _set_show(cfg, toolbox, args)
    if args.out is not None:
        _set_out(cfg, toolbox, args)
    if args.tta:
        _set_tta(cfg, toolbox)
    if args.deploy:
        _drop_averaging(cfg)
    runner = _build_runner(cfg)
    if isinstance(runner.model, torch.nn.Module):  # FlexibleRunner has a config until it runs
        _set_memory_format(runner.model)
    if args.deploy:
        _set_deploy(runner)
    if args.out is not None and toolbox.dump is not None and args.out_item != 'metrics':
        metrics = importlib.import_module('mmengine.registry').METRICS
        dump = metrics.build(dict(type=toolbox.dump, out_file_path=args.out))
        runner.test_evaluator.metrics.append(dump)
    results = runner.test()
    if args.out_item == 'metrics':
        importlib.import_module('mmengine').dump(results, args.out)
    return results


# --- errors --------------------------------------------------------------------------------------

# While these functions run, an error that was raised on purpose is about the config or about a
# checkpoint. The last one says what test time augmentation cannot do.
_CONFIGURING = (
    'build_from_cfg',
    'load_checkpoint',
    'load_or_resume',
    'init_weights',
    'merge_preds',
)
_CONFIGURING_PACKAGES = ('mmengine.', 'mmdet.models.test_time_augs')
# Raised here with a text that names the file; others without a file name may be bugs.
_NAMING_ERRORS = (FileNotFoundError, PermissionError, FileExistsError, IsADirectoryError)
_CONFIG_ERRORS = (ValueError, TypeError, LookupError, RuntimeError, AssertionError, ImportError)


def _text(error: BaseException) -> str:
    """The message of an exception in one line."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    if 'Original Traceback' in text:  # raised in a worker process of a DataLoader
        text = text.strip().splitlines()[-1]
    return ' '.join(text.split())


def _raised_on_purpose(error: BaseException) -> bool:
    """Whether a ``raise`` or ``assert`` statement raised it, or a call that did not fit."""
    tb = error.__traceback__
    while tb is not None and tb.tb_next is not None:
        tb = tb.tb_next
    if tb is None:
        return False
    code = tb.tb_frame.f_code
    return (
        code.co_code[tb.tb_lasti] == dis.opmap['RAISE_VARARGS'] or code.co_name == 'build_from_cfg'
    )


def _name_hint(text: str) -> str:
    """Point from a name that no registry knows to the class of hat_mm that may be meant."""
    name, known, _ = text.partition(' is not in the ')
    if not known:
        return text
    text = text.partition('. ')[0]
    near = difflib.get_close_matches(name.rpartition('.')[2], hat_mm.__all__, n=1, cutoff=0.8)
    return f"{text}; did you mean type='hat_mm.{near[0]}'?" if near else text


def explain(error: BaseException) -> str | None:
    """Say in one line what the user can put right; None if the error looks like a bug."""
    if isinstance(error, UserError | compat.DependencyError | pickle.UnpicklingError):
        return _text(error)
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    configuring = [
        frame
        for frame in frames
        if frame.f_code.co_name in _CONFIGURING
        and frame.f_globals.get('__name__', '').startswith(_CONFIGURING_PACKAGES)
    ]
    text = _name_hint(_text(error))
    if isinstance(error, OSError):
        if error.filename is None and not isinstance(error, _NAMING_ERRORS):
            return None
    elif not (
        configuring and text and isinstance(error, _CONFIG_ERRORS) and _raised_on_purpose(error)
    ):
        return None
    built = [frame for frame in configuring if frame.f_code.co_name == 'build_from_cfg']
    if built:
        settings = built[-1].f_locals
        kind = settings.get('obj_type') or settings['cfg'].get('type')
        text = f'{kind if isinstance(kind, str) else getattr(kind, "__name__", kind)}: {text}'
        root = settings['cfg'].get('data_root')
        if isinstance(root, str) and _is_local(root) and not os.path.isdir(root):
            text = (
                f'data folder {root!r} does not exist (data_root of {kind}; docs/datasets.md says '
                f'what belongs there and how to point to another folder): {_text(error)}'
            )
        elif isinstance(root, str) and isinstance(error, FileNotFoundError):
            text += f' (docs/datasets.md says what belongs into data_root {root!r})'
    return text


def run_tool(tool: Callable[[], Any], name: str) -> int:
    """Run a tool to an exit status.

    Where no GPU is in sight, the process keeps the memory that it frees, see
    :func:`hat_mm.tune_allocator`; nothing big may be allocated before.

    What :func:`explain` can explain is printed to stderr as one line; ``HAT_MM_DEBUG=1`` shows the
    traceback of that, too. Other exceptions pass through.

    Args:
        tool: Called without arguments.
        name: Name of the tool, which starts the line.

    Returns:
        0, or 1 for a user error, 2 for a wrong command line.
    """
    if not torch.cuda.is_available():
        tune_allocator()
    try:
        tool()
    except Exception as error:
        line = explain(error)
        if line is None or os.environ.get('HAT_MM_DEBUG'):
            raise
        print(f'{name}: error: {line}', file=sys.stderr)
        return error.status if isinstance(error, UserError) else 1
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return 0
