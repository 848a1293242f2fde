"""A loss that is not finite never reaches the weights."""

import itertools
import math
import os
import socket
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import torch.multiprocessing
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.registry import DATASETS, MODELS
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import Dataset

from hat_mm import NonFiniteLossHook
from hat_mm.engine import cli

NAMES = itertools.count()


@DATASETS.register_module(name='HooksNumbers')
class Numbers(Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, index):
        return dict(inputs=torch.tensor([float(index)]))


@MODELS.register_module(name='HooksNet')
class Net(BaseModel):
    """Has the given loss at some steps."""

    def __init__(self, bad):
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.norm = nn.BatchNorm1d(1, affine=False)
        self.bad = bad
        self.step = 0

    def forward(self, inputs, data_samples=None, mode='tensor'):
        self.step += 1
        bad = float(self.bad.get(f'step{self.step}', 0.0))
        x = torch.stack(inputs)
        self.norm(x + bad)
        loss = self.layer(x).square().mean()
        return dict(loss_good=loss, loss_bad=loss.detach() * 0 + bad, acc=torch.tensor(math.nan))


def train(work_dir, bad, accumulative_counts=1, launcher='none', **hook):
    runner = Runner(
        model=dict(type='HooksNet', bad=bad),
        work_dir=str(work_dir),
        train_dataloader=dict(
            batch_size=2,
            dataset=dict(type='HooksNumbers'),
            sampler=dict(type='DefaultSampler', shuffle=False),
        ),
        train_cfg=dict(by_epoch=True, max_epochs=1),
        optim_wrapper=dict(
            optimizer=dict(type='AdamW', lr=0.1), accumulative_counts=accumulative_counts
        ),
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=1)),
        custom_hooks=[dict(type='hat_mm.NonFiniteLossHook', **hook)] if hook else [],
        randomness=dict(seed=0),
        experiment_name=f'hooks{next(NAMES)}',
        launcher=launcher,
    )
    weights = []
    step = runner.model.train_step

    def train_step(*args, **kwargs):
        weights.append(next(runner.model.parameters()).item())
        return step(*args, **kwargs)

    if launcher == 'none':
        runner.model.train_step = train_step
    runner.train()
    return [*weights, next(runner.model.parameters()).item()], runner


def log_of(work_dir):
    [path] = Path(work_dir).glob('*/*.log')
    return path.read_text()


@pytest.mark.parametrize('value', ['nan', 'inf', '-inf'])
def test_a_bad_loss_stops_the_training(value, tmp_path, capsys):
    def run():
        train(tmp_path, {'step3': value}, policy='stop')

    assert cli.run_tool(run, 'train.py') == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line == (
        f'train.py: error: iteration 3 (epoch 1): loss = {value}, loss_bad = {value} is not '
        'finite; this step did not change the weights'
    )
    assert not list(tmp_path.glob('*.pth'))


@pytest.mark.parametrize('counts', [1, 2])
def test_a_bad_step_can_be_skipped(counts, tmp_path):
    whole, _ = train(tmp_path / 'whole', {}, counts, policy='skip')
    weights, runner = train(tmp_path, {'step3': 'nan', 'step5': 'inf'}, counts, policy='skip')
    assert all(map(math.isfinite, weights))
    assert weights[:3] == whole[:3]
    updates = [a != b for a, b in itertools.pairwise(weights)]
    if counts == 1:
        assert updates == [True, True, False, True, False, True, True, True]
    else:  # steps 3 and 5 count, with no gradient of their own
        assert updates == [False, True] * 4
    assert all(torch.isfinite(buffer).all() for buffer in runner.model.buffers())
    assert runner.model.norm.num_batches_tracked == 6
    [hook] = [hook for hook in runner.hooks if isinstance(hook, NonFiniteLossHook)]
    assert hook.skipped == 2
    log = log_of(tmp_path)
    assert 'iteration 3 (epoch 1): loss = nan, loss_bad = nan is not finite; step skipped, 1' in log
    assert 'iteration 5 (epoch 1): loss = inf, loss_bad = inf is not finite; step skipped, 2' in log
    assert (tmp_path / 'epoch_1.pth').exists()


def test_too_many_bad_steps_in_a_row_stop_the_training(tmp_path):
    bad = {f'step{number}': 'nan' for number in (1, 3, 4, 5)}
    with pytest.raises(cli.UserError, match=r'iteration 5 \(epoch 1\): loss = nan'):
        train(tmp_path, bad, policy='skip', max_consecutive=2)
    assert 'step skipped, 3 so far' in log_of(tmp_path)


def test_several_optimizers_are_guarded(tmp_path):
    net = Net({})
    wrappers = [OptimWrapper(torch.optim.SGD(net.parameters(), 0.1)) for _ in range(2)]
    runner = Mock(model=net, optim_wrapper=OptimWrapperDict(one=wrappers[0], two=wrappers[1]))
    hook = NonFiniteLossHook()
    hook.before_train(runner)
    hook.before_train_iter(runner, 0)
    before = net.layer.weight.clone()
    for wrapper, factor in ((wrappers[0], math.nan), (wrappers[1], 1.0)):
        wrapper.update_params((net.layer.weight * factor).sum())
        assert torch.equal(net.layer.weight, before) == math.isnan(factor)
    with pytest.raises(cli.UserError, match='is not finite'):
        hook.after_train_iter(Mock(iter=0, epoch=0), 0, outputs=dict(loss=math.nan))


def test_another_policy_is_an_error():
    with pytest.raises(ValueError, match="policy must be 'stop' or 'skip', got 'ignore'"):
        NonFiniteLossHook('ignore')


def _rank(rank, folder, port):
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', MASTER_ADDR='127.0.0.1',
        MASTER_PORT=str(port), GLOO_SOCKET_IFNAME='lo',
    )  # fmt: skip
    weights, runner = train(
        folder, {'step2': 'nan'} if rank else {}, launcher='pytorch', policy='skip'
    )
    [hook] = [hook for hook in runner.hooks if isinstance(hook, NonFiniteLossHook)]
    Path(folder, f'rank{rank}').write_text(f'{hook.skipped} {weights[-1]}')


def test_all_processes_skip_a_step_that_is_bad_in_one(tmp_path):
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_rank, (str(tmp_path), port), nprocs=2)
    ranks = [(tmp_path / f'rank{rank}').read_text().split() for rank in range(2)]
    assert ranks[0] == ranks[1]
    assert ranks[0][0] == '1'
    assert 'iteration 2 (epoch 1): the loss in another process is not finite' in log_of(tmp_path)
