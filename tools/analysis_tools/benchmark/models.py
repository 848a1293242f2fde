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
import gc
import importlib.util
import itertools
import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import measuring
import report
import torch
from candidates import FLAGS, PEERS, Candidate, Size, complexity, parse, prepare
from measuring import Work

from hat_mm.engine.allocator import VARIABLE
from hat_mm.engine.cli import UserError
from hat_mm.engine.environment import circumstances

MODES = ('forward', 'train', 'memory', 'train-memory')
AUTHORS = 'authors/faster_vit_0_any_res'
# What is measured without candidates: by mode, the authors' model being last where it is there.
PLAN = {
    'forward': [
        *('hat_mm.FasterViT:arch=0', 'hat_mm.FasterViT:arch=0@deploy'),
        *('hat_mm.FasterViT:arch=0@deploy+compile', 'hat_mm.FasterViT:arch=2'),
        *('hat_mm.FasterViT:arch=2@deploy', 'hat_mm.FasterViT:arch=2@deploy+compile'),
        *('hat_mm.HATNet:arch=small', 'resnet50', 'convnext-t', 'swin-t'),
    ],
    'train': ['hat_mm.FasterViT:arch=0', 'hat_mm.FasterViT:arch=0@cp', 'swin-t'],
    'memory': [
        *('hat_mm.FasterViT:arch=0', 'hat_mm.FasterViT:arch=0@deploy', 'hat_mm.HATNet:arch=small'),
        *('convnext-t', 'swin-t'),
    ],
    'train-memory': ['hat_mm.FasterViT:arch=0', 'hat_mm.FasterViT:arch=0@cp', 'swin-t'],
}
PLAN_PEERS = ['convnext-t', 'swin-t']


# --- command line ---------------------------------------------------------------------------------


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


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    flags = '\n'.join(f'  {name:14}{meaning}' for name, meaning in FLAGS.items())
    parser = argparse.ArgumentParser(
        prog='benchmark models',
        description=__doc__.format(peers=', '.join(PEERS), flags=flags),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add('candidates', nargs='*', metavar='CANDIDATE', help='such as hat_mm.FasterViT:arch=0@deploy')
    add('--size', nargs='+', type=read_size, default=[(800, 1280)], metavar='HxW',
        help='pixels of the images (default: 800x1280)')  # fmt: skip
    add('--batch-size', nargs='+', type=read_positive, default=[1], metavar='N')
    add('--mode', nargs='+', choices=MODES,
        help='time of a forward pass (default) or of a training step, that is forward and '
        'backward, or the memory of either')  # fmt: skip
    add(
        '--rounds', type=read_positive, default=7, help='timed turns of each candidate (default: 7)'
    )
    add('--processes', type=read_positive,
        help='fresh processes whose median is the memory (default: 3; 1 on a GPU, which counts '
        'exactly)')  # fmt: skip
    add('--peer', nargs='+', metavar='CANDIDATE',
        help='what the others are compared with, or its index (default: the last)')  # fmt: skip
    add('--device', choices=['cpu', 'cuda'], default='cuda' if torch.cuda.is_available() else 'cpu')
    add('--allocator', choices=['tuned', 'default'], default='tuned',
        help='tuned: on a CPU freed memory stays with the process, as in our other tools; default: '
        'the C library as it comes (default: tuned)')  # fmt: skip
    add('--out', type=Path, metavar='DIR',
        help='folder for benchmark.json, benchmark.md and plots')  # fmt: skip
    args = parser.parse_args(argv)
    if args.device == 'cuda' and not torch.cuda.is_available():
        parser.error('--device cuda: torch sees no GPU')
    if args.processes is None:
        args.processes = 1 if args.device == 'cuda' else 3
    return args


def misplaced(candidate: Candidate, mode: str) -> str:
    """The flag that makes no sense in a mode: what it is for; empty if there is none."""
    if mode.startswith('train'):
        return 'deploy is for forward and memory' * ('deploy' in candidate.flags)
    return 'cp is for train and train-memory' * ('cp' in candidate.flags)


def make_plan(args: argparse.Namespace) -> dict[str, list[Candidate]]:
    """The candidates of each mode."""
    if args.candidates:
        plan = dict.fromkeys(args.mode or ['forward'], args.candidates)
    else:
        found = all(importlib.util.find_spec(name) for name in ('fastervit', 'timm'))
        plan = {mode: PLAN[mode] + [AUTHORS] * found for mode in args.mode or MODES}
    for mode, texts in plan.items():
        twice = {text for text in texts if texts.count(text) > 1}
        if twice:
            raise UserError(f'given twice: {", ".join(sorted(twice))}')
        plan[mode] = []
        for candidate in map(parse, texts):
            why = misplaced(candidate, mode)
            if why:
                print(f'{mode} leaves out {candidate.text} ({why})', file=sys.stderr)
            else:
                plan[mode].append(candidate)
        if not plan[mode]:
            raise UserError(f'no candidate for --mode {mode}')
    return plan


def find_peers(args: argparse.Namespace, plan: dict[str, list[Candidate]]) -> list[str]:
    """The candidates that ratios are made with.

    Raises:
        UserError: ``--peer`` names none of the candidates.
    """
    texts = list(dict.fromkeys(c.text for candidates in plan.values() for c in candidates))
    if args.peer is None:
        return [texts[-1]] if args.candidates else [t for t in texts if t in (*PLAN_PEERS, AUTHORS)]
    peers = []
    for peer in args.peer:
        if peer.removeprefix('-').isdecimal() and -len(texts) <= int(peer) < len(texts):
            peer = texts[int(peer)]
        if peer not in texts:
            raise UserError(
                f'--peer {peer!r} is no candidate and no index of one; choices: {", ".join(texts)}'
            )
        peers.append(peer)
    return peers


# --- measuring ------------------------------------------------------------------------------------


def make_folder(path: Path) -> None:
    """Makes the folder of results before anything is measured.

    Raises:
        UserError: It cannot be written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(f'cannot write to --out {str(path)!r}: {error.strerror}') from error


def one_line(error: BaseException) -> str:
    """An error as a cell of a table."""
    text = ' '.join(str(error).split()) or 'no message'
    return f'{type(error).__name__}: {text}'[:200]


def work_of(job: dict[str, Any]) -> Work:
    """What a job measures: a candidate, or the product that tells what the machine can do."""
    if 'product' in job:
        return measuring.product(job['product'], job['device'])
    training = job['mode'].startswith('train')
    where = (tuple(job['size']), job['batch'], training, job['device'])
    return prepare(parse(job['candidate']), *where)


def time_rows(
    candidates: Sequence[Candidate], mode: str, size: Size, batch: int, rounds: int, device: str
) -> list[dict[str, Any]]:
    """Times candidates in turns, at one size.

    Beside them the matrix product is timed that tells what the machine can do.

    Returns:
        For each candidate its ``seconds`` and what belongs to them, or its ``error``.
    """
    if any('compile' in candidate.flags for candidate in candidates):
        torch._dynamo.reset()  # what is compiled is compiled for this size
    torch.backends.cudnn.benchmark = True
    rows = {candidate.text: {'candidate': candidate.text} for candidate in candidates}
    timers = {}
    with ExitStack() as stack:
        for candidate in candidates:
            job = dict(candidate=candidate.text, mode=mode, size=size, batch=batch, device=device)
            row: dict[str, Any] = rows[candidate.text]
            try:
                row['parameters'], row['macs'] = complexity(candidate.base, size)
                timer, row['first_seconds'] = measuring.timer_of(job, work_of, stack)
            except Exception as error:  # the others can still be measured
                row['error'] = one_line(error)
            else:
                timers[candidate.text] = timer
        for precision in {c.precision for c in candidates if c.text in timers}:
            job = dict(product=precision, device=device)
            try:
                timer, _ = measuring.timer_of(job, work_of, stack)
            except Exception as error:  # the candidates go without their share of it
                print(f'product in {precision}: {one_line(error)}', file=sys.stderr)
            else:
                timers[f'product {precision}'] = timer
        warm_up = 3 if device == 'cuda' else 1
        seconds, failed = measuring.time_in_turns(timers, rounds, warm_up)
    for name, error in failed.items():
        print(f'{name}: {one_line(error)}', file=sys.stderr)
    for candidate in candidates:
        row = rows[candidate.text]
        if candidate.text in failed:
            row['error'] = one_line(failed[candidate.text])
        elif candidate.text in seconds:
            row['seconds'] = seconds[candidate.text]
            row['product_macs'] = measuring.product_side(candidate.precision, device) ** 3
            row['product_seconds'] = seconds.get(f'product {candidate.precision}')
    return list(rows.values())


def memory_rows(
    candidates: Sequence[Candidate], mode: str, size: Size, batch: int, processes: int, device: str
) -> list[dict[str, Any]]:
    """Measures the memory of candidates, at one size.

    Returns:
        For each candidate ``peak``, ``peaks`` and ``held`` in bytes, or its ``error``.
    """
    rows = []
    for candidate in candidates:
        job = dict(candidate=candidate.text, mode=mode, size=size, batch=batch, device=device)
        try:
            found = measuring.memory_of(job, processes)
        except UserError as error:
            found = {'error': one_line(error)}
        rows.append({'candidate': candidate.text, **found})
    return rows


def memory_of_job(job: dict[str, Any]) -> dict[str, int | None]:
    """The memory of a candidate, in a fresh process."""
    measuring.warm_libraries(job['mode'] == 'train-memory')
    work = work_of(job)
    if job['device'] == 'cuda' or 'compile' in parse(job['candidate']).flags:
        # A GPU's memory is counted exactly; compiling takes memory of its own.
        work.reset()
        work.run()
    return measuring.peak_memory(work, job['device'])


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measures what the command line asks for.

    Returns:
        What benchmark.json holds; it is written after each size as well.
    """
    plan = make_plan(args)
    peers = find_peers(args, plan)
    wanted = [(c.text, m.startswith('train')) for m, candidates in plan.items() for c in candidates]
    for text, training in dict.fromkeys(wanted):  # a wrong name is better known now than later
        prepare(parse(text), args.size[0], 1, training, args.device)
    rows: list[dict[str, Any]] = []
    settings = [
        (mode, *setting)
        for mode in plan
        for setting in itertools.product(args.size, args.batch_size)
    ]
    for mode, size, batch in settings:
        print(f'{mode}, {size[0]}x{size[1]}, batch {batch}', file=sys.stderr, flush=True)
        where = (plan[mode], mode, size, batch)
        if mode.endswith('memory'):
            found = memory_rows(*where, args.processes, args.device)
        else:
            found = time_rows(*where, args.rounds, args.device)
        rows += [{'mode': mode, 'size': list(size), 'batch': batch, **row} for row in found]
        results = {**circumstances(args.device), 'peers': peers, 'rows': rows}
        results |= {'rounds': args.rounds, 'processes': args.processes}
        if args.out is not None:
            report.save(results, args.out)
        gc.collect()
        if args.device == 'cuda':
            torch.cuda.empty_cache()
    return results


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, writes and prints."""
    args = parse_args(argv)
    if args.allocator == 'default':
        os.environ[VARIABLE] = '1'  # the processes that measure inherit it
    if args.out is not None:
        make_folder(args.out)
    results = measure(args)
    print(report.markdown(results))
    if args.out is not None:
        for path in report.plot(results, args.out):
            print(path, file=sys.stderr)
    failed = [row for row in results['rows'] if 'error' in row]
    if failed:
        raise UserError(f'{len(failed)} of {len(results["rows"])} measurements failed; see above')
