"""What the tools measure with: seconds in turns, memory in fresh processes, what it ran on."""

from __future__ import annotations

import ctypes
import datetime
import gc
import importlib.metadata
import json
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from hat_mm.runtime import UserError

JOB = 'HAT_MM_MEASURING_JOB'
"""Environment variable by which a fresh process is told what to measure, in JSON."""
_RESULT = 'HAT_MM_MEASURING_RESULT '  # starts the line with its answer
MODULES = ('torch', 'mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain', 'timm', 'fastervit')

PRECISIONS = {
    'float32': torch.float32,
    'tf32': torch.float32,
    'bf16': torch.bfloat16,
    'fp16': torch.float16,
}
"""Names of what products are computed in, and the type of their factors."""


@dataclass(frozen=True)
class Work:
    """Something to measure.

    Attributes:
        forward: The forward pass; what it returns has ``backward`` if ``training``.
        training: Whether the backward pass belongs to it.
        reset: What is done before each pass and is not measured, such as dropping gradients.
    """

    forward: Callable[[], Any]
    training: bool = False
    reset: Callable[[], None] = lambda: None

    def run(self) -> None:
        """Does the work once."""
        result = self.forward()
        if self.training:
            result.backward()


# --- time -----------------------------------------------------------------------------------------


def synchronize(device: str) -> None:
    """Waits until the device has done what it was given."""
    if device == 'cuda':
        torch.cuda.synchronize()


def seconds_of(work: Work, device: str) -> float:
    """Seconds that one run takes."""
    work.reset()
    synchronize(device)
    start = time.perf_counter()
    work.run()
    synchronize(device)
    return time.perf_counter() - start


def time_in_turns(
    works: Mapping[str, Work], rounds: int, device: str, warm_up: int = 1
) -> dict[str, list[float]]:
    """Times all works in turns, so that whatever slows the machine slows them alike.

    Args:
        works: What to time, by name.
        rounds: Timed runs of each.
        device: ``'cpu'`` or ``'cuda'``.
        warm_up: Rounds before those that count.

    Returns:
        Seconds of each run, by name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(warm_up + rounds):
        for name, work in works.items():
            seconds[name].append(seconds_of(work, device))
    return {name: values[warm_up:] for name, values in seconds.items()}


def set_tf32(allowed: bool) -> None:
    """Whether float32 products on a GPU may round their factors to 10 bits of mantissa."""
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def product(precision: str, device: str) -> tuple[Work, int]:
    """A product of square matrices, as large as shows what the machine can do.

    Args:
        precision: Key of :data:`PRECISIONS`.
        device: ``'cpu'`` or ``'cuda'``.

    Returns:
        The work and its multiply-adds.
    """
    dtype = PRECISIONS[precision]
    side = 8192 if device == 'cuda' else 2048
    if device == 'cpu' and dtype != torch.float32:
        side = 512  # processors without such units take minutes for more
    matrix = torch.randn(side, side, generator=torch.Generator().manual_seed(0)).to(device, dtype)

    def forward() -> torch.Tensor:
        with torch.inference_mode():
            return matrix @ matrix

    return Work(forward, reset=lambda: set_tf32(precision == 'tf32')), side**3


def median(values: Sequence[float] | None) -> float | None:
    """The median; None of nothing."""
    return statistics.median(values) if values else None


def fit_exponent(xs: Sequence[float], ys: Sequence[float]) -> float | None:
    """The e of ``y = c * x ** e`` by least squares of the logarithms.

    Returns:
        None if there are fewer than three different ``xs``, or one of ``ys`` is not positive.
    """
    if len(set(xs)) < 3 or min(ys) <= 0:
        return None
    return statistics.linear_regression([*map(math.log, xs)], [*map(math.log, ys)]).slope


# --- memory ---------------------------------------------------------------------------------------


def _status(field: str) -> int:
    """A size in bytes from ``/proc/self/status``."""
    path = Path('/proc/self/status')
    for line in path.read_text().splitlines() if path.exists() else ():
        if line.startswith(f'{field}:'):
            return int(line.split()[1]) * 1024
    raise UserError(f'/proc/self/status has no {field}: memory can be measured on Linux only')


def _return_free_memory() -> None:
    """Gives memory that is free inside this process back, so that it does not count as taken."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), 'malloc_trim', None)
    if trim is not None:  # the C library is glibc
        trim(0)


def warm_libraries(training: bool) -> None:
    """Makes torch and its libraries allocate what they do once, on the CPU."""
    layers = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3),
        torch.nn.BatchNorm2d(8),
        torch.nn.GELU(),
        torch.nn.Flatten(2),
        torch.nn.LayerNorm(16),
        torch.nn.Linear(16, 16),
    )
    x = layers(torch.ones(1, 3, 6, 6))[:, None]
    loss = torch.nn.functional.scaled_dot_product_attention(x, x, x).softmax(-1).sum()
    if training:
        loss.backward()
        # Its first call imports modules.
        checkpoint(torch.nn.Identity(), x.detach().requires_grad_(), use_reentrant=False)


def peak_memory(work: Work, device: str) -> dict[str, int | None]:
    """Measures memory beyond what is in use before, which holds weights and input.

    On the CPU this is the resident set, so it has to be the first large thing that a process does.

    Args:
        work: What to run once.
        device: ``'cpu'`` or ``'cuda'``.

    Returns:
        Bytes: ``peak`` and, if training, ``held`` between the forward and the backward pass.
    """
    cuda = device == 'cuda'

    def used() -> int:
        synchronize(device)
        _return_free_memory()
        return torch.cuda.memory_allocated() if cuda else _status('VmRSS')

    work.reset()
    before = used()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path('/proc/self/clear_refs').write_text('5')  # resets the peak
    result = work.forward()
    held = None
    if work.training:
        held = used() - before
        result.backward()
    synchronize(device)
    peak = torch.cuda.max_memory_allocated() if cuda else _status('VmHWM')
    return {'peak': peak - before, 'held': held}


# --- fresh processes ------------------------------------------------------------------------------


def job() -> dict | None:
    """What this process was started to measure; None if it was not started to measure."""
    text = os.environ.get(JOB)
    return None if text is None else json.loads(text)


def answer(result: Any) -> None:
    """Hands the result of :func:`job` to the process that asked for it."""
    print('\n' + _RESULT + json.dumps(result), flush=True)


def in_fresh_process(script: str, job: dict) -> Any:
    """Has a Python program measure something in a process of its own.

    Args:
        script: Path of the program, which asks :func:`job` and calls :func:`answer`.
        job: What to measure.

    Returns:
        What the program answered.

    Raises:
        UserError: It did not; the message is its last line on stderr.
    """
    done = subprocess.run(
        [sys.executable, script],
        env={**os.environ, JOB: json.dumps(job)},
        capture_output=True,
        text=True,
        check=False,
    )
    answers = [line for line in done.stdout.splitlines() if line.startswith(_RESULT)]
    if done.returncode or not answers:
        lines = done.stderr.strip().splitlines() or ['no message']
        killed = ', killed: out of memory?' if done.returncode < 0 else ''
        raise UserError(f'{lines[-1]} (status {done.returncode}{killed})')
    return json.loads(answers[-1][len(_RESULT) :])


def memory_of(script: str, job: dict, processes: int) -> dict[str, Any]:
    """Measures memory in several fresh processes.

    Returns:
        ``peak`` and ``held`` in bytes, medians, and all ``peaks``.
    """
    found = [in_fresh_process(script, job) for _ in range(processes)]
    peaks = [result['peak'] for result in found]
    held = [result['held'] for result in found if result['held'] is not None]
    return {
        'peak': statistics.median(peaks),
        'held': statistics.median(held) if held else None,
        'peaks': peaks,
    }


# --- what it ran on -------------------------------------------------------------------------------


def processor() -> str:
    """Model of the processor, as the system calls it."""
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(':')[1].strip() for line in lines if 'model name' in line), 'unknown')


def versions() -> dict[str, str]:
    """Versions of Python, hat_mm and those of :data:`MODULES` that have been imported."""
    found = {'Python': platform.python_version()}
    for name in (*MODULES, 'hat_mm'):
        if name in sys.modules:
            version = getattr(sys.modules[name], '__version__', None)
            found[name] = version or importlib.metadata.version(name)
    return found


def circumstances(device: str) -> dict[str, Any]:
    """Command, date, hardware and versions of a measurement, for its results."""
    words = [os.path.relpath(sys.argv[0]), *sys.argv[1:]]
    return {
        'command': f'python {shlex.join(words)}',
        'date': str(datetime.date.today()),
        'device': device,
        'gpu': torch.cuda.get_device_name() if device == 'cuda' else None,
        'processor': processor(),
        'cores': os.cpu_count(),
        'threads': torch.get_num_threads(),
        'versions': versions(),
    }


def describe(found: dict[str, Any]) -> str:
    """:func:`circumstances` as a sentence, without the command."""
    threads = f'{found["threads"]} thread{"s" * (found["threads"] != 1)}'
    where = f'{threads} on {found["cores"]} cores of {found["processor"]}'
    if found['gpu']:
        where = f'{found["gpu"]}; {where}'
    names = ', '.join(f'{name} {version}' for name, version in found['versions'].items())
    return f'{where}; {names}; {found["date"]}'
