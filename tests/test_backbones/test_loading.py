"""Loading: official files, training files, foreign files, files with code."""

import argparse
import copy
import os
import pickle

import pytest
import torch
from mmengine.model import BaseModule
from mmengine.runner import load_checkpoint

import hat_mm
from hat_mm.weights.loading import unwrap
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
    """Stands for any toolbox's model: a backbone and something behind it."""

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
    new = [n for n in own if '.tokenizer.' in n or '.carrier_attn.' in n if name == 'SwinHAT']
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
        # mmpretrain's has norms of its outputs that are called as ours.
        lambda name: {'stages.0.0.gamma': torch.zeros(1), 'norm3.weight': torch.zeros(1)},
        lambda name: official(OTHERS[name]),
        lambda name: make(OTHERS[name]).state_dict(),
        lambda name: {'roi_head.bbox_head.fc_cls.weight': torch.zeros(1)},
        lambda name: {'epoch': 3},
    ],
    ids=[
        'resnet',
        'twins',
        'convnext',
        'other family',
        'native names of the other family',
        'head',
        'no checkpoint',
    ],
)
def test_file_of_another_network(name, state):
    state = state(name)
    with pytest.raises(ValueError, match=f'no {name} checkpoint'):
        make(name).load_state_dict(state)
    inside = {f'backbone.{key}': value for key, value in state.items()}
    with pytest.raises(ValueError, match=f'no {name} checkpoint'):
        Detector(name).load_state_dict(inside, strict=False)


def test_names_in_common_make_no_file_of_the_family():
    state = official('SwinHAT')
    state |= {'norm3.weight': torch.zeros(32), 'stages.0.blocks.0.norm1.weight': torch.zeros(4)}
    with pytest.raises(ValueError, match='looks like a SwinHAT'):
        make('FasterViT').load_state_dict(state)


def test_empty_file(name):
    with pytest.raises(ValueError, match='empty'):
        make(name).load_state_dict({'state_dict': {}})


def test_detector_file_in_a_backbone_points_to_prefix(name):
    with pytest.raises(ValueError, match=r"prefix='backbone\.'"):
        make(name).load_state_dict(Detector(name).state_dict())


@pytest.mark.parametrize('of', ['official', 'official of another family', 'native'])
def test_backbone_alone_as_load_from_points_to_init_cfg(name, of, tmp_path):
    state = official(OTHERS[name] if 'another' in of else name)
    state = make(name).state_dict() if of == 'native' else state
    path = str(tmp_path / 'alone.pth')
    torch.save({'state_dict': state}, path)
    for load in (
        lambda m: load_checkpoint(m, path, map_location='cpu'),
        lambda m: m.load_state_dict(state),
        lambda m: m.load_state_dict(state, strict=False),
    ):
        with pytest.raises(ValueError, match=r'backbone\.init_cfg'):
            load(Detector(name))


def test_head_alone_is_no_error(name, tmp_path):
    path = str(tmp_path / 'head.pth')
    head = {'head.weight': torch.ones(4, 32, 1, 1), 'neck.bias': torch.ones(1)}
    torch.save({'state_dict': head}, path)
    model = Detector(name)
    before = copy.deepcopy(model.backbone.state_dict())
    load_checkpoint(model, path)
    assert (model.head.weight == 1).all()
    assert all(torch.equal(v, before[k]) for k, v in model.backbone.state_dict().items())
    missing, unexpected = model.load_state_dict(head, strict=False)
    # PyTorch does not ask plain dicts for counters of batches.
    assert set(missing) == {'head.bias', *(f'backbone.{k}' for k in before if 'num_b' not in k)}
    assert unexpected == ['neck.bias']
    with pytest.raises(RuntimeError, match='Missing key'):
        model.load_state_dict(head)


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


@pytest.mark.parametrize('prefix', ['', 'backbone.'])
@pytest.mark.parametrize('part', ['stages.2.', 'stages.1.blocks.0.adapter.', 'stem.', 'norm0.'])
def test_part_of_a_native_file(name, prefix, part, tmp_path, log):
    def build():
        model = Detector(name, out_norm_cfg=dict(type='BN'))
        model.backbone.stages[1].blocks[0].adapter = torch.nn.Linear(2, 2)
        return model if prefix else model.backbone

    whole = build().state_dict()
    state = {k: v + 1 for k, v in whole.items() if k.startswith(prefix + part)}
    path = str(tmp_path / 'part.pth')
    torch.save(state, path)
    model = build()
    before = copy.deepcopy(model.state_dict())
    load_checkpoint(model, path)
    assert 'WARNING' in log.getvalue()
    assert f': {len([k for k in state if "num_b" not in k])} of ' in log.getvalue()
    for key, value in model.state_dict().items():
        assert torch.equal(value, state.get(key, before[key])), key
    missing, unexpected = build().load_state_dict(state, strict=False)
    # Each task trains its own norms of outputs, but for the one that official files have.
    own = tuple(f'{prefix}norm{i}.' for i in range(4 if name != 'FasterViT' else 3))
    needed = {k for k in whole if not k.startswith(own) and 'num_b' not in k}
    assert set(missing) == needed - set(state)
    assert not unexpected
    with pytest.raises(RuntimeError, match='Missing key'):
        build().load_state_dict(state)


def test_what_does_not_fit_in_a_native_file_is_told_by_torch(name, tmp_path, log):
    model, state = make(name), make(name).state_dict()
    gone = [key for key in state if key.startswith('stages.2.blocks.1.')][3]
    del state[gone]
    missing, unexpected = model.load_state_dict({**state, 'x': torch.ones(1)}, strict=False)
    assert (missing, unexpected) == ([gone], ['x'])
    assert f'WARNING {name} custom' in log.getvalue()
    assert f'1 missing ({gone}); 1 unexpected (x)' in log.getvalue()
    path = str(tmp_path / 'native.pth')
    torch.save(state, path)
    load_checkpoint(model, path)
    with pytest.raises(RuntimeError, match='Missing key'):
        model.load_state_dict(state)
    with pytest.raises(RuntimeError, match='size mismatch'):
        model.load_state_dict({**state, gone: torch.ones(1, 2, 3)}, strict=False)


@pytest.mark.parametrize('channels', [1, 4, 6])
@pytest.mark.parametrize('of', ['official', 'native'])
def test_file_for_colours_in_a_backbone_for_other_images(name, of, channels, tmp_path, log):
    colours = make(name).eval()
    colours.load_state_dict(official(name))
    path = str(tmp_path / 'colours.pth')
    torch.save(official(name) if of == 'official' else colours.state_dict(), path)
    init_cfg = dict(type='Pretrained', checkpoint=path)
    backbone = make(name, in_channels=channels, init_cfg=init_cfg).eval()
    backbone.init_weights()
    conv = FAMILIES[name].name_map.first_conv
    assert f'1 summed or repeated over colours ({conv})' in log.getvalue()
    weight, ours = (network.state_dict()[conv] for network in (colours, backbone))
    expected = weight.sum(1, keepdim=True)
    if channels > 1:
        expected = torch.stack([weight[:, i % 3] * 3 / channels for i in range(channels)], 1)
    torch.testing.assert_close(ours, expected)
    if channels in (1, 6):  # each colour as often as the others: a grey image is the same to both
        grey = torch.randn(1, 1, 40, 40)
        with torch.no_grad():
            maps = zip(
                backbone.stem(grey.expand(-1, channels, -1, -1)),
                colours.stem(grey.expand(-1, 3, -1, -1)),
                strict=True,
            )
        for mine, reference in maps:
            torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-5)


def test_file_for_four_channels_fits_only_four(name):
    state = make(name, in_channels=4).state_dict()
    make(name, in_channels=4).load_state_dict(state)
    with pytest.raises(RuntimeError, match='size mismatch'):
        make(name).load_state_dict(state)
    with pytest.raises(ValueError, match='1 mismatched'):
        make(name).load_state_dict(FAMILIES[name].name_map.to_official(state)[0])


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


@pytest.mark.parametrize('name', [*FAMILIES, 'HATPlugin'])
def test_files_of_version_0_1(name):
    # It called window_attn and carrier_attn of a block window and carrier.
    build = Detector if name in FAMILIES else lambda _: torch.nn.Sequential(hat_mm.HATPlugin(8))
    one, other = build(name), build(name)
    renamed = {
        key.replace('.window_attn.', '.window.').replace('.carrier_attn.', '.carrier.'): value
        for key, value in one.state_dict().items()
    }
    assert (renamed.keys() == one.state_dict().keys()) is (name == 'HATNet')
    other.load_state_dict(renamed)
    for key, value in other.state_dict().items():
        assert torch.equal(one.state_dict()[key], value)


@pytest.mark.parametrize('name', ['FasterViT', 'HATPlugin'])
def test_names_of_other_modules_are_left_alone(name):
    inner = make(name) if name in FAMILIES else hat_mm.HATPlugin(8)
    model = torch.nn.ModuleDict({'blocks': torch.nn.ModuleList([torch.nn.ModuleDict()])})
    model.blocks[0]['window'] = inner
    model.load_state_dict(model.state_dict())


@pytest.mark.parametrize('name', FAMILIES)
def test_strict_false_lets_the_caller_judge(name):
    backbone = make(name, out_norm_cfg=None)
    for state in ({}, {'conv1.weight': torch.zeros(1)}):
        missing, unexpected = backbone.load_state_dict(state, strict=False)
        assert len(missing) == len([n for n in backbone.state_dict() if 'num_batches' not in n])
        assert unexpected == [*state]
        with pytest.raises(ValueError, match=r'no tensors to load|this is no'):
            backbone.load_state_dict(state)
    for state in (official(OTHERS[name]), make(OTHERS[name]).state_dict()):
        with pytest.raises(ValueError, match=f'no {name} checkpoint'):
            backbone.load_state_dict(state, strict=False)
