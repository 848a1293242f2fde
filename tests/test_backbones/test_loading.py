"""Loading: official files, training files, foreign files, files with code."""

import argparse
import copy
import io
import logging
import os
import pickle

import pytest
import torch
from golden import fill
from mmengine.logging import MMLogger
from mmengine.model import BaseModule
from mmengine.runner import load_checkpoint

import hat_mm
from hat_mm.checkpoints import FASTERVIT_NAMES, unwrap
from test_backbones.archs import official_tiny, tiny

ARCH = tiny(propagate=True, layer_scale=0.5)


def official(arch=ARCH):
    return {name: fill(name, shape) for name, shape in official_tiny(arch).items()}


def training_file(state, window=4):
    """What the authors publish: a training checkpoint with buffers of one resolution."""
    state = dict(state)
    name = 'levels.2.blocks.0.attn.pos_emb_funct'
    state[f'{name}.relative_coords_table'] = torch.zeros(1, 2 * window - 1, 2 * window - 1, 2)
    state[f'{name}.relative_position_index'] = torch.zeros(window**2, window**2).long()
    state['levels.2.blocks.0.pos_embed.relative_bias'] = torch.zeros(1, window**2, 16)
    state['levels.2.global_tokenizer.pos_embed.weight'] = torch.full((16, 1, 3, 3), 9.0)
    state['patch_embed.conv_down.1.num_batches_tracked'] = torch.tensor(7)
    state['levels.2.global_tokenizer.pos_embed.bias'] = torch.full((16,), 9.0)
    return {
        'epoch': 300,
        'arch': 'faster_vit_tiny',
        'args': argparse.Namespace(model='faster_vit_tiny', lr=5e-3),
        'state_dict': {f'module.{k}': v for k, v in state.items()},
        'state_dict_ema': state,
        'optimizer': {'state': {}, 'param_groups': [{'lr': 0.1}]},
        'version': 2,
    }


@pytest.fixture(scope='module')
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp('official') / 'fastervit_tiny.pth.tar'
    torch.save(training_file(official()), path)
    return str(path)


class Detector(BaseModule):
    """Stands for any host's model: a backbone and something behind it."""

    def __init__(self, **arguments):
        super().__init__()
        self.backbone = hat_mm.FasterViT(ARCH, **arguments)
        self.head = torch.nn.Conv2d(32, 4, 1)


def assert_loaded(backbone, state=None):
    state = official() if state is None else state
    own = backbone.state_dict()
    native = FASTERVIT_NAMES.to_native(state)
    assert len(native) > 100
    for name, value in native.items():
        assert torch.equal(own[name], value), name


@pytest.fixture
def log():
    """What OpenMMLab's current logger writes."""
    stream = io.StringIO()
    logger, handler = MMLogger.get_current_instance(), logging.StreamHandler(stream)
    logger.addHandler(handler)
    yield stream
    logger.removeHandler(handler)


def test_init_cfg_in_a_model(file, log):
    model = Detector(init_cfg=dict(type='Pretrained', checkpoint=file))
    model.init_weights()
    assert_loaded(model.backbone)
    assert 'tensors loaded' in log.getvalue()


def test_load_checkpoint(file, log):
    backbone = hat_mm.FasterViT(ARCH)
    load_checkpoint(backbone, file, map_location='cpu')
    assert_loaded(backbone)
    total = len([n for n in backbone.state_dict() if 'num_batches' not in n])
    norms = 3 * 4  # Each map but the last has a norm that no official file knows.
    assert f'{total - norms} of {total} tensors loaded' in log.getvalue()
    assert f'{norms} kept as they were (norm0.weight, ' in log.getvalue()
    assert 'dropped (head.weight, head.bias, ' in log.getvalue()


@pytest.mark.parametrize('strict', [True, False])
def test_plain_load_state_dict(strict):
    for state in (official(), training_file(official()), {'model': official()}):
        backbone = hat_mm.FasterViT(ARCH)
        missing, unexpected = backbone.load_state_dict(copy.copy(state), strict=strict)
        assert not missing
        assert not unexpected
        assert_loaded(backbone)


def test_user_state_dict_is_left_alone():
    state = official()
    names = list(state)
    hat_mm.FasterViT(ARCH).load_state_dict(state)
    assert list(state) == names


def test_buffers_of_any_window_are_dropped():
    for window in (7, 12):
        backbone = hat_mm.FasterViT(ARCH, window_size=(7, 7, 12, 6))
        backbone.load_state_dict(training_file(official(), window))
        assert_loaded(backbone)


def test_fewer_stages_and_other_norms_load():
    hat_mm.FasterViT(ARCH, out_indices=(0, 2)).load_state_dict(official())
    hat_mm.FasterViT(ARCH, out_norm_cfg=None).load_state_dict(official())
    # The published norm of the last map is a batch norm; another norm starts anew.
    other = hat_mm.FasterViT(ARCH, out_norm_cfg=dict(type='GN', num_groups=2))
    other.load_state_dict(official())
    assert (other.norm3.weight == 1).all()


@pytest.mark.parametrize(
    ('wrong', 'message'),
    [
        (tiny(propagate=True, layer_scale=0.5, depths=(1, 1, 3, 1)), r'depths \(1, 1, 3, 1\)'),
        (tiny(propagate=True, layer_scale=0.5, depths=(1, 1, 1, 1)), 'missing'),
        (tiny(propagate=True, layer_scale=0.5, embed_dims=8), 'mismatched'),
        (tiny(carriers=False, layer_scale=0.5), 'missing'),
        (tiny(), 'missing'),
    ],
)
def test_file_of_another_arch(wrong, message, tmp_path):
    path = tmp_path / 'other.pth'
    torch.save({'state_dict': official(wrong)}, path)
    for load in (
        lambda b: b.load_state_dict(official(wrong)),
        lambda b: b.load_state_dict(official(wrong), strict=False),
        lambda b: load_checkpoint(b, str(path)),
    ):
        with pytest.raises(ValueError, match=message):
            load(hat_mm.FasterViT(ARCH))


def test_4_does_not_load_into_4_21k():
    four, without = tiny(layer_scale=0.5), tiny(layer_scale=0.5, carriers=False)
    with pytest.raises(ValueError, match='unexpected'):
        hat_mm.FasterViT(without).load_state_dict(official(four))


@pytest.mark.parametrize(
    'state',
    [
        {'layer1.0.conv1.weight': torch.zeros(1)},
        {'patch_embed.0.weight': torch.zeros(1), 'blocks.0.0.attn.norm.weight': torch.zeros(1)},
        {'epoch': 3},
    ],
    ids=['resnet', 'hat-net', 'no checkpoint'],
)
def test_file_of_another_family(state):
    with pytest.raises(ValueError, match='no FasterViT checkpoint'):
        hat_mm.FasterViT(ARCH).load_state_dict(state)


def test_empty_file():
    with pytest.raises(ValueError, match='empty'):
        hat_mm.FasterViT(ARCH).load_state_dict({'state_dict': {}})


def test_detector_file_in_a_backbone_points_to_prefix():
    with pytest.raises(ValueError, match=r"prefix='backbone\.'"):
        hat_mm.FasterViT(ARCH).load_state_dict(Detector().state_dict())


def test_official_file_as_load_from_points_to_init_cfg(file):
    for load in (
        lambda m: load_checkpoint(m, file, map_location='cpu'),
        lambda m: m.load_state_dict(official()),
    ):
        with pytest.raises(ValueError, match=r'backbone\.init_cfg'):
            load(Detector())


def test_own_checkpoints_load_as_usual(tmp_path, log):
    model = Detector()
    path = str(tmp_path / 'epoch_1.pth')
    torch.save({'state_dict': model.state_dict(), 'meta': {}}, path)
    other = Detector()
    load_checkpoint(other, path)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in other.state_dict().items())
    # The backbone of a detector, for another task.
    init_cfg = dict(type='Pretrained', checkpoint=path, prefix='backbone.')
    third = hat_mm.FasterViT(ARCH, init_cfg=init_cfg)
    third.init_weights()
    assert all(
        torch.equal(v, model.backbone.state_dict()[k]) for k, v in third.state_dict().items()
    )
    # Another choice of output norms is no error.
    load_checkpoint(Detector(out_norm_cfg=None), path)
    assert 'tensors loaded' in log.getvalue()


def test_incomplete_native_file(tmp_path):
    state = hat_mm.FasterViT(ARCH).state_dict()
    del state['stages.2.blocks.1.window.mlp.fc1.weight']
    path = str(tmp_path / 'native.pth')
    torch.save(state, path)
    with pytest.raises(ValueError, match='1 missing'):
        load_checkpoint(hat_mm.FasterViT(ARCH), path)


def test_first_name_of_the_carrier_convolution_counts():
    backbone = hat_mm.FasterViT(ARCH)
    backbone.load_state_dict(training_file(official()))
    assert not (backbone.stages[2].tokenizer.conv.weight == 9).any()


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_file_with_code_is_refused(tmp_path):
    path, sentinel = str(tmp_path / 'bad.pth'), str(tmp_path / 'ran')
    torch.save({'state_dict': official(), 'args': Malicious(sentinel)}, path)
    backbone = hat_mm.FasterViT(ARCH, init_cfg=dict(type='Pretrained', checkpoint=path))
    with pytest.raises((pickle.UnpicklingError, RuntimeError)):
        backbone.init_weights()
    assert not os.path.exists(sentinel)


def test_unwrap_finds_the_tensors():
    tensors = {'a': torch.zeros(1)}
    assert unwrap({'state_dict': {'model': {'module.a': tensors['a']}}}) == tensors
