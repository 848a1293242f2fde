"""Layer-wise learning rates: on backbones, whole models, under schedules and in a real run."""

import copy
import importlib
from pathlib import Path

import mmdet.utils
import mmpretrain.utils
import mmseg.utils
import pytest
import torch
from mmengine.logging import MMLogger
from mmengine.optim import MultiStepLR, build_optim_wrapper
from mmengine.registry import DefaultScope
from test_backbones.archs import FAMILIES
from torch import nn

import hat_mm
from hat_mm.engine import cli
from hat_mm.layers import (
    AbsolutePositionEmbedding,
    RelativePositionBias,
    RelativePositionTable,
)

ROOT = Path(__file__).resolve().parents[2]
TOY_CONFIG = str(ROOT / 'configs/toy/mask-rcnn_fastervit-tiny_fpn_shapes.py')
CONSTRUCTOR = 'hat_mm.LayerDecayOptimWrapperConstructor'
LR, DECAY = 0.8, 0.05
RECOMMENDED = {
    'pos_embed.fc': dict(decay_mult=0.0),
    'attn.bias.fc': dict(decay_mult=0.0),
    'relative_position_bias_table': dict(decay_mult=0.0),
}

ARCHS = {name: family.arch for name, family in FAMILIES.items()}
ARCHS['SwinHAT'] = FAMILIES['SwinHAT'].tiny(depths=(1, 1, 2, 1))
STEMS = {
    'FasterViT': 'stem.conv1.weight',
    'HATNet': 'stem.conv1.weight',
    'SwinHAT': 'stem.conv.weight',
}
# The tiny archs have 1, 1, 2 and 1 blocks: depth 0 is the stem, 1 to 5 the blocks, 6 the norms.
DEPTHS = {
    'FasterViT': {
        'stem.conv1.weight': 0,
        'stem.norm2.bias': 0,
        'stages.0.blocks.0.conv1.weight': 1,
        'stages.1.downsample.conv.weight': 2,
        'stages.1.blocks.0.norm1.weight': 2,
        'stages.2.downsample.norm.weight': 3,
        'stages.2.blocks.0.window_attn.attn.qkv.weight': 3,
        'stages.2.blocks.1.window_attn.attn.bias.fc1.weight': 4,
        'stages.3.downsample.conv.weight': 5,
        'stages.3.blocks.0.window_attn.mlp.fc2.bias': 5,
        'norm0.weight': 6,
        'norm3.bias': 6,
    },
    'HATNet': {
        'stem.conv1.weight': 0,
        'stem.norm.bias': 0,
        'stages.0.blocks.0.attn.qkv.weight': 1,
        'stages.1.downsample.conv.weight': 2,
        'stages.1.blocks.0.conv.conv2.weight': 2,
        'stages.2.downsample.norm.weight': 3,
        'stages.2.blocks.0.attn.ds_norm.weight': 3,
        'stages.2.blocks.1.conv.conv3.weight': 4,
        'stages.3.downsample.conv.weight': 5,
        'stages.3.blocks.0.attn.proj.bias': 5,
        'norm0.weight': 6,
        'norm3.bias': 6,
    },
    'SwinHAT': {
        'stem.conv.weight': 0,
        'stem.norm.bias': 0,
        'stages.0.tokenizer.conv.weight': 1,
        'stages.0.blocks.0.attn.qkv.weight': 1,
        'stages.1.downsample.reduction.weight': 2,
        'stages.2.downsample.norm.weight': 3,
        'stages.2.blocks.0.attn.bias.relative_position_bias_table': 3,
        'stages.2.blocks.1.carrier_attn.attn.qkv.weight': 4,
        'stages.3.blocks.0.mlp.fc2.bias': 5,
        'norm0.weight': 6,
        'norm3.bias': 6,
    },
}


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def backbone_cfg(name, **arguments):
    arguments = {'out_norm_cfg': dict(type='BN'), **arguments}
    return dict(type=f'hat_mm.{name}', arch=ARCHS[name], **arguments)


def bare(name, **arguments):
    cfg = backbone_cfg(name, **arguments)
    return getattr(hat_mm, cfg.pop('type').removeprefix('hat_mm.'))(**cfg)


def build(toolbox, cfg):
    """A model, built as the toolbox's tools build it."""
    if toolbox == 'mmdet':
        mmdet.utils.register_all_modules(init_default_scope=False)
    elif toolbox == 'mmseg':
        mmseg.utils.register_all_modules(init_default_scope=False)
    else:
        mmpretrain.utils.register_all_modules(init_default_scope=False)
    with DefaultScope.overwrite_default_scope(toolbox):
        return importlib.import_module(f'{toolbox}.registry').MODELS.build(cfg)


def channels(name):
    return list(bare(name).out_channels)


def detector(name):
    return build(
        'mmdet',
        dict(
            type='RetinaNet',
            backbone=backbone_cfg(name),
            neck=dict(type='FPN', in_channels=channels(name), out_channels=8, num_outs=4),
            bbox_head=dict(
                type='RetinaHead', num_classes=2, in_channels=8, feat_channels=8, stacked_convs=1
            ),
        ),
    )


def segmentor(name):
    return build(
        'mmseg',
        dict(
            type='EncoderDecoder',
            backbone=backbone_cfg(name),
            decode_head=dict(
                type='FCNHead', in_channels=channels(name)[-1], channels=8, num_classes=2
            ),
            train_cfg=dict(),
            test_cfg=dict(mode='whole'),
        ),
    )


def classifier_of(backbone, in_channels):
    return build(
        'mmpretrain',
        dict(
            type='ImageClassifier',
            backbone=backbone,
            neck=dict(type='GlobalAveragePooling'),
            head=dict(type='LinearClsHead', in_channels=in_channels, num_classes=2),
        ),
    )


def classifier(name):
    return classifier_of(backbone_cfg(name), channels(name)[-1])


def wrap(model, rate=0.5, constructor=CONSTRUCTOR, scope='mmengine', optimizer=None, **options):
    """The optimizer wrapper of a config."""
    cfg = dict(
        type='OptimWrapper',
        constructor=constructor,
        optimizer=optimizer or dict(type='AdamW', lr=LR, weight_decay=DECAY),
        paramwise_cfg=dict(layer_decay_rate=rate, **options),
    )
    with DefaultScope.overwrite_default_scope(scope):
        return build_optim_wrapper(model, cfg)


def settings(model, wrapper):
    """Name of a parameter -> its group in the optimizer."""
    names = {param: name for name, param in model.named_parameters()}
    found = {}
    for group in wrapper.optimizer.param_groups:
        for param in group['params']:
            assert names[param] not in found
            found[names[param]] = group
    return found


def rates(model, wrapper):
    return {name: group['lr'] for name, group in settings(model, wrapper).items()}


# --- learning rates -------------------------------------------------------------------------------


def test_every_depth_of_a_bare_backbone(family):
    model = bare(family)
    lr = rates(model, wrap(model))
    assert set(lr) == {name for name, _ in model.named_parameters()}
    for name, depth in DEPTHS[family].items():
        assert lr[name] == LR * 0.5 ** (6 - depth), name
    assert min(lr.values()) == lr[STEMS[family]]


@pytest.mark.parametrize('make', [detector, segmentor, classifier])
def test_every_depth_in_a_whole_model(make, family):
    scope = {detector: 'mmdet', segmentor: 'mmseg', classifier: 'mmpretrain'}[make]
    model = make(family)
    lr = rates(model, wrap(model, scope=scope))
    for name, depth in DEPTHS[family].items():
        assert lr[f'backbone.{name}'] == LR * 0.5 ** (6 - depth), name
    outside = {value for name, value in lr.items() if not name.startswith('backbone.')}
    assert outside == {LR}


def test_rates_rise_from_block_to_block(family):
    model = bare(family)
    lr = rates(model, wrap(model, rate=0.7))
    blocks = [('stem',), *((stage, block) for stage in range(4) for block in range(2))]
    prefixes = ['stem.', *(f'stages.{stage}.blocks.{block}.' for stage, block in blocks[1:])]
    found = [{value for name, value in lr.items() if name.startswith(p)} for p in prefixes]
    found = [values for values in found if values]
    assert len(found) == 6
    assert all(len(values) == 1 for values in found)
    rising = [value for values in found for value in values]
    assert rising == sorted(set(rising))


def test_a_rate_of_one_changes_nothing(family):
    model = bare(family)
    assert set(rates(model, wrap(model, rate=1)).values()) == {LR}


class Wrapped(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module


def test_backbones_are_found_wherever_they_are(family):
    depths = DEPTHS[family].items()

    model = Wrapped(detector(family))
    lr = rates(model, wrap(model))
    assert all(lr[f'module.backbone.{k}'] == LR * 0.5 ** (6 - d) for k, d in depths)

    # As MMSeparateDistributedDataParallel does, and as torch.compile, which passes attributes on.
    for outer, prefix in (Wrapped, 'module'), (torch.compile, '_orig_mod'):
        model = nn.ModuleDict({'backbone': outer(bare(family)), 'head': nn.Linear(2, 2)})
        lr = rates(model, wrap(model))
        assert all(lr[f'backbone.{prefix}.{k}'] == LR * 0.5 ** (6 - d) for k, d in depths)
        assert lr['head.weight'] == LR

    model = nn.ModuleDict({'student': detector(family), 'teacher': detector(family)})
    lr = rates(model, wrap(model))
    for half in ('student', 'teacher'):
        assert all(lr[f'{half}.backbone.{k}'] == LR * 0.5 ** (6 - d) for k, d in depths)
    assert lr['teacher.neck.fpn_convs.0.conv.weight'] == LR


def test_a_backbone_inside_a_backbone_is_part_of_it():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = bare('HATNet')

        def get_layer_depth(self, param_name, prefix=''):
            assert param_name.startswith(prefix + 'inner.')
            return 1, 3

    model = nn.ModuleDict({'backbone': Outer()})
    assert set(rates(model, wrap(model)).values()) == {LR * 0.5}


def test_two_backbones_of_different_depths():
    model = nn.ModuleDict({
        'a': bare('HATNet'),
        'ab': hat_mm.HATNet(FAMILIES['HATNet'].tiny(depths=(1, 1, 3, 1))),
    })  # fmt: skip
    lr = rates(model, wrap(model))
    assert lr['a.stem.conv1.weight'] == LR * 0.5**6
    assert lr['ab.stem.conv1.weight'] == LR * 0.5**7


def mmpretrain_backbone(name):
    if name in FAMILIES:
        return backbone_cfg(name), channels(name)[-1]
    if name == 'ConvNeXt':
        return dict(type=name, arch=dict(depths=[1, 1, 3, 1], channels=[4, 8, 16, 32])), 32
    arch = dict(embed_dims=4, depths=[1, 1, 2, 1], num_heads=[1, 1, 1, 1])
    return dict(type=name, arch=arch), 32


@pytest.mark.parametrize('name', [*FAMILIES, 'ConvNeXt', 'SwinTransformer'])
def test_same_as_mmpretrains_constructor(name):
    model = classifier_of(*mmpretrain_backbone(name))
    options = dict(norm_decay_mult=0.0, bias_decay_mult=0.0, flat_decay_mult=0.0)
    ours = settings(model, wrap(model, scope='mmpretrain', **options))
    theirs = settings(
        model,
        wrap(
            model,
            constructor='LearningRateDecayOptimWrapperConstructor',
            scope='mmpretrain',
            **options,
        ),
    )
    assert set(ours) == set(theirs)
    for key, group in ours.items():
        for setting in ('lr', 'weight_decay'):
            assert group[setting] == theirs[key][setting], key
    assert len({group['lr'] for group in ours.values()}) > 5


# --- other options --------------------------------------------------------------------------------


@pytest.mark.parametrize('norm_cfg', [None, dict(type='GN', num_groups=1)])
def test_no_weight_decay_on_norms_biases_scales_and_positions(family, norm_cfg):
    arch = ARCHS[family]
    if family == 'FasterViT':
        arch = {**arch, 'layer_scale': 1e-5}
    model = getattr(hat_mm, family)(arch, norm_cfg=norm_cfg, out_norm_cfg=dict(type='BN'))
    kinds = {
        'norm': (nn.GroupNorm, nn.LayerNorm, nn.modules.batchnorm._BatchNorm),
        'position': (AbsolutePositionEmbedding, RelativePositionBias, RelativePositionTable),
    }
    exempt = {kind: set() for kind in ('norm', 'position', 'bias', 'scale')}
    for name, module in model.named_modules():
        for kind, types in kinds.items():
            if isinstance(module, types):
                exempt[kind] |= {f'{name}.{key}' for key, _ in module.named_parameters()}
    for name, _ in model.named_parameters():
        last = name.rpartition('.')[2]
        if last == 'bias':
            exempt['bias'].add(name)
        elif last.startswith('gamma'):
            exempt['scale'].add(name)
    assert exempt['norm']
    assert exempt['bias']
    assert bool(exempt['position']) is (family != 'HATNet')
    assert bool(exempt['scale']) is (family == 'FasterViT')
    exempt = set().union(*exempt.values())

    full = dict(norm_decay_mult=0.0, bias_decay_mult=0.0, flat_decay_mult=0.0)
    for options in full, dict(flat_decay_mult=0.0):  # all of them are vectors, so one is enough
        found = settings(model, wrap(model, custom_keys=RECOMMENDED, **options))
        assert {name for name, group in found.items() if group['weight_decay'] == 0} == exempt
        others = {group['weight_decay'] for name, group in found.items() if name not in exempt}
        assert others == {DECAY}


def test_custom_keys_multiply_with_the_layer(family):
    model = detector(family)
    found = settings(
        model,
        wrap(
            model,
            custom_keys={
                'backbone': dict(lr_mult=0.1, decay_mult=0.5),
                'backbone.stem': dict(decay_mult=0.0, betas=[0.8, 0.9]),
                'bbox_head': dict(lr_mult=10),
            },
        ),
    )
    stem = found[f'backbone.{STEMS[family]}']  # the longest key counts, as in mmengine
    assert stem['lr'] == LR * 0.5**6
    assert stem['weight_decay'] == 0
    assert stem['betas'] == [0.8, 0.9]
    layer = 'conv1' if family == 'FasterViT' else 'attn.qkv'
    stage = found[f'backbone.stages.0.blocks.0.{layer}.weight']
    assert stage['lr'] == pytest.approx(LR * 0.1 * 0.5**5)
    assert stage['weight_decay'] == DECAY * 0.5
    assert stage['betas'] == (0.9, 0.999)
    assert found['bbox_head.retina_cls.weight']['lr'] == LR * 10
    assert found['neck.fpn_convs.0.conv.weight']['lr'] == LR


def test_bias_and_depthwise_multipliers():
    model = bare('HATNet')
    found = settings(model, wrap(model, bias_lr_mult=2, dwconv_decay_mult=0.5))
    assert found['stages.3.blocks.0.attn.proj.bias']['lr'] == 2 * LR * 0.5
    assert found['stages.3.blocks.0.conv.norm1.bias']['lr'] == LR * 0.5
    assert found['stages.3.blocks.0.conv.conv2.weight']['weight_decay'] == DECAY * 0.5
    assert found['stages.3.blocks.0.conv.conv1.weight']['weight_decay'] == DECAY


def test_equal_settings_share_a_group(family):
    # That a custom key made the same settings is no difference.
    custom = {'norm': dict(lr_mult=1.0, decay_mult=0.0)}
    wrapper = wrap(detector(family), flat_decay_mult=0.0, custom_keys=custom)
    kinds = [(group['lr'], group['weight_decay']) for group in wrapper.optimizer.param_groups]
    # The output norms have the rate of the head, but a depth.
    assert kinds.count((LR, 0)) == 2
    assert len(kinds) == len(set(kinds)) + 1 == 2 * 6 + 1 + 2


def test_frozen_stages_are_left_out(family):
    model = bare(family, frozen_stages=2)
    lr = rates(model, wrap(model))
    assert not [k for k in lr if k.startswith(('stem', 'stages.0', 'stages.1', 'norm0', 'norm1'))]
    assert lr['stages.2.downsample.norm.weight'] == LR * 0.5**3


def test_weights_shared_by_two_modules():
    model = nn.ModuleDict({'backbone': bare('HATNet'), 'a': nn.Linear(2, 2), 'b': nn.Linear(2, 2)})
    model['b'].weight = model['a'].weight
    with pytest.raises(ValueError, match=r'twice.*bypass_duplicate'):
        wrap(model)
    assert rates(model, wrap(model, bypass_duplicate=True))['a.weight'] == LR


# --- schedules and checkpoints --------------------------------------------------------------------


def test_schedules_keep_the_ratios(family):
    model = detector(family)
    wrapper = wrap(model)
    before = rates(model, wrapper)
    schedule = MultiStepLR(wrapper, milestones=[1, 2], gamma=0.1, by_epoch=True)
    for _ in range(2):
        schedule.step()
    after = rates(model, wrapper)
    assert after == pytest.approx({name: 0.01 * lr for name, lr in before.items()})
    assert wrapper.get_lr()['base_lr'] == pytest.approx([0.01 * LR])


def step(model, wrapper):
    torch.manual_seed(0)
    loss = sum(m.square().mean() for m in model(torch.rand(2, 3, 64, 64)))
    wrapper.update_params(loss)


def test_an_optimizer_goes_on_from_its_state(family):
    model = bare(family)
    wrapper = wrap(model, flat_decay_mult=0.0)
    step(model, wrapper)
    resumed_model = copy.deepcopy(model)
    resumed = wrap(resumed_model, rate=0.9, flat_decay_mult=0.0)
    resumed.load_state_dict(copy.deepcopy(wrapper.state_dict()))
    assert rates(resumed_model, resumed) == rates(model, wrapper)
    step(model, wrapper)
    step(resumed_model, resumed)
    weights = dict(resumed_model.named_parameters())
    assert all(torch.equal(weights[name], param) for name, param in model.named_parameters())


# --- what is logged -------------------------------------------------------------------------------


@pytest.fixture
def logged(tmp_path):
    """What the current logger has written."""
    path = tmp_path / 'run.log'
    MMLogger.get_instance('run', logger_name='run', log_file=str(path))
    return path.read_text


def test_table_of_groups(family, logged):
    model = detector(family)
    wrapper = wrap(model, flat_decay_mult=0.0)
    text = logged()
    assert text.count(f'layer_decay_rate 0.5 in backbone ({family})') == 1
    assert 'paramwise_options' not in text  # mmengine's, with rates that are not final
    _, header, *rows = text.rstrip('\n').split('\n')
    assert header.split() == [
        'depth',
        'lr',
        'scale',
        'lr',
        'weight',
        'decay',
        'tensors',
        'parameters',
    ]
    rows = [row.split() for row in rows]
    assert len(rows) == len(wrapper.optimizer.param_groups)
    assert [row[0] for row in rows] == [*(str(i // 2) for i in range(12)), '6', 'other', 'other']
    for row, group in zip(rows, wrapper.optimizer.param_groups, strict=True):
        assert float(row[1]) == pytest.approx(group['lr'] / LR, rel=1e-3)
        assert float(row[2]) == pytest.approx(group['lr'], rel=1e-3)
        assert float(row[3]) == group['weight_decay']
        assert int(row[4]) == len(group['params'])
    assert sum(int(row[5].replace(',', '')) for row in rows) == sum(
        param.numel() for param in model.parameters()
    )


def test_frozen_parameters_and_a_missing_weight_decay_are_told(logged):
    wrap(bare('HATNet', frozen_stages=0), optimizer=dict(type='AdamW', lr=LR))
    text = logged()
    assert 'stem.conv1.weight is skipped' in text
    assert '   default   ' in text


def test_only_the_main_process_logs(monkeypatch, logged):
    monkeypatch.setattr('hat_mm.engine.optim.is_main_process', lambda: False)
    wrap(bare('HATNet'))
    assert logged() == ''


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('options', 'parts'),
    [
        (dict(decay_rate=0.9), ["'decay_rate'", "did you mean 'layer_decay_rate'"]),
        (dict(layer_decay_rate=0.9, num_layers=12), ["'num_layers'", 'choices: layer_decay_rate']),
        (dict(layer_decay_rate=0.9, norm_decay_mul=0.0), ["did you mean 'norm_decay_mult'"]),
        (dict(), ['layer_decay_rate', 'not None']),
        (None, ['layer_decay_rate', 'not None']),
        (dict(layer_decay_rate=0), ['above 0', 'not 0']),
        (dict(layer_decay_rate=1.1), ['up to 1', 'not 1.1']),
        (dict(layer_decay_rate=float('nan')), ['not nan']),
        (dict(layer_decay_rate='0.9'), ["not '0.9'"]),
        (dict(layer_decay_rate=True), ['not True']),
    ],
)  # fmt: skip
def test_wrong_options(options, parts):
    cfg = dict(
        constructor=CONSTRUCTOR,
        optimizer=dict(type='AdamW', lr=LR, weight_decay=DECAY),
        paramwise_cfg=options,
    )
    with pytest.raises(ValueError) as error:
        build_optim_wrapper(bare('HATNet'), cfg)
    for part in parts:
        assert part in str(error.value)


def test_wrong_type_of_options():
    cfg = dict(constructor=CONSTRUCTOR, optimizer=dict(type='AdamW', lr=LR), paramwise_cfg=[0.9])
    with pytest.raises(TypeError, match=r'paramwise_cfg must be a dict, not \[0.9\]'):
        build_optim_wrapper(bare('HATNet'), cfg)


def test_what_the_optimizer_must_give():
    with pytest.raises(ValueError, match=r'optimizer.lr, which must be a number, not None'):
        wrap(bare('HATNet'), optimizer=dict(type='AdamW'))
    with pytest.raises(ValueError, match=r'flat_decay_mult needs .*optimizer.weight_decay'):
        wrap(bare('HATNet'), optimizer=dict(type='AdamW', lr=LR), flat_decay_mult=0.0)


def test_a_model_without_depths():
    # The method of mmpretrain's ImageClassifier asks the backbone, whose name it does not take.
    model = classifier_of(dict(type='MobileNetV2', widen_factor=0.1), 1280)
    assert hasattr(model, 'get_layer_depth')
    with pytest.raises(
        ValueError, match=r'ImageClassifier .* get_layer_depth\(param_name, prefix\)'
    ):
        wrap(model, scope='mmpretrain')


# --- for real -------------------------------------------------------------------------------------


def test_constructor_is_found_by_name_alone(run_python):
    """Nothing of hat_mm is imported by hand, and no model of hat_mm is built."""
    code = f"""
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from torch import nn
init_default_scope('mmengine')
class Net(nn.Linear):
    def get_layer_depth(self, param_name, prefix=''):
        return 0, 2
cfg = dict(type='OptimWrapper', constructor='{CONSTRUCTOR}', optimizer=dict(type='SGD', lr=1.0),
           paramwise_cfg=dict(layer_decay_rate=0.5))
optimizer = build_optim_wrapper(Net(2, 2), cfg).optimizer
print('rates', [group['lr'] for group in optimizer.param_groups])
"""
    done = run_python('-c', code)
    assert 'rates [0.5]' in done.stdout, done.stderr


@pytest.mark.usefixtures('plain_dumps')
def test_training(toy_options, tmp_path):
    cli.train([
        TOY_CONFIG, '--work-dir', str(tmp_path), '--auto-scale-lr',
        '--cfg-options', *toy_options,
        f'optim_wrapper.constructor={CONSTRUCTOR}',
        'optim_wrapper.paramwise_cfg.layer_decay_rate=0.5',
        'param_scheduler=[]',
    ])  # fmt: skip
    [log] = tmp_path.glob('*/*.log')
    text = log.read_text()
    assert text.count('layer_decay_rate 0.5 in backbone (FasterViT)') == 1
    assert text.count('depth  lr scale') == 1
    assert 'paramwise_options' not in text
    checkpoint = torch.load(tmp_path / 'epoch_1.pth', weights_only=True)
    lr = sorted({group['lr'] for group in checkpoint['optimizer']['param_groups']})
    assert len(lr) == 8  # stem, six blocks, everything after them
    assert lr == pytest.approx([lr[-1] * 0.5 ** (7 - depth) for depth in range(8)])
