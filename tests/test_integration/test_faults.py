"""What can go wrong in a long training: each fault is one clear line, and nothing is lost."""

import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmcv.transforms import BaseTransform
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, TRANSFORMS

from hat_mm.engine import cli
from hat_mm.weights import fileio

ROOT = Path(__file__).resolve().parents[2]
TOY_CONFIG = str(ROOT / 'configs/toy/mask-rcnn_fastervit-tiny_fpn_shapes.py')
RUNS = itertools.count()

pytestmark = pytest.mark.usefixtures('plain_dumps')


@pytest.fixture(scope='module')
def train(toy_options):
    """Train for two epochs of two steps, as the command line does; returns the exit status."""

    def run(work_dir, *arguments, options=()):
        argv = [TOY_CONFIG, '--work-dir', str(work_dir), *map(str, arguments), '--cfg-options']
        argv += [*toy_options, 'train_cfg.max_epochs=2', f'experiment_name=faults{next(RUNS)}']
        return cli.run_tool(lambda: cli.train([*argv, *options]), 'train.py')

    return run


@pytest.fixture(scope='module')
def trained(train, tmp_path_factory):
    folder = tmp_path_factory.mktemp('trained')
    assert train(folder) == 0
    return folder


@pytest.fixture
def work_dir(trained, tmp_path):
    """A copy of a training with two checkpoints."""
    folder = tmp_path / 'run'
    shutil.copytree(trained, folder)
    (folder / 'last_checkpoint').write_text(str(folder / 'epoch_2.pth'))
    return folder


def last_line(capsys):
    """The line that explains the error; there is no traceback."""
    captured = capsys.readouterr()
    assert 'Traceback' not in captured.err
    return captured.err.strip().splitlines()[-1]


def log_of(work_dir):
    return max(work_dir.glob('*/*.log'), key=os.path.getmtime).read_text()


# --- checkpoints ----------------------------------------------------------------------------------


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def scratch(path):
    """Changes one byte within a tensor."""
    with open(path, 'r+b') as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 255]))


@pytest.mark.parametrize('damage', [truncate, scratch, Path.unlink])
def test_resume_takes_the_checkpoint_before_a_damaged_one(damage, train, work_dir, trained):
    damage(work_dir / 'epoch_2.pth')
    assert train(work_dir, '--resume') == 0
    log = log_of(work_dir)
    assert 'epoch_2.pth' in log
    assert f'; resuming from {work_dir}/epoch_1.pth' in log
    found, expected = (fileio.read(folder / 'epoch_2.pth') for folder in (work_dir, trained))
    for name, value in expected['state_dict'].items():
        assert torch.equal(found['state_dict'][name], value)


def test_an_empty_pointer_does_not_lose_the_checkpoints(train, work_dir):
    (work_dir / 'last_checkpoint').write_text('')
    assert train(work_dir, '--resume') == 0
    assert f'last_checkpoint is empty; resuming from {work_dir}/epoch_2.pth' in log_of(work_dir)


def test_a_work_dir_can_be_moved(train, work_dir):
    (work_dir / 'last_checkpoint').write_text('elsewhere/epoch_2.pth')
    assert train(work_dir, '--resume') == 0
    assert f'resuming from {work_dir}/epoch_2.pth' in log_of(work_dir)


def test_no_whole_checkpoint_is_an_error(train, work_dir, capsys):
    for path in work_dir.glob('*.pth'):
        truncate(path)
    assert train(work_dir, '--resume') == 1
    line = last_line(capsys)
    assert 'epoch_2.pth was not loaded: it is no checkpoint, or is damaged' in line
    assert line.endswith(f'no checkpoint in {str(work_dir)!r} is whole: train without --resume')


def test_a_damaged_checkpoint_that_is_named_is_an_error(train, work_dir, capsys):
    truncate(work_dir / 'epoch_2.pth')
    assert train(work_dir, '--resume', work_dir / 'epoch_2.pth') == 1
    assert last_line(capsys).endswith(f'is damaged; {work_dir}/epoch_1.pth beside it is whole')
    (work_dir / 'epoch_1.pth').unlink()
    assert train(work_dir, '--resume', work_dir / 'epoch_2.pth') == 1
    assert last_line(capsys).endswith('is damaged; no other beside it is whole')


def test_a_full_disk_leaves_the_earlier_checkpoint(train, tmp_path, capsys):
    (tmp_path / '.epoch_2.pth.part').symlink_to('/dev/full')  # what is written there has no room
    assert train(tmp_path, options=['default_hooks.checkpoint.max_keep_ckpts=1']) == 1
    line = last_line(capsys)
    assert 'checkpoint not written (No space left on device), earlier ones are intact' in line
    assert line.endswith(f"'{tmp_path}/epoch_2.pth'")
    assert (tmp_path / 'last_checkpoint').read_text() == f'{tmp_path}/epoch_1.pth'
    assert [path.name for path in tmp_path.glob('*epoch*')] == ['epoch_1.pth']
    fileio.read(tmp_path / 'epoch_1.pth')
    assert train(tmp_path, '--resume', options=['default_hooks.checkpoint.max_keep_ckpts=1']) == 0
    assert [path.name for path in tmp_path.glob('*epoch*')] == ['epoch_2.pth']


@HOOKS.register_module(name='FaultsReadOnly')
class ReadOnly(Hook):
    """Turns the work dir into something that cannot be written to."""

    def after_train_epoch(self, runner):
        shutil.rmtree(runner.work_dir)
        Path(runner.work_dir).symlink_to('/proc')


def test_a_work_dir_that_becomes_read_only(train, tmp_path, capsys):
    options = ['default_hooks.fault.type=FaultsReadOnly']
    assert train(tmp_path / 'run', options=options) == 1
    line = last_line(capsys)
    assert 'checkpoint not written (' in line
    assert 'run/epoch_1.pth' in line


# --- pictures -------------------------------------------------------------------------------------


@pytest.fixture
def broken(shapes, tmp_path):
    """The data set with one image cut off, and the options that set it."""
    data = tmp_path / 'shapes'
    shutil.copytree(shapes, data)
    image = sorted((data / 'train').iterdir())[1]
    os.truncate(image, image.stat().st_size // 2)
    return image, [f'train_dataloader.dataset.data_root={data}/']


@pytest.mark.parametrize('workers', [0, 1])
def test_a_broken_image_is_named(workers, train, broken, tmp_path, capsys):
    image, options = broken
    options = [*options, f'train_dataloader.num_workers={workers}']
    assert train(tmp_path / 'run', options=options) == 1
    line = last_line(capsys)
    assert line.startswith(f'train.py: error: failed to load image: {image} (it is no image, or is')


@pytest.mark.parametrize('workers', [0, 1])
@pytest.mark.parametrize('missing', [False, True])
def test_a_broken_image_can_be_left_out(workers, missing, train, broken, tmp_path):
    image, options = broken
    if missing:
        image.unlink()
    options = [
        *options,
        f'train_dataloader.num_workers={workers}',
        'train_dataloader.dataset.pipeline.0.type=hat_mm.LoadImageOrSkip',
    ]
    assert train(tmp_path / 'run', options=options) == 0
    log = log_of(tmp_path / 'run')
    assert f"image '{image}' is left out (" in log
    assert '); 1 so far' in log
    assert '); 2 so far' in log  # it comes once in each epoch


def test_a_missing_image_is_named_from_a_worker(train, broken, tmp_path, capsys):
    image, options = broken
    image.unlink()
    assert train(tmp_path / 'run', options=[*options, 'train_dataloader.num_workers=1']) == 1
    assert last_line(capsys).endswith(f"No such file or directory: '{image}'")


# --- processes ------------------------------------------------------------------------------------


@TRANSFORMS.register_module(name='FaultsDie')
class Die(BaseTransform):
    def __init__(self, prob):
        pass

    def transform(self, results):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_dies_is_explained(train, tmp_path, capsys):
    options = [
        'train_dataloader.num_workers=1',
        'train_dataloader.dataset.pipeline.3.type=FaultsDie',
    ]
    assert train(tmp_path, options=options) == 1
    line = last_line(capsys)
    assert 'a process that loads data has died, most often for lack of memory' in line
    assert 'DataLoader worker (pid' in line


FAULT = """
import os, signal
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

@HOOKS.register_module()
class DieLate(Hook):
    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.rank == 1 and runner.epoch == 1:
            os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_rank_that_dies_is_explained_by_the_others(toy_options, tmp_path):
    (tmp_path / 'late_fault.py').write_text(FAULT)
    config = tmp_path / 'config.py'
    config.write_text(
        f"_base_ = {TOY_CONFIG!r}\ncustom_imports = dict(imports=['late_fault'])\n"
        "default_hooks = dict(fault=dict(type='DieLate'))\n"
    )
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    # Not by torchrun, which ends the other processes before they can speak.
    command = [
        sys.executable, ROOT / 'tools/train.py', config, '--work-dir', tmp_path / 'run',
        '--launcher', 'pytorch', '--cfg-options', *toy_options,
        'train_dataloader.batch_size=1', 'train_cfg.max_epochs=2',
    ]  # fmt: skip
    ranks = [
        subprocess.Popen(
            command,
            env={
                **os.environ,
                'PYTHONPATH': f'{ROOT}:{tmp_path}',
                'RANK': str(rank),
                'LOCAL_RANK': str(rank),
                'WORLD_SIZE': '2',
                'MASTER_ADDR': '127.0.0.1',
                'MASTER_PORT': str(port),
                'CUDA_VISIBLE_DEVICES': '',
                'GLOO_SOCKET_IFNAME': 'lo',
                'OMP_NUM_THREADS': '1',
            },
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=300)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [1, -signal.SIGKILL], errors
    line = errors[0].strip().splitlines()[-1]
    assert line.startswith('train.py: error: another process of this training has ended; its own')
    assert line.endswith('--resume continues from the last checkpoint')
    fileio.read(tmp_path / 'run/epoch_1.pth')
