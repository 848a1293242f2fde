"""Shared by all tests: hat_mm before any toolbox, no network, few threads, one tiny data set."""

import functools
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from mmengine.config import config, utils
from mmengine.utils import ManagerMixin
from shapes import make_dataset

import hat_mm  # noqa: F401  its repairs apply to toolboxes that are imported later

ROOT = Path(__file__).resolve().parents[1]
CPUS = len(os.sched_getaffinity(0)) // int(os.environ.get('PYTEST_XDIST_WORKER_COUNT', '1')) or 1

torch.set_num_threads(min(CPUS, 4))
# Programs that the tests start share the processor as well.
os.environ.setdefault('OMP_NUM_THREADS', str(torch.get_num_threads()))
# onnxruntime reads this when it is imported.
os.environ.setdefault('ORT_DISABLE_TELEMETRY', '1')
# Tools that run in this process are not to keep the memory that they free.
os.environ.setdefault('HAT_MM_NO_MALLOPT', '1')


# --- no network ----------------------------------------------------------------------------------

_LOOPBACK = ('127.', '::1', 'localhost')


def _guarded(method: Callable) -> Callable:
    def connect(self: socket.socket, address: object) -> object:
        if isinstance(address, tuple) and not str(address[0]).startswith(_LOOPBACK):
            raise RuntimeError(f'a test tried to reach {address[0]!r} over the network')
        return method(self, address)

    return connect


socket.socket.connect = _guarded(socket.socket.connect)
socket.socket.connect_ex = _guarded(socket.socket.connect_ex)


# --- no state of mmengine between tests ----------------------------------------------------------


@pytest.fixture(autouse=True)
def _fresh_globals() -> None:
    """Forget mmengine's global instances: runs named by the second would share their visualizer."""
    kinds = [ManagerMixin]
    while kinds:
        kind = kinds.pop()
        kind._instance_dict.clear()
        kinds += kind.__subclasses__()


@pytest.fixture(autouse=True, scope='session')
def _quick_external_bases() -> Iterator[None]:
    """Read each metafile once: mmengine reads all of a toolbox's for every external base."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, 'load', functools.cache(utils.load))
        yield


@pytest.fixture(scope='module')
def plain_dumps() -> Iterator[None]:
    """Write configs unformatted: yapf takes most of the time of a short run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, 'FormatCode', lambda text, **_: (text, True), raising=False)
        yield


# --- a tiny data set and the toy config on it ---------------------------------------------------


@pytest.fixture(scope='session')
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy instance set with four training and two validation images."""
    folder = tmp_path_factory.mktemp('data') / 'shapes'
    make_dataset(folder, num_train=4, num_val=2)
    return folder


@pytest.fixture(scope='session')
def toy_options(shapes: Path) -> list[str]:
    """``--cfg-options`` that put the toy config on ``shapes``, for two steps without validation."""
    options = [
        'train_cfg.max_epochs=1',
        'train_cfg.val_interval=10',
        'train_dataloader.batch_size=2',
        'model.test_cfg.rpn.max_per_img=20',
        'model.test_cfg.rcnn.max_per_img=5',
    ]
    for split in ('train', 'val', 'test'):
        options += [
            f'{split}_dataloader.dataset.data_root={shapes}/',
            f'{split}_dataloader.num_workers=0',
            f'{split}_dataloader.persistent_workers=False',
        ]
    for split in ('val', 'test'):
        options.append(f'{split}_evaluator.ann_file={shapes}/annotations/val.json')
    return options


# --- fresh interpreters --------------------------------------------------------------------------


@pytest.fixture(scope='session')
def run_python() -> Callable[..., subprocess.CompletedProcess]:
    """Run a fresh interpreter with arguments; keywords set environment variables."""

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, *arguments],
            env={**os.environ, 'PYTHONPATH': str(ROOT), **environment},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return run
