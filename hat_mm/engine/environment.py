"""Records how a figure was measured: command, hardware, versions and date."""

import datetime
import importlib.metadata
import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

from .allocator import objection, tune_allocator

MODULES = (
    *('torch', 'mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain', 'timm', 'fastervit'),
    *('onnxruntime', 'openvino', 'nncf'),
)


def processor() -> str:
    """Model name of the processor, from the system."""
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(':')[1].strip() for line in lines if 'model name' in line), 'unknown')


def versions() -> dict[str, str]:
    """Versions of Python, hat_mm and the imported modules of :data:`MODULES`."""
    found = {'Python': platform.python_version()}
    for name in (*MODULES, 'hat_mm'):
        if name in sys.modules:
            version = getattr(sys.modules[name], '__version__', None)
            found[name] = version or importlib.metadata.version(name)
    return found


def tune() -> str:
    """Calls :func:`hat_mm.tune_allocator`; returns the outcome in words."""
    return 'tuned' if tune_allocator() else f'not tuned ({objection() or "glibc refused"})'


def circumstances(device: str, allocator: str | None = None) -> dict[str, Any]:
    """Command, date, hardware and versions of a measurement, for its results.

    Args:
        device: ``'cpu'`` or ``'cuda'``.
        allocator: State of the allocator in measurements on a CPU, as :func:`tune` returns it.
    """
    words = [os.path.relpath(sys.argv[0]), *sys.argv[1:]]
    return {
        'command': f'python {shlex.join(words)}',
        'date': str(datetime.date.today()),
        'device': device,
        'gpu': torch.cuda.get_device_name() if device == 'cuda' else None,
        'processor': processor(),
        'cores': os.cpu_count(),
        'threads': torch.get_num_threads(),
        'allocator': allocator,
        'versions': versions(),
    }


def describe(found: dict[str, Any]) -> str:
    """The result of :func:`circumstances` as a sentence, without the command."""
    threads = f'{found["threads"]} thread{"s" * (found["threads"] != 1)}'
    where = f'{threads} on {found["cores"]} cores of {found["processor"]}'
    if found['gpu']:
        where = f'{found["gpu"]}; {where}'
    if found.get('allocator'):  # earlier results do not have it
        where += f'; allocator {found["allocator"]}'
    names = ', '.join(f'{name} {version}' for name, version in found['versions'].items())
    return f'{where}; {names}; {found["date"]}'
