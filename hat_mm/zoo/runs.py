"""Reads what the files of a training run recorded, for its entry in a metafile."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmengine.config import Config

from hat_mm.weights import fileio

from .publish import NOT_VALIDATED, check_published

__all__ = ['Run', 'read_run']


@dataclass(frozen=True)
class Run:
    """What the files of a training run say about one of its checkpoints.

    Attributes:
        stem: Name of the run's config without ``.py``.
        settings: The config with the command line's options applied.
        metadata: ``Metadata`` of the entry: only what is recorded.
        results: ``Results`` of the entry, measured with the checkpoint's weights.
        notes: Notes for the user.
    """

    stem: str
    settings: Mapping[str, Any]
    metadata: dict[str, Any]
    results: list[dict[str, Any]]
    notes: tuple[str, ...]


# Last part of a metric's name -> task, name, factor to the metafiles' unit, decimals there.
_METRICS = {
    'bbox_mAP': ('Object Detection', 'box AP', 100, 1),
    'segm_mAP': ('Instance Segmentation', 'mask AP', 100, 1),
    'mIoU': ('Semantic Segmentation', 'mIoU', 1, 2),
    'top1': ('Image Classification', 'Top 1 Accuracy', 1, 2),
    'top5': ('Image Classification', 'Top 5 Accuracy', 1, 2),
}
# Type of a dataset with its standard classes -> name in metafiles.
_DATA_SETS = {
    'ADE20KDataset': 'ADE20K',
    'CityscapesDataset': 'Cityscapes',
    'CocoDataset': 'COCO',
    'ImageNet': 'ImageNet-1k',
    'ImageNet21k': 'ImageNet-21k',
}
_SOFTWARE = (
    'PyTorch', 'TorchVision', 'OpenCV', 'MMEngine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain',
    'hat_mm',
)  # fmt: skip


def read_run(
    work_dir: str | Path,
    weights: str | Path,
    *,
    dataset: str | None = None,
    unfinished: bool = False,
) -> Run:
    """Reads what a training run recorded about a published checkpoint.

    Args:
        work_dir: Folder of the run, with ``<timestamp>/vis_data/``.
        weights: The file that :func:`publish` made of one of its checkpoints.
        dataset: Name of the dataset, if its type does not determine it.
        unfinished: Accepts a run that has not reached the end of its schedule; the number of epochs
            is then that of the checkpoint.

    Raises:
        pickle.UnpicklingError: ``weights`` is damaged or carries code.
        ValueError: ``weights`` is not a published file, or belongs to another run; the run is not
            finished, was not validated after the checkpoint was written, or records too little.
        OSError: A file or folder is missing.
    """
    work_dir, weights = Path(work_dir), Path(weights)
    check_published(weights)
    meta = fileio.read(weights).get('meta') or {}
    if meta.get('published', {}).get('weights') == NOT_VALIDATED:
        raise ValueError(
            f'{weights} holds weights that no validation has measured: {NOT_VALIDATED}'
        )
    # mmengine's experiment name: the name of the config and the start time.
    started = re.fullmatch(r'(.+)_(\d{8}_\d{6})', str(meta.get('experiment_name')))
    if not started:
        raise ValueError(f'{weights} does not say which run wrote it: it has no experiment_name')
    folder = work_dir / started[2]
    lines = _log(folder)
    if not lines:
        raise FileNotFoundError(
            f'{weights.name} was written by the run of {folder.name}, of which {work_dir} has no '
            f"log ({folder.name}/vis_data/{folder.name}.json, which the visualizer's "
            'LocalVisBackend writes)'
        )
    settings = Config.fromfile(folder / 'vis_data' / 'config.py', import_custom_modules=False)

    epoch, iteration = meta['epoch'], meta['iter']
    logger = settings.get('default_hooks', {}).get('logger') or {}
    counts_epochs = logger.get('log_metric_by_epoch', True)
    step = epoch if counts_epochs else iteration
    measured = _validation(lines, step, iteration, folder)

    by_epoch = 'max_epochs' in settings.train_cfg
    unit, reached = ('epoch', epoch) if by_epoch else ('iter', iteration)
    total = settings.train_cfg[f'max_{unit}s']
    notes: list[str] = []
    # A training record names an epoch that has begun, a validation record one that has ended.
    done = [line.get('step') for line in lines if by_epoch == ('iter' not in line)]
    if by_epoch and not counts_epochs:
        done = []
    if max(reached, *done, 0) < total:
        if not unfinished:
            raise ValueError(
                f'the run in {work_dir} has not reached the end of its schedule ({total} {unit}s; '
                f'the checkpoint is of {reached}): finish it with tools/train.py --resume, or '
                'say --unfinished'
            )
        notes.append(f'the schedule has {total} {unit}s, the log does not show that they were done')
        total = reached

    name = dataset or _data_set(settings.get('train_dataloader'))
    recorded = _environment(folder / f'{folder.name}.log')
    metadata: dict[str, Any] = {'Training Data': name}
    metadata['Epochs' if by_epoch else 'Iterations'] = total
    metadata['Checkpoint Epoch' if by_epoch else 'Checkpoint Iteration'] = reached
    hardware = _hardware(settings, lines, recorded)
    metadata |= {key: value for key, value in hardware.items() if value is not None}
    notes += [f'{k} left out: the log does not say' for k, v in hardware.items() if v is None]
    metadata['Date'] = re.sub(r'(\d{4})-?(\d{2})-?(\d{2}).*', r'\1-\2-\3', meta['time'])
    metadata['Software'] = {key: recorded[key] for key in _SOFTWARE if key in recorded}
    metadata['Seed'] = meta['seed']
    results = _results(measured, dataset or _data_set(settings.get('val_dataloader')))
    return Run(started[1], settings, metadata, results, tuple(notes))


def _log(folder: Path) -> list[dict[str, Any]]:
    """The records of a log; those of training have ``iter``, those of validation do not."""
    path = folder / 'vis_data' / f'{folder.name}.json'
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]


def _validation(
    lines: Sequence[Mapping[str, Any]], step: int, iteration: int, folder: Path
) -> Mapping[str, Any]:
    """The record of the validation right after a checkpoint was saved."""
    last, steps, found = 0, [], []
    for line in lines:
        if 'iter' not in line:
            steps.append(line['step'])
            if line['step'] == step and last <= iteration:
                found.append(line)
            continue
        last = line['iter']
        if last <= iteration:  # same epoch, but the checkpoint was saved after that validation
            found = []
    if len(found) != 1:
        raise ValueError(
            f'the log {folder} must have one validation of the checkpoint (step {step}, iteration '
            f'{iteration}), but has {len(found)}; its steps are {", ".join(map(str, steps))}. '
            'Publish a checkpoint that was validated; of a schedule of iterations, train with '
            'default_hooks.logger.log_metric_by_epoch=False'
        )
    return found[0]


def _environment(path: Path) -> dict[str, str]:
    """The system and run-time environment at the start of a log."""
    if not path.is_file():
        return {}
    text = path.read_text(encoding='utf-8', errors='replace')
    block = re.search(r'^System environment:\n(.*?)^-{20}', text, re.MULTILINE | re.DOTALL)
    found = re.findall(r'^ {4}([^\s:][^:\n]*): (.*)$', block[1] if block else '', re.MULTILINE)
    recorded = {key: value.strip() for key, value in found}
    # What tools/train.py adds, such as `hat_mm 0.1.0, mmcv 2.1.0`.
    if line := re.search(r' - INFO - Software: (.+)$', text, re.MULTILINE):
        recorded |= dict(part.split(' ', 1) for part in line[1].split(', '))
    return recorded


def _data_set(loader: Any) -> str:
    dataset = (loader or {}).get('dataset') or {}
    replaced = 'metainfo' in dataset
    while 'dataset' in dataset:
        dataset = dataset['dataset']
        replaced = replaced or 'metainfo' in dataset
    kind = str(dataset.get('type')).rpartition('.')[2]
    if kind in _DATA_SETS and not replaced:
        return _DATA_SETS[kind]
    raise ValueError(
        f'{kind}{" with classes of its own" * replaced} does not tell the name of the data set: '
        'give it with --dataset'
    )


def _hardware(
    settings: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], recorded: Mapping[str, str]
) -> dict[str, Any]:
    """Batch size, GPUs and their memory; None for what is not recorded."""
    processes = int(recorded.get('GPU number', 0))  # mmengine's name for the number of processes
    images = settings['train_dataloader']['batch_size']
    steps = settings['optim_wrapper'].get('accumulative_counts', 1)
    memory = max((line.get('memory', 0) for line in lines), default=0)
    gpus = {value for key, value in recorded.items() if re.fullmatch(r'GPU [\d,]+', key)}
    one_kind = len(gpus) == 1 and processes
    return {
        'Batch Size': processes * images * steps or None,
        'Training Memory (GB)': round(memory / 1024, 1) or None,
        'Training Resources': f'{processes}x {gpus.pop()} GPUs' if one_kind else None,
    }


def _results(measured: Mapping[str, Any], dataset: str) -> list[dict[str, Any]]:
    results: dict[str, dict[str, Any]] = {}
    for key, value in measured.items():
        metric = _METRICS.get(key.rpartition('/')[2])
        # mmdet gives -1 if there is nothing to detect.
        if metric and math.isfinite(value) and value >= 0:
            task, name, factor, decimals = metric
            metrics = results.setdefault(task, {})
            if name in metrics:
                raise ValueError(f'the validation has several {name}, {key} is one of them')
            metrics[name] = round(value * factor, decimals)
    if not results:
        raise ValueError(
            f'the validation has no value of a metric that metafiles know ({", ".join(_METRICS)}), '
            f'but {", ".join(f"{k}={v}" for k, v in measured.items() if k != "step")}'
        )
    return [{'Task': t, 'Dataset': dataset, 'Metrics': m} for t, m in results.items()]
