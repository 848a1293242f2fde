"""Swaps the backbone of every config that the toolboxes ship, and lists what happens.

Each leaf of mmdet, mmsegmentation and mmpretrain is parsed, swapped, built and run on a small
picture; with --steps, one leaf of each folder also takes a training step and predicts. What is
found goes to a file as soon as it is there, so the check can be interrupted; both stacks may share
the file. --render writes the tables of docs/swap.md.

The models of some leaves need more packages: lap, motmetrics and scikit-image for trackers and
BoxInst, timm for its example.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.metadata
import json
import logging
import signal
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from check_configs import batch, shorten, train_step  # imports hat_mm, which repairs the toolboxes
from mmdet.structures import ReIDDataSample
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config
from mmengine.logging import MessageHub, MMLogger
from mmengine.registry import DefaultScope
from mmengine.structures import InstanceData, PixelData
from mmseg.structures import SegDataSample
from tabulate import tabulate
from torch import nn

from hat_mm.engine.build import build_model, without_weights
from hat_mm.engine.cli import TOOLBOXES, UserError
from hat_mm.engine.edits import configs_of, write
from hat_mm.engine.maps import check_model, without_groups
from hat_mm.engine.swap import Refused, Swap, plan_swap

BACKBONES = ('fastervit-0', 'hat-net-tiny')
SWAPPED = ('swapped', 'refused', 'failed', 'broken', 'fragment')
STEPPED = ('stepped', 'did not step')
SECONDS = 300
"""Most seconds for one config."""


def installed_stack() -> str:
    """Whose packages are installed."""
    try:
        importlib.metadata.distribution('onedl-mmdetection')
    except importlib.metadata.PackageNotFoundError:
        return 'OpenMMLab'
    return 'OneDL'


STACK = installed_stack()

checked: dict[str, str] = {}  # models that this process has run, and their errors


def leaves(toolbox: str) -> Iterator[str]:
    """The configs of a toolbox, by their paths in its folder."""
    root = configs_of(toolbox)
    for path in sorted(root.rglob('*.py')):
        if '_base_' not in path.parts:
            yield str(path.relative_to(root))


def check(toolbox: str, leaf: str, backbone: str) -> dict[str, Any]:
    """Swaps one backbone.

    Returns:
        ``outcome``: ``swapped``, ``refused``, ``failed``, ``broken`` (mmengine cannot read it) or
        ``fragment`` (it has no model); ``why`` for the others than ``swapped``.
    """
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(SECONDS)
    start = time.perf_counter()
    found = dict(stack=STACK, toolbox=toolbox, leaf=leaf, backbone=backbone)
    try:
        outcome, why = _check(configs_of(toolbox) / leaf, backbone)
    except Exception as error:
        outcome, why = 'failed', f'{type(error).__name__}: {" ".join(str(error).split())}'
    finally:
        signal.alarm(0)
    return found | dict(outcome=outcome, why=why[:500], seconds=time.perf_counter() - start)


# --- a training step ------------------------------------------------------------------------------


def step(toolbox: str, leaf: str, backbone: str) -> dict[str, Any]:
    """Takes a training step and predicts, with few blocks.

    Returns:
        ``outcome``, ``stepped`` or ``did not step``, and ``why``.
    """
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(SECONDS)
    found = dict(stack=STACK, toolbox=toolbox, leaf=leaf, backbone=backbone)
    found |= dict(outcome='stepped', why='')
    try:
        # Distillation names the teacher's config by a path in the toolbox's repository.
        with contextlib.chdir(configs_of(toolbox).parent):
            _step(plan_swap(Config.fromfile(configs_of(toolbox) / leaf), backbone, check=False))
    except Exception as error:
        why = f'{type(error).__name__}: {" ".join(str(error).split())}'[:500]
        found |= dict(outcome='did not step', why=why)
    finally:
        signal.alarm(0)
    return found


def _step(swap: Swap) -> None:
    cfg = swap.cfg
    torch.manual_seed(0)
    if 'detector' in cfg.model:  # of a tracker, whose own pictures are frames of a video
        cfg.model = cfg.model.detector
        cfg.data_preprocessor = cfg.model.get('data_preprocessor', dict(type='DetDataPreprocessor'))
    shorten(cfg)
    model = build_model(Config(dict(cfg, model=without_groups(without_weights(cfg.model)))))
    model.init_weights()
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        # What is only tested, such as DeepSORT, names no optimizer.
        given = cfg.get('optim_wrapper') or dict(optimizer=dict(type='SGD', lr=0.01))
        wrapper = {k: v for k, v in given.items() if k not in ('loss_scale', 'dtype')}
        if hasattr(model, 'set_epoch'):  # what a hook does for TOOD
            model.set_epoch(0)
        MessageHub.get_current_instance().update_info_dict(dict(iter=0, epoch=0))
        unused = cfg.get('find_unused_parameters')
        train_step(
            model,
            wrapper | dict(type='OptimWrapper'),
            some_pictures(cfg, model),
            reached=nn.Module() if unused else model.backbone,
        )
        model.eval()
        with torch.no_grad():
            if hasattr(model, 'with_target_generator'):
                return  # what trains without labels does not predict
            model.test_step(some_pictures(cfg, model, count=1))


def some_pictures(cfg: Config, model: Any, count: int = 2) -> dict[str, Any]:
    """Random pictures with truth of all kinds, in the form that a toolbox's loader returns."""
    classes = min(_numbers_of_classes(cfg.model), default=80)
    if cfg.default_scope == 'mmpretrain' or type(model).__name__ == 'BaseReID':
        made = batch(Config(dict(cfg, default_scope='mmpretrain')), count)
        made['inputs'] = made['inputs'][:, : model.backbone.in_channels]
        if cfg.default_scope == 'mmdet':  # persons, whose whole height its head pools
            made['inputs'] = made['inputs'].repeat(1, 1, 4, 2)[..., :128]
            made['data_samples'] = [
                ReIDDataSample().set_gt_label(one.gt_label) for one in made['data_samples']
            ]
        if not hasattr(model, 'with_target_generator'):
            return made
        return made | dict(inputs=[made['inputs']] * 2)  # training without labels takes two views
    if cfg.default_scope == 'mmseg':
        size = tuple(cfg.model.data_preprocessor.size)
        samples = [
            SegDataSample(metainfo=dict(img_shape=size, ori_shape=size)) for _ in range(count)
        ]
        for sample in samples:
            sample.gt_sem_seg = PixelData(data=torch.randint(0, classes, (1, *size)))
        images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for _ in range(count)]
        return dict(inputs=images, data_samples=samples)
    shapes = [[3, 288, 320]] * count  # of one size, as YOLACT wants them
    truth = dict(num_items=[3] * count, with_mask=True, with_semantic=True, use_box_type=True)
    made = demo_mm_inputs(count, shapes, num_classes=min(max(classes, 2), 80), **truth)
    for sample in made['data_samples']:
        sample.gt_instances.labels %= classes
        if getattr(model, 'rpn_head', None) is None:
            sample.proposals = InstanceData(bboxes=sample.gt_instances.bboxes.tensor.clone())
    return made


def _numbers_of_classes(cfg: Any) -> Iterator[int]:
    if isinstance(cfg, dict):
        for key, value in cfg.items():
            if key in ('num_classes', 'num_things_classes') and isinstance(value, int):
                yield value
            else:
                yield from _numbers_of_classes(value)
    elif isinstance(cfg, (list, tuple)):
        for value in cfg:
            yield from _numbers_of_classes(value)


# --- all of them ----------------------------------------------------------------------------------


def _too_long(*_: Any) -> None:
    raise TimeoutError(f'more than {SECONDS} s')


def _check(path: Path, backbone: str) -> tuple[str, str]:
    try:
        cfg = Config.fromfile(path)
    except Exception as error:
        return 'broken', f'{type(error).__name__}: {error}'
    if not isinstance(cfg.get('model'), dict):
        return 'fragment', 'no model'
    try:
        swap = plan_swap(cfg, backbone, check=False)
    except Refused as error:
        return 'refused', str(error)
    with TemporaryDirectory() as folder:
        write(Path(folder, 'swapped.py'), swap.edits.text(str(path), swap.notes), swap.cfg)
    text = json.dumps(without_weights(swap.cfg.model.to_dict()), default=str, sort_keys=True)
    key = hashlib.sha256(text.encode()).hexdigest()
    if key not in checked:
        try:
            check_model(swap.cfg)
            checked[key] = ''
        except UserError as error:
            checked[key] = str(error)
    if not checked[key]:
        return 'swapped', ''
    try:
        cfg.default_scope = swap.cfg.default_scope
        build_model(without_weights(cfg))
    except Exception as error:
        return 'broken', f'with its own backbone, too: {type(error).__name__}: {error}'
    return 'failed', checked[key]


def _quiet() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter('ignore')
    MMLogger.get_current_instance().setLevel('ERROR')
    logging.disable(logging.ERROR)


def read(path: Path) -> list[dict[str, Any]]:
    """What was found before."""
    lines = path.read_text(encoding='utf-8').splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def key(found: dict[str, Any]) -> tuple[str, str, str]:
    return found['toolbox'], found['leaf'], found['backbone']


def one_of_each_folder(known: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """The first leaf of each folder whose backbone was swapped, or was to be."""
    jobs = {}
    for found in sorted(known, key=key):
        if found['outcome'] in ('swapped', 'failed'):
            folder = Path(found['leaf']).parts[0]
            jobs.setdefault((found['toolbox'], folder, found['backbone']), key(found))
    return list(jobs.values())


# --- tables ---------------------------------------------------------------------------------------

BEGIN, END = '<!-- begin of tables: tools/dev/check_swaps.py -->', '<!-- end of tables -->'


def render(page: Path, known: list[dict[str, Any]]) -> None:
    """Puts the tables between the marks of a page."""
    text = page.read_text(encoding='utf-8')
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    parts = [totals(known), reasons(known, 'refused'), reasons(known, 'failed'), by_folder(known)]
    page.write_text(f'{before}{BEGIN}\n\n{"".join(parts)}{END}{after}', encoding='utf-8')


def table(rows: list[dict[str, Any]]) -> str:
    return tabulate(rows, headers='keys', tablefmt='github', disable_numparse=True) + '\n\n'


def counts(found: list[dict[str, Any]]) -> dict[str, Any]:
    """How many leaves of each outcome, and shares in percent."""
    number = Counter(one['outcome'] for one in found)
    model = sum(number[outcome] for outcome in ('swapped', 'refused', 'failed'))
    tried, steps = number['swapped'] + number['failed'], number['stepped'] + number['did not step']
    return {
        'configs': sum(number[outcome] for outcome in SWAPPED),
        'no model': number['fragment'],
        'broken': number['broken'],
        'refused': f'{number["refused"]} ({number["refused"] / max(model, 1):.1%})',
        'failed': number['failed'],
        'swapped': f'{number["swapped"]} ({number["swapped"] / max(tried, 1):.1%})',
        'steps': f'{number["stepped"]} of {steps}' if steps else 'not run',
    }


def totals(known: list[dict[str, Any]]) -> str:
    """The table of stacks, backbones and toolboxes."""
    rows = []
    for stack, backbone in dict.fromkeys((one['stack'], one['backbone']) for one in known):
        for toolbox in (*TOOLBOXES, 'all'):
            found = [
                one
                for one in known
                if (one['stack'], one['backbone']) == (stack, backbone)
                and toolbox in (one['toolbox'], 'all')
            ]
            row = {'stack': stack, 'backbone': backbone, 'toolbox': toolbox}
            rows.append(row | counts(found))
    return table(rows)


def reasons(known: list[dict[str, Any]], outcome: str) -> str:
    """The table of reasons for an outcome, and for steps that were not taken."""
    outcomes = (outcome, 'did not step') if outcome == 'failed' else (outcome,)
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for one in known:
        if one['outcome'] in outcomes:
            why = one['why'].replace(one['backbone'], 'the backbone').replace('|', '\\|')
            found.setdefault((one['toolbox'], why[:200]), []).append(one)
    rows = [
        {
            'toolbox': toolbox,
            'configs': len({one['leaf'] for one in ones}),
            'such as': min(one['leaf'] for one in ones),
            outcome: f'{", ".join(sorted({one["backbone"] for one in ones}))}: {why}'
            if outcome == 'failed'
            else why,
        }
        for (toolbox, why), ones in sorted(found.items())
    ]
    return table(rows) if rows else ''


def by_folder(known: list[dict[str, Any]]) -> str:
    """The table of folders, of the default stack."""
    known = [one for one in known if one['stack'] == 'OpenMMLab']
    rows = []
    folders = sorted({(one['toolbox'], Path(one['leaf']).parts[0]) for one in known})
    for toolbox, folder in folders:
        row: dict[str, Any] = {'toolbox': toolbox, 'folder': folder}
        for backbone in dict.fromkeys(one['backbone'] for one in known):
            found = [
                one
                for one in known
                if (one['toolbox'], Path(one['leaf']).parts[0], one['backbone'])
                == (toolbox, folder, backbone)
            ]
            number = Counter(one['outcome'] for one in found)
            shown = ', '.join(f'{number[name]} {name}' for name in SWAPPED if number[name])
            row[backbone] = shown
            steps = [one['outcome'] for one in found if one['outcome'] in STEPPED]
            row[f'{backbone}, step'] = 'yes' if steps == ['stepped'] else 'no' if steps else ''
        rows.append(row)
    return f'<details><summary>By folder</summary>\n\n{table(rows)}</details>\n\n'


def main(argv: list[str] | None = None) -> None:
    """Checks what has not been checked, and prints the counts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--toolboxes', nargs='+', choices=TOOLBOXES, default=list(TOOLBOXES))
    parser.add_argument('--backbones', nargs='+', default=list(BACKBONES))
    parser.add_argument(
        '--steps', action='store_true', help='a training step with one leaf of each folder'
    )
    parser.add_argument('--only', default='*', metavar='GLOB', help="leaves, such as 'yolox/*'")
    parser.add_argument('--jobs', type=int, default=2, help='processes')
    parser.add_argument('--out', type=Path, default=Path('work_dirs/check_swaps.jsonl'))
    parser.add_argument('--render', type=Path, metavar='PAGE', help='only write the tables')
    args = parser.parse_args(argv)
    if args.render:
        render(args.render, read(args.out))
        return
    known = [one for one in read(args.out) if one['stack'] == STACK]
    if args.steps:
        jobs = one_of_each_folder(known)
    else:
        jobs = [(t, leaf, b) for b in args.backbones for t in args.toolboxes for leaf in leaves(t)]
    outcomes = STEPPED if args.steps else SWAPPED
    done = {key(found) for found in known if found['outcome'] in outcomes}
    todo = [job for job in jobs if job not in done and Path(job[1]).match(args.only)]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with (
        args.out.open('a', encoding='utf-8') as file,
        ProcessPoolExecutor(args.jobs, initializer=_quiet) as pool,
    ):
        for run in as_completed([pool.submit(step if args.steps else check, *job) for job in todo]):
            file.write(json.dumps(run.result()) + '\n')
            file.flush()
    print(totals(read(args.out)))


if __name__ == '__main__':
    main()
