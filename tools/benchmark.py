"""Times backbones against each other, or measures the memory that one forward pass takes.

The last backbone is the peer of the others. All run in turns, so that whatever slows the machine
slows them alike. Memory is measured in a fresh process for each backbone and size.
"""

from __future__ import annotations

import argparse
import ast
import datetime
import logging
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import hat_mm
from hat_mm import compat
from hat_mm.runtime import UserError, run_tool


def parse_args() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        'backbones',
        nargs='+',
        metavar='TYPE[:KEY=VALUE,...]',
        help='registered name and arguments, such as hat_mm.HATNet:arch=small',
    )
    parser.add_argument(
        '--size',
        nargs=2,
        type=int,
        action='append',
        metavar=('HEIGHT', 'WIDTH'),
        help='pixels of the image (default: 800 1280); may be given several times',
    )
    parser.add_argument('--batch-size', type=int, default=1)
    parser.add_argument('--rounds', type=int, default=7, help='timed forward passes of each')
    parser.add_argument('--memory', action='store_true', help='measure memory, not time')
    args = parser.parse_args()
    args.size = args.size or [[800, 1280]]
    for name in ('batch_size', 'rounds'):
        if getattr(args, name) < 1:
            parser.error(f'--{name.replace("_", "-")} must be at least 1')
    if min(side for size in args.size for side in size) < 1:
        parser.error('--size must be at least 1 1')
    return args


def split_arguments(arguments: str) -> list[str]:
    """Splits ``KEY=VALUE,...`` at commas that are in no brackets."""
    parts, depth = [''], 0
    for char in arguments:
        depth += (char in '([{') - (char in ')]}')
        if char == ',' and depth == 0:
            parts.append('')
        else:
            parts[-1] += char
    return parts


def build(spec: str) -> torch.nn.Module:
    """Builds a backbone from ``TYPE:KEY=VALUE,...`` with random weights, in eval mode."""
    registry = compat.require('mmengine.registry')
    kind, _, arguments = spec.partition(':')
    scope = kind.partition('.')[0]
    if '.' not in kind:
        raise UserError(f'{kind!r} has no scope; write for example hat_mm.{kind} or mmdet.{kind}')
    if scope in ('mmdet', 'mmseg', 'mmpretrain'):
        compat.require(f'{scope}.models')
    cfg: dict[str, Any] = {'type': kind}
    for argument in filter(None, split_arguments(arguments)):
        key, equals, value = argument.partition('=')
        if not equals:
            raise UserError(f'{argument!r} in {spec!r} is not KEY=VALUE')
        try:
            cfg[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            cfg[key] = value
    backbone = registry.MODELS.build(cfg)
    backbone.eval()
    with torch.inference_mode():
        try:
            backbone(torch.zeros(1, 3, 32, 32))  # also what libraries allocate once
        except Exception as error:
            raise UserError(f'{spec} takes no image of 3 channels: {error}') from error
    return backbone


def image(args: argparse.Namespace, size: list[int]) -> torch.Tensor:
    """A random batch of images."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(args.batch_size, 3, *size, generator=generator)


# --- time -----------------------------------------------------------------------------------------


def time_in_turns(args: argparse.Namespace) -> list[list[str]]:
    """Rows of a table: size, backbone, median and fastest seconds, ratio to the peer's median."""
    backbones = [build(spec) for spec in args.backbones]
    rows = []
    for size in args.size:
        x = image(args, size)
        seconds: list[list[float]] = [[] for _ in backbones]
        with torch.inference_mode():
            for round_ in range(args.rounds + 1):  # the first is a warm-up
                for backbone, times in zip(backbones, seconds, strict=True):
                    start = time.perf_counter()
                    backbone(x)
                    if round_:
                        times.append(time.perf_counter() - start)
        medians = [statistics.median(times) for times in seconds]
        for spec, times, median in zip(args.backbones, seconds, medians, strict=True):
            ratio = f'{median / medians[-1]:.2f}'
            rows.append(
                [f'{size[0]}×{size[1]}', f'`{spec}`', f'{median:.3f}', f'{min(times):.3f}', ratio]
            )
    return rows


# --- memory ---------------------------------------------------------------------------------------


def status(field: str) -> int:
    """A size in bytes from ``/proc/self/status``."""
    for line in Path('/proc/self/status').read_text().splitlines():
        if line.startswith(f'{field}:'):
            return int(line.split()[1]) * 1024
    raise UserError(f'/proc/self/status has no {field}: memory can be measured on Linux only')


def forward_memory(args: argparse.Namespace) -> int:
    """Bytes that the one backbone's forward pass takes at its peak, beyond weights and image."""
    [spec], [size] = args.backbones, args.size
    backbone = build(spec)
    with torch.inference_mode():
        x = image(args, size)
        before = status('VmRSS')
        Path('/proc/self/clear_refs').write_text('5')  # resets the peak
        backbone(x)
        return status('VmHWM') - before


def memory_of_each(args: argparse.Namespace) -> list[list[str]]:
    """Rows of a table: size, megapixels, backbone, peak and peak for a megapixel."""
    rows = []
    for size in args.size:
        pixels = args.batch_size * size[0] * size[1] / 1e6
        for spec in args.backbones:
            command = [sys.executable, __file__, spec, '--memory', '--size', *map(str, size)]
            command += ['--batch-size', str(args.batch_size)]
            done = subprocess.run(
                command,
                env={**os.environ, 'HAT_MM_BENCHMARK_CHILD': '1'},
                stdout=subprocess.PIPE,
                text=True,
                check=False,
            )
            if done.returncode:
                raise UserError(f'measuring {spec} at {size[0]}×{size[1]} failed; see above')
            peak = int(done.stdout.split()[-1]) / 2**20
            rows.append(
                [f'{size[0]}×{size[1]}', f'{pixels:.2f}', f'`{spec}`', f'{peak:.0f}']
                + [f'{peak / pixels:.0f}']
            )
    return rows


# --- output ---------------------------------------------------------------------------------------


def processor() -> str:
    """Model of the processor, as the system calls it."""
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(':')[1].strip() for line in lines if 'model name' in line), 'unknown')


def show(head: list[str], rows: list[list[str]], args: argparse.Namespace) -> None:
    """Prints a Markdown table and what it was measured on."""
    print('| ' + ' | '.join(head) + ' |')
    print('|' + '---|' * len(head))
    for row in rows:
        print('| ' + ' | '.join(row) + ' |')
    print(
        f'\nfloat32, inference_mode, batch {args.batch_size}; {torch.get_num_threads()} threads of '
        f'{processor()}; torch {torch.__version__}, hat_mm {hat_mm.__version__}; '
        f'{datetime.date.today()}'
    )


def main() -> None:
    """Runs the benchmark."""
    args = parse_args()
    logging.disable(logging.WARNING)
    if os.environ.get('HAT_MM_BENCHMARK_CHILD'):
        print(forward_memory(args))
    elif args.memory:
        head = ['image', 'megapixels', 'backbone', 'peak MiB', 'MiB a megapixel']
        show(head, memory_of_each(args), args)
    else:
        head = ['image', 'backbone', 'median s', 'fastest s', 'ratio to the last']
        show(head, time_in_turns(args), args)


if __name__ == '__main__':
    sys.exit(run_tool(main, 'benchmark.py'))
