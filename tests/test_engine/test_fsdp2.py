"""FSDP2Runner over gloo: the losses of DDP, a part of the memory, files that load anywhere."""

import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from torch import nn

import hat_mm
from hat_mm.engine.fsdp2 import find_units
from hat_mm.weights import fileio, sharded

ROOT = Path(__file__).resolve().parents[2]
WORKER = ROOT / 'tests/fsdp2_worker.py'
ENVIRONMENT = {
    'CUDA_VISIBLE_DEVICES': '',
    'GLOO_SOCKET_IFNAME': 'lo',
    'OMP_NUM_THREADS': '1',
    'PYTHONPATH': str(ROOT),
    'PYTHON': sys.executable,
}


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return str(probe.getsockname()[1])


def start(*command, **environment) -> subprocess.Popen:
    return subprocess.Popen(
        [str(word) for word in command],
        env={**os.environ, **ENVIRONMENT, **environment},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen) -> str:
    said, _ = process.communicate(timeout=500)
    assert process.returncode == 0, said[-6000:]
    return said


def work(folder: Path, processes: int, *names: str) -> None:
    torchrun = ['-m', 'torch.distributed.run', '--master_port', free_port()]
    finish(start(sys.executable, *torchrun, '--nproc_per_node', processes, WORKER, folder, *names))


def state(folder: Path, iteration: int = 6) -> dict:
    checkpoint = fileio.read(folder / f'iter_{iteration}.pth')
    return {key: checkpoint[key] for key in ('state_dict', 'ema_state_dict', 'optimizer')}


def said(folder: Path) -> list[dict]:
    files = sorted(folder.glob('rank*.json'))
    return [json.loads(file.read_text(encoding='utf-8')) for file in files]


def assert_equal(one: dict, other: dict, **tolerance: float) -> None:
    torch.testing.assert_close(one, other, **{'rtol': 0, 'atol': 0, **tolerance})


@pytest.fixture(scope='module')
def two(tmp_path_factory) -> Path:
    """Runs in two processes."""
    folder = tmp_path_factory.mktemp('two')
    names = ['ddp', 'full', 'sharded', 'full_resumed', 'sharded_resumed', 'bf16']
    # Left by an earlier training into the same folder, with the other setting.
    (folder / 'full_resumed/iter_6.pth').mkdir(parents=True)
    (folder / 'full_resumed/iter_6.pth/rest.pth').touch()
    (folder / 'sharded_resumed').mkdir()
    (folder / 'sharded_resumed/iter_6.pth').touch()
    work(folder, 2, *names)
    yield folder
    shutil.rmtree(folder)


# --- trainings ------------------------------------------------------------------------------------


def check_against_ddp(folder: Path) -> None:
    for ours, theirs in zip(said(folder / 'full'), said(folder / 'ddp'), strict=True):
        assert ours['losses'][:3] == pytest.approx(theirs['losses'][:3], rel=1e-5)
        assert ours['losses'] == pytest.approx(theirs['losses'], rel=1e-4)
        assert ours['metrics']['count'] == 13
        assert ours['metrics']['mean'] == pytest.approx(theirs['metrics']['mean'], rel=0.02)
    # AdamW moves a weight by up to a learning rate (1e-3) if rounding decides about its direction.
    assert_equal(state(folder / 'full'), state(folder / 'ddp'), atol=2e-3)


def test_losses_states_and_validation_are_those_of_ddp(two):
    check_against_ddp(two)


def test_a_process_holds_its_part(two):
    whole = said(two / 'ddp')[0]
    for held in said(two / 'full'):
        for what in ('parameters', 'gradients', 'states'):
            assert held[what] == pytest.approx(whole[what] / 2, rel=0.01), what


def test_full_checkpoint_holds_what_the_processes_hold(two):
    """Loaded here, without torch.distributed."""
    checkpoint = fileio.read(two / 'full/iter_6.pth')
    parts = [torch.load(two / f'full/rank{rank}.pt', weights_only=True) for rank in (0, 1)]
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    trained = checkpoint['ema_state_dict']  # mmengine swaps them: state_dict has the averaged
    assert whole
    for name, value in whole.items():
        found = trained[f'module.{name}']
        assert type(found) is torch.Tensor
        assert torch.equal(found.reshape(value.shape), value), name
    assert checkpoint['state_dict']['layers.0.scale'].shape == ()
    backbone = hat_mm.FasterViT(
        arch=dict(
            embed_dims=8, stem_dims=8, depths=(1, 1, 2, 1), num_heads=(1, 1, 2, 4), window_size=2
        ),
        out_indices=(3,),
    )  # fmt: skip
    prefix = 'backbone.'
    weights = checkpoint['state_dict'].items()
    backbone.load_state_dict(
        {name.removeprefix(prefix): value for name, value in weights if name.startswith(prefix)}
    )


@pytest.mark.parametrize('kind', ['full', 'sharded'])
def test_resume_is_exact(kind, two):
    assert_equal(state(two / f'{kind}_resumed'), state(two / kind))
    assert not list((two / f'{kind}_resumed').glob('.*'))


def test_sharded_checkpoint_has_the_same_content(two):
    folder = two / 'sharded/iter_3.pth'
    assert sharded.is_sharded(folder)
    assert len(list(folder.glob('*.safetensors'))) == 2
    assert_equal(state(two / 'sharded', 3), state(two / 'full', 3))
    assert fileio.latest_whole(two / 'sharded') == (two / 'sharded/iter_6.pth', '')
    assert not list((two / 'sharded').glob('.*'))


def test_an_unfinished_sharded_checkpoint_is_not_resumed(two, tmp_path):
    shutil.copytree(two / 'sharded', tmp_path, dirs_exist_ok=True)
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'iter_6.pth'))
    (tmp_path / 'iter_6.pth' / sharded.REST).unlink()
    path, problem = fileio.latest_whole(tmp_path)
    assert path == tmp_path / 'iter_3.pth'
    assert 'iter_6.pth' in problem


def test_a_lost_or_damaged_part_is_noticed(two, tmp_path):
    folder = tmp_path / 'iter_3.pth'
    parts = sorted(path.name for path in (two / 'sharded/iter_3.pth').glob('*.safetensors'))
    for name in parts:
        for damage in (Path.unlink, lambda path: os.truncate(path, path.stat().st_size - 4)):
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(two / 'sharded/iter_3.pth', folder)
            damage(folder / name)
            for read in (fileio.read, fileio.check_whole):
                with pytest.raises(pickle.UnpicklingError, match='was not loaded'):
                    read(folder)


def test_a_folder_without_sizes_is_refused(two, tmp_path):
    folder = tmp_path / 'iter_3.pth'
    shutil.copytree(two / 'sharded/iter_3.pth', folder)
    rest = fileio.read(folder / sharded.REST)
    del rest[sharded.SIZES]
    torch.save(rest, folder / sharded.REST)
    with pytest.raises(pickle.UnpicklingError, match='was not loaded'):
        fileio.check_whole(folder)


def test_weights_alone_are_read_without_the_optimizer(two):
    folder = two / 'sharded/iter_3.pth'
    rest = fileio.read(folder / sharded.REST)
    found = sharded.fill(rest, folder, with_optimizer=False)
    whole = fileio.read(folder)
    assert whole.keys() - found.keys() == {'optimizer'}
    for part in ('state_dict', 'ema_state_dict'):
        assert_equal(found[part], whole[part])


def test_mixed_precision_is_in_the_backbone_alone(two):
    exact, rounded = said(two / 'full')[0]['losses'], said(two / 'bf16')[0]['losses']
    assert exact != rounded
    assert exact[:3] == pytest.approx(rounded[:3], rel=0.05)
    checkpoint = fileio.read(two / 'bf16/iter_6.pth')
    dtypes = {v.dtype for v in checkpoint['state_dict'].values() if v.is_floating_point()}
    assert dtypes == {torch.float32}


@pytest.mark.slow
def test_four_processes(two, tmp_path):
    """Also files that come from, or go to, another number of processes and DDP."""
    shutil.copytree(two, tmp_path, dirs_exist_ok=True)
    work(tmp_path, 4, 'sharded_resumed', 'from_ddp', 'to_ddp')
    shutil.rmtree(tmp_path / 'full')
    shutil.rmtree(tmp_path / 'ddp')
    work(tmp_path, 4, 'ddp', 'full', 'with_cp')
    check_against_ddp(tmp_path)
    assert_equal(state(tmp_path / 'with_cp'), state(tmp_path / 'full'))
    whole = said(tmp_path / 'ddp')[0]
    for held in said(tmp_path / 'full'):
        assert held['states'] == pytest.approx(whole['states'] / 4, rel=0.02)


# --- a detector, by the tools ---------------------------------------------------------------------

TOY = 'configs/toy/mask-rcnn_fastervit-tiny_fpn_shapes.py'
FSDP2 = ['runner_type=hat_mm.FSDP2Runner', 'fsdp2.min_params=20000']


def losses(work_dir: Path) -> list[float]:
    (file,) = work_dir.glob('*/vis_data/scalars.json')
    lines = map(json.loads, file.read_text(encoding='utf-8').splitlines())
    return [line['loss'] for line in lines if 'loss' in line]


def dist_train(work_dir: Path, *options: str, processes: int = 2, **environment: str):
    return start(
        'bash', 'tools/dist_train.sh', TOY, processes, '--work-dir', work_dir,
        '--cfg-options', *options, **{'PORT': free_port(), **environment},
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize('processes', [2, 4])
def test_losses_of_a_detector(processes, toy_options, tmp_path):
    """Twenty steps. Without clipping, whose norm is rounded otherwise, two processes are equal."""
    options = [
        *toy_options, 'train_cfg.max_epochs=20', 'train_cfg.val_interval=100',
        'train_dataloader.batch_size=1', 'default_hooks.logger.interval=1',
        'default_hooks.checkpoint.interval=20', 'log_processor.window_size=1',
        'model.backbone.drop_path_rate=0.0', 'optim_wrapper.clip_grad=None', 'randomness.seed=1',
        'val_dataloader=None', 'val_cfg=None', 'val_evaluator=None',
    ]  # fmt: skip
    found = {}
    for name, extra in {'ddp': [], 'fsdp2': FSDP2}.items():
        finish(dist_train(tmp_path / name, *options, *extra, processes=processes))
        found[name] = losses(tmp_path / name)
    assert len(found['ddp']) >= 20
    assert found['fsdp2'][:3] == pytest.approx(found['ddp'][:3], rel=1e-5)
    if processes == 2:
        assert found['fsdp2'][:20] == pytest.approx(found['ddp'][:20], rel=1e-3)


@pytest.mark.slow
def test_two_machines_and_what_follows(toy_options, tmp_path):
    """Two process groups of torchrun; then resume, test and publishing in one process."""
    options = [*toy_options, 'train_dataloader.batch_size=1', *FSDP2]
    options += ['fsdp2.checkpoints=sharded']
    port, trained = free_port(), tmp_path / 'trained'
    machines = [
        dist_train(trained, *options, processes=1, NNODES='2', NODE_RANK=str(rank), PORT=port)
        for rank in (0, 1)
    ]
    for machine in machines:
        finish(machine)
    folder = trained / 'epoch_1.pth'
    assert sharded.is_sharded(folder)
    tested = [sys.executable, 'tools/test.py', TOY, folder, '--work-dir', tmp_path / 'tested']
    assert 'bbox_mAP' in finish(start(*tested, '--cfg-options', *options))
    refused = start(*tested, '--cfg-options', *toy_options)
    assert 'publish_model.py' in refused.communicate()[0]
    assert refused.returncode == 1
    publish = [sys.executable, 'tools/model_converters/publish_model.py', folder]
    finish(start(*publish, tmp_path / 'toy.pth'))
    (published,) = tmp_path.glob('toy-*.pth')
    tested[3] = published
    assert 'bbox_mAP' in finish(start(*tested, '--cfg-options', *toy_options))


# --- the parts ------------------------------------------------------------------------------------


class Head(nn.Module):
    """Computes its loss in a method of its own, as heads of the toolboxes do."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Linear(40, 40), nn.Linear(2, 2)])
        self.big = nn.Linear(50, 50)

    def loss(self) -> None:
        raise NotImplementedError


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(60, 60), nn.Sequential(nn.Linear(3, 3)))
        self.heads = nn.ModuleList([Head()])


def test_units():
    model = Model()
    units = list(find_units(model, 1000))
    assert units == [model.backbone[0], model.backbone, model.heads[0].convs[0]]


def test_members_that_share_a_parameter_are_no_units():
    model = Model()
    model.heads[0].convs.append(model.heads[0].convs[0])
    model.backbone.append(nn.Linear(60, 60))
    model.backbone[2].weight = model.backbone[0].weight
    assert list(find_units(model, 1000)) == [model.backbone]


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(min_param=3), r"not \['min_param'\]"),
        (dict(checkpoints='local'), "'full' or 'sharded', not 'local'"),
        (dict(mixed_precision=dict(param_dtype='bf16')), "not param_dtype='bf16'"),
        (dict(mixed_precision=dict(output_dtype='float32')), 'not output_dtype'),
        (dict(mixed_precision=dict(param_dtype='bfloat16')), 'Linear has none'),
        (dict(mixed_precision='bfloat16'), "a dict, not 'bfloat16'"),
        (dict(checkpoints='sharded'), 'published_keys'),
    ],
)
def test_wrong_options(options, message, tmp_path):
    hooks = dict(checkpoint=dict(type='CheckpointHook', published_keys=['state_dict']))
    cfg = Config(
        dict(model=nn.Linear(1, 1), work_dir=str(tmp_path), fsdp2=options, default_hooks=hooks)
    )
    with pytest.raises(ValueError, match=message):
        hat_mm.FSDP2Runner.from_cfg(cfg)


def test_only_sharded_tensors_are_taken_out():
    checkpoint = {'state_dict': {'a': torch.ones(2)}, 'meta': {'iter': 3, 'list': [1, 'x']}}
    rest, shards = sharded.split(checkpoint, lambda path: False)
    assert shards == {}
    assert rest['meta'] == checkpoint['meta']
    assert rest['state_dict'] is not checkpoint['state_dict']
