"""The converter of weights: there and back, with tiny archs in place of the published ones."""

import hashlib
import json
import re
import sys

import convert_weights
import pytest
import torch
from golden import fill, official_shapes
from mmengine.registry import MODELS
from mmengine.runner import load_checkpoint
from safetensors.torch import load_file
from test_backbones.archs import FAMILIES
from test_backbones.test_loading import Malicious, training_file

import hat_mm
from hat_mm.engine.cli import run_tool
from hat_mm.weights import fileio
from hat_mm.weights.convert import Source, from_official
from hat_mm.weights.loading import unwrap
from hat_mm.weights.names import NAME_MAPS, UNUSED
from hat_mm.weights.official import OFFICIAL_FILES

KEYS = (
    'fastervit_0', 'fastervit_2', 'fastervit_3', 'fastervit_4', 'fastervit_4_21k', 'hat_net_tiny',
    'hat_net_small', 'hat_net_medium',
)  # fmt: skip

# Names of tiny archs, and their fields.
ARCHS = {
    'FasterViT': {'0': {}, '1': dict(depths=(1, 1, 3, 1))},
    'HATNet': {'tiny': {}},
}


@pytest.fixture(scope='module', autouse=True)
def tiny_archs():
    """Takes tiny archs for the published ones, by their names."""
    with pytest.MonkeyPatch.context() as patch:
        for name, archs in ARCHS.items():
            family = FAMILIES[name]
            table = {k: family.backbone.arch_type(**family.tiny(**v)) for k, v in archs.items()}
            patch.setattr(family.backbone, 'archs', table)
        yield


def official_state(name):
    """What an official file of a family's first arch holds."""
    family = FAMILIES[name]
    return family.state(family.tiny())


def convert(*arguments):
    """Runs the tool in this process; returns its exit status."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', ['convert_weights.py', *map(str, arguments)])
        return run_tool(convert_weights.main, 'convert_weights.py')


@pytest.fixture(params=ARCHS)
def official(request, tmp_path):
    """A family, an official training checkpoint as the authors' are, and its learned tensors."""
    folder = tmp_path / 'official'
    folder.mkdir()
    path = folder / 'file.pth.tar'
    file = training_file(official_state(request.param))
    state = {
        name: value
        for name, value in unwrap(file).items()
        if not re.search(r'relative_|num_batches_tracked', name)
    }
    file['state_dict_ema'] = {name: value + 1 for name, value in state.items()}
    torch.save(file, path)
    return request.param, path, state


# --- there and back -------------------------------------------------------------------------------


@pytest.mark.parametrize('head', [(), ('--head',)], ids=['backbone', 'classifier'])
@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_round_trip_is_exact(official, head, suffix, tmp_path):
    _, path, state = official
    native, back = tmp_path / f'native{suffix}', tmp_path / f'back{suffix}'
    assert convert(path, native, *head) == 0
    assert convert(native, back, '--to-official') == 0
    after = fileio.read(back)['state_dict']
    learned = {name for name in after if not name.endswith('num_batches_tracked')}
    assert learned == set(state)
    for name, value in state.items():
        assert after[name].dtype == value.dtype
        assert torch.equal(after[name], value), name


@pytest.mark.parametrize('keys', KEYS)
def test_every_learned_name_comes_back(keys):
    """Of the large variants as well; a number stands for each tensor."""
    state = {name: fill(name, ()) for name in official_shapes(keys)}
    [name_map] = [m for m in NAME_MAPS if m.matches(state)]
    native = name_map.to_native(state)
    assert name_map.matches_native(native)
    back, unknown = name_map.to_official(native)
    assert not unknown
    # A second name that differs from the first is among those that are kept apart.
    assert {**back, **name_map.left_over(state)} == state
    assert [m for m in NAME_MAPS if m.matches_native(native)] == [name_map]


def test_equal_second_names_are_written_again(tmp_path):
    family = FAMILIES['FasterViT']
    state = official_state('FasterViT')
    first = 'levels.2.global_tokenizer.to_global_feature.pos.'
    second = 'levels.2.global_tokenizer.pos_embed.'
    for part in ('weight', 'bias'):
        state[second + part] = state[first + part]
    made = from_official({'state_dict': state}, Source('x.pth', '0'), True, False)
    assert not any(name.startswith(second) for name in made[UNUSED])
    back, _ = family.name_map.to_official(family.name_map.to_native(state))
    assert torch.equal(back[second + 'weight'], state[first + 'weight'])


def test_a_trained_detector_goes_back(tmp_path, capsys):
    """Its output norms have no official names; the classifier is gone."""
    backbone = hat_mm.FasterViT('0')
    path, back = tmp_path / 'epoch_1.pth', tmp_path / 'official.pth'
    state = {f'backbone.{name}': value for name, value in backbone.state_dict().items()}
    torch.save({'state_dict': {**state, 'neck.weight': torch.zeros(1)}, 'meta': {}}, path)
    assert convert(path, back, '--to-official') == 0
    said = capsys.readouterr().out
    assert '15 left out that the published network lacks (norm0.weight, …); no classifier' in said
    names = {name for name in official_state('FasterViT') if not name.startswith('head.')}
    after = fileio.read(back)['state_dict']
    assert {name for name in after if 'num_batches' not in name} == names
    hat_mm.FasterViT('0').load_state_dict(after)


# --- what comes out -------------------------------------------------------------------------------


def test_backbone_file(official, tmp_path, capsys):
    name, path, state = official
    target = tmp_path / 'backbone.pth'
    assert convert(path, target) == 0
    checkpoint = fileio.read(target)
    backbone, reference = FAMILIES[name].backbone(), FAMILIES[name].backbone()
    load_checkpoint(backbone, str(target), map_location='cpu')
    reference.load_state_dict(state)
    for key, value in reference.state_dict().items():
        if 'num_batches_tracked' not in key:
            assert torch.equal(backbone.state_dict()[key], value)
    meta, digest = checkpoint['meta'], hashlib.sha256(path.read_bytes()).hexdigest()
    assert meta['source'] == {'file': path.name, 'sha256': digest, 'weights': 'last'}
    assert meta['hat_mm_version'] == hat_mm.__version__
    said = capsys.readouterr().out
    assert meta['report'] in said
    assert 'tensors loaded' in meta['report']
    assert digest in said
    assert hashlib.sha256(target.read_bytes()).hexdigest() in said


def test_safetensors_file_in_a_config(official, tmp_path):
    name, path, state = official
    target = tmp_path / 'backbone.safetensors'
    assert convert(path, target) == 0
    cfg = dict(
        type=f'hat_mm.{name}',
        init_cfg=dict(type='Pretrained', checkpoint=str(target)),
    )
    backbone = MODELS.build(cfg)
    backbone.init_weights()
    stem = 'patch_embed.conv_down.0.weight' if name == 'FasterViT' else 'patch_embed.0.weight'
    assert torch.equal(backbone.stem.conv1.weight, state[stem])
    # Plain PyTorch takes the file, too.
    type(backbone)().load_state_dict(load_file(target))


def test_ema(official, tmp_path):
    path = official[1]
    last, average = tmp_path / 'last.pth', tmp_path / 'average.pth'
    assert convert(path, last, '--head') == 0
    assert convert(path, average, '--head', '--ema') == 0
    one, other = (fileio.read(p) for p in (last, average))
    assert other['meta']['source']['weights'] == 'average'
    for name, value in one['state_dict'].items():
        if 'num_batches' not in name:
            assert torch.equal(other['state_dict'][name], value + 1)
    assert not any(name.startswith(('head.', 'classifier.1.')) for name in one[UNUSED])
    assert set(one['state_dict']) >= {
        'head.fc.weight',
        'head.fc.bias',
        'backbone.stem.conv1.weight',
    }


def test_official_names_are_known_by_the_table(tmp_path):
    row = next(file for file in OFFICIAL_FILES if file.backbone == 'hat-net-tiny')
    torch.save(official_state('HATNet'), tmp_path / row.name)
    assert convert(tmp_path / row.name, tmp_path / 'x.safetensors') == 0
    meta = fileio.read(tmp_path / 'x.safetensors')['meta']
    assert meta['arch'] == ['tiny']
    assert meta['source']['url'] == row.url
    assert meta['source']['licence'] == row.licence
    json.dumps(meta)


# --- what is refused ------------------------------------------------------------------------------


def without(*names):
    return {k: v for k, v in official_state('HATNet').items() if k not in names}


def tiny_official(name, path, **fields):
    family = FAMILIES[name]
    torch.save({'state_dict': family.state(family.tiny(**fields))}, path)
    return path


CASES = {
    'not there': (lambda p: None, (), 'No such file'),
    'empty': (lambda p: torch.save({}, p), (), 'no official file of FasterViT or HATNet'),
    'no dictionary': (lambda p: torch.save([1], p), (), 'holds no weights, but list'),
    'resnet': (
        lambda p: torch.save({'layer1.0.conv1.weight': torch.zeros(1)}, p),
        (),
        r"is no official file.*'layer1\.0\.conv1\.weight'",
    ),
    'other depths': (
        lambda p: tiny_official('FasterViT', p, depths=(1, 1, 2, 2)),
        (),
        'fits no arch of FasterViT .* nearest is 0',
    ),
    'no average': (lambda p: tiny_official('HATNet', p), ('--ema',), 'no averaged weights'),
    'no head': (
        lambda p: torch.save(
            {k: v for k, v in official_state('HATNet').items() if 'classifier' not in k}, p
        ),
        ('--head',),
        'leave --head out',
    ),
    'native': (
        lambda p: torch.save(hat_mm.HATNet().state_dict(), p),
        (),
        'a file of hat_mm already; --to-official',
    ),
    'official': (
        lambda p: tiny_official('HATNet', p),
        ('--to-official',),
        'is an official HATNet file already',
    ),
    'neither': (
        lambda p: torch.save({'a': torch.zeros(1)}, p),
        ('--to-official',),
        'holds no backbone of hat_mm',
    ),
    'code': (
        lambda p: torch.save({'state_dict': {}, 'args': Malicious(str(p) + '.ran')}, p),
        (),
        'was not loaded: it carries code',
    ),
    'of another family by name': (
        lambda p: torch.save(official_state('HATNet'), p),
        (),
        'is the name of a FasterViT file, but it holds a HATNet',
    ),
    'of another arch by name': (
        lambda p: torch.save(official_state('FasterViT'), p),
        (),
        'is the name of arch 1, but its tensors are those of arch 0: was it renamed',
    ),
    'half a classifier': (
        lambda p: torch.save(without('classifier.1.bias'), p),
        ('--head',),
        r'no linear layer of 24 inputs.*head\.fc\.weight \(10, 24\)',
    ),
    'numbers as names': (lambda p: torch.save({1: torch.zeros(1)}, p), (), '1 in it is no name'),
    'sparse': (
        lambda p: torch.save(
            {k: v.to_sparse() if 'qkv' in k else v for k, v in official_state('HATNet').items()},
            p,
        ),
        (),
        r'mismatched \(stages\.0\.blocks\.0\.attn\.qkv\.weight',
    ),
    'part of a backbone': (
        lambda p: torch.save({'stem.norm.weight': torch.zeros(1)}, p),
        ('--to-official',),
        'fits no arch of HATNet',
    ),
    'foreign under unused': (
        lambda p: torch.save(
            {'state_dict': hat_mm.HATNet().state_dict(), 'unused': {'stem.conv1.weight': 1}}, p
        ),
        ('--to-official',),
        "under 'unused' it holds other things",
    ),
    'suffix': (lambda p: None, 'x.zip', 'must end with'),
    'plain http': (lambda p: None, 'http://example.com/x.pth', 'https'),
}


@pytest.mark.parametrize('case', CASES)
def test_refused(case, tmp_path, capsys):
    make, arguments, message = CASES[case]
    source, target = tmp_path / 'source.pth', tmp_path / 'target.pth'
    if case.endswith('by name'):
        named = {'family': 'fastervit_0_224_1k.pth.tar', 'arch': 'fastervit_1_224_1k.pth.tar'}
        source = tmp_path / named[case.split()[2]]
    make(source)
    if case == 'suffix':
        target, arguments = tmp_path / arguments, ()
    if case == 'plain http':
        source, arguments = arguments, ()
    before = sorted(tmp_path.iterdir())
    assert convert(source, target, *arguments) == 1
    line = capsys.readouterr().err
    assert line.startswith('convert_weights.py: error: ')
    assert len(line.splitlines()) == 1
    assert re.search(message, line), line
    assert sorted(tmp_path.iterdir()) == before


def test_a_finished_file_is_not_overwritten(official, tmp_path, capsys):
    _, path, _ = official
    target = tmp_path / 'target.pth'
    target.write_bytes(b'finished')
    assert convert(path, target) == 1
    assert '--force overwrites it' in capsys.readouterr().err
    assert target.read_bytes() == b'finished'
    # Nor by a failed conversion.
    broken = tmp_path / 'broken.pth'
    broken.write_bytes(path.read_bytes()[:1000])
    assert convert(broken, target, '--force') == 1
    assert target.read_bytes() == b'finished'
    assert convert(path, target, '--force') == 0
    assert convert(target, target, '--force', '--to-official') == 1
    assert 'both source and target' in capsys.readouterr().err


def test_an_altered_official_file_is_refused(tmp_path, monkeypatch, capsys):
    """Where the table has a checksum."""
    row = next(file for file in OFFICIAL_FILES if file.backbone == 'hat-net-tiny')
    path = tmp_path / row.name
    torch.save(official_state('HATNet'), path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    for known, status in ((digest, 0), ('0' * 64, 1)):
        known = type(row)(**{**vars(row), 'sha256': known})
        monkeypatch.setattr(convert_weights, 'official_file', lambda _, known=known: known)
        assert convert(path, tmp_path / f'{status}.pth') == status
    assert 'is not the file that its authors publish' in capsys.readouterr().err


def test_the_address_is_where_it_came_from(tmp_path, monkeypatch):
    """An official name on another host is no official file."""
    path = tmp_path / 'HAT-Net_Tiny.pth'
    torch.save(official_state('HATNet'), path)
    monkeypatch.setattr(convert_weights, 'fetch', lambda url: path)
    for i, (address, licence) in enumerate(
        (
            ('https://example.com/HAT-Net_Tiny.pth', None),
            (
                'https://github.com/yun-liu/HAT-Net/releases/download/v2.0/HAT-Net_Tiny.pth?x=1',
                'none',
            ),
        )
    ):
        assert convert(address, tmp_path / f'{i}.pth') == 0
        source = fileio.read(tmp_path / f'{i}.pth')['meta']['source']
        assert source['url'] == address.partition('?')[0]
        assert str(source.get('licence')).startswith(str(licence))
    # The way back says what it is made from.
    assert convert(tmp_path / '1.pth', tmp_path / 'back.pth', '--to-official') == 0
    source = fileio.read(tmp_path / 'back.pth')['meta']['source']
    assert source['made_from']['licence'] == 'none is stated'


def test_options_that_exclude_each_other(capsys):
    with pytest.raises(SystemExit) as status:
        convert('a.pth', 'b.pth', '--to-official', '--head')
    assert status.value.code == 2
