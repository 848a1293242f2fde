"""Measures seconds and memory, in separate processes."""

from __future__ import annotations

import ctypes
import gc
import logging
import multiprocessing
import re
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.benchmark import Timer
from torch.utils.checkpoint import checkpoint

from hat_mm.engine.cli import UserError
from hat_mm.engine.environment import tune


@dataclass(frozen=True)
class Work:
    """Something to measure.

    Attributes:
        forward: The forward pass; its result has ``backward`` if ``training``.
        training: Whether the backward pass is part of the work.
        reset: Called before each pass and not measured, for example to drop gradients.
        compiled: Whether the first pass compiles.
    """

    forward: Callable[[], Any]
    training: bool = False
    reset: Callable[[], None] = lambda: None
    compiled: bool = False

    def run(self) -> None:
        """Does the work once."""
        result = self.forward()
        if self.training:
            result.backward()


Job = tuple[Callable[..., Work], Any]
"""A function that makes a piece of work in the measuring process, and its argument."""
Measured = tuple[dict[str, list[float]], dict[str, str]]
"""The measurements by name, and the errors of those that failed."""


# --- processes ------------------------------------------------------------------------------------


class Worker(AbstractContextManager):
    """A fresh process for measurements; it ends with the ``with`` block.

    Args:
        device: ``'cpu'`` or ``'cuda'``.
        tuned: Whether a process that measures on a CPU keeps the memory that it frees, unless the
            user's environment says otherwise.

    Attributes:
        allocator: State of the allocator, in words; None on a GPU.
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
            return self._pool.submit(call, function, *arguments).result()
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


def call(function: Callable, *arguments: Any) -> Any:
    """Calls a function; raises UserError, which any process can receive, if it fails."""
    try:
        return function(*arguments)
    except UserError:
        raise
    except Exception as error:  # not all exceptions can be sent to another process
        text = ' '.join(str(error).split()) or 'no message'
        raise UserError(f'{type(error).__name__}: {text}'[:200]) from error


# --- time -----------------------------------------------------------------------------------------

timers: dict[str, Timer] = {}  # of this process


def turn(name: str, prepare: Callable[..., Work], argument: Any) -> float:
    """Returns the seconds of one run: the median of as many runs as fill a fifth of a second.

    A run before them does not count, because it takes longer after a pause or another process.
    """
    if name not in timers:
        names = {'work': prepare(argument)}
        threads = torch.get_num_threads()
        timers[name] = Timer('work.run()', 'work.reset()', globals=names, num_threads=threads)
    return timers[name].blocked_autorange(min_run_time=0.2).median


def seconds_of(jobs: Mapping[str, Job], rounds: int, device: str, tuned: bool) -> Measured:
    """Times several jobs in turns, so that whatever slows the machine affects all of them.

    On a CPU each job has its own process, because the speed of memory allocation depends on
    everything that a process has done before. On a GPU they share one, because the allocator of
    each process would keep its memory.
    """
    found: dict[str, list[float]] = {name: [] for name in jobs}
    errors: dict[str, str] = {}
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for name in jobs:
            if not workers or device == 'cpu':
                worker = stack.enter_context(Worker(device, tuned))
            workers[name] = worker
        for _ in range(rounds):
            for name in [name for name in jobs if name not in errors]:
                try:
                    found[name].append(workers[name].run(turn, name, *jobs[name]))
                except UserError as error:  # the other jobs can still be measured
                    errors[name] = str(error)
    return found, errors


# --- memory ---------------------------------------------------------------------------------------


def resident(field: str) -> int:
    """Bytes of this process: ``VmRSS`` now, ``VmHWM`` at the peak."""
    path = Path('/proc/self/status')
    found = re.search(rf'^{field}:\s*(\d+)', path.read_text() if path.exists() else '', re.M)
    if found is None:
        raise UserError(f'{path} has no {field}: memory can be measured on Linux only')
    return int(found[1]) * 1024


def return_free_memory() -> None:
    """Returns memory that is free inside this process to the system, so that it does not count."""
    trim = getattr(ctypes.CDLL(None), 'malloc_trim', None)
    if trim is not None:  # the C library is glibc
        trim(0)


def _warm_libraries() -> None:
    """Makes torch and its libraries allocate on the CPU what they allocate only once."""
    layers = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3),
        torch.nn.BatchNorm2d(8),
        torch.nn.GELU(),
        torch.nn.Flatten(2),
        torch.nn.LayerNorm(16),
        torch.nn.Linear(16, 16),
    )
    x = layers(torch.ones(1, 3, 6, 6))[:, None]
    torch.nn.functional.scaled_dot_product_attention(x, x, x).softmax(-1).sum().backward()
    # The first call of checkpoint imports modules.
    checkpoint(torch.nn.Identity(), x.detach().requires_grad_(), use_reentrant=False)


def peak_memory(device: str, prepare: Callable[..., Work], argument: Any) -> int:
    """Measures the peak memory of a pass beyond what is in use before it, in bytes.

    Weights, images, and what libraries allocate once are in use before. On the CPU memory means the
    resident set, so this has to be the first large thing that a process does: holes that an earlier
    pass left in the heap would change the result.
    """
    _warm_libraries()
    work = prepare(argument)
    if device == 'cuda' or work.compiled:
        work.run()
    work.reset()
    gc.collect()
    if device == 'cuda':
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work.run()
        return torch.cuda.max_memory_allocated() - before
    return_free_memory()
    before = resident('VmRSS')
    Path('/proc/self/clear_refs').write_text('5')  # resets the peak
    result = work.forward()
    if work.training:
        return_free_memory()
        result.backward()
    return resident('VmHWM') - before


def peaks_of(jobs: Mapping[str, Job], processes: int, device: str, tuned: bool) -> Measured:
    """Measures the memory of several jobs, each time in a fresh process."""
    found: dict[str, list[float]] = {name: [] for name in jobs}
    errors: dict[str, str] = {}
    for name, job in jobs.items():
        try:
            for _ in range(processes):
                with Worker(device, tuned) as worker:
                    found[name].append(worker.run(peak_memory, device, *job))
        except UserError as error:
            errors[name] = str(error)
    return found, errors
