"""Checks the backbones on a GPU and measures them beside timm's; gpu_check.sh is the command.

The checks (backbone_checks.py) come first. They run in processes of their own, several at a time,
and one that fails, dies or takes too long does not keep the others from running. A figure that is
not a number fails. A table of times fills the rest, the most important rows first; rows that were
not reached are named. A group of candidates is built and compiled at a time, then each is timed
with the GPU for itself.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.metadata
import importlib.util
import itertools
import json
import logging
import multiprocessing
import os
import queue
import shlex
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import measuring
import report
import torch
from backbone_checks import CHECKS, NO_COMPILER, QUICK, Check, Finding, Skip, line
from candidates import Setting, complexity, parse, prepare
from test_backbones.archs import FAMILIES

from hat_mm.engine.environment import circumstances, describe

# --- processes ------------------------------------------------------------------------------------


@dataclass
class Result:
    """The outcome of a check: PASS, FAIL or SKIP, why, and what it found."""

    name: str
    status: str
    reason: str = ''
    seconds: float = 0.0
    findings: list[Any] = field(default_factory=list)


class Worker:
    """A process that runs generators, one after the other; a new one follows after a failure."""

    def __init__(self) -> None:
        self._process: Any = None

    def run(self, name: str, function: Callable, *arguments: Any, seconds: float) -> Result:
        """Runs a generator; its status is LATE if it was stopped."""
        start = time.monotonic()
        if self._process is None:
            spawn = multiprocessing.get_context('spawn')
            self._link, theirs = spawn.Pipe()
            self._process = spawn.Process(target=_serve, args=(theirs,))
            self._process.start()
            theirs.close()
        result = Result(name, 'LATE', f'stopped after {seconds:.0f} s')
        try:
            self._link.send((function, arguments))
            while self._link.poll(max(0, start + seconds - time.monotonic())):
                kind, content = self._link.recv()
                if kind != 'finding':
                    result.status, result.reason = kind, content
                    break
                result.findings.append(content)
        except (EOFError, OSError):
            result.status, result.reason = 'FAIL', 'the process died; out of memory?'
        result.seconds = time.monotonic() - start
        if result.status in ('FAIL', 'LATE'):  # an error of CUDA stays with its process
            self.stop(patience=result.status == 'FAIL')
        return result

    def stop(self, patience: float = 1) -> None:
        """Ends the process, which has so many seconds to do it by itself."""
        if self._process is not None:
            self._link.close()
            self._process.join(patience)
            self._process.kill()
            self._process.join()
            self._process = None


def _serve(link: Any) -> None:
    logging.disable(logging.WARNING)
    warnings.simplefilter('ignore')
    with contextlib.suppress(EOFError):  # the end of the main process
        while True:
            function, arguments = link.recv()
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
            try:
                for finding in function(*arguments):
                    link.send(('finding', finding))
                link.send(('PASS', ''))
            except Skip as skip:
                link.send(('SKIP', str(skip)))
            except Exception as failure:
                link.send(('FAIL', line(failure)))


@contextlib.contextmanager
def workers_of(jobs: int) -> Iterator[list[Worker]]:
    """Workers that end with the block."""
    workers = [Worker() for _ in range(jobs)]
    try:
        yield workers
    finally:
        for worker in workers:
            worker.stop()


def judge(result: Result) -> Result:
    """Decides whether a check passed: every figure is within its limit."""
    limited = [f for f in result.findings if f[2] is not None]
    wrong = [f for f in limited if not f[1] <= f[2]]  # NaN is wrong
    if wrong:
        result.status = 'FAIL'
        result.reason = '; '.join(
            f'{what}: {value:.3g} > {limit:g}' for what, value, limit in wrong
        )
    elif result.status == 'LATE':
        # What takes long to compile on a slow machine is no fault.
        result.status = 'SKIP' if result.name.startswith('compile') else 'FAIL'
        result.reason += f'; figures so far: {len(result.findings)}'
    elif result.status == 'PASS' and not result.findings:
        result.status, result.reason = 'FAIL', 'it found nothing'
    elif result.status == 'PASS':
        parts = [what for what, _, limit in result.findings if limit is None]
        if limited:
            what, value, limit = max(limited, key=lambda f: f[1] / f[2] if f[2] else 0)
            parts.append(f'nearest to its limit: {what} {value:.3g} (limit {limit:g})')
        result.reason = '; '.join(parts)
    return result


def run_checks(
    checks: list[Check],
    device: str,
    quick: bool,
    *,
    budget: float,
    end: float,
    workers: list[Worker],
    done: Callable[[Result], None] = lambda result: None,
) -> list[Result]:
    """Runs checks, as many at a time as there are workers.

    Args:
        checks: The checks.
        device: ``'cuda'`` or ``'cpu'``.
        quick: Whether tiny archs will do.
        budget: Seconds that the shares of the checks are shares of.
        end: When the last has to be done, on the monotonic clock.
        workers: The processes.
        done: Called with each result, by one check at a time.
    """
    free: queue.SimpleQueue = queue.SimpleQueue()
    for worker in workers:
        free.put(worker)
    lock = threading.Lock()

    def run(check: Check) -> Result:
        worker = free.get()
        try:
            seconds = min(check.share * budget, end - time.monotonic())
            if seconds < 5:
                result = Result(check.name, 'SKIP', 'no time is left for it')
            else:
                arguments = (device, quick, *check.arguments)
                result = worker.run(check.name, check.function, *arguments, seconds=seconds)
        finally:
            free.put(worker)
        with lock:
            done(judge(result))
        return result

    with ThreadPoolExecutor(len(workers)) as pool:
        return list(pool.map(run, checks))


# --- the table ------------------------------------------------------------------------------------

CORE = ['hat_mm.FasterViT:arch=0', 'hat_mm.HATNet:arch=small', 'timm/swin_tiny_patch4_window7_224']
CORE += [
    'hat_mm.FasterViT:arch=2',
    'hat_mm.HATNet:arch=tiny',
    'timm/convnext_tiny',
    'timm/resnet50',
]
MORE = ['hat_mm.FasterViT:arch=4', 'hat_mm.HATNet:arch=medium', 'hat_mm.HATNet:arch=large']
MORE += [f'timm/swin_{size}_patch4_window7_224' for size in ('small', 'base')]
MORE += [f'timm/convnext_{size}' for size in ('small', 'base')]
SHAPES = [((224, 224), 128), ((800, 1280), 1), ((800, 1280), 8)]
# Models, flags and shapes, the most important first.
PLAN = [(CORE, 'bf16', SHAPES), (CORE, 'bf16+compile', SHAPES[:2]), (MORE, 'bf16', SHAPES)]
PLAN += [(CORE, 'bf16+channels_last', SHAPES[:1]), (CORE, 'bf16+compile', SHAPES[2:])]
PLAN += [(MORE, 'bf16+compile', SHAPES)]
TINY = [f'hat_mm.{family}:arch={FAMILIES[family].arch}' for family in ('FasterViT', 'HATNet')]
QUICK_PLAN = [([*TINY, 'timm/resnet50'], 'bf16', [((64, 64), 2)])]
PEERS = [f'timm/swin_tiny_patch4_window7_224@{flags}' for flags in ('bf16', 'bf16+compile')]
ROUNDS = 3


def timed(setting: Setting, rounds: int) -> Iterator[Finding]:
    """Times a candidate in rounds; without rounds, builds and compiles it and counts its MACs."""
    if not rounds:
        measuring.timers.clear()  # what was timed before
        torch._dynamo.reset()
        gc.collect()
        if setting.device == 'cuda':
            torch.cuda.empty_cache()
        torch.backends.cudnn.benchmark = True
        measuring.turn('row', _prepare_there, setting)
        with torch.device('meta'):
            counts = complexity(parse(setting.text).base, setting.size)
        yield from zip(('parameters', 'macs'), counts, (None, None), strict=True)
    for _ in range(rounds):
        yield 'seconds', measuring.turn('row', _prepare_there, setting), None


def _prepare_there(setting: Setting) -> measuring.Work:
    with torch.device(setting.device):  # large models take long to initialize on a CPU
        return prepare(setting)


def measure(
    plan: list, device: str, *, end: float, workers: list[Worker], absent: dict[str, str]
) -> tuple[list[dict[str, Any]], list[str]]:
    """Times the rows of a plan.

    Args:
        plan: See :data:`PLAN`.
        device: ``'cuda'`` or ``'cpu'``.
        end: When the last has to be done, on the monotonic clock.
        workers: As many candidates are built at a time.
        absent: Part of the name of candidates that cannot run here, and why.

    Returns:
        The rows, in the form of benchmark.json, and the names of those that were not reached.
    """
    rows: list[dict[str, Any]] = []
    unreached: list[str] = []
    for models, flags, shapes in plan:
        candidates = [f'{model}@{flags}' for model in models]
        unreached += [
            f'{report.label(text)} ({why})'
            for text, (part, why) in itertools.product(candidates, absent.items())
            if part in text
        ]
        candidates = [text for text in candidates if not any(part in text for part in absent)]
        settings = [
            Setting(text, size, batch, False, device)
            for (size, batch), text in itertools.product(shapes, candidates)
        ]
        need, most = (50, 150) if 'compile' in flags else (10, 60)  # seconds for a group
        for first in range(0, len(settings), len(workers)):
            group = settings[first : first + len(workers)]
            left = end - time.monotonic() - 2 * len(group)
            found = _time(group, workers, min(left, most)) if left > need else []
            for setting, result in itertools.zip_longest(group, found):
                if result is None or result.status == 'LATE':
                    unreached.append(_name(setting))
                else:
                    row = dict(mode='forward', size=list(setting.size), batch=setting.batch)
                    rows.append(row | {'candidate': setting.text} | _cells(result))
    return rows, unreached


def _time(group: list[Setting], workers: list[Worker], seconds: float) -> list[Result]:
    """Builds candidates at the same time, then times one after the other."""
    with ThreadPoolExecutor(len(group)) as pool:
        build = partial(_run, rounds=0, seconds=seconds)
        built = list(pool.map(build, workers, group))
    for worker, setting, result in zip(workers, group, built, strict=False):
        if result.status == 'PASS':
            clocked = _run(worker, setting, rounds=ROUNDS, seconds=30)
            result.status, result.reason = clocked.status, clocked.reason
            result.findings += clocked.findings
    return built


def _run(worker: Worker, setting: Setting, rounds: int, seconds: float) -> Result:
    return worker.run(setting.text, timed, setting, rounds, seconds=seconds)


def _cells(result: Result) -> dict[str, Any]:
    if result.status != 'PASS':
        return {'error': result.reason}
    cells = {what: value for what, value, _ in result.findings}
    return cells | {'seconds': [value for what, value, _ in result.findings if what == 'seconds']}


def _name(setting: Setting) -> str:
    return f'{report.label(setting.text)} {_shape(setting.size, setting.batch)}'


def _shape(size: Any, batch: int) -> str:
    return f'{size[0]}×{size[1]} batch {batch}'


# --- the report -----------------------------------------------------------------------------------


def summary(results: dict[str, Any], details: bool) -> str:
    """The checks and the images per second, as Markdown tables; failures always have details."""
    lines = [
        {
            'check': c['name'],
            'status': c['status'],
            's': f'{c["seconds"]:.0f}',
            '': c['reason'] if details or c['status'] != 'PASS' else '',
        }
        for c in results['checks']
    ]
    speeds: dict[str, dict[str, str]] = {}
    for row in results['rows']:
        seconds = report.cost(row)
        name = report.label(row['candidate'])
        speeds.setdefault(name, {'images/s': name})[_shape(row['size'], row['batch'])] = (
            'failed' if seconds is None else f'{row["batch"] / seconds:.4g}'
        )
    parts = [report.table(lines), report.table(list(speeds.values()))]
    if results['unreached']:
        parts.append(f'Not reached: {", ".join(results["unreached"])}.')
    return '\n\n'.join(parts)


def write(results: dict[str, Any], out: Path) -> None:
    """Writes gpu_check.json and gpu_check.md."""
    (out / 'gpu_check.json').write_text(json.dumps(results, indent=1) + '\n', encoding='utf-8')
    text = f'# GPU check\n\n{summary(results, details=True)}\n\n{report.markdown(results)}'
    (out / 'gpu_check.md').write_text(text, encoding='utf-8')


def main(argv: list[str] | None = None) -> int:
    """Checks, measures, writes and prints; returns the exit status."""
    parser = argparse.ArgumentParser('gpu_check.sh', description=__doc__.partition('\n')[0])
    add = parser.add_argument
    add('--out', type=Path, default=Path('work_dirs/gpu_check'), metavar='DIR',
        help='for gpu_check.json and gpu_check.md (default: work_dirs/gpu_check)')  # fmt: skip
    add('--device', choices=['cuda', 'cpu'], default='cuda')
    add('--quick', action='store_true', help='tiny archs, a table of two rows')
    add('--minutes', type=float, default=9, help='for all of it (default: 9)')
    add('--started', type=float, default=time.time(), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.device == 'cuda' and not torch.cuda.is_available():
        parser.error(f'--device cuda: torch {torch.__version__} sees no GPU; the choice is cpu')
    budget = 60 * args.minutes
    # A few seconds remain for the last files.
    end = time.monotonic() + budget - (time.time() - args.started) - 8
    args.out.mkdir(parents=True, exist_ok=True)
    jobs = max(1, min(4, (os.cpu_count() or 1) // 4))
    os.environ.setdefault(
        'TORCHINDUCTOR_COMPILE_THREADS', str(max(1, (os.cpu_count() or 1) // jobs))
    )
    results = circumstances(args.device) | {'rounds': ROUNDS, 'processes': 1, 'peers': PEERS}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        results['versions']['timm'] = importlib.metadata.version('timm')
    words = [f'--device={args.device}', *(['--quick'] if args.quick else [])]
    results['command'] = shlex.join(['tools/dev/gpu_check.sh', *words])
    results |= {'checks': [], 'rows': [], 'unreached': []}

    def done(result: Result) -> None:
        print(f'{result.status} {result.name}, {result.seconds:.0f} s: {result.reason}', flush=True)
        results['checks'].append(asdict(result))
        write(results, args.out)

    with workers_of(jobs) as workers:
        checks = QUICK if args.quick else CHECKS
        half = end - 0.5 * budget
        found = run_checks(
            checks, args.device, args.quick, budget=budget, end=half, workers=workers, done=done
        )
        broken = [r.reason for r in found if r.reason.startswith(NO_COMPILER)]
        absent = {'compile': broken[0]} if broken else {}
        missing = [name for name in ('timm', 'torchvision') if not importlib.util.find_spec(name)]
        if missing:
            absent['timm/'] = f'{missing[0]} is not installed'
        plan, start = QUICK_PLAN if args.quick else PLAN, time.monotonic()
        rows, unreached = measure(plan, args.device, end=end, workers=workers, absent=absent)
    results |= {'rows': rows, 'unreached': unreached}
    failed = [f'{row["candidate"]}: {row["error"]}' for row in rows if 'error' in row]
    reason = failed[0] if failed else f'{len(rows)} rows, {len(unreached)} not reached'
    done(
        Result('table', 'FAIL' if failed or not rows else 'PASS', reason, time.monotonic() - start)
    )
    print(
        f'\n{summary(results, details=False)}\n\n{describe(results)}\n{args.out / "gpu_check.md"}'
    )
    return int(any(check['status'] == 'FAIL' for check in results['checks']))


if __name__ == '__main__':
    sys.exit(main())
