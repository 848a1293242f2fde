"""What is measured with: seconds and memory, in processes of their own."""

from __future__ import annotations

import ctypes
import gc
import logging
import multiprocessing
import re
import statistics
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.benchmark import Timer, timer

from hat_mm.engine.cli import UserError
from hat_mm.engine.environment import tune


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


def one_line(error: BaseException) -> str:
    """An error as a cell of a table."""
    text = ' '.join(str(error).split()) or 'no message'
    return f'{type(error).__name__}: {text}'[:200]


# --- processes ------------------------------------------------------------------------------------


class Worker(AbstractContextManager):
    """A fresh process that measures; it ends with the ``with`` block.

    How fast the system hands out memory depends on all that a process has done before, so on a CPU
    each candidate has one.

    Args:
        device: ``'cpu'`` or ``'cuda'``.
        tuned: Whether a process that measures on a CPU keeps the memory that it frees, unless the
            user's environment says otherwise.

    Attributes:
        allocator: How the process gets its memory, in words; None on a GPU.
    """

    def __init__(self, device: str, tuned: bool) -> None:
        self._pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context('spawn'))
        self.allocator: str | None = self.run(_begin, device, tuned)

    def run(self, function: Callable, *arguments: Any) -> Any:
        """Calls a function in the process.

        Raises:
            UserError: It failed, or the process was killed.
        """
        try:
            return self._pool.submit(_call, function, *arguments).result()
        except BrokenProcessPool as error:
            raise UserError('the process was killed: out of memory?') from error

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)


def _begin(device: str, tuned: bool) -> str | None:
    logging.disable(logging.WARNING)
    warnings.simplefilter('ignore')  # of the toolboxes
    if device == 'cuda':
        torch.backends.cudnn.benchmark = True
        return None
    return tune() if tuned else 'default'


def _call(function: Callable, *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except Exception as error:  # not every exception can be sent to another process
        raise UserError(one_line(error)) from error


# --- time -----------------------------------------------------------------------------------------

_timers: dict[str, Timer] = {}
"""In a process that measures, what it times."""


def add_timer(name: str, prepare: Callable[..., Work], *arguments: Any) -> float:
    """Prepares what :func:`turn` times.

    Returns:
        Seconds of a first run, which compiles what has to be compiled.
    """
    work = prepare(*arguments)
    _timers[name] = Timer(
        'work.run()', 'work.reset()', globals={'work': work}, num_threads=torch.get_num_threads()
    )
    work.reset()
    start = timer()
    work.run()
    return timer() - start


def turn(name: str) -> float:
    """Seconds that one run takes: the median of as many as fill a fifth of a second.

    A run before them does not count: after a pause, or after another process, it takes longer.
    """
    return _timers[name].blocked_autorange(min_run_time=0.2).median


def time_in_turns(
    timers: Mapping[str, Callable[[], float]], rounds: int
) -> tuple[dict[str, list[float]], dict[str, Exception]]:
    """Times several things in turns, so that whatever slows the machine slows them alike.

    Args:
        timers: By name, what does the thing once and returns the seconds that it took.
        rounds: Turns of each.

    Returns:
        By name the seconds of each turn, and what ended those that failed in one.
    """
    seconds: dict[str, list[float]] = {name: [] for name in timers}
    failed: dict[str, Exception] = {}
    for _ in range(rounds):
        for name in [*seconds]:
            try:
                seconds[name].append(timers[name]())
            except Exception as error:  # the others can still be measured
                failed[name] = error
                del seconds[name]
    return seconds, failed


# --- memory ---------------------------------------------------------------------------------------


def _resident(field: str) -> int:
    """Bytes of this process: ``VmRSS`` now, ``VmHWM`` at the peak."""
    path = Path('/proc/self/status')
    found = re.search(rf'^{field}:\s*(\d+)', path.read_text() if path.exists() else '', re.M)
    if found is None:
        raise UserError(f'{path} has no {field}: memory can be measured on Linux only')
    return int(found[1]) * 1024


def _used(device: str) -> int:
    """Bytes in use, without those that are free inside this process."""
    gc.collect()
    if device == 'cuda':
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()
    trim = getattr(ctypes.CDLL(None), 'malloc_trim', None)
    if trim is not None:  # the C library is glibc
        trim(0)
    return _resident('VmRSS')


def peak_memory(device: str, prepare: Callable[..., Work], *arguments: Any) -> dict[str, Any]:
    """Measures memory beyond what is in use before, which holds weights and input.

    On the CPU this is the resident set, so it has to be the first large thing that a process does.

    Returns:
        Bytes: ``peak`` and, if training, ``held`` between the forward and the backward pass.
    """
    work = prepare(*arguments)
    work.run()  # what libraries allocate once is no part of a pass
    work.reset()
    before = _used(device)
    if device == 'cuda':
        torch.cuda.reset_peak_memory_stats()
    else:
        Path('/proc/self/clear_refs').write_text('5')  # resets the peak
    result = work.forward()
    held = None
    if work.training:
        held = _used(device) - before
        result.backward()
    if device == 'cuda':
        torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() if device == 'cuda' else _resident('VmHWM')
    return {'peak': peak - before, 'held': held}


def memory_of(
    processes: int, device: str, tuned: bool, prepare: Callable[..., Work], *arguments: Any
) -> dict[str, Any]:
    """Measures memory in several fresh processes.

    Returns:
        ``peak`` and ``held`` in bytes, medians, and all ``peaks``.
    """
    found = []
    for _ in range(processes):
        with Worker(device, tuned) as worker:
            found.append(worker.run(peak_memory, device, prepare, *arguments))
    peaks = [result['peak'] for result in found]
    held = [result['held'] for result in found if result['held'] is not None]
    return {
        'peak': statistics.median(peaks),
        'held': statistics.median(held) if held else None,
        'peaks': peaks,
    }
