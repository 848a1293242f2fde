"""What is measured with: seconds in turns, memory in fresh processes."""

from __future__ import annotations

import ctypes
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
from torch.utils.checkpoint import checkpoint

from hat_mm.engine.allocator import tune_allocator
from hat_mm.engine.cli import UserError

PROGRAM = Path(__file__).parent
"""What is started to measure in a process of its own; it asks :func:`job`."""
JOB = 'HAT_MM_MEASURING_JOB'
"""Environment variable by which a fresh process is told what to measure, in JSON."""
_RESULT = 'HAT_MM_MEASURING_RESULT '  # starts the line with its answer

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


def turn(work: Work, device: str) -> float:
    """Seconds that one run takes, the median of as many as fill a fifth of a second.

    After a pause, or after another process, the first runs of something short take twice as long.
    """
    seconds = [seconds_of(work, device)]
    while sum(seconds) < 0.2:
        seconds.append(seconds_of(work, device))
    return statistics.median(seconds)


def time_in_turns(
    timers: Mapping[str, Callable[[], float]], rounds: int, warm_up: int = 1
) -> tuple[dict[str, list[float]], dict[str, Exception]]:
    """Times several things in turns, so that whatever slows the machine slows them alike.

    Args:
        timers: By name, what does the thing once and returns the seconds that it took.
        rounds: Timed turns of each.
        warm_up: Rounds before those that count.

    Returns:
        By name the seconds of each turn, and what ended those that failed in one.
    """
    seconds: dict[str, list[float]] = {name: [] for name in timers}
    failed: dict[str, Exception] = {}
    for _ in range(warm_up + rounds):
        for name in [*seconds]:
            try:
                seconds[name].append(timers[name]())
            except Exception as error:  # the others can still be measured
                failed[name] = error
                del seconds[name]
    return {name: values[warm_up:] for name, values in seconds.items()}, failed


def set_tf32(allowed: bool) -> None:
    """Whether float32 products on a GPU may round their factors to 10 bits of mantissa."""
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def product_side(precision: str, device: str) -> int:
    """Side of the matrices of :func:`product`: as large as shows what the machine can do."""
    if device == 'cuda':
        return 8192
    # Processors without units for half precision take minutes for more.
    return 2048 if PRECISIONS[precision] == torch.float32 else 512


def product(precision: str, device: str) -> Work:
    """A product of square matrices.

    Args:
        precision: Key of :data:`PRECISIONS`.
        device: ``'cpu'`` or ``'cuda'``.
    """
    side = product_side(precision, device)
    matrix = torch.randn(side, side, generator=torch.Generator().manual_seed(0))
    matrix = matrix.to(device, PRECISIONS[precision])

    def forward() -> torch.Tensor:
        with torch.inference_mode():
            return matrix @ matrix

    return Work(forward, reset=lambda: set_tf32(precision == 'tf32'))


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
    """What this process was started to measure; None if it was not started to measure.

    On a CPU the process keeps the memory that it frees from here on, unless the user does not want
    it.
    """
    text = os.environ.get(JOB)
    if text is None:
        return None
    found = json.loads(text)
    if found['device'] == 'cpu':
        tune_allocator()
    return found


def answer(result: Any) -> None:
    """Hands a result of :func:`job` to the process that asked for it."""
    print('\n' + _RESULT + json.dumps(result), flush=True)


class Worker:
    """The program in a process of its own; see :func:`start`.

    Args:
        process: The process.
        errors: What it writes to stderr.
    """

    def __init__(self, process: subprocess.Popen, errors: IO[str]) -> None:
        self._process = process
        self._errors = errors

    def answer(self) -> Any:
        """Waits for the next answer.

        Raises:
            UserError: The program ended without it; the message is its last line on stderr.
        """
        for line in self._process.stdout:
            if line.startswith(_RESULT):
                return json.loads(line[len(_RESULT) :])
        status = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines() or ['no message']
        killed = ', killed: out of memory?' if status == -9 else ''
        raise UserError(f'{lines[-1]} (status {status}{killed})')

    def ask(self) -> Any:
        """Asks for another answer and waits for it.

        Raises:
            UserError: As in :meth:`answer`.
        """
        with suppress(BrokenPipeError):  # answer() says why
            self._process.stdin.write('\n')
            self._process.stdin.flush()
        return self.answer()


@contextmanager
def start(job: dict) -> Iterator[Worker]:
    """Starts the program in a process of its own for a job, and ends it whatever it does."""
    with tempfile.TemporaryFile('w+') as errors:
        process = subprocess.Popen(
            [sys.executable, str(PROGRAM)],
            env={**os.environ, JOB: json.dumps(job)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        try:
            yield Worker(process, errors)
        finally:
            process.kill()
            process.communicate()


def in_fresh_process(job: dict) -> Any:
    """Has a job measured in a process of its own.

    Raises:
        UserError: As :meth:`Worker.answer`.
    """
    with start(job) as worker:
        return worker.answer()


def timer_of(
    job: dict[str, Any], work_of: Callable[[dict], Work], stack: ExitStack
) -> tuple[Callable[[], float], float]:
    """Makes what times a job.

    On a CPU it is in a process of its own, as a model is where it is used: how fast the system
    hands out memory depends on all that a process has done before. A GPU's allocator keeps what it
    has, and a process for each model would multiply that.

    Args:
        job: What to time, with the ``device``.
        work_of: Makes the work of a job.
        stack: Where the end of the process is arranged.

    Returns:
        The timer, and the seconds of a first run.
    """
    if job['device'] == 'cpu':
        worker = stack.enter_context(start(job))
        return worker.ask, worker.answer()
    work = work_of(job)
    return partial(turn, work, job['device']), seconds_of(work, job['device'])


def answer_times(work: Work, device: str) -> None:
    """Answers with the seconds of a first run, then of a turn for each request."""
    answer(seconds_of(work, device))
    for _ in sys.stdin:
        answer(turn(work, device))


def memory_of(job: dict, processes: int) -> dict[str, Any]:
    """Measures memory in several fresh processes.

    Returns:
        ``peak`` and ``held`` in bytes, medians, and all ``peaks``.
    """
    found = [in_fresh_process(job) for _ in range(processes)]
    peaks = [result['peak'] for result in found]
    held = [result['held'] for result in found if result['held'] is not None]
    return {
        'peak': statistics.median(peaks),
        'held': statistics.median(held) if held else None,
        'peaks': peaks,
    }
