"""Compares models: time of a forward pass or a training step, and memory.

A candidate is NAME[:KEY=VALUE,...][@FLAG+FLAG...]; NAME is a registered type such as
hat_mm.FasterViT, a config (KEYs are settings of its model; SCOPE::CONFIG is one that a toolbox
ships, such as mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py), timm/MODEL,
authors/faster_vit_0_any_res (the authors' FasterViT), an exported file (.onnx, .xml), or one of
  {peers}.
FLAGs:
{flags}
All candidates run in turns, so that whatever slows the machine affects all of them; on a CPU each
has its own process. Memory is measured in fresh processes for each candidate. Weights are random,
images are already on the device. The default candidates show how FasterViT compares with others.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import measuring
import report
import torch
from candidates import FLAGS, PEERS, Setting, Size, complexity, parse, prepare

from hat_mm.engine.cli import UserError
from hat_mm.engine.environment import circumstances

DESCRIPTION = __doc__.format(
    peers=', '.join(PEERS),
    flags='\n'.join(f'  {name:14}{meaning}' for name, meaning in FLAGS.items()),
)
AUTHORS = 'authors/faster_vit_0_any_res'
PREDICTING = ['hat_mm.FasterViT:arch=0', 'hat_mm.FasterViT:arch=0@deploy']
PREDICTING += ['hat_mm.HATNet:arch=small', 'resnet50', 'convnext-t', 'swin-t']
TRAINED = ['hat_mm.FasterViT:arch=0', 'hat_mm.FasterViT:arch=0@cp', 'swin-t']
# The default candidates, with the authors' model if it is installed.
PLAN = {
    'forward': ['hat_mm.FasterViT:arch=0@deploy+compile', 'hat_mm.FasterViT:arch=2', *PREDICTING],
    'train': TRAINED,
    'memory': PREDICTING,
    'train-memory': TRAINED,
}
PLAN_PEERS = ['convnext-t', 'swin-t', AUTHORS]


# --- command lines --------------------------------------------------------------------------------


def read_size(text: str) -> Size:
    """Reads ``HEIGHTxWIDTH``."""
    sides = text.split('x')
    if len(sides) != 2 or not all(side.isdecimal() and int(side) for side in sides):
        raise argparse.ArgumentTypeError(f'{text!r} is not HEIGHTxWIDTH, such as 800x1280')
    return int(sides[0]), int(sides[1])


def read_positive(text: str) -> int:
    """Reads a positive number."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f'{text!r} is not a positive integer')
    return int(text)


def add_arguments(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """Adds the arguments of ``benchmark models``; with other defaults, those of ``attention``."""
    add = parser.add_argument
    add('candidates', nargs='*', metavar='CANDIDATE', help='such as hat_mm.FasterViT:arch=0@deploy')
    add('--size', nargs='+', type=read_size, default=[(800, 1280)], metavar='HxW',
        help='pixels of the images (default: 800x1280)')  # fmt: skip
    add('--batch-size', nargs='+', type=read_positive, default=[1], metavar='N')
    add('--mode', nargs='+', choices=PLAN,
        help='time of a forward pass (default) or of a training step, that is forward and '
        'backward, or the memory of either')  # fmt: skip
    add('--rounds', type=read_positive, default=5, help='timed turns of each (default: 5)')
    add('--processes', type=read_positive, default=3,
        help='fresh processes whose median is the memory (default: 3)')  # fmt: skip
    add('--peer', nargs='+', metavar='CANDIDATE',
        help='what the others are compared with, or its index (default: the last)')  # fmt: skip
    add('--device', choices=['cpu', 'cuda'], default='cuda' if torch.cuda.is_available() else 'cpu')
    add('--allocator', choices=['tuned', 'default'], default='tuned',
        help='tuned: on a CPU freed memory stays with the process, as in our other tools; default: '
        'the C library as it comes (default: tuned)')  # fmt: skip
    add('--out', type=Path, metavar='DIR',
        help='folder for benchmark.json, benchmark.md and plots')  # fmt: skip
    parser.set_defaults(**defaults)


def make_plan(args: argparse.Namespace) -> dict[str, list[str]]:
    """The candidates for each mode."""
    if args.candidates:
        return dict.fromkeys(args.mode or ['forward'], args.candidates)
    found = all(importlib.util.find_spec(name) for name in ('fastervit', 'timm'))
    return {mode: PLAN[mode] + [AUTHORS] * found for mode in args.mode or PLAN}


def find_peers(args: argparse.Namespace, plan: dict[str, list[str]]) -> list[str]:
    """The candidates that the others are compared with.

    Raises:
        UserError: ``--peer`` names none of the candidates.
    """
    texts = list(dict.fromkeys(itertools.chain(*plan.values())))
    if args.peer is None:
        return [texts[-1]] if args.candidates else [t for t in texts if t in PLAN_PEERS]
    by_name = {text: text for text in texts}
    for index, text in enumerate(texts):
        by_name |= {str(index): text, str(index - len(texts)): text}
    for peer in args.peer:
        if peer not in by_name:
            raise UserError(
                f'--peer {peer!r} is no candidate and no index of one; choices: {", ".join(texts)}'
            )
    return [by_name[peer] for peer in args.peer]


# --- measuring ------------------------------------------------------------------------------------


def check(setting: Setting) -> None:
    """Raises the error of a candidate that cannot be built."""
    prepare(setting)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measures what the command line asks for.

    Returns:
        The content of benchmark.json, which is also written after each size.
    """
    plan = make_plan(args)
    peers = find_peers(args, plan)
    device, tuned = args.device, args.allocator == 'tuned'
    with measuring.Worker(device, tuned) as worker:
        for mode, texts in plan.items():
            for text in texts:  # reports a wrong name now rather than later
                training = mode.startswith('train')
                worker.run(check, Setting(text, args.size[0], 1, training, device))
        results = worker.run(circumstances, device, worker.allocator)
    rows: list[dict[str, Any]] = []
    results |= {'peers': peers, 'rounds': args.rounds, 'processes': args.processes, 'rows': rows}
    for mode, size, batch in itertools.product(plan, args.size, args.batch_size):
        print(f'{mode}, {size[0]}x{size[1]}, batch {batch}', file=sys.stderr, flush=True)
        training, memory = mode.startswith('train'), mode.endswith('memory')
        jobs = {t: (prepare, Setting(t, size, batch, training, device)) for t in plan[mode]}
        if memory:
            found, errors = measuring.peaks_of(jobs, args.processes, device, tuned)
        else:
            found, errors = measuring.seconds_of(jobs, args.rounds, device, tuned)
        for text in jobs:
            row = {'mode': mode, 'size': list(size), 'batch': batch, 'candidate': text}
            if text in errors:
                row['error'] = errors[text]
            elif memory:
                row['peaks'] = found[text]
            else:
                row['seconds'] = found[text]
                row['parameters'], row['macs'] = complexity(parse(text).base, size)
            rows.append(row)
        if args.out is not None:
            text = json.dumps(results, indent=1) + '\n'
            (args.out / 'benchmark.json').write_text(text, encoding='utf-8')
    return results


def run(args: argparse.Namespace) -> None:
    """Measures, writes and prints."""
    if args.device == 'cuda' and not torch.cuda.is_available():
        raise UserError('--device cuda: torch sees no GPU', status=2)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
    results = measure(args)
    text = report.markdown(results)
    print(text)
    if args.out is not None:
        (args.out / 'benchmark.md').write_text(text, encoding='utf-8')
        for path in report.plot(results, args.out):
            print(path, file=sys.stderr)
    failed = [row for row in results['rows'] if 'error' in row]
    if failed:
        raise UserError(f'{len(failed)} of {len(results["rows"])} measurements failed; see above')
