"""Loading: official files, training files, foreign files, files with code."""

import argparse
import copy
import os
import pickle

import pytest
import torch
from mmengine.model import BaseModule
from mmengine.runner import load_checkpoint

from hat_mm.checkpoints import unwrap
from test_backbones.archs import FAMILIES

# Fields of the tiny arch of each family, and of archs that its file does not fit, with the message.
FIELDS = {'FasterViT': dict(propagate=True, layer_scale=0.5), 'HATNet': {}, 'SwinHAT': {}}
WRONG = {
    'FasterViT': [
        (dict(depths=(1, 1, 3, 1)), r'depths \(1, 1, 3, 1\)'),
        (dict(depths=(1, 1, 1, 1)), 'missing'),
        (dict(embed_dims=8), 'mismatched'),
        (dict(propagate=False, carriers=False), 'missing'),
        (dict(propagate=False, layer_scale=None), 'missing'),
    ],
    'HATNet': [
        (dict(depths=(1, 1, 3, 1)), r'depths \(1, 1, 3, 1\)'),
        (dict(depths=(1, 1, 1, 1)), 'missing'),
        (dict(embed_dims=(8, 16, 32, 48)), 'mismatched'),
        (dict(grids=(4, 1, 4, 1), ds_ratios=(4, 1, 2, 1)), 'missing'),
        (dict(kernels=(5, 3, 3, 3)), 'mismatched'),
    ],
    'SwinHAT': [
        (dict(depths=(1, 2, 3, 1)), r'depths \(1, 2, 3, 1\)'),
        (dict(depths=(1, 2, 1, 1)), 'missing'),
        (dict(embed_dims=8), 'mismatched'),
        (dict(num_heads=(1, 1, 1, 2)), 'mismatched'),
        (dict(mlp_ratio=2), 'mismatched'),
    ],
}


@pytest.fixture(params=FAMILIES)
def name(request):
    return request.param


def make(name, **arguments):
    """A tiny backbone of a family."""
    family = FAMILIES[name]
    return family.backbone(family.tiny(**FIELDS[name]), **arguments)


def official(name, **fields):
    """An official file of a tiny backbone, with some fields of the arch changed."""
    family = FAMILIES[name]
    return family.state(family.tiny(**{**FIELDS[name], **fields}))


def training_file(state, window=4):
    """What the authors publish: a training checkpoint, FasterViT's with buffers of a resolution."""
    state = dict(state)
    if 'levels.2.blocks.0.attn.qkv.weight' in state:
        add_buffers(state, window)
    return {
        'epoch': 300,
        'arch': 'tiny',
        'args': argparse.Namespace(model='tiny', lr=5e-3),
        'state_dict': {f'module.{k}': v for k, v in state.items()},
        'state_dict_ema': state,
        'optimizer': {'state': {}, 'param_groups': [{'lr': 0.1}]},
        'version': 2,
    }


def add_buffers(state, window):
    name = 'levels.2.blocks.0.attn.pos_emb_funct'
    state[f'{name}.relative_coords_table'] = torch.zeros(1, 2 * window - 1, 2 * window - 1, 2)
    state[f'{name}.relative_position_index'] = torch.zeros(window**2, window**2).long()
    state['levels.2.blocks.0.pos_embed.relative_bias'] = torch.zeros(1, window**2, 16)
    state['levels.2.global_tokenizer.pos_embed.weight'] = torch.full((16, 1, 3, 3), 9.0)
    state['patch_embed.conv_down.1.num_batches_tracked'] = torch.tensor(7)
    state['levels.2.global_tokenizer.pos_embed.bias'] = torch.full((16,), 9.0)


@pytest.fixture
def file(name, tmp_path):
    path = tmp_path / 'tiny.pth.tar'
    torch.save(training_file(official(name)), path)
    return str(path)


class Detector(BaseModule):
    """Stands for any host's model: a backbone and something behind it."""

    def __init__(self, name, **arguments):
        super().__init__()
        self.backbone = make(name, **arguments)
        self.head = torch.nn.Conv2d(32, 4, 1)


def assert_loaded(backbone, name):
    own = backbone.state_dict()
    native = FAMILIES[name].name_map.to_native(official(name))
    assert len(native) > 90
    for name, value in native.items():
        assert torch.equal(own[name], value), name


def test_init_cfg_in_a_model(name, file, log):
    model = Detector(name, init_cfg=dict(type='Pretrained', checkpoint=file))
    model.init_weights()
    assert_loaded(model.backbone, name)
    assert 'tensors loaded' in log.getvalue()


def test_load_checkpoint(name, file, log):
    norms = {} if name == 'SwinHAT' else dict(out_norm_cfg=dict(type='BN'))
    backbone = make(name, **norms)
    load_checkpoint(backbone, file, map_location='cpu')
    assert_loaded(backbone, name)
    own = [n for n in backbone.state_dict() if 'num_batches' not in n]
    new = [n for n in own if '.tokenizer.' in n or '.carrier.' in n if name == 'SwinHAT']
    # Each map has a norm that no official file knows, but for the last one of two families.
    norms = {'FasterViT': 3 * 4, 'HATNet': 4 * 4, 'SwinHAT': 3 * 2}[name]
    assert f'{len(own) - norms - len(new)} of {len(own)} tensors loaded' in log.getvalue()
    assert not new or f'; {len(new)} new (stages.0.tokenizer.conv.weight, ' in log.getvalue()
    assert f'{norms} kept as they were (norm0.weight, ' in log.getvalue()
    dropped = {
        'FasterViT': 'levels.2.global_tokenizer.pos_embed.weight, ',
        'HATNet': 'classifier.1.weight, ',
        'SwinHAT': 'head.weight, ',
    }[name]
    assert f'dropped ({dropped}' in log.getvalue()


@pytest.mark.parametrize('strict', [True, False])
def test_plain_load_state_dict(name, strict):
    tensors = official(name)
    for state in (tensors, training_file(tensors), {'model': tensors}):
        backbone = make(name)
        missing, unexpected = backbone.load_state_dict(copy.copy(state), strict=strict)
        assert not missing
        assert not unexpected
        assert_loaded(backbone, name)


def test_user_state_dict_is_left_alone(name):
    state = official(name)
    names = list(state)
    make(name).load_state_dict(state)
    assert list(state) == names


def test_buffers_of_any_window_are_dropped():
    for window in (7, 12):
        backbone = make('FasterViT', window_size=(7, 7, 12, 6))
        backbone.load_state_dict(training_file(official('FasterViT'), window))
        assert_loaded(backbone, 'FasterViT')


def test_fewer_stages_and_other_norms_load(name):
    make(name, out_indices=(0, 2)).load_state_dict(official(name))
    make(name, out_norm_cfg=None).load_state_dict(official(name))
    # FasterViT's published norm of the last map is a batch norm; another norm starts anew.
    other = make(name, out_norm_cfg=dict(type='GN', num_groups=2))
    other.load_state_dict(official(name))
    assert (other.norm3.weight == 1).all()


@pytest.mark.parametrize(
    ('name', 'wrong', 'message'), [(name, *case) for name in WRONG for case in WRONG[name]]
)
def test_file_of_another_arch(name, wrong, message, tmp_path):
    path = tmp_path / 'other.pth'
    state = official(name, **wrong)
    torch.save({'state_dict': state}, path)
    for load in (
        lambda b: b.load_state_dict(state),
        lambda b: b.load_state_dict(state, strict=False),
        lambda b: load_checkpoint(b, str(path)),
    ):
        with pytest.raises(ValueError, match=message):
            load(make(name))


def test_4_does_not_load_into_4_21k():
    family = FAMILIES['FasterViT']
    without = family.backbone(family.tiny(layer_scale=0.5, carriers=False))
    with pytest.raises(ValueError, match='unexpected'):
        without.load_state_dict(official('FasterViT'))


def test_norms_with_statistics_are_the_named_cause():
    with pytest.raises(ValueError, match='leave norm_cfg at its default'):
        make('HATNet', norm_cfg=dict(type='SyncBN')).load_state_dict(official('HATNet'))


OTHERS = {'FasterViT': 'HATNet', 'HATNet': 'SwinHAT', 'SwinHAT': 'FasterViT'}


@pytest.mark.parametrize(
    'state',
    [
        lambda name: {'layer1.0.conv1.weight': torch.zeros(1)},
        lambda name: {'blocks.0.0.attn.q.weight': torch.zeros(1)},
        lambda name: official(OTHERS[name]),
        lambda name: make(OTHERS[name]).state_dict(),
        lambda name: {'epoch': 3},
    ],
    ids=['resnet', 'twins', 'other family', 'native names of the other family', 'no checkpoint'],
)
def test_file_of_another_family(name, state):
    with pytest.raises(ValueError, match=f'no {name} checkpoint|does not fit {name}'):
        make(name).load_state_dict(state(name))


def test_empty_file(name):
    with pytest.raises(ValueError, match='empty'):
        make(name).load_state_dict({'state_dict': {}})


def test_detector_file_in_a_backbone_points_to_prefix(name):
    with pytest.raises(ValueError, match=r"prefix='backbone\.'"):
        make(name).load_state_dict(Detector(name).state_dict())


def test_official_file_as_load_from_points_to_init_cfg(name, file):
    for load in (
        lambda m: load_checkpoint(m, file, map_location='cpu'),
        lambda m: m.load_state_dict(official(name)),
    ):
        with pytest.raises(ValueError, match=r'backbone\.init_cfg'):
            load(Detector(name))


def test_own_checkpoints_load_as_usual(name, tmp_path, log):
    model = Detector(name)
    path = str(tmp_path / 'epoch_1.pth')
    torch.save({'state_dict': model.state_dict(), 'meta': {}}, path)
    other = Detector(name)
    load_checkpoint(other, path)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in other.state_dict().items())
    # The backbone of a detector, for another task.
    init_cfg = dict(type='Pretrained', checkpoint=path, prefix='backbone.')
    third = make(name, init_cfg=init_cfg)
    third.init_weights()
    assert all(
        torch.equal(v, model.backbone.state_dict()[k]) for k, v in third.state_dict().items()
    )
    # Another choice of output norms is no error.
    load_checkpoint(Detector(name, out_norm_cfg=None), path)
    load_checkpoint(Detector(name, out_norm_cfg=dict(type='BN')), path)
    assert 'tensors loaded' in log.getvalue()


def test_incomplete_native_file(name, tmp_path):
    state = make(name).state_dict()
    del state[[key for key in state if key.startswith('stages.2.blocks.1.')][3]]
    path = str(tmp_path / 'native.pth')
    torch.save(state, path)
    with pytest.raises(ValueError, match='1 missing'):
        load_checkpoint(make(name), path)


def test_first_name_of_the_carrier_convolution_counts():
    backbone = make('FasterViT')
    backbone.load_state_dict(training_file(official('FasterViT')))
    assert not (backbone.stages[2].tokenizer.conv.weight == 9).any()


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_file_with_code_is_refused(name, tmp_path):
    path, sentinel = str(tmp_path / 'bad.pth'), str(tmp_path / 'ran')
    torch.save({'state_dict': official(name), 'args': Malicious(sentinel)}, path)
    backbone = make(name, init_cfg=dict(type='Pretrained', checkpoint=path))
    with pytest.raises((pickle.UnpicklingError, RuntimeError)):
        backbone.init_weights()
    assert not os.path.exists(sentinel)


def test_unwrap_finds_the_tensors():
    tensors = {'a': torch.zeros(1)}
    assert unwrap({'state_dict': {'model': {'module.a': tensors['a']}}}) == tensors
