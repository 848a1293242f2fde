"""Settings of the C library's allocator that keep freed memory in the process."""

import ctypes
import logging
import os
import platform

__all__ = ['VARIABLE', 'objection', 'tune_allocator']

logger = logging.getLogger(__name__)

VARIABLE = 'HAT_MM_NO_MALLOPT'
"""Environment variable that makes :func:`tune_allocator` leave the allocator alone."""

# Parameters of glibc's malloc.h. Large thresholds would not do: they are ints, so blocks of 2 GiB
# would still be given back, and before glibc 2.35 that of mmap is at most 32 MiB. These values set
# no limit.
_SETTINGS = {
    -8: 1,  # M_ARENA_MAX: all threads share one arena; other arenas cannot hold large blocks
    -4: 0,  # M_MMAP_MAX: no block is mapped separately, and so unmapped when it is freed
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

    By default glibc returns large blocks to the system when they are freed, and gets new ones page
    by page, each cleared and mapped; this takes a good part of a forward pass on a CPU. After this
    call, freed blocks of any size stay in the process, so its resident size stays at its peak.
    Models on a GPU gain nothing.

    Call it first: a thread that has already allocated memory keeps its own arena, which still
    returns large blocks. ``import hat_mm`` does not call it; our tools do if there is no GPU.

    The user's settings have priority: nothing happens if ``HAT_MM_NO_MALLOPT`` is set, if
    ``GLIBC_TUNABLES`` or a ``MALLOC_*`` variable configures the allocator, or if ``LD_PRELOAD``
    replaces it, for example by jemalloc or tcmalloc; ``python -m torch.backends.xeon.run_cpu``
    starts a program with either.

    Returns:
        Whether freed memory is kept; if not, the log says why at debug level.
    """
    reason = objection()
    if reason:
        logger.debug('allocator left alone: %s', reason)
        return False
    mallopt = ctypes.CDLL(None).mallopt
    done = all(mallopt(parameter, value) for parameter, value in _SETTINGS.items())
    logger.debug('freed memory %s with the process', 'stays' if done else 'does not all stay')
    return done
