"""Publishing a checkpoint of a training, its entry in a metafile, and the model by its name."""

import hashlib
import importlib
import json
import os
from pathlib import Path

import make_metafile_entry
import numpy as np
import publish_model
import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from shapes import make_dataset

import hat_mm
from hat_mm.engine import cli
from hat_mm.weights import fileio
from hat_mm.zoo import metafiles, publish, runs

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / 'configs/toy/fastervit-tiny_shapes.py'


@HOOKS.register_module(force=True)
class KeepAverage(Hook):
    """Keeps the weights that EMAHook has averaged, and those it has averaged them from."""

    def after_train(self, runner) -> None:
        [hook] = [hook for hook in runner.hooks if type(hook).__name__ == 'EMAHook']
        KeepAverage.averaged = {k: v.clone() for k, v in hook.ema_model.module.state_dict().items()}
        KeepAverage.last = {k: v.clone() for k, v in hook.src_model.state_dict().items()}


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory, plain_dumps):
    """Of a classifier that was trained and validated for an epoch, with EMAHook."""
    folder = tmp_path_factory.mktemp('averaged')
    data = folder / 'shapes-classes'
    make_dataset(data, layout='classes', num_train=12, num_val=6)
    config = folder / CONFIG.name
    config.write_text(
        f'_base_ = [{str(CONFIG)!r}]\n'
        "custom_hooks = [dict(type='EMAHook', momentum=0.3), dict(type='KeepAverage')]\n"
    )
    options = [
        'train_cfg.max_epochs=1',
        'train_cfg.val_interval=1',
        'train_dataloader.batch_size=4',
    ]
    for split in ('train', 'val', 'test'):
        options += [
            f'{split}_dataloader.dataset.data_root={data}/{"train" if split == "train" else "val"}',
            f'{split}_dataloader.num_workers=0',
            f'{split}_dataloader.persistent_workers=False',
        ]
    cli.train([str(config), '--work-dir', str(folder / 'run'), '--cfg-options', *options])
    return folder / 'run/epoch_1.pth'


@pytest.fixture(scope='module')
def published(checkpoint, tmp_path_factory):
    return publish.publish(checkpoint, tmp_path_factory.mktemp('out') / 'model.pth')


def saved(path, **content):
    torch.save(content, path)
    return path


STATE = {'backbone.weight': torch.arange(6.0).reshape(2, 3), 'head.bias': torch.ones(2)}


@pytest.fixture
def source(tmp_path):
    return saved(tmp_path / 'epoch_3.pth', state_dict=STATE, meta=dict(epoch=3, iter=30))


def run(capsys, tool, *argv):
    """Exit status, standard output and standard error of a tool."""
    capsys.readouterr()  # of a training before
    status = cli.run_tool(lambda: tool.main([str(a) for a in argv]), f'{tool.__name__}.py')
    return status, *capsys.readouterr()


# --- of a real training ---------------------------------------------------------------------------


def test_only_weights_and_metadata_are_left(checkpoint, published):
    before = fileio.read(checkpoint)
    assert {'optimizer', 'param_schedulers', 'message_hub', 'ema_state_dict'} <= set(before)
    after = torch.load(published.path, weights_only=True)
    assert set(after) == {'state_dict', 'meta'}
    assert set(published.dropped) == set(before) - {'state_dict', 'meta'}
    assert published.tensors == len(after['state_dict']) == len(before['state_dict'])
    meta = after['meta']
    assert (meta['epoch'], meta['iter'], meta['seed']) == (1, 3, 0)
    assert meta['dataset_meta'] == {'classes': ('circle', 'square', 'triangle')}
    assert meta['experiment_name'].startswith('fastervit-tiny_shapes_')
    assert meta['published']['torch_version'] == str(torch.__version__)
    assert meta['published']['hat_mm_version'] == hat_mm.__version__
    # Without the commit of the folder that the training was started in.
    assert meta['mmengine_version'] == importlib.import_module('mmengine').__version__
    assert meta['cfg'] == before['meta']['cfg']
    assert Config.fromstring(meta['cfg'], '.py').default_scope == 'mmpretrain'


def test_the_averaged_weights_are_published(published):
    state = torch.load(published.path, weights_only=True)['state_dict']
    averaged, last = KeepAverage.averaged, KeepAverage.last
    assert any(not torch.equal(averaged[name], last[name]) for name in averaged)
    assert state.keys() == averaged.keys()
    for name, value in state.items():
        assert torch.equal(value, averaged[name]), name
    assert published.weights == 'the average (EMA)'


def test_the_others_on_request(checkpoint, tmp_path):
    done = publish.publish(checkpoint, tmp_path / 'last.pth', averaged=False)
    state = torch.load(done.path, weights_only=True)['state_dict']
    parameters = [name for name in state if name.endswith(('.weight', '.bias'))]
    for name in parameters:
        assert torch.equal(state[name], KeepAverage.last[name]), name
    # The log has no figure of these weights, so no entry can be made of them.
    with pytest.raises(ValueError, match='no validation has measured'):
        runs.read_run(checkpoint.parent, done.path, dataset='shapes')


PLAIN_TORCH = """
import pickletools, sys, zipfile, torch
torch.load(sys.argv[1], weights_only=True)
archive = zipfile.ZipFile(sys.argv[1])
[name] = [name for name in archive.namelist() if name.endswith('/data.pkl')]
print(sorted({
    argument for code, argument, _ in pickletools.genops(archive.read(name))
    if code.name in ('GLOBAL', 'STACK_GLOBAL', 'INST')
}))
assert 'hat_mm' not in sys.modules and 'mmengine' not in sys.modules
"""


def test_plain_torch_reads_it(published, run_python):
    done = run_python('-c', PLAIN_TORCH, str(published.path))
    assert done.returncode == 0, done.stderr
    # What is called while reading: storages of torch and nothing of numpy, mmengine or hat_mm.
    assert 'torch._utils _rebuild_tensor_v2' in done.stdout
    for package in ('numpy', 'mmengine', 'hat_mm', 'Parameter', 'mmpretrain', 'getattr'):
        assert package not in done.stdout


def test_safetensors_hold_the_same(checkpoint, published, tmp_path):
    done = publish.publish(checkpoint, tmp_path / 'model.safetensors')
    library = importlib.import_module('safetensors')
    with library.safe_open(done.path, 'pt') as file:
        meta = json.loads(file.metadata()['hat_mm'])
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert meta['dataset_meta']['classes'] == ['circle', 'square', 'triangle']
    theirs = torch.load(published.path, weights_only=True)['state_dict']
    assert state.keys() == theirs.keys()
    assert all(torch.equal(state[name], theirs[name]) for name in theirs)


def test_the_input_is_not_changed_and_the_same_bytes_come_out(checkpoint, published, tmp_path):
    before = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    again = publish.publish(checkpoint, tmp_path / 'model.pth')
    assert hashlib.sha256(checkpoint.read_bytes()).hexdigest() == before
    assert again.sha256 == published.sha256
    assert again.path.name == published.path.name == f'model-{again.sha256[:8]}.pth'
    assert hashlib.sha256(again.path.read_bytes()).hexdigest() == again.sha256
    # And of what is published already.
    assert publish.publish(again.path, tmp_path / 'model.pth') == publish.Published(
        again.path, again.sha256, again.tensors, (), again.weights
    )
    assert os.listdir(tmp_path) == [again.path.name]


def test_from_a_run_to_a_model(checkpoint, published, tmp_path, capsys):
    metafile = tmp_path / 'metafile.yml'
    url = published.path.parent.as_uri()
    status, out, err = run(
        capsys, make_metafile_entry, checkpoint.parent, published.path, metafile, '--url', url,
        '--collection', 'FasterViT', '--dataset', 'shapes', '--name', 'from-run-to-model',
    )  # fmt: skip
    assert (status, err) == (0, '')
    [entry] = metafiles.load(metafile)['Models']
    assert entry['Config'] == 'configs/toy/fastervit-tiny_shapes.py'
    assert entry['Weights'] == f'{url}/{published.path.name}'
    facts = entry['Metadata']
    assert (facts['Epochs'], facts['Checkpoint Epoch'], facts['Batch Size']) == (1, 1, 4)
    assert (facts['Training Data'], facts['Seed']) == ('shapes', 0)
    assert facts['SHA256'] == published.sha256
    for label, module in (('PyTorch', 'torch'), ('mmcv', 'mmcv'), ('mmpretrain', 'mmpretrain')):
        assert facts['Software'][label] == importlib.import_module(module).__version__
    [record] = [
        record
        for line in next(checkpoint.parent.glob('*/vis_data/2*.json')).read_text().splitlines()
        if 'iter' not in (record := json.loads(line))
    ]
    [result] = entry['Results']
    assert (result['Task'], result['Dataset']) == ('Image Classification', 'shapes')
    assert result['Metrics'] == {'Top 1 Accuracy': round(record['accuracy/top1'], 2)}
    assert 'note: not as in the config: train_cfg.max_epochs 6 -> 1\n' in out
    assert 'data_root' not in out

    hat_mm.register_model_index(metafile, config_prefix=ROOT)
    model = hat_mm.get_model('from-run-to-model', pretrained=True)
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in KeepAverage.averaged.items())
    assert model.dataset_meta == {'classes': ('circle', 'square', 'triangle')}


# --- files and names ------------------------------------------------------------------------------


def test_the_tool_says_what_it_did(source, tmp_path, capsys):
    status, out, err = run(capsys, publish_model, source, tmp_path / 'model.pth')
    assert (status, err) == (0, '')
    [path] = tmp_path.glob('model-*.pth')
    assert out.splitlines() == [
        f'file: {path}',
        'size: 0.0 MiB, 2 tensors',
        'weights: as trained (no EMA)',
        'left out: nothing',
        f'sha256: {hashlib.sha256(path.read_bytes()).hexdigest()}',
    ]


@pytest.mark.parametrize('suffix', fileio.SUFFIXES)
def test_every_suffix(source, tmp_path, suffix):
    done = publish.publish(source, tmp_path / f'm.v1{suffix}')
    assert done.path.name == f'm.v1-{done.sha256[:8]}{suffix}'
    state = fileio.read(done.path)['state_dict']
    assert all(torch.equal(state[name], STATE[name]) for name in STATE)


def test_another_file_is_not_overwritten(source, tmp_path, capsys):
    done = publish.publish(source, tmp_path / 'model.pth')
    done.path.write_bytes(b'other')
    status, _, err = run(capsys, publish_model, source, tmp_path / 'model.pth')
    assert status == 1 and '--force overwrites it' in err
    assert done.path.read_bytes() == b'other'
    assert run(capsys, publish_model, source, tmp_path / 'model.pth', '--force')[0] == 0
    assert fileio.sha256(done.path) == done.sha256


def test_what_is_refused(source, tmp_path, capsys):
    contents = ({}, {'optimizer': {'state': {}}}, {'state_dict': {'a': 3}}, [torch.ones(1)])
    for number, content in enumerate(contents):
        torch.save(content, tmp_path / f'{number}.pth')
    cases = [(f'{number}.pth', 'm.pth', 'is no checkpoint of') for number in range(len(contents))]
    cases += [
        ('epoch_3.pth', 'model', 'must end with one of .pth'),
        ('epoch_3.pth', 'none/model.pth', 'does not exist'),
        ('none.pth', 'm.pth', 'none.pth'),
    ]
    before = sorted(os.listdir(tmp_path))
    for name, out, told in cases:
        status, _, err = run(capsys, publish_model, tmp_path / name, tmp_path / out)
        assert status == 1 and told in err and 'Traceback' not in err
    status, _, err = run(capsys, publish_model, source, tmp_path / 'm.pth', '--no-ema')
    assert status == 1 and 'no averaged weights' in err
    assert sorted(os.listdir(tmp_path)) == before


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), 'w')


def test_code_is_refused(tmp_path, capsys):
    saved(tmp_path / 'x.pth', state_dict=STATE, meta=dict(note=Evil(tmp_path / 'ran')))
    status, _, err = run(capsys, publish_model, tmp_path / 'x.pth', tmp_path / 'model.pth')
    assert status == 1 and 'was not loaded' in err
    assert os.listdir(tmp_path) == ['x.pth']


def test_metadata_become_plain(tmp_path):
    palette = np.array([[220, 20, 60], [0, 160, 80]], dtype=np.uint8)
    meta = dict(
        dataset_meta=dict(classes=('a', np.str_('b')), palette=palette),
        epoch=np.int64(2),
        kind=torch.float32,  # readable, but no plain data
    )
    source = saved(tmp_path / 'x.pth', state_dict=STATE, meta=meta, unused=dict(a=torch.ones(1)))
    done = publish.publish(source, tmp_path / 'm.pth')
    assert done.dropped == ('unused', 'meta.kind')
    kept = torch.load(done.path, weights_only=True)['meta']
    assert kept['dataset_meta'] == {'classes': ('a', 'b'), 'palette': [[220, 20, 60], [0, 160, 80]]}
    assert type(kept['epoch']) is int
