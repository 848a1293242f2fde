"""Trains small backbones where only global context tells classes apart, and compares them.

The set is that of ``demo/shapes.py --relation``. Each run is an ordinary one of
``tools/train.py`` in a process of its own. The runs of a seed come one after the other before the
next seed's, so whatever happens to the machine meanwhile happens to all backbones. Runs that are
done are skipped, so the same command goes on where an interrupted one stopped. Steps are timed at
the end, in turns. The results go to a JSON file, a Markdown table to the screen, a plot to a PNG.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hat_mm import compat
from hat_mm.engine.cli import UserError, run_tool
from hat_mm.engine.environment import circumstances, describe

ROOT = Path(__file__).resolve().parents[2]
BACKBONES = {
    'ResNet': 'resnet-toy',
    'ResNet + HAT': 'resnet-hat-toy',
    'ResNet + H-MHSA': 'resnet-hmhsa-toy',
    'Swin': 'swin-toy',
    'SwinHAT': 'swin-hat-toy',
    'FasterViT without carriers': 'fastervit-no-carriers-toy',
    'FasterViT': 'fastervit-toy',
}
GLOBAL = ('ResNet + HAT', 'ResNet + H-MHSA', 'SwinHAT', 'FasterViT')
"""Backbones in which every place of an image attends to every other; the rest are their peers."""
RESULT = 'result.json'


@dataclasses.dataclass(frozen=True)
class Metrics:
    """What one run reached on the validation images.

    Attributes:
        mAP: COCO's mean average precision of boxes, IoU 0.5 to 0.95.
        recall: COCO's average recall of boxes whatever their class, at most 100 an image.
        right: Share of the found objects whose class says the right kind of marker; 0.5 is chance.
    """

    mAP: float
    recall: float
    right: float


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    mmengine = compat.require('mmengine')
    parser.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2])
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/plugin_study'))
    parser.add_argument('--jobs', type=int, default=2, help='runs at once, of one thread each')
    parser.add_argument('--rounds', type=int, default=15, help='timed steps of each backbone')
    parser.add_argument('--out', type=Path, default=Path('docs/plugin_study.json'))
    parser.add_argument('--plot', type=Path, default=Path('docs/images/plugin_study.png'))
    parser.add_argument(
        '--render', action='store_true', help='only table and plot, from the file of --out'
    )
    parser.add_argument(
        '--cfg-options', nargs='+', default=[], metavar='KEY=VALUE', help='override the configs'
    )
    args = parser.parse_args(argv)
    if min(args.jobs, args.rounds) < 1 or min(args.seeds) < 0:
        parser.error('--jobs and --rounds must be at least 1, --seeds at least 0')
    if len(set(args.seeds)) < max(len(args.seeds), 2):
        parser.error('--seeds must be two or more different ones: one has no deviation')
    # As on the command line of tools/train.py, for what is timed.
    action = argparse.ArgumentParser()
    action.add_argument('--cfg-options', nargs='+', action=mmengine.DictAction, default={})
    options = ['--cfg-options', *args.cfg_options] if args.cfg_options else []
    args.overrides = action.parse_args(options).cfg_options
    return args


# --- runs -----------------------------------------------------------------------------------------


def config_of(backbone: str) -> Path:
    """The config of a backbone, one of the values of :data:`BACKBONES`."""
    return ROOT / f'configs/toy/faster-rcnn_{backbone}_fpn_relation.py'


def load_config(backbone: str, overrides: dict) -> Any:
    """The config of a backbone with the overrides of the command line."""
    cfg = compat.require('mmengine').Config.fromfile(config_of(backbone))
    cfg.merge_from_dict(overrides)
    return cfg


def fingerprint(cfg: Any, seed: int) -> str:
    """Changes with whatever makes an earlier result stale: the config and the data set."""
    data = Path(cfg.data_root, 'dataset.json').read_text(encoding='utf-8')
    text = json.dumps([cfg.to_dict(), seed, data], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def finished(folder: Path, key: str) -> Metrics | None:
    """The result that an earlier run with the same config has left in its folder, if any."""
    try:
        result = json.loads((folder / RESULT).read_text(encoding='utf-8'))
    except (OSError, ValueError):
        return None
    return Metrics(**result['metrics']) if result['key'] == key else None


def train(folder: Path, backbone: str, seed: int, key: str, options: list[str]) -> Metrics:
    """Trains one backbone with ``tools/train.py``, unless that is done.

    Args:
        folder: Work dir of the run.
        backbone: One of the values of :data:`BACKBONES`.
        seed: Seed of weights and order of the images.
        key: Fingerprint of the run.
        options: Further ``--cfg-options``.

    Raises:
        UserError: The training failed.
    """
    metrics = finished(folder, key)
    if metrics is not None:
        print(f'{folder}: done before', flush=True)
        return metrics
    folder.mkdir(parents=True, exist_ok=True)
    predictions = folder / 'predictions'
    command = ['tools/train.py', str(config_of(backbone).relative_to(ROOT)), '--work-dir']
    command += [str(folder.absolute()), '--cfg-options', f'randomness.seed={seed}']
    command += [f'val_evaluator.outfile_prefix={predictions.absolute()}', *options]
    print(f'python {shlex.join(command)}', flush=True)
    start = time.monotonic()
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}
    with (folder / 'output.log').open('w', encoding='utf-8') as log:
        done = subprocess.run(
            [sys.executable, *command],
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if done.returncode:
        raise UserError(f'training failed; the cause stands in {folder / "output.log"}')
    metrics = read_metrics(folder)
    content = {'key': key, 'metrics': dataclasses.asdict(metrics)}
    (folder / RESULT).write_text(json.dumps(content) + '\n', encoding='utf-8')
    minutes = (time.monotonic() - start) / 60
    print(f'{folder}: {metrics}, {minutes:.1f} min', flush=True)
    return metrics


# --- results of a run -----------------------------------------------------------------------------


def read_metrics(folder: Path) -> Metrics:
    """Reads what the newest training in a work dir reached at its end.

    Args:
        folder: Work dir with ``<timestamp>/vis_data/scalars.json``, the predictions in
            ``predictions.bbox.json`` and the config, which names the annotations.

    Raises:
        UserError: The log has no validation.
    """
    logs = sorted(folder.glob('*/vis_data/scalars.json'))
    lines = logs[-1].read_text(encoding='utf-8').splitlines() if logs else []
    measured = [line for line in map(json.loads, lines) if 'coco/bbox_mAP' in line]
    if not measured:
        raise UserError(f'the log in {folder} has no validation with coco/bbox_mAP')
    cfg = compat.require('mmengine').Config.fromfile(logs[-1].parent / 'config.py')
    right = marker_right(
        json.loads((ROOT / cfg.val_evaluator.ann_file).read_text(encoding='utf-8')),
        json.loads((folder / 'predictions.bbox.json').read_text(encoding='utf-8')),
    )
    return Metrics(measured[-1]['coco/bbox_mAP'], measured[-1]['coco/AR@100'], right)


def marker_right(truth: dict, predictions: list[dict]) -> float:
    """Share of the found objects that are called by the right kind of marker.

    An object is found if a box of its outline, of whichever kind, covers it with an IoU of at least
    0.5; the box with the highest score among them says the kind. Unlike the average precision this
    does not depend on how exact boxes are.

    Args:
        truth: COCO's annotations. Names of categories are an outline, a hyphen and a kind.
        predictions: COCO's list of predicted boxes, by the same categories.

    Returns:
        The share, between 0 and 1; nan if nothing was found.
    """
    from pycocotools import mask

    names = {c['id']: c['name'].split('-') for c in truth['categories']}
    boxes: dict[tuple, list[dict]] = {}
    for box in predictions:
        boxes.setdefault((box['image_id'], names[box['category_id']][0]), []).append(box)
    right = []
    for object_ in truth['annotations']:
        outline, kind = names[object_['category_id']]
        near = boxes.get((object_['image_id'], outline), [])
        if not near:
            continue
        ious = mask.iou([b['bbox'] for b in near], [object_['bbox']], [0])[:, 0]
        found = [b for b, iou in zip(near, ious, strict=True) if iou >= 0.5]
        if found:
            best = max(found, key=lambda b: b['score'])
            right.append(names[best['category_id']][1] == kind)
    return sum(right) / len(right) if right else float('nan')


# --- costs ----------------------------------------------------------------------------------------


def costs(overrides: dict, rounds: int) -> dict[str, dict[str, float]]:
    """Measures what a training step of each detector takes, step by step in turns on one thread.

    Args:
        overrides: Changes to the configs.
        rounds: Timed steps of each.

    Returns:
        For each of :data:`BACKBONES`, ``parameters`` of the backbone and ``seconds`` of a step
        (median): loss, gradient and update, with the images loaded before.
    """
    import torch

    registry = compat.require('mmdet.registry')
    compat.require('mmdet.utils').register_all_modules()
    build_optim_wrapper = compat.require('mmengine.optim').build_optim_wrapper
    collate = compat.require('mmengine.dataset').pseudo_collate
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found, steps = {}, {}
    for name, backbone in BACKBONES.items():
        cfg = load_config(backbone, overrides)
        model = registry.MODELS.build(cfg.model).train()
        images = registry.DATASETS.build(cfg.train_dataloader.dataset)
        batch = collate([images[i] for i in range(cfg.train_dataloader.batch_size)])
        steps[name] = (model, build_optim_wrapper(model, cfg.optim_wrapper), batch)
        found[name] = {'parameters': sum(p.numel() for p in model.backbone.parameters())}
    seconds: dict[str, list[float]] = {name: [] for name in BACKBONES}
    for round_ in range(rounds + 1):  # the first is a warm-up
        for name, (model, optimizer, batch) in steps.items():
            start = time.perf_counter()
            model.train_step(batch, optimizer)
            if round_:
                seconds[name].append(time.perf_counter() - start)
    for name, values in seconds.items():
        found[name]['seconds'] = statistics.median(values)
    return found


# --- output ---------------------------------------------------------------------------------------


def mean_sd(values: list[float]) -> tuple[float, float]:
    """Mean and sample standard deviation."""
    return statistics.mean(values), statistics.stdev(values)


def of_runs(row: dict, metric: str) -> list[float]:
    """The values of a metric for all seeds, from an entry of ``backbones`` of the results."""
    return [run[metric] for run in row['runs'].values()]


def table(results: dict) -> str:
    """The Markdown table of the results, and what they were measured on."""
    rows = [
        ['backbone', 'mAP', 'marker right', 'recall', 'backbone parameters', 'step'],
        ['---'] * 6,
    ]
    for name, row in results['backbones'].items():
        means = [mean_sd(of_runs(row, metric)) for metric in ('mAP', 'right', 'recall')]
        (ap, ap_sd), (right, right_sd), (recall, recall_sd) = means
        rows.append(
            [
                name,
                f'{ap:.3f} ± {ap_sd:.3f}',
                f'{right:.0%} ± {right_sd:.0%}',
                f'{recall:.3f} ± {recall_sd:.3f}',
                f'{row["parameters"] / 1e6:.2f} M',
                f'{row["seconds"]:.2f} s',
            ]
        )
    lines = ['|' + '|'.join(f' {cell} ' for cell in row) + '|' for row in rows]
    lines[1] = '|' + '---|' * 6
    return '\n'.join([*lines, '', f'`{results["command"]}`; {results["measured"]}'])


def plot(results: dict, out: Path) -> None:
    """Draws mAP with its deviation for each backbone, and against the time of a step.

    Args:
        results: What the file of ``--out`` holds.
        out: PNG to write.
    """
    import matplotlib

    matplotlib.use('agg')
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.8), sharey=True)
    for index, (name, row) in enumerate(results['backbones'].items()):
        values = of_runs(row, 'mAP')
        mean, deviation = mean_sd(values)
        colour = 'tab:red' if name in GLOBAL else 'tab:blue'
        left.plot([index] * len(values), values, '.', color='grey', alpha=0.6, zorder=1)
        left.errorbar(index, mean, deviation, fmt='o', color=colour, capsize=4)
        right.errorbar(row['seconds'], mean, deviation, fmt='o', color=colour, capsize=4)
        offset = (5, -10 if index % 2 else 4)  # neighbours of like scores stand apart
        right.annotate(name, (row['seconds'], mean), offset, textcoords='offset points', fontsize=7)
    names = [name.replace(' without ', '\nwithout ') for name in results['backbones']]
    left.set_xticks(range(len(names)), names, rotation=30, ha='right', fontsize=8)
    left.set_ylim(bottom=0)
    left.set_ylabel('mAP: mean, standard deviation, seeds')
    right.set_xlabel('seconds of a training step, one thread')
    right.margins(x=0.2)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    for label, colour in (('global attention', 'tab:red'), ('without', 'tab:blue')):
        right.plot([], [], 'o', color=colour, label=label)
    right.legend(fontsize=8, loc='lower right')
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    pyplot.close(figure)


def measured_on(cfg: Any, args: argparse.Namespace) -> str:
    """Steps, hardware, versions and date, in a line."""
    return (
        f'{cfg.train_cfg.max_iters} steps of {cfg.train_dataloader.batch_size} images, seeds '
        f'{", ".join(map(str, args.seeds))}, {args.jobs} runs at once; '
        f'{describe(circumstances("cpu"))}'
    )


# --- the study ------------------------------------------------------------------------------------


def study(args: argparse.Namespace, command: str) -> dict:
    """Trains what is missing, times steps, and writes the results.

    Args:
        args: Arguments of the command line.
        command: The command line, for the results.

    Returns:
        The results, as written.
    """
    subprocess.run([sys.executable, 'demo/shapes.py', '--relation'], cwd=ROOT, check=True)
    configs = {name: load_config(backbone, args.overrides) for name, backbone in BACKBONES.items()}
    runs: dict[str, dict[str, dict]] = {name: {} for name in BACKBONES}
    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = {}
        for seed in args.seeds:
            for name, backbone in BACKBONES.items():
                folder = args.work_dir / f'seed-{seed}' / backbone
                key = fingerprint(configs[name], seed)
                job = pool.submit(train, folder, backbone, seed, key, args.cfg_options)
                jobs[name, seed] = job
        try:
            for (name, seed), job in jobs.items():
                runs[name][str(seed)] = dataclasses.asdict(job.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    costs_ = costs(args.overrides, args.rounds)
    results = {
        'command': command,
        'measured': measured_on(configs['ResNet'], args),
        'backbones': {name: {**costs_[name], 'runs': runs[name]} for name in BACKBONES},
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=1) + '\n', encoding='utf-8')
    return results


def main(argv: list[str] | None = None) -> None:
    """Runs the study, or reads its results; prints the table and draws the plot."""
    args = parse_args(argv)
    if args.render:
        results = json.loads(args.out.read_text(encoding='utf-8'))
    else:
        words = sys.argv[1:] if argv is None else argv
        results = study(
            args, f'python tools/analysis_tools/plugin_study.py {shlex.join(words)}'.strip()
        )
    print(table(results))
    plot(results, args.plot)


if __name__ == '__main__':
    sys.exit(run_tool(main, 'plugin_study.py'))
