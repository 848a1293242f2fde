"""Trains small backbones from random weights on real pictures, and compares them.

Each run gets the config that tools/misc/new_config.py writes for its backbone, so recipe, detector
and number of steps are the same, and trains in a process of its own, on one thread. All backbones
run with one seed before the next seed starts. The result of a run goes to a JSON file as soon as it
ends; runs that have one are skipped, and an interrupted run is resumed. Prints a Markdown table and
draws a plot of all results that are there. The runs may share the machine with other work: time is
measured apart, by --seconds.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from benchmark.measuring import Work, seconds_of
from coco_scores import score
from matplotlib.figure import Figure
from tabulate import tabulate

from hat_mm import compat
from hat_mm.engine.analysis import count
from hat_mm.engine.cli import UserError, run_tool
from hat_mm.engine.environment import circumstances, describe, tune

TOOLS = Path(__file__).resolve().parents[1]
NEW_CONFIG, CONVERTERS = TOOLS / 'misc/new_config.py', TOOLS / 'dataset_converters'
BACKBONES = {
    'FasterViT': 'fastervit-toy',
    'FasterViT without carriers': 'fastervit-no-carriers-toy',
    'Swin': 'swin-toy',
    'ResNet': 'resnet-wide-toy',
    'FasterViT, carrier bias 8': 'fastervit-carrier-bias-toy',
    'HAT-Net': 'hat-net-toy',
    'SwinHAT': 'swin-hat-toy',
    'ConvNeXt': 'convnext-toy',
}
SCALES = (0.5, 1.0, 2.0)
"""Sizes of the validation pictures, as multiples of that in training."""
METRICS = ('ap', 'ap50', 'ap75')
SECONDS = 'seconds.json'


class Data(NamedTuple):
    """A dataset and what is trained on it.

    Attributes:
        model: Model of ``new_config.py``.
        epochs: Epochs of a run, for at least ten minutes on one thread.
        kind: What is scored, ``'bbox'`` or ``'segm'``.
        title: Title of the table.
    """

    model: str
    epochs: int
    kind: str
    title: str


DATA = {
    'trees': Data('retinanet', 70, 'bbox', 'trees'),
    'nuclei': Data(
        'mask-rcnn',
        8,
        'segm',
        'nuclei, by masks of an automatic segmentation with errors (ERR_SEG)',
    ),
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--data', nargs='+', choices=DATA, default=list(DATA))
    parser.add_argument(
        '--backbones', nargs='+', choices=BACKBONES.values(), default=list(BACKBONES.values())
    )
    parser.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2])
    parser.add_argument('--epochs', type=int, help='(default: by the data)')
    parser.add_argument('--jobs', type=int, default=2, help='runs at once')
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/real_study'))
    parser.add_argument('--out', type=Path, default=Path('docs/real_images'), metavar='FOLDER')
    parser.add_argument('--plot', type=Path, default=Path('docs/images/real_study.png'))
    parser.add_argument(
        '--seconds',
        action='store_true',
        help='train nothing; time a step and a picture of each backbone in turns, on one thread',
    )
    parser.add_argument(
        '--render', action='store_true', help='only table and plot, of the results in --out'
    )
    args = parser.parse_args(argv)
    numbers = [args.jobs] if args.epochs is None else [args.jobs, args.epochs]
    for name in ('data', 'backbones', 'seeds'):
        setattr(args, name, list(dict.fromkeys(getattr(args, name))))
    if min(numbers) < 1 or min(args.seeds) < 0:
        parser.error('--jobs and --epochs must be at least 1, --seeds at least 0')
    return args


# --- a run ----------------------------------------------------------------------------------------


def make_config(data: str, backbone: str, seed: int, epochs: int, folder: Path) -> Any:
    """Writes the config of a run and reads it."""
    path = folder / 'config.py'
    splits = {
        f'--{split}': (f'data/{data}/annotations/{split}.json', f'data/{data}/{split}')
        for split in ('train', 'val')
    }
    words = [word for flag, pair in splits.items() for word in (flag, *pair)]
    words += ['--model', DATA[data].model, '--backbone', backbone, '--epochs', str(epochs)]
    words += ['--flip', 'horizontal', 'vertical', 'diagonal', '--out', str(path), '--force']
    done = subprocess.run(
        [sys.executable, NEW_CONFIG, *words], check=False, capture_output=True, text=True
    )
    if done.returncode:
        raise UserError(done.stdout + done.stderr)
    cfg = compat.require('mmengine').Config.fromfile(path)
    cfg.data = data
    cfg.work_dir = str(folder)
    cfg.randomness.seed = seed
    cfg.resume = True
    # The training process loads the pictures itself, on its one thread.
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        loader.update(num_workers=0, persistent_workers=False)
    cfg.train_cfg.val_interval = epochs
    return cfg


def train(*, data: str, backbone: str, seed: int, epochs: int, folder: Path, out: Path) -> None:
    """Trains, tests and measures one backbone, and writes what was found to ``out``.

    The file holds AP, AP50 and AP75 of ``test``, and of ``val`` at each of :data:`SCALES`;
    ``parameters`` of the backbone and its ``macs`` for 512x512 pixels; ``steps``; ``measured``,
    hardware and versions.
    """
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    with (
        (folder / 'output.log').open('a', encoding='utf-8') as log,
        redirect_stdout(log),
        redirect_stderr(log),
    ):
        cfg = make_config(data, backbone, seed, epochs, folder)
        runner = compat.require('mmengine.registry').RUNNERS.build(cfg)
        runner.train()
        checkpoint = (folder / 'last_checkpoint').read_text(encoding='utf-8').strip()
        found: dict[str, Any] = {'data': data, 'backbone': backbone, 'seed': seed}
        found |= {'epochs': epochs, 'steps': runner.iter, 'val': {}}
        for scale in SCALES:
            found['val'][str(scale)] = test(cfg, checkpoint, 'val', scale)
        found['test'] = test(cfg, checkpoint, 'test', 1.0)
        complexity = count(runner.model.backbone, (512, 512)).whole
        found |= {'parameters': complexity.parameters, 'macs': complexity.flops}
        found['measured'] = describe(circumstances('cpu', tune()))
    out.write_text(json.dumps(found, indent=1) + '\n', encoding='utf-8')


def test(cfg: Any, checkpoint: str, split: str, scale: float) -> dict[str, float]:
    """AP, AP50 and AP75 of a checkpoint on a split at a multiple of the training's scale."""
    cfg = copy.deepcopy(cfg)
    folder = Path(cfg.work_dir, f'{split}-{scale}')
    annotations = Path(cfg.val_evaluator.ann_file).with_name(f'{split}.json')
    cfg.update(load_from=checkpoint, resume=False, work_dir=str(folder))
    dataset = cfg.test_dataloader.dataset
    dataset.ann_file = str(annotations)
    dataset.data_prefix.img = str(annotations.parents[1] / split)
    [resize] = [step for step in dataset.pipeline if step.type == 'Resize']
    resize.scale_factor *= scale
    cfg.test_evaluator.update(ann_file=str(annotations), outfile_prefix=str(folder / 'found'))
    runner = compat.require('mmengine.runner').Runner.from_cfg(cfg)
    runner.test()
    kind = DATA[cfg.data].kind
    found = folder / f'found.{kind}.json'
    # mmdet writes no file if nothing was found.
    detections = json.loads(found.read_text(encoding='utf-8')) if found.exists() else []
    scores = score(annotations, detections, kind)
    return {name: getattr(scores, name) for name in METRICS}


# --- time -----------------------------------------------------------------------------------------


def training_step(settings: dict[str, Any]) -> Work:
    """A training step of the detector; loading the pictures is not included."""
    runner = make_runner(**settings)
    model, batch = runner.model.train(), next(iter(runner.train_dataloader))
    optimizer = runner.build_optim_wrapper(runner.cfg.optim_wrapper)
    return Work(lambda: model.train_step(batch, optimizer))


def picture(settings: dict[str, Any]) -> Work:
    """Detection on the first validation picture."""
    runner = make_runner(**settings)
    model, batch = runner.model.eval(), next(iter(runner.val_dataloader))
    return Work(torch.inference_mode()(lambda: model.test_step(batch)))


def make_runner(**settings: Any) -> Any:
    """The runner of a config, in a process that measures on one thread."""
    torch.set_num_threads(1)
    cfg = make_config(**settings)
    cfg.resume = False
    return compat.require('mmengine.registry').RUNNERS.build(cfg)


def measure_seconds(args: argparse.Namespace, rounds: int = 9) -> None:
    """Writes medians of a training step and of a picture to :data:`SECONDS` in ``args.out``."""
    path = args.out / SECONDS
    found = json.loads(path.read_text(encoding='utf-8')) if path.exists() else {}
    measured = describe(circumstances('cpu', tune()))
    for name in args.data:
        found.setdefault(name, {}).update({one: {'measured': measured} for one in args.backbones})
        for what in (training_step, picture):
            with TemporaryDirectory() as folder:
                jobs = {
                    backbone: (
                        what,
                        dict(data=name, backbone=backbone, seed=0, epochs=1)
                        | dict(folder=Path(folder, backbone)),
                    )
                    for backbone in args.backbones
                }
                seconds, errors = seconds_of(jobs, rounds, device='cpu', tuned=True)
            if errors:
                raise UserError(f'{name}, {what.__name__}: {errors}')
            for backbone, values in seconds.items():
                found[name][backbone][what.__name__] = statistics.median(values)
    args.out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + '\n', encoding='utf-8')


# --- output ---------------------------------------------------------------------------------------


def read_results(folder: Path) -> dict[str, dict[str, list[dict]]]:
    """The results of a folder by dataset and name of the backbone, in the order of the tables.

    Those of :func:`measure_seconds` are added to the runs, as far as they are there.
    """
    files = sorted(folder.glob('*_*.json'))
    runs = [json.loads(path.read_text(encoding='utf-8')) for path in files]
    path = folder / SECONDS
    seconds = json.loads(path.read_text(encoding='utf-8')) if path.exists() else {}
    for run in runs:
        run['seconds'] = seconds.get(run['data'], {}).get(run['backbone'])
    return {
        data: {
            name: found
            for name, backbone in BACKBONES.items()
            if (found := [r for r in runs if (r['data'], r['backbone']) == (data, backbone)])
        }
        for data in DATA
    }


def mean_sd(values: list[float]) -> str:
    """Mean and sample standard deviation; the value alone if there is only one."""
    mean = statistics.mean(values)
    return f'{mean:.3f} ± {statistics.stdev(values):.3f}' if len(values) > 1 else f'{mean:.3f}'


def table(rows: dict[str, list[dict]]) -> str:
    """The Markdown table of one dataset."""
    text = [
        {
            'backbone': name,
            'seeds': len(runs),
            **{
                f'AP50 at {scale}×': mean_sd([run['val'][str(scale)]['ap50'] for run in runs])
                for scale in SCALES
            },
            'AP': mean_sd([run['val']['1.0']['ap'] for run in runs]),
            'AP50, test': mean_sd([run['test']['ap50'] for run in runs]),
            **{
                heading: f'{runs[0]["seconds"][what.__name__]:.2f}' if runs[0]['seconds'] else '-'
                for heading, what in (('step, s', training_step), ('picture, s', picture))
            },
            'parameters, M': f'{runs[0]["parameters"] / 1e6:.2f}',
            'MACs, G': f'{runs[0]["macs"] / 1e9:.2f}',
        }
        for name, runs in rows.items()
    ]
    return tabulate(text, headers='keys', tablefmt='github', disable_numparse=True)


def plot(results: dict[str, dict[str, list[dict]]], out: Path) -> None:
    """Draws AP50 of each run and their mean, one dataset beside the other."""
    shown = {data: rows for data, rows in results.items() if rows}
    figure = Figure(figsize=(5 * len(shown), 4), layout='constrained')
    axes = figure.subplots(1, len(shown), squeeze=False)[0]
    for axis, (data, rows) in zip(axes, shown.items(), strict=True):
        for i, runs in enumerate(rows.values()):
            values = [run['val']['1.0']['ap50'] for run in runs]
            axis.plot([i] * len(values), values, 'o', color='tab:blue', alpha=0.5)
            axis.plot(i, statistics.mean(values), '_', color='black', markersize=20)
        names = [name.replace(' without ', '\nwithout ') for name in rows]
        axis.set_xticks(range(len(rows)), names, rotation=30, ha='right', fontsize=8)
        axis.set_title(data)
        axis.set_ylabel('AP50: seeds and mean')
        axis.set_ylim(0, 1.05 * axis.get_ylim()[1])
        axis.grid(alpha=0.3)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=100)


# --- the study ------------------------------------------------------------------------------------


def make_data(names: set[str]) -> None:
    """Makes the datasets that are not there."""
    for name in names:
        if not Path('data', name).exists():
            subprocess.run([sys.executable, CONVERTERS / f'{name}.py'], check=True)


def study(args: argparse.Namespace) -> None:
    """Makes the runs that have no result yet.

    Raises:
        UserError: A result was made with another number of epochs.
    """
    todo = []
    for data, seed, backbone in itertools.product(args.data, args.seeds, args.backbones):
        epochs = args.epochs or DATA[data].epochs
        out = args.out / f'{data}_{backbone}_{seed}.json'
        if not out.exists():
            folder = args.work_dir / f'{out.stem}_{epochs}'
            todo.append(dict(data=data, backbone=backbone, seed=seed, epochs=epochs))
            todo[-1] |= dict(folder=folder, out=out)
            continue
        made = json.loads(out.read_text(encoding='utf-8'))['epochs']
        if made != epochs:
            raise UserError(f'{out} was made with --epochs {made}: choose another --out')
    make_data({settings['data'] for settings in todo})
    os.environ['OMP_NUM_THREADS'] = '1'  # for the processes that train
    args.out.mkdir(parents=True, exist_ok=True)
    one_process_a_run = dict(mp_context=multiprocessing.get_context('spawn'), max_tasks_per_child=1)
    with ProcessPoolExecutor(args.jobs, initializer=tune, **one_process_a_run) as pool:
        runs = {pool.submit(train, **settings): settings for settings in todo}
        try:
            for run in as_completed(runs):
                run.result()
                print(f'{runs[run]["out"]}: done', flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def main(argv: list[str] | None = None) -> None:
    """Makes the missing runs; prints the tables and draws the plot."""
    args = parse_args(argv)
    if args.seconds:
        make_data(set(args.data))
        measure_seconds(args)
    elif not args.render:
        study(args)
    results = read_results(args.out)
    for data, rows in results.items():
        if rows:
            print(f'\n{DATA[data].title}\n\n{table(rows)}')
    if not any(results.values()):
        raise UserError(f'{args.out} has no results')
    plot(results, args.plot)


if __name__ == '__main__':
    sys.exit(run_tool(main, 'real_study.py'))
