"""Reads what the files of a training run have recorded, for its entry in a metafile."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hat_mm import compat
from hat_mm.weights import fileio

from .publish import NOT_VALIDATED, check_published

__all__ = ['Run', 'read_run']


@dataclass(frozen=True)
class Run:
    """What the files of a training run say of a checkpoint that it wrote.

    Attributes:
        stem: Name of the run's config without ``.py``.
        settings: The config with the options of the command line.
        metadata: ``Metadata`` of the entry: what is recorded, and nothing else.
        results: ``Results`` of the entry, measured with the checkpoint's weights.
        notes: What a person should know.
    """

    stem: str
    settings: Mapping[str, Any]
    metadata: dict[str, Any]
    results: list[dict[str, Any]]
    notes: tuple[str, ...]


# Last part of a metric's name -> task, name, factor to the unit and decimals of metafiles.
_METRICS = {
    'bbox_mAP': ('Object Detection', 'box AP', 100, 1),
    'segm_mAP': ('Instance Segmentation', 'mask AP', 100, 1),
    'mIoU': ('Semantic Segmentation', 'mIoU', 1, 2),
    'top1': ('Image Classification', 'Top 1 Accuracy', 1, 2),
    'top5': ('Image Classification', 'Top 5 Accuracy', 1, 2),
}
# Type of a data set whose classes are not replaced -> name in metafiles.
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
_STAMP = re.compile(r'\d{8}_\d{6}')


def read_run(
    work_dir: str | Path,
    weights: str | Path,
    *,
    dataset: str | None = None,
    unfinished: bool = False,
) -> Run:
    """Reads what a training run has recorded of a published checkpoint.

    Args:
        work_dir: Folder of the run, with its config and ``<timestamp>/vis_data/``.
        weights: The file that :func:`publish` made of one of its checkpoints.
        dataset: Name of the data set, where its type does not tell it.
        unfinished: Accepts a run that has not reached the end of its schedule; the epochs are then
            those of the checkpoint.

    Raises:
        pickle.UnpicklingError: ``weights`` is damaged or carries code.
        ValueError: ``weights`` is not a published file or is of another run; the run is not
            finished, was not validated when the checkpoint was written, or says too little.
        OSError: A file or folder is missing.
    """
    work_dir, weights = Path(work_dir), Path(weights)
    check_published(weights)
    checkpoint = fileio.read(weights)
    meta = checkpoint.get('meta') if isinstance(checkpoint, Mapping) else None
    published = meta.get('published') if isinstance(meta, Mapping) else None
    if not isinstance(published, Mapping):
        raise ValueError(
            f'{weights} is no published file: it has no metadata of one; '
            'tools/model_converters/publish_model.py makes one'
        )
    if published.get('weights') == NOT_VALIDATED:
        raise ValueError(
            f'{weights} holds weights that no validation has measured: {NOT_VALIDATED}'
        )
    notes: list[str] = []
    folder = _log_folder(work_dir, meta, weights.name, notes)
    lines = _log_lines(folder)
    recorded = _environment(folder / f'{folder.name}.log')
    stem, settings = _settings(work_dir, folder, meta)

    epoch, iteration = meta.get('epoch'), meta.get('iter')
    if not isinstance(epoch, int) or not isinstance(iteration, int):
        raise ValueError(f'{weights} does not say at which epoch and iteration it was saved')
    logger = settings.get('default_hooks', {}).get('logger') or {}
    step = epoch if logger.get('log_metric_by_epoch', True) else iteration
    measured = _validation(lines, step, iteration, folder)

    kind = _class_name(settings.train_cfg.get('type', ''))
    by_iteration = 'Iter' in kind or (not kind and not settings.train_cfg.get('by_epoch', True))
    unit, reached = ('iter', iteration) if by_iteration else ('epoch', epoch)
    total = settings.train_cfg.get(f'max_{unit}s')
    if not total:
        raise ValueError(f'the config of the run in {work_dir} has no train_cfg.max_{unit}s')
    if max(reached, _last(work_dir, folder, unit, iteration)) < total:
        if not unfinished:
            raise ValueError(
                f'the run in {work_dir} has not reached the end of its schedule ({total} {unit}s; '
                f'the checkpoint is of {reached}): finish it with tools/train.py --resume, or '
                'say --unfinished'
            )
        notes.append(f'the schedule has {total} {unit}s, the log does not show that they were done')
        total = reached

    name = dataset or _data_set(settings.get('train_dataloader'))
    metadata: dict[str, Any] = {'Training Data': name}
    metadata['Iterations' if by_iteration else 'Epochs'] = total
    metadata['Checkpoint Iteration' if by_iteration else 'Checkpoint Epoch'] = reached
    metadata |= _hardware(settings, lines, recorded, notes)
    metadata['Date'] = _date(meta.get('time') or folder.name)
    software = {key: recorded[key] for key in _SOFTWARE if key in recorded}
    if 'MMEngine' not in software and meta.get('mmengine_version'):
        software['MMEngine'] = meta['mmengine_version']
    if software:
        metadata['Software'] = software
    seed = meta.get('seed', recorded.get('seed'))
    if str(seed).isdigit():
        metadata['Seed'] = int(seed)
    results = _results(measured, dataset or _data_set(settings.get('val_dataloader')), notes)
    return Run(stem, settings, metadata, results, tuple(notes))


def _log_folder(work_dir: Path, meta: Mapping[str, Any], name: str, notes: list[str]) -> Path:
    """The folder of logs of the process that wrote the checkpoint."""
    if not work_dir.is_dir():
        raise FileNotFoundError(f'work dir {str(work_dir)!r} does not exist')
    folders = _log_folders(work_dir)
    if not folders:
        raise FileNotFoundError(
            f'{work_dir} has no log of a training (<timestamp>/vis_data/<timestamp>.json, which '
            "the visualizer's LocalVisBackend writes)"
        )
    written = re.search(rf'({_STAMP.pattern})$', str(meta.get('experiment_name', '')))
    if written:
        for folder in folders:
            if folder.name == written[1]:
                return folder
        raise ValueError(
            f'{name} was written by the run of {written[1]}, but {work_dir} has logs of '
            f'{", ".join(folder.name for folder in folders)}'
        )
    if len(folders) > 1:
        notes.append(
            f'{name} does not say which run wrote it: took the newest of {len(folders)}, '
            f'{folders[-1].name}'
        )
    return folders[-1]


def _log_folders(work_dir: Path) -> list[Path]:
    """The folders of logs of all processes that trained there, the oldest first."""
    return sorted(f for f in work_dir.iterdir() if _STAMP.fullmatch(f.name) and _scalars(f))


def _scalars(folder: Path) -> Path | None:
    for name in (f'{folder.name}.json', 'scalars.json'):
        path = folder / 'vis_data' / name
        if path.is_file() and path.stat().st_size:
            return path
    return None


def _log_lines(folder: Path) -> list[dict[str, Any]]:
    """The records of a log: those of training have ``iter``, those of validation have not."""
    path = _scalars(folder)
    lines = path.read_text(encoding='utf-8').splitlines()
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            if number < len(lines):  # a process that was killed may leave half a line
                raise ValueError(f'{path}, line {number} is no JSON: {error}') from error
            continue
        if not isinstance(record, dict):
            raise ValueError(f'{path}, line {number} is no record of a log: {line[:60]}')
        records.append(record)
    return records


def _environment(path: Path) -> dict[str, str]:
    """The system and run-time environment that a log starts with."""
    if not path.is_file():
        return {}
    text = path.read_text(encoding='utf-8', errors='replace')
    block = re.search(r'^System environment:\n(.*?)^-{20}', text, re.MULTILINE | re.DOTALL)
    found = re.findall(r'^ {4}([^\s:][^:\n]*): (.*)$', block[1] if block else '', re.MULTILINE)
    recorded = {key: value.strip() for key, value in found}
    # What tools/train.py adds, as `hat_mm 0.1.0, mmcv 2.1.0`.
    if line := re.search(r' - INFO - Software: (.+)$', text, re.MULTILINE):
        recorded |= dict(part.split(' ', 1) for part in line[1].split(', '))
    return recorded


def _settings(work_dir: Path, folder: Path, meta: Mapping[str, Any]) -> tuple[str, Any]:
    """Name of the run's config, and the config itself."""
    stems = sorted(path.stem for path in work_dir.glob('*.py'))
    written = re.sub(rf'_?{_STAMP.pattern}$', '', str(meta.get('experiment_name', '')))
    if not stems:
        raise FileNotFoundError(f'{work_dir} has no config (*.py) of the run')
    if len(stems) > 1 and written not in stems:
        raise ValueError(
            f'{work_dir} has several configs ({", ".join(stems)}), and the checkpoint does not '
            'say which one is its own: keep only that one'
        )
    stem = written if written in stems else stems[0]
    path = folder / 'vis_data' / 'config.py'
    if not path.is_file():
        path = work_dir / f'{stem}.py'
    settings = compat.require('mmengine').Config.fromfile(path, import_custom_modules=False)
    if not settings.get('train_cfg'):
        raise ValueError(f'{path} is no config of a training: it has no train_cfg')
    return stem, settings


def _validation(
    lines: Sequence[Mapping[str, Any]], step: int, iteration: int, folder: Path
) -> Mapping[str, Any]:
    """The record of the validation right after a checkpoint was saved."""
    steps, last, found = [], 0, []
    for index, line in enumerate(lines):
        if 'iter' in line:
            last = line['iter']
            continue
        steps.append(line.get('step'))
        following = (later['iter'] for later in lines[index + 1 :] if 'iter' in later)
        # Numbers of epochs are not enough: a checkpoint may be from the midst of one.
        if line.get('step') == step and last <= iteration < next(following, math.inf):
            found.append(line)
    if len(found) > 1:
        raise ValueError(
            f'the log {folder} does not tell which of {len(found)} validations is that of '
            f'iteration {iteration}: train with default_hooks.logger.log_metric_by_epoch=False'
        )
    if found:
        return found[0]
    raise ValueError(
        f'the log {folder} has no validation of the checkpoint (step {step}, iteration '
        f'{iteration}), but '
        + (f'of steps {", ".join(map(str, steps))}' if steps else 'none at all')
        + ': publish a checkpoint that was validated'
    )


def _last(work_dir: Path, folder: Path, unit: str, iteration: int) -> int:
    """The last iteration, or validated epoch, of a run and of those that resumed it after one."""
    last = 0
    for later in _log_folders(work_dir):
        lines = _log_lines(later)
        trained = [line['iter'] for line in lines if 'iter' in line]
        resumed = later.name > folder.name and trained and trained[0] > iteration
        if later == folder or resumed:
            # A log names an epoch when it begins; its validation is a sign of its end.
            validated = [line.get('step', 0) for line in lines if 'iter' not in line]
            last = max(last, *(trained if unit == 'iter' else validated), 0)
    return last


def _class_name(kind: Any) -> str:
    """``EpochBasedTrainLoop`` for the class, its name or its path."""
    return (kind if isinstance(kind, str) else kind.__name__).rpartition('.')[2]


def _data_set(loader: Any) -> str:
    dataset = (loader or {}).get('dataset') or {}
    replaced = 'metainfo' in dataset
    while 'dataset' in dataset:
        dataset = dataset['dataset']
        replaced = replaced or 'metainfo' in dataset
    kind = _class_name(dataset.get('type', ''))
    if kind in _DATA_SETS and not replaced:
        return _DATA_SETS[kind]
    raise ValueError(
        f'{kind or "the config"}{" with classes of its own" * replaced} does not tell the name of '
        'the data set: give it with --dataset'
    )


def _hardware(
    settings: Any,
    lines: Sequence[Mapping[str, Any]],
    recorded: Mapping[str, str],
    notes: list[str],
) -> dict[str, Any]:
    """Batch size, GPUs and their memory, as far as they are recorded."""
    found: dict[str, Any] = {}
    processes = int(recorded.get('GPU number', 0))  # mmengine's word for processes
    images = (settings.get('train_dataloader') or {}).get('batch_size')
    steps = (settings.get('optim_wrapper') or {}).get('accumulative_counts', 1)
    if processes and images:
        found['Batch Size'] = processes * images * steps
    else:
        notes.append('batch size left out: the log does not say the number of processes')
    memory = max((line.get('memory', 0) for line in lines), default=0)
    if memory:
        found['Training Memory (GB)'] = round(memory / 1024, 1)
    else:
        notes.append('training memory left out: the log has none, as of a training on the CPU')
    gpus = {value for key, value in recorded.items() if re.fullmatch(r'GPU [\d,]+', key)}
    if len(gpus) == 1 and processes:
        found['Training Resources'] = f'{processes}x {gpus.pop()} GPUs'
    else:
        notes.append('training resources left out: the log does not name GPUs of one kind')
    return found


def _date(text: str) -> str:
    found = re.match(r'(\d{4})-?(\d{2})-?(\d{2})', text)
    if not found:
        raise ValueError(f'{text!r} is no date of a checkpoint')
    return '-'.join(found.groups())


def _results(measured: Mapping[str, Any], dataset: str, notes: list[str]) -> list[dict[str, Any]]:
    results: dict[str, dict[str, Any]] = {}
    for key, value in measured.items():
        known = _METRICS.get(key.rpartition('/')[2])
        if known is None:
            continue
        task, name, factor, decimals = known
        if not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
            notes.append(f'{name} left out: the log has {key}={value}')
            continue
        metrics = results.setdefault(task, {})
        if name in metrics:
            raise ValueError(f'the validation has several {name}, {key} is one of them')
        metrics[name] = round(float(value) * factor, decimals)
    if not results:
        raise ValueError(
            f'the validation has no value of a metric that metafiles know ({", ".join(_METRICS)}), '
            f'but {", ".join(f"{k}={v}" for k, v in measured.items() if k != "step")}'
        )
    return [{'Task': t, 'Dataset': dataset, 'Metrics': m} for t, m in results.items()]
