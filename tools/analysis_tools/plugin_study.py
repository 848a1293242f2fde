"""Trains small backbones where only global context tells classes apart, and compares them.

The dataset is that of ``demo/shapes.py --relation``. Each run is an ordinary training of its
config, in its own process. All backbones run with one seed before the next seed starts, so that
whatever slows the machine affects all of them. Finished runs are skipped, so the same command
continues where an interrupted one stopped. Steps are timed at the end, in turns. The results go to
a JSON file, a Markdown table to the screen, a plot to a PNG.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from tabulate import tabulate

from hat_mm import compat
from hat_mm.engine.cli import add_cfg_options, run_tool
from hat_mm.engine.environment import circumstances, describe, tune

ROOT = Path(__file__).resolve().parents[2]
BACKBONES = {
    'ResNet': 'resnet-toy',
    'ResNet + HAT': 'resnet-hat-toy',
    'ResNet + H-MHSA': 'resnet-hmhsa-toy',
    'Swin': 'swin-toy',
    'SwinHAT': 'swin-hat-toy',
    'FasterViT without carriers': 'fastervit-no-carriers-toy',
    'FasterViT': 'fastervit-toy',
    'FasterViT, carrier bias 8': 'fastervit-carrier-bias-toy',
}
GLOBAL = (
    'ResNet + HAT',
    'ResNet + H-MHSA',
    'SwinHAT',
    'FasterViT',
    'FasterViT, carrier bias 8',
)
"""Backbones with global attention; the others are compared with them."""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2])
    parser.add_argument(
        '--only',
        nargs='+',
        choices=BACKBONES,
        default=list(BACKBONES),
        metavar='NAME',
        help=f'some of {", ".join(BACKBONES)}; needs an --out of its own',
    )
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/plugin_study'))
    parser.add_argument('--jobs', type=int, default=2, help='runs at once, of one thread each')
    parser.add_argument('--out', type=Path, default=Path('docs/plugin_study.json'))
    parser.add_argument('--plot', type=Path, default=Path('docs/images/plugin_study.png'))
    parser.add_argument(
        '--render', action='store_true', help='only table and plot, from the file of --out'
    )
    add_cfg_options(parser)
    args = parser.parse_args(argv)
    if len(args.only) < len(BACKBONES) and args.out == parser.get_default('out'):
        parser.error(f'--only needs --out: {args.out} holds the results of all')
    if args.jobs < 1 or min(args.seeds) < 0:
        parser.error('--jobs must be at least 1, --seeds at least 0')
    if len(set(args.seeds)) < max(len(args.seeds), 2):
        parser.error('--seeds must be two or more different ones: one has no deviation')
    return args


def load_config(backbone: str, overrides: dict) -> Any:
    """The config of a backbone, one of the values of :data:`BACKBONES`, with overrides."""
    path = ROOT / f'configs/toy/faster-rcnn_{backbone}_fpn_relation.py'
    cfg = compat.require('mmengine').Config.fromfile(path)
    cfg.merge_from_dict(overrides)
    return cfg


# --- runs -----------------------------------------------------------------------------------------


def train(folder: Path, backbone: str, seed: int, overrides: dict) -> dict[str, float]:
    """Trains one backbone, unless its folder already holds the result of this config and data.

    Args:
        folder: Work dir of the run.
        backbone: One of the values of :data:`BACKBONES`.
        seed: Seed of the weights and of the order of the images.
        overrides: Changes to the config.

    Returns:
        ``mAP``, COCO's mean average precision of boxes, IoU 0.5 to 0.95; ``recall``, COCO's average
        recall of boxes of any class, at most 100 per image; ``right``, see :func:`marker_right`.
    """
    cfg = load_config(backbone, {**overrides, 'randomness.seed': seed})
    cfg.work_dir = str(folder)
    cfg.val_evaluator.outfile_prefix = str(folder / 'predictions')
    data = Path(cfg.data_root, 'dataset.json').read_text(encoding='utf-8')
    key = json.dumps([cfg.to_dict(), data], default=str)
    result = folder / 'result.json'
    if result.exists():
        found = json.loads(result.read_text(encoding='utf-8'))
        if found['key'] == key:
            return found['metrics']
    folder.mkdir(parents=True, exist_ok=True)
    with (
        (folder / 'output.log').open('w', encoding='utf-8') as log,
        redirect_stdout(log),
        redirect_stderr(log),
    ):
        runner = compat.require('mmengine.runner').Runner.from_cfg(cfg)
        runner.train()
    truth = json.loads(Path(cfg.val_evaluator.ann_file).read_text(encoding='utf-8'))
    predictions = json.loads((folder / 'predictions.bbox.json').read_text(encoding='utf-8'))
    metrics = {
        'mAP': float(runner.message_hub.get_scalar('val/coco/bbox_mAP').current()),
        'recall': float(runner.message_hub.get_scalar('val/coco/AR@100').current()),
        'right': marker_right(truth, predictions),
    }
    result.write_text(json.dumps({'key': key, 'metrics': metrics}), encoding='utf-8')
    return metrics


def marker_right(truth: dict, predictions: list[dict]) -> float:
    """Fraction of the found objects that are assigned the right kind of marker; 0.5 is chance.

    An object is found if a box with its outline, of either kind, has an IoU of at least 0.5 with
    it; the one with the highest score determines the kind. Unlike average precision, this does not
    depend on how exact the boxes are.

    Args:
        truth: COCO's annotations. Names of categories are an outline, a hyphen and a kind.
        predictions: COCO's list of predicted boxes, with the same categories.

    Returns:
        The fraction, between 0 and 1; nan if nothing was found.
    """
    from pycocotools import mask

    names = {c['id']: c['name'].split('-') for c in truth['categories']}
    right = []
    for object_ in truth['annotations']:
        outline, kind = names[object_['category_id']]
        found = [
            box
            for box in predictions
            if box['image_id'] == object_['image_id']
            and names[box['category_id']][0] == outline
            and mask.iou([box['bbox']], [object_['bbox']], [0]) >= 0.5
        ]
        if found:
            best = max(found, key=lambda b: b['score'])
            right.append(names[best['category_id']][1] == kind)
    return statistics.fmean(right) if right else float('nan')


def costs(
    backbones: Iterable[str], overrides: dict, rounds: int = 15
) -> dict[str, dict[str, float]]:
    """Times a training step of each detector, in turns and on one thread.

    Args:
        backbones: Some of :data:`BACKBONES`.
        overrides: Changes to the configs.
        rounds: Timed steps of each.

    Returns:
        For each of them, ``parameters`` of the backbone and ``seconds`` of a step (median): loss,
        gradient and update; loading the images is not included.
    """
    registry = compat.require('mmdet.registry')
    compat.require('mmdet.utils').register_all_modules()
    build_optim_wrapper = compat.require('mmengine.optim').build_optim_wrapper
    collate = compat.require('mmengine.dataset').pseudo_collate
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found, steps = {}, {}
    for name in backbones:
        cfg = load_config(BACKBONES[name], overrides)
        model = registry.MODELS.build(cfg.model).train()
        images = registry.DATASETS.build(cfg.train_dataloader.dataset)
        batch = collate([images[i] for i in range(cfg.train_dataloader.batch_size)])
        steps[name] = (model, build_optim_wrapper(model, cfg.optim_wrapper), batch)
        found[name] = {'parameters': sum(p.numel() for p in model.backbone.parameters())}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 1):
        for name, (model, optimizer, batch) in steps.items():
            start = time.perf_counter()
            model.train_step(batch, optimizer)
            seconds[name].append(time.perf_counter() - start)
    for name, values in seconds.items():
        found[name]['seconds'] = statistics.median(values[1:])  # the first is a warm-up
    return found


# --- output ---------------------------------------------------------------------------------------


def mean_sd(row: dict, metric: str) -> tuple[float, float]:
    """Mean and sample standard deviation of a metric of one backbone over the seeds."""
    values = [run[metric] for run in row['runs'].values()]
    return statistics.mean(values), statistics.stdev(values)


def table(results: dict) -> str:
    """The Markdown table of the results, and the hardware and versions."""
    rows = [
        {
            'backbone': name,
            'mAP': '{:.3f} ± {:.3f}'.format(*mean_sd(row, 'mAP')),
            'marker right': '{:.0%} ± {:.0%}'.format(*mean_sd(row, 'right')),
            'recall': '{:.3f} ± {:.3f}'.format(*mean_sd(row, 'recall')),
            'backbone parameters': f'{row["parameters"] / 1e6:.2f} M',
            'step': f'{row["seconds"]:.2f} s',
        }
        for name, row in results['backbones'].items()
    ]
    text = tabulate(rows, headers='keys', tablefmt='github', disable_numparse=True)
    return f'{text}\n\n`{results["command"]}`; {results["measured"]}'


def plot(results: dict, out: Path) -> None:
    """Draws mAP with its standard deviation for each backbone, and against the time of a step.

    Args:
        results: The content of the file ``--out``.
        out: PNG to write.
    """
    figure = Figure(figsize=(10, 3.8), layout='tight')
    left, right = figure.subplots(1, 2, sharey=True)
    for index, (name, row) in enumerate(results['backbones'].items()):
        mean, deviation = mean_sd(row, 'mAP')
        style = dict(fmt='o', color='tab:red' if name in GLOBAL else 'tab:blue', capsize=4)
        for run in row['runs'].values():
            left.plot(index, run['mAP'], '.', color='grey', alpha=0.6, zorder=1)
        left.errorbar(index, mean, deviation, **style)
        right.errorbar(row['seconds'], mean, deviation, **style)
        offset = (5, -10 if index % 2 else 4)  # separates neighbours with similar scores
        right.annotate(name, (row['seconds'], mean), offset, textcoords='offset points', fontsize=7)
    names = [name.replace(' without ', '\nwithout ') for name in results['backbones']]
    left.set_xticks(range(len(names)), names, rotation=30, ha='right', fontsize=8)
    left.set_ylim(bottom=0)
    left.set_ylabel('mAP: mean, standard deviation, seeds')
    right.set_xlabel('seconds of a training step, one thread')
    right.margins(x=0.2)
    for label, colour in (('global attention', 'tab:red'), ('without', 'tab:blue')):
        right.plot([], [], 'o', color=colour, label=label)
    right.legend(fontsize=8, loc='lower right')
    for axes in (left, right):
        axes.grid(alpha=0.3)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)


# --- the study ------------------------------------------------------------------------------------


def study(args: argparse.Namespace, command: str) -> dict:
    """Trains missing runs and times steps; returns the results, with the command line."""
    allocator = tune()
    subprocess.run([sys.executable, ROOT / 'demo/shapes.py', '--relation'], check=True)
    os.environ['OMP_NUM_THREADS'] = '1'  # for the processes that train
    backbones: dict[str, dict] = {name: {'runs': {}} for name in args.only}
    one_process_a_run = dict(mp_context=multiprocessing.get_context('spawn'), max_tasks_per_child=1)
    with ProcessPoolExecutor(args.jobs, initializer=tune, **one_process_a_run) as pool:
        jobs = {
            (seed, name): pool.submit(
                *(train, args.work_dir.absolute() / f'seed-{seed}' / BACKBONES[name]),
                *(BACKBONES[name], seed, args.cfg_options),
            )
            for seed, name in itertools.product(args.seeds, args.only)
        }
        try:
            for (seed, name), job in jobs.items():
                backbones[name]['runs'][str(seed)] = job.result()
                print(f'{name}, seed {seed}: {job.result()}', flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    for name, cost in costs(args.only, args.cfg_options).items():
        backbones[name] = {**cost, **backbones[name]}
    cfg = load_config(BACKBONES['ResNet'], args.cfg_options)
    measured = (
        f'{cfg.train_cfg.max_iters} steps of {cfg.train_dataloader.batch_size} images, seeds '
        f'{", ".join(map(str, args.seeds))}, {args.jobs} runs at once; '
        f'{describe(circumstances("cpu", allocator))}'
    )
    return {'command': command, 'measured': measured, 'backbones': backbones}


def main(argv: list[str] | None = None) -> None:
    """Runs the study, or reads its results; prints the table and draws the plot."""
    args = parse_args(argv)
    if args.render:
        results = json.loads(args.out.read_text(encoding='utf-8'))
    else:
        words = shlex.join(sys.argv[1:] if argv is None else argv)
        results = study(args, f'python tools/analysis_tools/plugin_study.py {words}'.strip())
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(results, indent=1) + '\n', encoding='utf-8')
    print(table(results))
    plot(results, args.plot)


if __name__ == '__main__':
    sys.exit(run_tool(main, 'plugin_study.py'))
