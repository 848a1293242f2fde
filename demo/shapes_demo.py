"""Shows a backbone learning a task: draws data, trains, tests, makes pictures.

A second run skips finished steps and continues where an interrupted one stopped. Each step is an
ordinary tool, run as you would run it yourself; its command is printed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import matplotlib
import torch
from shapes import LAYOUTS

import hat_mm  # noqa: F401  repairs the toolboxes before they are imported

# isort: split
from mmengine.config import Config, DictAction

from hat_mm.engine.cli import key_value

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / 'configs/toy/mask-rcnn_fastervit-tiny_fpn_shapes.py'
STATE = 'demo.json'

matplotlib.use('agg')


class DemoError(Exception):
    """A step failed; the message says which and where to look."""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument(
        'config',
        nargs='?',
        type=Path,
        default=CONFIG,
        help='one of configs/toy; Mask R-CNN with FasterViT if none',
    )
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/demo'))
    parser.add_argument('--num-train', type=int, help='training images (default: by task)')
    parser.add_argument('--num-val', type=int, help='validation images (default: by task)')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        type=key_value,
        default=[],
        metavar='KEY=VALUE',
        help='override the toy config',
    )
    return parser.parse_args(argv)


# --- tasks ----------------------------------------------------------------------------------------


def paint_sheet(pictures: Path, metrics: dict, cfg: Config, out: Path) -> None:
    """Puts the first six pictures of ``tools/test.py`` on one sheet."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(3, 2, figsize=(9, 8), layout='constrained')
    figure.suptitle('ground truth beside prediction', fontsize='medium')
    for axis in axes.flat:
        axis.axis('off')
    for axis, path in zip(axes.flat, sorted(pictures.rglob('*.png')), strict=False):
        axis.imshow(pyplot.imread(path))
    figure.savefig(out, dpi=100, pil_kwargs={'optimize': True})


def paint_confusion(pictures: Path, metrics: dict, cfg: Config, out: Path) -> None:
    """Draws a confusion matrix: true classes down, predicted ones across."""
    from mmpretrain.evaluation import ConfusionMatrix

    matrix = torch.tensor(metrics['confusion_matrix/result'])
    figure = ConfusionMatrix.plot(
        matrix, include_values=True, classes=list(cfg.metainfo.classes), show=False
    )
    figure.set_size_inches(5, 4)
    figure.savefig(out, dpi=100, bbox_inches='tight')  # without the empty margin


class Task(NamedTuple):
    """What the demo does differently for each layout of the data.

    Attributes:
        rows: Rows of the closing table: name, key of the metric, and factor that makes 1 the best.
        overview: Name of the picture that shows the result.
        paint: Makes that picture, called with (pictures of ``tools/test.py``, metrics, config,
            file).
    """

    rows: tuple[tuple[str, str, float], ...]
    overview: str
    paint: Callable[[Path, dict, Config, Path], None]


AP = (('box mAP', 'coco/bbox_mAP', 1.0), ('mask mAP', 'coco/segm_mAP', 1.0))
PQ = tuple((name, f'panoptic/{name}', 0.01) for name in ('PQ', 'SQ', 'RQ'))
TASKS = {
    'instances': Task(AP, 'pictures.png', paint_sheet),
    'semantic': Task((('mIoU', 'mIoU', 0.01),), 'pictures.png', paint_sheet),
    'classes': Task((('top-1', 'accuracy/top1', 0.01),), 'confusion_matrix.png', paint_confusion),
    'panoptic': Task((*PQ, *AP), 'pictures.png', paint_sheet),
}
"""Tasks by layout of the data."""
LAYOUT_OF = {'mmdet': 'instances', 'mmseg': 'semantic', 'mmpretrain': 'classes'}
"""Layout of the data by ``default_scope`` of a config."""


# --- the demo -------------------------------------------------------------------------------------


def run_step(title: str, command: list[str]) -> None:
    """Runs a tool with its output on the screen.

    Raises:
        DemoError: The tool fails.
    """
    print(f'\n== {title}\n$ python {shlex.join(command)}', flush=True)
    # On a busy machine, OpenMP threads that spin while waiting slow each other down tenfold.
    environment = {'OMP_WAIT_POLICY': 'PASSIVE', **os.environ}
    status = subprocess.run([sys.executable, *command], env=environment, check=False).returncode
    if status:
        raise DemoError(f'{title} failed with status {status}; the cause stands above')


def load_config(path: Path, options: list[str]) -> Config:
    """Loads a toy config with overrides."""
    if not path.is_file():
        raise DemoError(f'there is no config {path}; {CONFIG.parent} has some')
    parser = argparse.ArgumentParser()
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, default={})
    cfg = Config.fromfile(path)
    cfg.merge_from_dict(parser.parse_args(options).cfg_options)
    return cfg


def read_state(work_dir: Path, key: str) -> dict:
    """What earlier runs with the same config did; empty after another config or no run."""
    try:
        state = json.loads((work_dir / STATE).read_text(encoding='utf-8'))
    except (OSError, ValueError):
        state = {}
    if state.get('key') == key:
        return state
    # Checkpoints of another config must not be resumed from.
    (work_dir / 'last_checkpoint').unlink(missing_ok=True)
    return {'key': key, 'seconds': {}}


def demo(args: argparse.Namespace) -> str:
    """Runs the steps that are left; returns the closing table."""
    options = ['--cfg-options', *args.cfg_options] if args.cfg_options else []
    cfg = load_config(args.config, options)
    name = 'panoptic' if 'panoptic_head' in cfg.model else LAYOUT_OF[cfg.default_scope]
    task, layout = TASKS[name], LAYOUTS[name]
    num_train = layout.num_train if args.num_train is None else args.num_train
    num_val = layout.num_val if args.num_val is None else args.num_val
    work_dir: Path = args.work_dir
    work_dir.mkdir(parents=True, exist_ok=True)
    what = json.dumps([cfg.to_dict(), num_train, num_val], sort_keys=True, default=str)
    state = read_state(work_dir, hashlib.sha256(what.encode()).hexdigest())
    overview, pictures = work_dir / task.overview, work_dir / 'pictures'

    def step(name: str, *command: object) -> None:
        start = time.monotonic()
        try:
            run_step(name.capitalize(), list(map(str, command)))
        finally:  # an interrupted training counts, too
            spent = state['seconds'].get(name, 0) + time.monotonic() - start
            state['seconds'][name] = spent
            # Peak memory of the largest process of all steps in this run.
            kibibytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
            state['memory'] = max(state.get('memory', 0), kibibytes * 1024)
            save()

    def save() -> None:
        (work_dir / STATE).write_text(json.dumps(state, indent=1) + '\n', encoding='utf-8')

    if 'metrics' in state and overview.is_file():
        print('\n== All steps: done before')
        return closing_table(task, state, overview, pictures)
    counts = ('--num-train', num_train, '--num-val', num_val)
    data = ('--layout', name, '--out', cfg.data_root.rstrip('/'), *counts)
    step('data set', ROOT / 'demo/shapes.py', *data)
    if 'trained' in state:
        print(f'\n== Training: done before ({state["trained"]})')
    else:
        last = work_dir / 'last_checkpoint'
        resume = ['--resume'] if last.exists() else []
        train = (ROOT / 'tools/train.py', args.config, '--work-dir', work_dir)
        step('training', *train, *resume, *options)
        state['trained'] = last.read_text(encoding='utf-8').strip()
        save()
    folder = work_dir / 'test'
    test = (ROOT / 'tools/test.py', args.config, state['trained'], '--work-dir', folder)
    step('test', *test, '--show-dir', pictures.absolute(), *options)
    newest = max(folder.glob('*/*.json'))  # their names are times
    state['metrics'] = json.loads(newest.read_text(encoding='utf-8').splitlines()[-1])
    task.paint(pictures, state['metrics'], cfg, overview)
    save()
    return closing_table(task, state, overview, pictures)


def closing_table(task: Task, state: dict, overview: Path, pictures: Path) -> str:
    """The results of the demo, in a few lines."""
    seconds = state['seconds']
    parts = ', '.join(f'{name} {value / 60:.1f}' for name, value in seconds.items())
    rows = [
        *((name, f'{state["metrics"][metric] * scale:.3f}') for name, metric, scale in task.rows),
        ('minutes', f'{sum(seconds.values()) / 60:.1f} ({parts})'),
        ('peak memory', f'{state["memory"] / 2**30:.1f} GiB of the largest process'),
        ('checkpoint', state['trained']),
        ('pictures', f'{overview} (all: {pictures})'),
    ]
    return '\n'.join(f'{name:<12} {value}' for name, value in rows)


def main(argv: list[str] | None = None) -> int:
    """Runs the demo; returns the exit status."""
    args = parse_args(argv)
    try:
        print(f'\n{demo(args)}')
    except (DemoError, OSError) as error:
        print(f'shapes_demo.py: error: {error}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print('\ninterrupted: run the same command again to go on', file=sys.stderr)
        return 130
    return 0


if __name__ == '__main__':
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stop the running step, too
    sys.exit(main())
