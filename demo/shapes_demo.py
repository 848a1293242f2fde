"""Shows a backbone learning a task: draws data, trains, tests, paints pictures.

A second run skips what is done, and goes on where an interrupted one stopped. Each step is one of
the ordinary tools, run as you would run it yourself; its command is printed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from shapes import LAYOUTS

import hat_mm  # noqa: F401  repairs the toolboxes before they are imported
from hat_mm import compat

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ROOT / 'tools'
CONFIG = ROOT / 'configs/toy/mask-rcnn_fastervit-tiny_fpn_shapes.py'
STATE = 'demo.json'


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
        '--cfg-options', nargs='+', default=[], metavar='KEY=VALUE', help='override the toy config'
    )
    return parser.parse_args(argv)


# --- steps and what they cost ---------------------------------------------------------------------


def tree_memory(pid: int) -> int:
    """Resident memory in bytes of a process and all below it; 0 where there is no ``/proc``.

    Pages that processes share count once for each, so the figure is an upper bound.
    """
    parents, resident = {}, {}
    for folder in Path('/proc').glob('[0-9]*'):
        try:
            stat = (folder / 'stat').read_text()
            pages = int((folder / 'statm').read_text().split()[1])
        except (OSError, IndexError, ValueError):
            continue  # the process has ended
        number = int(folder.name)
        parents[number] = int(stat.rpartition(')')[2].split()[1])
        resident[number] = pages * os.sysconf('SC_PAGE_SIZE')
    tree, grown = {pid}, True
    while grown:
        below = {child for child, parent in parents.items() if parent in tree} - tree
        tree |= below
        grown = bool(below)
    return sum(resident.get(number, 0) for number in tree)


def run_step(title: str, command: list[str]) -> tuple[float, int]:
    """Runs a tool with its output on the screen.

    Args:
        title: What the step is called in messages.
        command: The tool and its arguments.

    Returns:
        Seconds it took, and the peak of its memory in bytes.

    Raises:
        DemoError: If the tool fails.
    """
    print(f'\n== {title}\n$ python {shlex.join(command)}', flush=True)
    peak, done = 0, threading.Event()
    start = time.monotonic()
    # On a busy machine OpenMP threads that spin while they wait slow each other down tenfold.
    environment = {'OMP_WAIT_POLICY': 'PASSIVE', **os.environ}
    # In a group of its own, so that its data loading workers can be stopped with it.
    process = subprocess.Popen([sys.executable, *command], env=environment, process_group=0)

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.5):
            peak = max(peak, tree_memory(process.pid))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        status = process.wait()
    except BaseException:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()
        raise
    finally:
        done.set()
        watcher.join()
    if status:
        raise DemoError(f'{title} failed with status {status}; the cause stands above')
    return time.monotonic() - start, peak


# --- what an earlier run has left -----------------------------------------------------------------


def load_config(path: Path, options: list[str]) -> object:
    """A toy config with the overrides."""
    mmengine = compat.require('mmengine')
    for toolbox in TASKS:
        compat.require(toolbox)
    parser = argparse.ArgumentParser()
    parser.add_argument('--cfg-options', nargs='+', action=mmengine.DictAction, default={})
    if not path.is_file():
        raise DemoError(f'there is no config {path}; {CONFIG.parent} has some')
    cfg = mmengine.Config.fromfile(str(path))
    cfg.merge_from_dict(
        parser.parse_args(['--cfg-options', *options] if options else []).cfg_options
    )
    return cfg


def fingerprint(cfg: object, num_train: int, num_val: int) -> str:
    """Changes with anything that makes earlier results stale: the config and the data set."""
    text = json.dumps([cfg.to_dict(), num_train, num_val], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def read_state(work_dir: Path, key: str) -> dict:
    """What earlier runs with the same config have done; empty after another config or none."""
    try:
        state = json.loads((work_dir / STATE).read_text(encoding='utf-8'))
    except (OSError, ValueError):
        return {}
    return state if state.get('key') == key else {}


def write_state(work_dir: Path, state: dict) -> None:
    """Replaces the state in one move, so that an interruption cannot leave half of it."""
    partial = work_dir / f'{STATE}.partial'
    partial.write_text(json.dumps(state, indent=1) + '\n', encoding='utf-8')
    partial.replace(work_dir / STATE)


def newest_metrics(folder: Path) -> dict:
    """The metrics that ``tools/test.py`` wrote last below a folder."""
    files = sorted(folder.glob('*/*.json'), key=lambda path: path.stat().st_mtime)
    if not files:
        raise DemoError(f'tools/test.py left no metrics in {folder}')
    return json.loads(files[-1].read_text(encoding='utf-8').splitlines()[-1])


# --- pictures -------------------------------------------------------------------------------------


def make_sheet(pictures: Path, out: Path, count: int = 6, columns: int = 2) -> None:
    """Puts the first painted pictures (ground truth beside prediction) on one sheet.

    Args:
        pictures: Folder of ``tools/test.py --show-dir``.
        out: PNG to write.
        count: Number of pictures.
        columns: Pictures in a row.
    """
    from PIL import Image, ImageDraw

    width, gap = 440, 8
    images = [Image.open(path).convert('RGB') for path in sorted(pictures.rglob('*.png'))[:count]]
    if not images:
        raise DemoError(f'tools/test.py painted no pictures in {pictures}')
    scaled = [im.resize((width, round(im.height * width / im.width))) for im in images]
    rows = [scaled[i : i + columns] for i in range(0, len(scaled), columns)]
    tops, top = [], 22
    for row in rows:
        tops.append(top)
        top += max(im.height for im in row) + gap
    sheet = Image.new('RGB', (columns * (width + gap) - gap, top), 'white')
    draw = ImageDraw.Draw(sheet)
    for column in range(columns):
        left = column * (width + gap)
        draw.text((left + 60, 4), 'ground truth', fill='black')
        draw.text((left + width // 2 + 60, 4), 'prediction', fill='black')
    for row, y in zip(rows, tops, strict=True):
        for column, image in enumerate(row):
            sheet.paste(image, (column * (width + gap), y))
    sheet.save(out, optimize=True)


def plot_confusion(matrix: list[list[int]], classes: list[str], out: Path) -> None:
    """Draws a confusion matrix: true classes down, predicted ones across.

    Args:
        matrix: Number of images of each true class (rows) predicted as each class (columns).
        classes: Their names.
        out: PNG to write.
    """
    import matplotlib
    import torch

    matplotlib.use('agg')
    from mmpretrain.evaluation import ConfusionMatrix

    figure = ConfusionMatrix.plot(
        torch.tensor(matrix), include_values=True, classes=classes, show=False
    )
    figure.set_size_inches(5, 4)
    figure.savefig(out, dpi=100, bbox_inches='tight')  # without its empty margin


# --- tasks ----------------------------------------------------------------------------------------


class Task(NamedTuple):
    """What the demo of a toolbox does its own way.

    Attributes:
        layout: Layout of the data set.
        rows: Rows of the closing table: their names, keys of the metrics and what makes 1 the best.
        overview: Name of the picture that shows the result.
        paint: Writes it, called with (pictures of ``tools/test.py``, metrics, config, file).
    """

    layout: str
    rows: tuple[tuple[str, str, float], ...]
    overview: str
    paint: Callable[[Path, dict, object, Path], None]


def _paint_sheet(pictures: Path, metrics: dict, cfg: object, out: Path) -> None:
    make_sheet(pictures, out)


def _paint_confusion(pictures: Path, metrics: dict, cfg: object, out: Path) -> None:
    plot_confusion(metrics['confusion_matrix/result'], list(cfg.metainfo.classes), out)


TASKS = {
    'mmdet': Task(
        'instances',
        (('box mAP', 'coco/bbox_mAP', 1.0), ('mask mAP', 'coco/segm_mAP', 1.0)),
        'pictures.png',
        _paint_sheet,
    ),
    'mmseg': Task('semantic', (('mIoU', 'mIoU', 0.01),), 'pictures.png', _paint_sheet),
    'mmpretrain': Task(
        'classes',
        (('top-1', 'accuracy/top1', 0.01),),
        'confusion_matrix.png',
        _paint_confusion,
    ),
}
"""Tasks by the ``default_scope`` of a config."""


# --- the demo -------------------------------------------------------------------------------------


def demo(args: argparse.Namespace) -> str:
    """Runs what is still to do; returns the closing table."""
    config = str(args.config)
    cfg = load_config(args.config, args.cfg_options)
    task = TASKS[cfg.default_scope]
    layout = LAYOUTS[task.layout]
    num_train = layout.num_train if args.num_train is None else args.num_train
    num_val = layout.num_val if args.num_val is None else args.num_val
    work_dir: Path = args.work_dir
    work_dir.mkdir(parents=True, exist_ok=True)
    key = fingerprint(cfg, num_train, num_val)
    state = read_state(work_dir, key)
    last = work_dir / 'last_checkpoint'
    if not state:  # checkpoints of another config must not be resumed from
        last.unlink(missing_ok=True)
        state = {'key': key, 'seconds': {}, 'memory': 0}
        write_state(work_dir, state)
    options = ['--cfg-options', *args.cfg_options] if args.cfg_options else []

    def step(name: str, title: str, command: list[str]) -> None:
        start = time.monotonic()
        try:
            _, peak = run_step(title, command)
            state['memory'] = max(state['memory'], peak)
        finally:  # an interrupted training took its time, too
            spent = state['seconds'].get(name, 0) if name == 'training' else 0
            state['seconds'][name] = spent + time.monotonic() - start
            write_state(work_dir, state)

    counts = ['--num-train', str(num_train), '--num-val', str(num_val)]
    data = ['--layout', task.layout, '--out', cfg.data_root.rstrip('/'), *counts]
    drawn_in = state['seconds'].get('data set')
    step('data set', 'Data set', [str(ROOT / 'demo/shapes.py'), *data])
    if drawn_in is not None:  # it was there: keep the time that drawing took
        state['seconds']['data set'] = drawn_in

    if not state.get('trained'):
        resume = ['--resume'] if last.exists() else []
        command = [str(TOOLS / 'train.py'), config, '--work-dir', str(work_dir), *resume]
        step('training', 'Training', [*command, *options])
        state['trained'] = last.read_text(encoding='utf-8').strip()
        write_state(work_dir, state)
    else:
        print(f'\n== Training: done before ({state["trained"]})')

    pictures = work_dir / 'pictures'
    overview = work_dir / task.overview
    if not state.get('metrics') or not overview.is_file():
        folder = work_dir / 'test'
        command = [str(TOOLS / 'test.py'), config, state['trained'], '--work-dir', str(folder)]
        step('test', 'Test', [*command, '--show-dir', str(pictures.absolute()), *options])
        metrics = newest_metrics(folder)
        task.paint(pictures, metrics, cfg, overview)
        state['metrics'] = metrics
        write_state(work_dir, state)
    else:
        print('\n== Test: done before')
    return closing_table(task, state, overview, pictures)


def closing_table(task: Task, state: dict, overview: Path, pictures: Path) -> str:
    """What the demo has shown, in a few lines."""
    seconds = state['seconds']
    parts = ', '.join(f'{name} {value / 60:.1f}' for name, value in seconds.items())
    memory = f'{state["memory"] / 2**30:.1f} GiB' if state['memory'] else 'not measured'
    rows = [
        *((name, f'{state["metrics"][metric] * scale:.3f}') for name, metric, scale in task.rows),
        ('minutes', f'{sum(seconds.values()) / 60:.1f} ({parts})'),
        ('peak memory', f'{memory}, all processes together'),
        ('checkpoint', state['trained']),
        ('pictures', f'{overview} (all: {pictures})'),
    ]
    return '\n'.join(f'{name:<12} {value}' for name, value in rows)


def main(argv: list[str] | None = None) -> int:
    """Runs the demo; returns the exit status."""
    args = parse_args(argv)
    try:
        print(f'\n{demo(args)}')
    except (DemoError, OSError, compat.DependencyError) as error:
        print(f'shapes_demo.py: error: {error}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print('\ninterrupted: run the same command again to go on', file=sys.stderr)
        return 130
    return 0


if __name__ == '__main__':
    for number in (signal.SIGTERM, signal.SIGHUP):  # stop the running step, too, as Ctrl-C does
        signal.signal(number, signal.default_int_handler)
    sys.exit(main())
