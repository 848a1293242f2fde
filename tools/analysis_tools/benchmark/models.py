"""Measures models beside each other: time of a forward pass or a training step, and memory.

A candidate is NAME[:KEY=VALUE,...][@FLAG+FLAG...]; NAME is a registered type such as
hat_mm.FasterViT, a config (KEYs are settings of its model; SCOPE::CONFIG is one that a toolbox
ships, such as mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py), timm/MODEL,
authors/faster_vit_0_any_res (the authors' FasterViT), or one of
  {peers}.
FLAGs:
{flags}
All candidates run in turns, so that whatever slows the machine slows them alike; on a CPU each is
in a process of its own. Memory is measured in fresh processes for each candidate. Weights are
random, images are on the device already. Without candidates a set of them is measured that tells
how FasterViT compares.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import attention
import measuring
import report
import torch
from candidates import FLAGS, HALVES, PEERS, Candidate, Size, complexity, parse, prepare
from measuring import Worker, one_line

from hat_mm.engine.cli import UserError
from hat_mm.engine.environment import circumstances

DESCRIPTION = __doc__.format(
    peers=', '.join(PEERS),
    flags='\n'.join(f'  {name:14}{meaning}' for name, meaning in FLAGS.items()),
)
AUTHORS = 'authors/faster_vit_0_any_res'
TRAINED = ['hat_mm.FasterViT:arch=0', 'hat_mm.FasterViT:arch=0@cp', 'swin-t']
# What is measured without candidates: by mode, the authors' model being last where it is there.
PLAN = {
    'forward': [
        *('hat_mm.FasterViT:arch=0', 'hat_mm.FasterViT:arch=0@deploy'),
        *('hat_mm.FasterViT:arch=0@deploy+compile', 'hat_mm.FasterViT:arch=2'),
        *('hat_mm.FasterViT:arch=2@deploy', 'hat_mm.FasterViT:arch=2@deploy+compile'),
        *('hat_mm.HATNet:arch=small', 'resnet50', 'convnext-t', 'swin-t'),
    ],
    'train': TRAINED,
    'memory': [
        *('hat_mm.FasterViT:arch=0', 'hat_mm.FasterViT:arch=0@deploy', 'hat_mm.HATNet:arch=small'),
        *('convnext-t', 'swin-t'),
    ],
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


def _add_common(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add('--rounds', type=read_positive, default=5, help='timed turns of each (default: 5)')
    add('--processes', type=read_positive, default=3,
        help='fresh processes whose median is the memory (default: 3)')  # fmt: skip
    add('--device', choices=['cpu', 'cuda'], default='cuda' if torch.cuda.is_available() else 'cpu')
    add('--allocator', choices=['tuned', 'default'], default='tuned',
        help='tuned: on a CPU freed memory stays with the process, as in our other tools; default: '
        'the C library as it comes (default: tuned)')  # fmt: skip


def add_models_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``benchmark models``."""
    add = parser.add_argument
    add('candidates', nargs='*', metavar='CANDIDATE', help='such as hat_mm.FasterViT:arch=0@deploy')
    add('--size', nargs='+', type=read_size, default=[(800, 1280)], metavar='HxW',
        help='pixels of the images (default: 800x1280)')  # fmt: skip
    add('--batch-size', nargs='+', type=read_positive, default=[1], metavar='N')
    add('--mode', nargs='+', choices=PLAN,
        help='time of a forward pass (default) or of a training step, that is forward and '
        'backward, or the memory of either')  # fmt: skip
    add('--peer', nargs='+', metavar='CANDIDATE',
        help='what the others are compared with, or its index (default: the last)')  # fmt: skip
    add('--out', type=Path, metavar='DIR',
        help='folder for benchmark.json, benchmark.md and plots')  # fmt: skip
    _add_common(parser)


def add_attention_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``benchmark attention``."""
    add = parser.add_argument
    sizes = ' '.join(f'{height}x{width}' for height, width in attention.SIZES)
    add('--size', nargs='+', type=read_size, default=attention.SIZES, metavar='HxW',
        help=f'tokens of the map (default: {sizes})')  # fmt: skip
    add('--dim', type=read_positive, default=256, help='channels (default: 256)')
    add('--heads', type=read_positive, default=8)
    add('--dtype', choices=['float32', *HALVES], default='float32')
    add('--out', type=Path, default=Path('work_dirs/attention_scaling'), metavar='DIR')
    _add_common(parser)


def run_attention(args: argparse.Namespace) -> None:
    """Measures the forms of attention as any other candidates."""
    flag = '' if args.dtype == 'float32' else f'@{args.dtype}'
    args.candidates = [
        f'attention/{form}:dim={args.dim},heads={args.heads}{flag}' for form in attention.FORMS
    ]
    args.mode, args.batch_size, args.peer = ['forward', 'memory'], [1], None
    run(args)


def make_plan(args: argparse.Namespace) -> dict[str, list[Candidate]]:
    """The candidates of each mode."""
    if args.candidates:
        twice = {text for text in args.candidates if args.candidates.count(text) > 1}
        if twice:
            raise UserError(f'given twice: {", ".join(sorted(twice))}')
        plan = dict.fromkeys(args.mode or ['forward'], args.candidates)
    else:
        found = all(importlib.util.find_spec(name) for name in ('fastervit', 'timm'))
        plan = {mode: PLAN[mode] + [AUTHORS] * found for mode in args.mode or PLAN}
    return {mode: [parse(text) for text in texts] for mode, texts in plan.items()}


def find_peers(args: argparse.Namespace, plan: dict[str, list[Candidate]]) -> list[str]:
    """The candidates that ratios are made with.

    Raises:
        UserError: ``--peer`` names none of the candidates.
    """
    texts = list(dict.fromkeys(c.text for candidates in plan.values() for c in candidates))
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


def time_rows(
    candidates: Sequence[Candidate], setting: tuple[Size, int, bool, str], rounds: int, tuned: bool
) -> list[dict[str, Any]]:
    """Times candidates in turns.

    Args:
        candidates: What to time.
        setting: Size, batch, whether to train, and device.
        rounds: Turns of each.
        tuned: As :class:`Worker` takes it.

    Returns:
        For each candidate its ``seconds`` and what belongs to them, or its ``error``.
    """
    size, *_, device = setting
    rows: dict[str, dict[str, Any]] = {c.text: {'candidate': c.text} for c in candidates}
    timers = {}
    with ExitStack() as stack:
        worker = None
        for candidate in candidates:
            # A GPU's allocator keeps what it has, and would for each process.
            if worker is None or device == 'cpu':
                worker = stack.enter_context(Worker(device, tuned))
            text, row = candidate.text, rows[candidate.text]
            try:
                row['parameters'], row['macs'] = complexity(candidate.base, size)
                row['first_seconds'] = worker.run(
                    measuring.add_timer, text, prepare, candidate, *setting
                )
                timers[text] = partial(worker.run, measuring.turn, text)
            except Exception as error:  # the others can still be measured
                row['error'] = one_line(error)
        seconds, failed = measuring.time_in_turns(timers, rounds)
    for text, values in seconds.items():
        rows[text]['seconds'] = values
    for text, error in failed.items():
        rows[text]['error'] = one_line(error)
    return list(rows.values())


def memory_rows(
    candidates: Sequence[Candidate],
    setting: tuple[Size, int, bool, str],
    processes: int,
    tuned: bool,
) -> list[dict[str, Any]]:
    """Measures the memory of candidates; arguments and result are like those of time_rows."""
    rows = []
    for candidate in candidates:
        job = (setting[-1], tuned, prepare, candidate, *setting)
        try:
            found = measuring.memory_of(processes, *job)
        except UserError as error:
            found = {'error': one_line(error)}
        rows.append({'candidate': candidate.text, **found})
    return rows


def check(candidate: Candidate, *setting: Any) -> None:
    """Raises whatever keeps a candidate from being built."""
    prepare(candidate, *setting)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measures what the command line asks for.

    Returns:
        What benchmark.json holds; it is written after each size as well.
    """
    plan = make_plan(args)
    peers = find_peers(args, plan)
    device, tuned = args.device, args.allocator == 'tuned'
    with Worker(device, tuned) as worker:
        for mode, candidates in plan.items():
            for candidate in candidates:  # a wrong name is better known now than later
                worker.run(check, candidate, args.size[0], 1, mode.startswith('train'), device)
        results = worker.run(circumstances, device, worker.allocator)
    rows: list[dict[str, Any]] = []
    results |= {'peers': peers, 'rounds': args.rounds, 'processes': args.processes, 'rows': rows}
    for mode, size, batch in itertools.product(plan, args.size, args.batch_size):
        print(f'{mode}, {size[0]}x{size[1]}, batch {batch}', file=sys.stderr, flush=True)
        setting = (size, batch, mode.startswith('train'), device)
        if mode.endswith('memory'):
            found = memory_rows(plan[mode], setting, args.processes, tuned)
        else:
            found = time_rows(plan[mode], setting, args.rounds, tuned)
        rows += [{'mode': mode, 'size': list(size), 'batch': batch, **row} for row in found]
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
