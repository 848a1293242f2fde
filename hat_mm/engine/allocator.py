"""The C library's allocator, set so that memory stays with the process."""

import ctypes
import logging
import os
import platform

__all__ = ['VARIABLE', 'objection', 'tune_allocator']

logger = logging.getLogger(__name__)

VARIABLE = 'HAT_MM_NO_MALLOPT'
"""Environment variable by which :func:`tune_allocator` leaves the allocator alone."""

# Parameters of glibc's malloc.h. Its thresholds take an int, so that a large one still gives back
# blocks of 2 GiB, and before glibc 2.35 the one of mmap ends at 32 MiB; these values have no limit.
_SETTINGS = {
    -8: 1,  # M_ARENA_MAX: threads share one arena; those of their own cannot hold large blocks
    -4: 0,  # M_MMAP_MAX: no block is mapped by itself, to be unmapped when it is freed
    -1: -1,  # M_TRIM_THRESHOLD: the end of the heap is never given back
}


def objection() -> str:
    """Why :func:`tune_allocator` leaves the allocator alone; empty if it does not."""
    if os.environ.get(VARIABLE):
        return f'{VARIABLE} is set'
    for name, value in os.environ.items():
        if value and (
            name.startswith('MALLOC_')
            or (name == 'GLIBC_TUNABLES' and 'glibc.malloc.' in value)
            or (name == 'LD_PRELOAD' and 'malloc' in value)  # jemalloc, tcmalloc, mimalloc
        ):
            return f'{name}={value}'
    return '' if platform.libc_ver()[0] == 'glibc' else 'the C library is not glibc'


def tune_allocator() -> bool:
    """Keeps freed memory in this process for the next pass, if the C library is glibc.

    By default glibc gives large blocks back to the system when they are freed, and gets them again
    page by page, each of them cleared and mapped: a good part of a forward pass on a CPU. After
    this call freed blocks of any size wait for the next pass, so the resident size of the process
    stays at its peak. Models on a GPU gain nothing.

    Call it first: a thread that has allocated memory before keeps its own arena, which gives large
    blocks back as ever. ``import hat_mm`` does not call it; our tools do where there is no GPU.

    What the user has decided stays: nothing happens if ``HAT_MM_NO_MALLOPT`` is set, if
    ``GLIBC_TUNABLES`` or a ``MALLOC_*`` variable sets the allocator, or if ``LD_PRELOAD`` puts
    another one in its place. Such alternatives are jemalloc and tcmalloc; ``python -m
    torch.backends.xeon.run_cpu`` starts a program with either.

    Returns:
        Whether freed memory is kept; at debug level the log says why not.
    """
    reason = objection()
    if reason:
        logger.debug('allocator left alone: %s', reason)
        return False
    mallopt = ctypes.CDLL(None).mallopt
    done = all(mallopt(parameter, value) for parameter, value in _SETTINGS.items())
    logger.debug('freed memory %s with the process', 'stays' if done else 'does not all stay')
    return done
