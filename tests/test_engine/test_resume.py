"""Exact resume: whatever stops a training, the resumed one ends with the same weights."""

import itertools
import random
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.registry import DATA_SAMPLERS, DATASETS, LOOPS, METRICS, MODELS, RUNNERS
from mmengine.runner import EpochBasedTrainLoop
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler

from hat_mm import ExactEpochBasedTrainLoop, ExactIterBasedTrainLoop, ExactResumeRunner

NAMES = itertools.count()
BY_EPOCH = dict(by_epoch=True, max_epochs=3, val_interval=2)
BY_ITER = dict(by_epoch=False, max_iters=12, val_interval=4)


@DATASETS.register_module(name='ResumeNoise')
class Noise(Dataset):
    """Ten samples with noise of all three generators; the first entry is the index."""

    metainfo = dict(classes=('a',))

    def __init__(self):
        self.loaded = []

    def __len__(self):
        return 10

    def __getitem__(self, index):
        self.loaded.append(index)
        noise = [index, random.random(), np.random.rand(), torch.rand(()).item()]
        return dict(inputs=torch.tensor(noise, dtype=torch.float32), data_samples=index)


@MODELS.register_module(name='ResumeNet')
class Net(BaseModel):
    """A layer with dropout, which keeps what it was trained on."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        self.seen = []
        self.noise = []

    def forward(self, inputs, data_samples=None, mode='tensor'):
        x = torch.stack(inputs)
        if mode == 'loss':
            self.seen.append(x)
            self.noise.append(random.random())
            return dict(loss=self.layers(x).square().mean())
        return [torch.ones(1)] * len(x)


@METRICS.register_module(name='ResumeScore')
class Score(BaseMetric):
    """Better with each call."""

    calls = itertools.count()

    def process(self, data_batch, data_samples):
        self.results.append(1)

    def compute_metrics(self, results):
        return dict(score=float(next(self.calls)))


class Killed(Exception):
    pass


class Kill(Hook):
    """Stops a run where nothing of it is saved any more."""

    priority = 'HIGHEST'

    def __init__(self, event, iteration):
        self.event, self.iteration = event, iteration
        setattr(self, event, self._kill)

    def _kill(self, runner, *args, **kwargs):
        if runner.iter == self.iteration:
            raise Killed


class Validations(Hook):
    def __init__(self):
        self.done = []

    def after_val_epoch(self, runner, metrics=None):
        self.done.append(runner.iter)


def build(work_dir, plan, workers=0, checkpoint=None, hooks=(), loader=None, **settings):
    dataset = dict(type='ResumeNoise')
    sampler = dict(type='DefaultSampler' if plan['by_epoch'] else 'InfiniteSampler')
    data = dict(batch_size=3, num_workers=workers)
    cfg = dict(
        runner_type='hat_mm.ExactResumeRunner',
        model=dict(type='ResumeNet'),
        work_dir=str(work_dir),
        train_dataloader=data | dict(dataset=dataset, sampler=sampler) | (loader or {}),
        val_dataloader=dict(
            batch_size=5, num_workers=0, dataset=dataset, sampler=dict(type='DefaultSampler')
        ),
        val_evaluator=dict(type='DumpResults', out_file_path=f'{work_dir}/out.pkl'),
        train_cfg=plan,
        val_cfg=dict(),
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=0.1)),
        param_scheduler=dict(type='LinearLR', by_epoch=plan['by_epoch'], end=3),
        default_hooks=dict(
            checkpoint=checkpoint or dict(type='CheckpointHook', by_epoch=plan['by_epoch'])
        ),
        custom_hooks=[dict(type='EMAHook')],
        randomness=dict(seed=5),
        log_level='ERROR',
        experiment_name=f'run{next(NAMES)}',
    )
    runner = RUNNERS.build(cfg | settings)
    for hook in hooks:
        runner.register_hook(hook)
    return runner


def train(*args, **kwargs):
    runner = build(*args, **kwargs)
    runner.train()
    return runner


def assert_equal(found, expected):
    """Weights, averaged weights and moments of two files."""
    found, expected = (torch.load(path, weights_only=True) for path in (found, expected))
    for part in ('state_dict', 'ema_state_dict'):
        for name, value in expected[part].items():
            assert torch.equal(found[part][name], value), name
    for state, other in zip(
        found['optimizer']['state'].values(), expected['optimizer']['state'].values(), strict=True
    ):
        assert all(torch.equal(state[name], other[name]) for name in other)
    assert found['param_schedulers'] == expected['param_schedulers']


@pytest.mark.parametrize('workers', [0, 1, 2])
@pytest.mark.parametrize(
    ('train_cfg', 'last'), [(BY_EPOCH, 'epoch_3.pth'), (BY_ITER, 'iter_12.pth')]
)
def test_samples_and_weights_do_not_depend_on_the_workers(tmp_path, train_cfg, last, workers):
    one = train(tmp_path / 'one', train_cfg)
    two = train(tmp_path / 'two', train_cfg, workers)
    assert len(one.model.seen) == one.train_loop.max_iters
    assert all(map(torch.equal, one.model.seen, two.model.seen))
    assert_equal(tmp_path / 'two' / last, tmp_path / 'one' / last)


def test_no_noise_is_drawn_twice(tmp_path):
    model = train(tmp_path, BY_EPOCH).model
    seen = torch.cat(model.seen)
    assert len(seen) == 30
    drawn = {*seen[:, 1].tolist(), *torch.tensor(model.noise).tolist()}
    assert len(drawn) == 30 + 12  # the model's own noise is different, too
    assert sorted(seen[:10, 0].tolist()) == list(range(10))
    assert seen[:10, 0].tolist() != seen[10:20, 0].tolist() != list(range(10))
    for column in seen[:, 1:].T:
        assert len(column.unique()) == len(seen)


@pytest.mark.parametrize(
    ('train_cfg', 'saved', 'last'),
    [(BY_EPOCH, 'epoch_{}.pth', 3), (BY_ITER, 'iter_{}.pth', 12)],
)
@pytest.mark.parametrize(
    ('stop', 'workers'),
    [('before_train_iter', 0), ('before_val_epoch', 0), ('after_train_iter', 2)],
)
def test_a_killed_run_ends_as_if_nothing_had_happened(
    tmp_path, train_cfg, saved, last, workers, stop
):
    whole = train(tmp_path / 'whole', train_cfg)
    iteration = {'before_val_epoch': 8}.get(stop, 9)
    step = 2 if train_cfg['by_epoch'] else 8
    kill = Kill(stop, iteration)
    by_epoch = train_cfg['by_epoch']
    checkpoint = dict(type='CheckpointHook', by_epoch=by_epoch, interval=1 if by_epoch else 4)
    with pytest.raises(Killed):
        train(tmp_path / 'killed', train_cfg, workers, checkpoint, hooks=[kill])
    assert (tmp_path / 'killed/last_checkpoint').read_text().endswith(saved.format(step))
    validations = Validations()
    runner = train(
        tmp_path / 'killed', train_cfg, workers, checkpoint, hooks=[validations], resume=True
    )
    assert len(runner.model.seen) == 4
    assert all(map(torch.equal, runner.model.seen, whole.model.seen[8:]))
    if workers == 0:  # and nothing else was loaded
        expected = torch.cat(whole.model.seen[8:])[:, 0].tolist()
        assert runner.train_dataloader.dataset.loaded == expected
    # The validation after the checkpoint may have been done; only the killed run knew.
    assert validations.done == [8, 12]
    assert_equal(tmp_path / 'killed' / saved.format(last), tmp_path / 'whole' / saved.format(last))


def test_mmengine_alone_does_not_resume_exactly(tmp_path):
    # So the tests above can fail.
    checkpoint = dict(type='CheckpointHook', interval=1)
    train(tmp_path / 'whole', BY_EPOCH, runner_type='Runner')
    with pytest.raises(Killed):
        train(
            tmp_path / 'killed', BY_EPOCH, 0, checkpoint, [Kill('before_train_iter', 9)],
            runner_type='Runner',
        )  # fmt: skip
    train(tmp_path / 'killed', BY_EPOCH, 0, checkpoint, resume=True, runner_type='Runner')
    with pytest.raises(AssertionError):
        assert_equal(tmp_path / 'killed/epoch_3.pth', tmp_path / 'whole/epoch_3.pth')


class Batches(Hook):
    def __init__(self):
        self.seen = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.seen.append((runner.epoch, batch_idx))


@pytest.mark.parametrize('iteration', [2, 4, 5])
def test_an_epoch_goes_on_where_it_stopped(tmp_path, iteration):
    # A checkpoint by iterations, also after the last one of an epoch, whose end was not reached.
    checkpoint = dict(type='CheckpointHook', by_epoch=False, interval=iteration, save_last=True)
    train(tmp_path / 'whole', BY_EPOCH, 0, checkpoint)
    with pytest.raises(Killed):
        train(tmp_path / 'killed', BY_EPOCH, 0, checkpoint, [Kill('after_train_iter', iteration)])
    validations, batches = Validations(), Batches()
    train(tmp_path / 'killed', BY_EPOCH, 0, checkpoint, [validations, batches], resume=True)
    assert batches.seen == [divmod(index, 4) for index in range(iteration, 12)]
    assert validations.done == [8, 12]
    assert_equal(tmp_path / 'killed/iter_12.pth', tmp_path / 'whole/iter_12.pth')


@pytest.mark.parametrize('train_cfg', [BY_EPOCH, BY_ITER])
def test_a_random_seed_is_resumed(tmp_path, train_cfg):
    kept = dict(type='CheckpointHook', interval=2, by_epoch=train_cfg['by_epoch'])
    random_seed = dict(randomness=dict(seed=None, diff_rank_seed=True))
    whole = train(tmp_path, train_cfg, 0, kept, **random_seed)
    middle = tmp_path / ('epoch_2.pth' if train_cfg['by_epoch'] else 'iter_8.pth')
    again = train(tmp_path, train_cfg, load_from=str(middle), resume=True, **random_seed)
    assert again.model.seen
    assert all(map(torch.equal, again.model.seen, whole.model.seen[8:]))


def test_a_validation_that_was_finished_is_not_repeated(tmp_path):
    # CheckpointHook saves again after a validation that found the best model so far.
    kept = dict(type='CheckpointHook', interval=1, save_best='score', rule='greater')
    evaluator = dict(val_evaluator=dict(type='ResumeScore'))
    train(tmp_path, BY_EPOCH, 0, kept, **evaluator)
    validations = Validations()
    for name in ('epoch_2.pth', 'epoch_3.pth'):
        hooks = [validations, Kill('before_train_iter', 8)]
        with pytest.raises(Killed) if name == 'epoch_2.pth' else nullcontext():
            train(
                tmp_path, BY_EPOCH, 0, kept, hooks, resume=True, load_from=str(tmp_path / name),
                **evaluator,
            )  # fmt: skip
    assert validations.done == []


def test_an_iteration_based_training_may_take_a_finite_sampler(tmp_path):
    loader = dict(sampler=dict(type='DefaultSampler'))
    seen = torch.cat(train(tmp_path, BY_ITER, loader=loader).model.seen)[:, 0].tolist()
    assert [sorted(seen[i : i + 10]) for i in (0, 10, 20)] == [list(range(10))] * 3
    assert seen[:10] != seen[10:20]


def test_the_loops_can_be_set_alone(tmp_path):
    by_epoch = dict(type='hat_mm.ExactEpochBasedTrainLoop', max_epochs=1)
    by_iter = dict(type='hat_mm.ExactIterBasedTrainLoop', max_iters=2)
    kept = dict(type='CheckpointHook')
    sampler = dict(sampler=dict(type='DefaultSampler'))
    for kind in ('Runner', 'hat_mm.ExactResumeRunner'):
        runner = build(tmp_path, BY_EPOCH, 0, kept, runner_type=kind, train_cfg=by_epoch)
        runner.train()
        assert type(runner.train_loop) is ExactEpochBasedTrainLoop
        runner = build(
            tmp_path, BY_EPOCH, 0, kept, loader=sampler, runner_type=kind, train_cfg=by_iter
        )
        runner.train()
        assert type(runner.train_loop) is ExactIterBasedTrainLoop


@LOOPS.register_module(name='ResumeOther')
class Other(EpochBasedTrainLoop):
    pass


def test_another_loop_is_an_error(tmp_path):
    runner = build(tmp_path, BY_EPOCH, train_cfg=dict(type='ResumeOther', max_epochs=1))
    assert isinstance(runner, ExactResumeRunner)
    with pytest.raises(ValueError, match=r"no exact form of the train loop 'ResumeOther'.*EpochBa"):
        runner.train()


def test_a_data_loader_without_batches_is_an_error(tmp_path):
    runner = build(tmp_path, BY_EPOCH)
    with pytest.raises(TypeError, match='needs a torch DataLoader with a batch size'):
        ExactEpochBasedTrainLoop(runner, DataLoader(Noise(), batch_size=None), max_epochs=1)


@DATA_SAMPLERS.register_module(name='ResumeGlobal')
class Global(Sampler):
    """Draws each index from NumPy's global state; ``extra`` batches more or less than announced."""

    def __init__(self, dataset, seed=None, extra=0):
        self.extra = extra

    def __len__(self):
        return 12

    def __iter__(self):
        for _ in range(12 + 3 * self.extra):
            yield int(np.random.randint(10))


@pytest.mark.parametrize('train_cfg', [BY_EPOCH, BY_ITER])
@pytest.mark.parametrize('extra', [-1, 0, 1])
def test_samplers_may_use_global_states_and_be_wrong_about_their_length(tmp_path, train_cfg, extra):
    by_epoch = train_cfg['by_epoch']
    kept = dict(type='CheckpointHook', interval=2 if by_epoch else 8, by_epoch=by_epoch)
    loader = dict(sampler=dict(type='ResumeGlobal', extra=extra))
    whole = train(tmp_path, train_cfg, 0, kept, loader=loader).model.seen
    done = 2 * (4 + extra) if by_epoch else 8
    assert len(whole) == (3 * (4 + extra) if by_epoch else 12)
    middle = tmp_path / ('epoch_2.pth' if by_epoch else 'iter_8.pth')
    again = train(tmp_path, train_cfg, loader=loader, load_from=str(middle), resume=True)
    assert len(again.model.seen) == len(whole) - done
    assert all(map(torch.equal, again.model.seen, whole[done:]))


class SecondPass(Hook):
    """Reads the data again, as mmpretrain's PreciseBNHook does, also by a loader of its own."""

    def __init__(self):
        self.seen = []

    def after_train_epoch(self, runner):
        loader = runner.train_dataloader
        assert loader.batch_size == 3
        self.seen.append([batch['data_samples'] for batch in loader])
        assert len(list(DataLoader(loader.dataset, batch_size=5))) == 2


def test_hooks_may_read_the_data_again(tmp_path):
    kept = dict(type='CheckpointHook', by_epoch=False, interval=6)
    whole, again = SecondPass(), SecondPass()
    train(tmp_path, BY_EPOCH, 0, kept, [whole])
    middle = str(tmp_path / 'iter_6.pth')
    train(tmp_path, BY_EPOCH, 0, kept, [again], load_from=middle, resume=True)
    assert again.seen == whole.seen[1:]


def test_a_sampler_keeps_a_seed_of_its_own(tmp_path):
    loader = dict(sampler=dict(type='DefaultSampler', seed=77))
    runner = train(tmp_path, BY_EPOCH, loader=loader)
    assert runner.train_dataloader.batch_sampler.sampler.seed == 77
