"""Publishing a checkpoint: what stays, what goes, and who can read the file."""

import argparse
import collections
import hashlib
import importlib
import json
import os
import pickle
from pathlib import Path

import numpy as np
import publish_model
import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, DefaultScope
from mmengine.runner import load_checkpoint
from shapes import make_dataset

from hat_mm.engine import cli
from hat_mm.weights import fileio
from hat_mm.zoo import publish, runs

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
def trained(tmp_path_factory, plain_dumps):
    """Work dir of a classifier that was trained and validated for an epoch, with EMAHook."""
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
    return folder / 'run'


@pytest.fixture(scope='module')
def checkpoint(trained):
    return trained / 'epoch_1.pth'


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


def run(capsys, *argv):
    """Exit status, standard output and standard error of the tool."""
    status = cli.run_tool(lambda: publish_model.main([str(a) for a in argv]), 'publish_model.py')
    return status, *capsys.readouterr()


# --- of a real training ---------------------------------------------------------------------------


def test_only_weights_and_metadata_are_left(checkpoint, published):
    before = fileio.read(checkpoint)
    assert {'optimizer', 'param_schedulers', 'message_hub', 'ema_state_dict'} <= set(before)
    after = torch.load(published.path, weights_only=True)
    assert set(after) == {'state_dict', 'meta'}
    assert set(published.dropped) == set(before) - {'state_dict', 'meta'}
    assert published.tensors == len(after['state_dict']) == len(before['state_dict'])
    assert list(after['state_dict']) == list(before['state_dict'])
    meta = after['meta']
    assert (meta['epoch'], meta['iter'], meta['seed']) == (1, 3, 0)
    assert meta['dataset_meta'] == {'classes': ('circle', 'square', 'triangle')}
    assert meta['time'] == before['meta']['time']
    assert meta['experiment_name'].startswith('fastervit-tiny_shapes_')
    assert meta['published']['torch_version'] == str(torch.__version__)
    assert meta['published']['hat_mm_version']
    # Without the commit of the folder that the training was started in.
    assert meta['mmengine_version'] == importlib.import_module('mmengine').__version__


def test_the_averaged_weights_are_published(checkpoint, published):
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
    assert not torch.equal(state[parameters[0]], KeepAverage.averaged[parameters[0]])
    # The log has no figure of these weights, so no entry can be made of them.
    with pytest.raises(ValueError, match='no validation has measured'):
        runs.read_run(checkpoint.parent, done.path, dataset='shapes')


def built(cfg):
    importlib.import_module('mmpretrain.models')
    models = importlib.import_module('mmpretrain.registry').MODELS
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        return models.build(cfg.model).eval()


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_the_model_computes_the_same(checkpoint, tmp_path, suffix):
    done = publish.publish(checkpoint, tmp_path / f'model{suffix}')
    cfg = Config.fromfile(CONFIG)
    image = torch.rand(2, 3, 96, 64, generator=torch.Generator().manual_seed(0))
    outputs = []
    for path in (checkpoint, done.path):
        model = built(cfg)
        if path.suffix == '.pth':
            load_checkpoint(model, str(path), strict=True)
        else:
            load_file = importlib.import_module('safetensors.torch').load_file
            model.load_state_dict(load_file(path), strict=True)
        with torch.no_grad():
            outputs.append(model(image))
    assert torch.equal(*outputs)
    assert outputs[0].abs().max() > 0


PLAIN_TORCH = """
import pickletools, sys, zipfile, torch
path = sys.argv[1]
checkpoint = torch.load(path, weights_only=True)
assert checkpoint['meta']['dataset_meta']['classes'] == ('circle', 'square', 'triangle')
assert all(type(value) is torch.Tensor for value in checkpoint['state_dict'].values())
archive = zipfile.ZipFile(path)
[name] = [name for name in archive.namelist() if name.endswith('/data.pkl')]
called = {
    argument for code, argument, _ in pickletools.genops(archive.read(name))
    if code.name in ('GLOBAL', 'STACK_GLOBAL', 'INST')
}
print(sorted(called))
assert 'hat_mm' not in sys.modules and 'mmengine' not in sys.modules
"""


@pytest.mark.parametrize('force', ['0', '1'])
def test_plain_torch_reads_it(published, run_python, tmp_path, force):
    done = run_python('-c', PLAIN_TORCH, str(published.path), TORCH_FORCE_WEIGHTS_ONLY_LOAD=force)
    assert done.returncode == 0, done.stderr
    names = done.stdout.strip()
    # What is called while reading: storages of torch and nothing of numpy, mmengine or hat_mm.
    assert 'torch._utils _rebuild_tensor_v2' in names
    for package in ('numpy', 'mmengine', 'hat_mm', 'Parameter', 'mmpretrain', 'getattr'):
        assert package not in names


def test_a_training_checkpoint_is_not_read_so(checkpoint, run_python):
    """The check above can fail."""
    done = run_python('-c', PLAIN_TORCH, str(checkpoint))
    assert done.returncode != 0
    assert 'HistoryBuffer' in done.stderr or 'weights_only' in done.stderr


def test_safetensors(checkpoint, published, run_python, tmp_path):
    done = publish.publish(checkpoint, tmp_path / 'model.safetensors')
    code = (
        'import sys; from safetensors.torch import load_file; from safetensors import safe_open\n'
        'state = load_file(sys.argv[1]); print(len(state))\n'
        "print(safe_open(sys.argv[1], 'pt').metadata()['hat_mm'])\n"
        "assert 'hat_mm' not in sys.modules and 'mmengine' not in sys.modules\n"
    )
    shown = run_python('-c', code, str(done.path))
    assert shown.returncode == 0, shown.stderr
    count, meta = shown.stdout.split('\n', 1)
    assert int(count) == done.tensors
    assert json.loads(meta)['dataset_meta']['classes'] == ['circle', 'square', 'triangle']
    ours, theirs = (fileio.read(path)['state_dict'] for path in (done.path, published.path))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_config_text_is_whole(checkpoint, published):
    text = torch.load(published.path, weights_only=True)['meta']['cfg']
    assert text == fileio.read(checkpoint)['meta']['cfg']
    assert Config.fromstring(text, '.py').default_scope == 'mmpretrain'


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


# --- files and names ------------------------------------------------------------------------------


def test_the_tool_says_what_it_did(source, tmp_path, capsys):
    status, out, err = run(capsys, source, tmp_path / 'model.pth')
    assert (status, err) == (0, '')
    [path] = tmp_path.glob('model-*.pth')
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert out.splitlines() == [
        f'file: {path}',
        'size: 0.0 MiB, 2 tensors',
        'weights: as trained (no EMA)',
        'left out: nothing',
        f'sha256: {digest}',
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
    status, _, err = run(capsys, source, tmp_path / 'model.pth')
    assert status == 1
    assert err.startswith('publish_model.py: error: ') and '--force overwrites it' in err
    assert done.path.read_bytes() == b'other'
    assert run(capsys, source, tmp_path / 'model.pth', '--force')[0] == 0
    assert fileio.sha256(done.path) == done.sha256


def test_the_input_is_not_overwritten_by_force(source, tmp_path):
    done = publish.publish(source, tmp_path / 'model.pth')
    os.replace(source, done.path)  # now named as what will come of it
    before = done.path.read_bytes()
    with pytest.raises(FileExistsError, match='is the checkpoint itself'):
        publish.publish(done.path, tmp_path / 'model.pth', force=True)
    assert done.path.read_bytes() == before


def test_nothing_is_left_of_a_write_that_fails(source, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, 'No space left on device')

    folder = tmp_path / 'out'
    folder.mkdir()
    monkeypatch.setattr(os, 'replace', fail)
    with pytest.raises(OSError, match='No space left'):
        publish.publish(source, folder / 'model.pth')
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ('content', 'told'),
    [
        ({}, 'it holds nothing'),
        ({'optimizer': {'state': {}}}, "it holds 'optimizer'"),
        ({'state_dict': {}}, "its 'state_dict' is empty"),
        ({'state_dict': {'a': 3}}, "'a' in its state_dict is int, no tensor"),
        ({'a': torch.ones(1)}, "it holds 'a'"),
        ([torch.ones(1)], 'it holds a list'),
    ],
)
def test_what_is_no_checkpoint(tmp_path, capsys, content, told):
    torch.save(content, tmp_path / 'x.pth')
    status, _, err = run(capsys, tmp_path / 'x.pth', tmp_path / 'model.pth')
    assert status == 1 and 'Traceback' not in err
    assert 'is no checkpoint of' in err and told in err
    assert os.listdir(tmp_path) == ['x.pth']


def test_wrong_names(source, tmp_path, capsys):
    for out, told in (
        (tmp_path / 'model', 'must end with one of .pth'),
        (tmp_path / '.pth', 'cannot end an address'),
        (tmp_path / 'none/model.pth', 'does not exist'),
    ):
        status, _, err = run(capsys, source, out)
        assert status == 1 and told in err
    status, _, err = run(capsys, tmp_path / 'none.pth', tmp_path / 'model.pth')
    assert status == 1 and 'none.pth' in err
    status, _, err = run(capsys, source, tmp_path / 'model.pth', '--no-ema')
    assert status == 1 and 'no averaged weights' in err
    assert os.listdir(tmp_path) == ['epoch_3.pth']


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), 'w')


def test_code_is_refused(tmp_path, capsys):
    saved(tmp_path / 'x.pth', state_dict=STATE, meta=dict(note=Evil(tmp_path / 'ran')))
    status, _, err = run(capsys, tmp_path / 'x.pth', tmp_path / 'model.pth')
    assert status == 1 and 'was not loaded' in err
    assert os.listdir(tmp_path) == ['x.pth']


def test_a_damaged_file_is_refused(source, tmp_path, capsys):
    source.write_bytes(source.read_bytes()[:-200])
    status, _, err = run(capsys, source, tmp_path / 'model.pth')
    assert status == 1 and 'was not loaded' in err


# --- metadata -------------------------------------------------------------------------------------


Pair = collections.namedtuple('Pair', 'a b')


@pytest.mark.parametrize(
    ('value', 'expected'),
    [
        (np.float64(0.5), 0.5),
        (np.int32(3), 3),
        (np.bool_(True), True),
        (np.str_('a'), 'a'),
        (np.array([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
        (np.array(['a'], dtype=object), ['a']),
        (torch.tensor([1.5]), [1.5]),
        (torch.Size([2, 3]), (2, 3)),
        (Pair(1, np.int8(2)), (1, 2)),
        (collections.OrderedDict(a=(np.uint8(1),)), {'a': (1,)}),
        ({np.int64(7): 'x'}, {7: 'x'}),
        ({(1, 2): 'x'}, {'(1, 2)': 'x'}),
        ({3, 1}, [1, 3]),
        (argparse.Namespace(lr=np.float32(0.5)), {'lr': 0.5}),
        (None, None),
    ],
)  # fmt: skip
def test_plain_forms(value, expected):
    def types(item):
        children = item.items() if isinstance(item, dict) else item
        deep = [types(child) for child in children] if isinstance(item, dict | list | tuple) else []
        return type(item), deep

    result = publish.plain(value)
    assert result == expected
    assert types(result) == types(expected)
    assert pickle.loads(pickle.dumps(result)) == expected


def test_metadata_become_plain(tmp_path):
    palette = np.array([[220, 20, 60], [0, 160, 80]], dtype=np.uint8)
    meta = dict(
        dataset_meta=dict(classes=['a', 'b'], palette=palette),
        epoch=np.int64(2),
        kind=torch.float32,  # readable, but no plain data
        hook_msgs=dict(last_ckpt='/home/me/epoch_2.pth'),
        checkpoint='/home/me/start.pth',
    )
    source = saved(tmp_path / 'x.pth', state_dict=STATE, meta=meta)
    done = publish.publish(source, tmp_path / 'm.pth')
    assert done.dropped == ('meta.kind', 'meta.hook_msgs')
    kept = torch.load(done.path, weights_only=True)['meta']
    assert kept['dataset_meta'] == {'classes': ['a', 'b'], 'palette': [[220, 20, 60], [0, 160, 80]]}
    assert type(kept['epoch']) is int
    assert kept['checkpoint'] == '/home/me/start.pth'


def test_a_checkpoint_without_metadata(tmp_path):
    done = publish.publish(
        saved(tmp_path / 'x.pth', state_dict=STATE, meta=None), tmp_path / 'm.pt'
    )
    assert set(torch.load(done.path, weights_only=True)['meta']) == {'published'}


def test_what_is_converted_is_published_too(tmp_path):
    """A converted file keeps where it comes from; unused tensors go."""
    meta = dict(family='FasterViT', source=dict(url='https://example.org/x.pth.tar'))
    source = saved(tmp_path / 'x.pth', state_dict=STATE, meta=meta, unused=dict(a=torch.ones(1)))
    done = publish.publish(source, tmp_path / 'm.safetensors')
    assert done.dropped == ('unused',)
    assert fileio.read(done.path)['meta']['source'] == meta['source']


def test_views_do_not_bring_their_storage(tmp_path):
    whole = torch.arange(100_000.0)
    source = saved(tmp_path / 'x.pth', state_dict={'a': whole[:3], 'b': whole[:6:2]})
    done = publish.publish(source, tmp_path / 'm.pth')
    assert done.path.stat().st_size < 10_000
    assert torch.load(done.path, weights_only=True)['state_dict']['b'].tolist() == [0, 2, 4]


def test_ema_without_its_weights(tmp_path):
    source = saved(tmp_path / 'x.pth', state_dict=STATE, ema_state_dict={'steps': torch.ones(1)})
    with pytest.raises(ValueError, match='does not belong to state_dict'):
        publish.publish(source, tmp_path / 'm.pth', averaged=False)
    other = {'module.nobody': torch.ones(1)}
    source = saved(tmp_path / 'y.pth', state_dict=STATE, ema_state_dict=other)
    with pytest.raises(ValueError, match='nobody'):
        publish.publish(source, tmp_path / 'm.pth', averaged=False)


@pytest.mark.parametrize(
    ('other', 'told'),
    [
        ({'module.a': 3}, "'module.a' in its ema_state_dict is int"),
        ({1: torch.ones(1)}, 'ema_state_dict has the name 1'),
        ({'module.a': torch.ones(7)}, r'does not belong to state_dict \(a\)'),
    ],
)
def test_an_average_that_is_none(other, told, tmp_path):
    source = saved(tmp_path / 'x.pth', state_dict={'a': torch.ones(1)}, ema_state_dict=other)
    for averaged in (True, False):
        with pytest.raises(ValueError, match=told):
            publish.publish(source, tmp_path / 'm.pth', averaged=averaged)


def test_bytes_are_the_same_in_every_process(source, tmp_path, run_python):
    """The library for safetensors orders several metadata by chance."""
    names = {publish.publish(source, tmp_path / 'm.safetensors').path.name}
    arguments = f'{str(source)!r}, {str(tmp_path / "m.safetensors")!r}'
    code = f'from hat_mm.zoo.publish import publish; publish({arguments})'
    for _ in range(3):
        assert run_python('-c', code).returncode == 0
    assert {path.name for path in tmp_path.glob('m-*.safetensors')} == names


def test_versions_of_modules_stay(tmp_path):
    """Some modules rename the tensors of files without them."""
    state = torch.nn.BatchNorm2d(2).state_dict()
    done = publish.publish(saved(tmp_path / 'x.pth', state_dict=state), tmp_path / 'm.pth')
    assert torch.load(done.path, weights_only=True)['state_dict']._metadata == state._metadata
