"""A training that is killed at twenty random moments ends with the weights of an unbroken one."""

import contextlib
import multiprocessing
import os
import random
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from shapes import make_dataset

from hat_mm.engine import cli
from hat_mm.weights import fileio

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / 'configs/toy/mask-rcnn_fastervit-tiny_fpn_shapes.py')
EPOCHS = 4
KILLS = 20


@HOOKS.register_module(name='KillsPhase')
class Phase(Hook):
    """Writes down what the run is doing."""

    def __init__(self, file):
        self.file = Path(file)

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.file.write_text('training')

    def before_val_iter(self, runner, batch_idx, data_batch=None):
        self.file.write_text('evaluation')

    def before_save_checkpoint(self, runner, checkpoint):
        self.file.write_text('saving')


def run(argv, log):
    """What the process does that gets killed; its parent has imported the packages."""
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(log, 'a')  # noqa: SIM115
    sys.exit(cli.run_tool(lambda: cli.train(argv), 'train.py'))


@pytest.fixture(scope='module')
def start():
    """Starts a training in a fresh process, within a second."""
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['mmdet.apis', 'mmdet.evaluation', 'mmdet.engine', __name__])

    def begin(argv, log):
        process = context.Process(target=run, args=(argv, str(log)))
        process.start()
        return process

    return begin


def read(work_dir, epoch=EPOCHS):
    return torch.load(work_dir / f'epoch_{epoch}.pth', weights_only=True)


def differences(found, expected):
    """Names of the tensors that are not equal, in weights, their averages and the optimizer."""
    parts = {}
    for checkpoint in (found, expected):
        tensors = parts[id(checkpoint)] = {}
        for part in ('state_dict', 'ema_state_dict'):
            tensors |= {f'{part} {name}': value for name, value in checkpoint[part].items()}
        for number, state in checkpoint['optimizer']['state'].items():
            tensors |= {f'optimizer {number} {name}': value for name, value in state.items()}
    found, expected = parts[id(found)], parts[id(expected)]
    assert found.keys() == expected.keys()
    return [name for name in expected if not torch.equal(found[name], expected[name])]


@pytest.mark.slow
@pytest.mark.parametrize('workers', [0, 1, 2])
def test_killed_and_unbroken_trainings_end_equal(start, tmp_path, workers):
    data, phase, log = tmp_path / 'shapes', tmp_path / 'phase', tmp_path / 'log'
    make_dataset(data, num_train=10, num_val=3)
    options = [
        f'train_cfg.max_epochs={EPOCHS}',
        'train_cfg.val_interval=2',
        'model.backbone.arch.drop_path_rate=0.3',
        'train_dataloader.batch_size=2',
        'default_hooks.checkpoint.save_best=auto',
        'default_hooks.averaging.type=EMAHook',
        'default_hooks.phase.type=KillsPhase',
        f'default_hooks.phase.file={phase}',
        f'val_evaluator.ann_file={data}/annotations/val.json',
    ]
    for split, number in (('train', workers), ('val', 0)):
        options += [
            f'{split}_dataloader.dataset.data_root={data}/',
            f'{split}_dataloader.num_workers={number}',
            f'{split}_dataloader.persistent_workers={number > 0}',
        ]

    def begin(folder, *arguments):
        argv = [CONFIG, '--work-dir', str(folder), *arguments, '--cfg-options', *options]
        return start(argv, log)

    begun = time.monotonic()
    for name in ('one', 'two'):
        process = begin(tmp_path / name)
        process.join()
        assert process.exitcode == 0, log.read_text()[-3000:]
    length = (time.monotonic() - begun) / 2
    expected = read(tmp_path / 'one')
    assert differences(read(tmp_path / 'two'), expected) == []

    moments = random.Random(workers)
    hits, finished = Counter(), 0
    while hits.total() < KILLS or finished == 0:
        folder = tmp_path / f'killed_{finished}'
        phase.write_text('set-up')
        process = begin(folder, '--resume')
        # Some kills wait for what takes little time.
        wanted = {5: 'saving', 10: 'evaluation', 15: 'saving'}.get(hits.total())
        end = time.monotonic() + moments.uniform(0.15, 0.6) * length
        if hits.total() == KILLS:
            end = float('inf')
        while process.is_alive() and time.monotonic() < end and phase.read_text() != wanted:
            time.sleep(0.001)
        if process.is_alive():
            hits[phase.read_text()] += 1
            process.kill()
            process.join()
        else:
            assert process.exitcode == 0, log.read_text()[-3000:]
            assert differences(read(folder), expected) == []
            finished += 1
        # Nothing under a final name is damaged.
        for path in folder.glob('*.pth'):
            fileio.read(path)
        with contextlib.suppress(FileNotFoundError):
            fileio.read((folder / 'last_checkpoint').read_text())
    print(f'\n{workers} worker(s): {length:.0f} s unbroken; killed during {dict(hits)}; '
          f'{finished} training(s) finished, all equal', file=sys.__stdout__)  # fmt: skip
    assert {'training', 'evaluation', 'saving'} <= {*hits}
    assert os.path.exists(tmp_path / 'killed_0' / f'epoch_{EPOCHS}.pth')
