"""The authors' trained detector: equal to theirs, and its files wherever weights are loaded."""

import argparse
import copy
import re
import sys
from dataclasses import replace
from importlib.metadata import packages_distributions
from pathlib import Path

import convert_weights
import pytest
import torch
from check_configs import shorten
from golden import Golden, fill, official_shapes, official_state
from mmdet.apis import init_detector
from mmdet.models import DINO
from mmdet.structures import DetDataSample
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import load_checkpoint
from test_backbones.archs import tiny

import hat_mm
from hat_mm.engine.build import build_model
from hat_mm.engine.cli import run_tool
from hat_mm.weights import fileio
from hat_mm.weights.dino import from_mmdet, to_mmdet
from hat_mm.weights.names import UNUSED

NAME = 'dino-4scale_fastervit-4-21k-224_authors_coco'
KEYS = 'dino_4scale_fastervit_4_21k_224'
CONFIG = Path(__file__).resolve().parents[1] / f'configs/fastervit/{NAME}.py'
# The category ids that COCO uses, which are the rows of mmdet's classes.
COCO_IDS = [
    *range(1, 12), *range(13, 26), 27, 28, *range(31, 45), *range(46, 66), 67, 70,
    *range(72, 83), *range(84, 91),
]  # fmt: skip
HEAD = r'(transformer\.decoder\.)?(class|bbox)_embed\.\d\.'


# A layer of its decoder has another shape, which docs/dino.md explains.
ONEDL = 'onedl-mmdetection' in packages_distributions()['mmdet']
pytestmark = pytest.mark.skipif(ONEDL, reason='DINO of onedl-mmdetection is another network')


@pytest.fixture(autouse=True, scope='module')
def _mmdet():
    register_all_modules(init_default_scope=False)
    with DefaultScope.overwrite_default_scope('mmdet'):
        yield


def tied(state):
    """Gives the heads of the decoder's layers, which are one tensor under many names, one value."""
    for name in state:
        if re.match(HEAD, name):
            first = re.sub(HEAD, r'transformer.decoder.\2_embed.0.', name)
            state[name] = state[first]
    return {k: torch.tensor(0) if 'num_batches' in k else v for k, v in state.items()}


# --- equal ----------------------------------------------------------------------------------------


def test_equals_the_authors_detector():
    golden = Golden(f'{KEYS}_256x320')
    with torch.device('meta'):
        model = build_model(Config.fromfile(CONFIG)).eval()
    model.load_state_dict(tied(official_state(KEYS)), assign=True)
    model.double()
    outputs = {}
    shape = golden.meta['input_shape'][2:]
    sample = DetDataSample(metainfo=dict(img_shape=shape, batch_input_shape=shape))
    with torch.inference_mode():
        maps = model.backbone(golden.image().double())
        levels = model.neck(maps)
        outputs |= {f'backbone{i}': x for i, x in enumerate(maps)}
        outputs |= {f'level{i}': x for i, x in enumerate(levels)}
        encoder_inputs, decoder_inputs = model.pre_transformer(levels, [sample])
        encoded = model.forward_encoder(**encoder_inputs)
        outputs['memory'] = encoded['memory']
        queries, _ = model.pre_decoder(**encoded)
        outputs['init_boxes'] = queries['reference_points']
        decoded = model.forward_decoder(**{**decoder_inputs, **queries})
        logits, boxes = model.bbox_head(**decoded)
        outputs['pred_boxes'] = boxes[-1]
    # Boxes differ, because mmdet clips before its inverse sigmoid at 1e-5, the authors at 1e-3.
    limits = {'memory': 1e-6, 'init_boxes': 1e-6, 'pred_boxes': 2e-3}
    for name, output in outputs.items():
        assert golden.error(name, output) <= limits.get(name, 1e-8), name
    assert golden.error('pred_logits', logits[-1], columns=COCO_IDS) <= 1e-5


# --- a short one with the authors' names ----------------------------------------------------------


# Widths of the published backbone, and of one that is narrower.
NARROW = {
    196 * factor: 16 * factor for factor in (1, 2, 4, 8, 12, 16, 24, 32)
}  # stages 0 to 3, their queries, keys and values, and their MLPs


def short_config():
    """The detector with one narrow block a stage, an encoder layer, two decoder layers."""
    cfg = Config.fromfile(CONFIG)
    shorten(cfg)
    cfg.model.backbone.arch.embed_dims = 16
    cfg.model.neck.in_channels = [32, 64, 128]
    return cfg


@pytest.fixture(scope='module')
def official():
    """What the authors' file of the short detector would hold."""
    state = {}
    for name, shape in official_shapes(KEYS).items():
        numbers = [int(n) for n in re.findall(r'\.(?:blocks|layers)\.(\d+)\.', name)]
        layers = 1 if 'backbone' in name or '.encoder.' in name else 2
        if re.search('(class|bbox)_embed', name):  # the layers of a head's MLP all stay
            numbers = [int(n) for n in re.findall(r'_embed\.(\d)\.', name)]
        if 'ref_point_head' not in name and any(n >= layers for n in numbers):
            continue
        if name == 'transformer.tgt_embed.weight':
            shape = (20, 256)
        state[name] = fill(name, tuple(NARROW.get(size, size) for size in shape))
    return tied(state)


@pytest.fixture
def training_file(official, tmp_path):
    """A file as the authors' training saves it."""
    path = tmp_path / 'checkpoint0011.pth'
    average = {name: v + 1 if v.is_floating_point() else v for name, v in official.items()}
    args = argparse.Namespace(num_classes=91, backbone='faster_vit_4_21k_224')
    file = dict(model=official, ema_model=average, optimizer={}, lr_scheduler={}, epoch=11)
    torch.save({**file, 'args': args}, path)
    return path


def assert_loaded(model, official):
    """Checks a tensor of each part, and the rows of the classes."""
    state = model.state_dict()
    for ours, theirs in {
        'backbone.norm2.running_mean': 'backbone.0.norm2.running_mean',
        'backbone.stages.3.downsample.conv.weight':
            'backbone.0.levels.2.downsample.reduction.0.weight',
        'neck.convs.2.conv.bias': 'input_proj.2.0.bias',
        'neck.extra_convs.0.gn.weight': 'input_proj.3.1.weight',
        'level_embed': 'transformer.level_embed',
        'encoder.layers.0.ffn.layers.1.weight': 'transformer.encoder.layers.0.linear2.weight',
        'decoder.layers.1.norms.0.weight': 'transformer.decoder.layers.1.norm2.weight',
        'bbox_head.reg_branches.1.4.bias': 'bbox_embed.1.layers.2.bias',
        'bbox_head.reg_branches.2.2.bias': 'transformer.enc_out_bbox_embed.layers.1.bias',
    }.items():  # fmt: skip
        assert torch.equal(state[ours], official[theirs]), ours
    for ours, theirs in {
        'bbox_head.cls_branches.0.weight': 'class_embed.0.weight',
        'bbox_head.cls_branches.2.bias': 'transformer.enc_out_class_embed.bias',
        'dn_query_generator.label_embedding.weight': 'label_enc.weight',
    }.items():
        assert torch.equal(state[ours], official[theirs][COCO_IDS]), ours


def test_a_file_is_taken_as_it_is(official, training_file):
    model = init_detector(short_config(), str(training_file), device='cpu')
    assert type(model) is DINO
    assert_loaded(model, official)


def test_a_model_by_name_takes_it(official, training_file):
    cfg = short_config().model
    model = hat_mm.get_model(
        NAME,
        pretrained=training_file,
        backbone=dict(arch=dict(_delete_=True, **cfg.backbone.arch)),
        neck=dict(in_channels=cfg.neck.in_channels),
        num_queries=20,
        encoder=dict(num_layers=1),
        decoder=dict(num_layers=2),
    )
    assert_loaded(model, official)


def test_it_loads_within_another_model(official):
    wrapper = torch.nn.ModuleDict({'teacher': build_model(short_config())})
    wrapper.load_state_dict({f'teacher.{name}': v for name, v in official.items()})
    assert_loaded(wrapper['teacher'], official)


def test_a_copy_takes_it_and_native_files_load_as_ever(official):
    model = copy.deepcopy(build_model(short_config()))
    model.load_state_dict(official)
    assert_loaded(model, official)
    other = build_model(short_config())
    other.load_state_dict(model.state_dict())
    assert_loaded(other, official)


def without(state, name):
    return {k: v for k, v in state.items() if k != name}


FAULTS = {
    'missing outside': (
        lambda s: without(s, 'input_proj.3.1.bias'), '1 missing .input_proj.3.1.bias',
    ),
    'missing second name': (
        lambda s: without(s, 'transformer.decoder.bbox_embed.0.layers.1.bias'), '1 missing',
    ),
    'missing in the backbone': (
        lambda s: without(s, 'backbone.0.norm2.bias'), r'missing .*norm2\.bias',
    ),
    'level_embed missing': (lambda s: without(s, 'transformer.level_embed'), '1 missing'),
    'label_enc missing': (lambda s: without(s, 'label_enc.weight'), '1 missing'),
    'transformer missing': (
        lambda s: {k: v for k, v in s.items() if not k.startswith('transformer.')}, 'missing',
    ),
    'backbone missing': (
        lambda s: {k: v for k, v in s.items() if not k.startswith('backbone.')}, 'no backbone',
    ),
    'norm missing': (
        lambda s: {k: v for k, v in s.items() if not k.startswith('backbone.0.norm2.')},
        r'4 missing .*norm2',
    ),
    'no tensor': (lambda s: {**s, 'transformer.level_embed': 'abc'}, 'no dense tensor'),
    'integers': (
        lambda s: {**s, 'transformer.level_embed': s['transformer.level_embed'].long()}, 'no dense',
    ),
    'width': (lambda s: {**s, 'transformer.level_embed': torch.ones(4, 7)}, 'has shape'),
    'class rows': (
        lambda s: {k: v[:85] if re.search('class_embed.*weight', k) else v for k, v in s.items()},
        'has shape',
    ),
    'number': (lambda s: {**s, 'label_enc.weight': torch.tensor(1.0)}, 'no dense tensor'),
    'other shape': (
        lambda s: {**s, 'transformer.decoder.layers.1.linear1.weight': torch.ones(5, 5)},
        'has shape',
    ),
    'few labels': (lambda s: {**s, 'label_enc.weight': torch.ones(85, 256)}, 'has 85 rows'),
    'not known': (lambda s: {**s, 'transformer.new': torch.ones(1)}, 'not known .transformer.new'),
    'two values': (
        lambda s: {**s, 'class_embed.1.bias': s['class_embed.1.bias'] + 1},
        'class_embed.1.bias differs',
    ),
    'other backbone': (
        lambda s: {re.sub(r'\.levels\.2\.blocks\.0', '.levels.2.blocks.1', k): v
                   for k, v in s.items()},
        'missing',
    ),
    'no FasterViT': (
        lambda s: {k.replace('.0.levels.', '.0.layers.').replace('conv_down', 'proj'): v
                   for k, v in s.items()},
        'FasterViT',
    ),
}  # fmt: skip


@pytest.mark.parametrize('fault', FAULTS)
def test_a_wrong_file_is_an_error(official, fault):
    change, message = FAULTS[fault]
    with torch.device('meta'):
        model = build_model(short_config())
    with pytest.raises(ValueError, match=message):
        model.load_state_dict(change(official), assign=True)


def test_other_shapes_are_an_error(official):
    cfg = short_config()
    cfg.model.encoder.layer_cfg.ffn_cfg.feedforward_channels = 64
    with pytest.raises(ValueError, match=r'3 mismatched \(encoder\.layers\.0\.ffn'):
        build_model(cfg).load_state_dict(official)


def test_the_arch_of_the_classifiers_is_an_error(official):
    cfg = short_config()
    cfg.model.backbone.arch.positions_by_tokens = False
    with pytest.raises(ValueError, match="arch='4-21k-224-dino'"):
        build_model(cfg).load_state_dict(official)


def test_a_backbone_alone_does_not_take_it(training_file):
    backbone = build_model(short_config()).backbone
    with pytest.raises(ValueError, match=r'docs/dino\.md'):
        load_checkpoint(backbone, str(training_file), map_location='cpu')


def test_another_number_of_levels_is_an_error(official):
    cfg = short_config()
    cfg.model.neck.num_outs = 5
    with pytest.raises(ValueError, match=r'does not fit.*neck\.extra_convs\.1\.conv\.weight'):
        build_model(cfg).load_state_dict(official)


def test_other_classes_warn_as_mmengine_does(official, training_file, capsys):
    cfg = short_config()
    cfg.model.bbox_head.num_classes = 20
    model = build_model(cfg)
    load_checkpoint(model, str(training_file), map_location='cpu')
    assert 'size mismatch for bbox_head.cls_branches.0.weight' in capsys.readouterr().out
    assert torch.equal(model.level_embed, official['transformer.level_embed'])


def test_names_of_five_levels(official):
    """Four maps and an extra level, as in the authors' 5-scale configs."""
    state = {name.replace('input_proj.3.', 'input_proj.4.'): v for name, v in official.items()}
    state |= {f'input_proj.3.{k}': v for k, v in {
        '0.weight': torch.ones(256, 128, 1, 1), '0.bias': torch.ones(256),
        '1.weight': torch.ones(256), '1.bias': torch.ones(256),
    }.items()}  # fmt: skip
    with pytest.raises(ValueError, match=r'4 missing .*norm0\.bias'):
        to_mmdet(state)
    parts = ('weight', 'bias', 'running_mean', 'running_var')
    state |= {f'backbone.0.norm0.{part}': torch.ones(16) for part in parts}
    state['transformer.level_embed'] = torch.ones(5, 256)
    renamed, whole = to_mmdet(state)
    cfg = short_config()
    cfg.model.backbone.out_indices = (0, 1, 2, 3)
    cfg.model.neck.in_channels = [16, 32, 64, 128]
    cfg.model.neck.num_outs = 5
    own = build_model(cfg).state_dict()
    outside = {name for name in own if not name.startswith('backbone.')}
    assert {name for name in renamed if not name.startswith('backbone.')} == outside
    assert renamed['neck.convs.3.conv.weight'].shape == own['neck.convs.3.conv.weight'].shape
    assert set(from_mmdet(renamed, whole)) == set(state)


# --- conversion -----------------------------------------------------------------------------------


def convert(*arguments):
    """Runs the tool in this process; returns its exit status."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', ['convert_weights.py', *map(str, arguments)])
        return run_tool(convert_weights.main, 'convert_weights.py')


@pytest.fixture
def short_arch(monkeypatch):
    """The published arch with one block a stage, for the converter."""
    short = hat_mm.FasterViT.arch_type(**short_config().model.backbone.arch)
    plain = replace(short, pad_every_stage=False, positions_by_tokens=False)
    archs = {'4-21k-224': plain, '4-21k-224-dino': short}
    monkeypatch.setattr(hat_mm.FasterViT, 'archs', archs)


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_round_trip_is_exact(official, training_file, short_arch, suffix, tmp_path, capsys):
    native, back = tmp_path / f'native{suffix}', tmp_path / f'back{suffix}'
    assert convert(training_file, native) == 0
    said = capsys.readouterr().out
    assert 'FasterViT 4-21k-224-dino: backbone: ' in said
    assert re.search(r'outside: all \d+ tensors renamed .*, of 7 the rows of 80 classes', said)
    converted = fileio.read(native)
    model = build_model(short_config())
    cfg = short_config().model
    plain = MODELS.build({**cfg, 'type': 'mmdet.DINO'})
    for detector in (model, plain):
        detector.load_state_dict(converted['state_dict'])
        assert_loaded(detector, official)
    assert convert(native, back, '--to-official') == 0
    file = fileio.read(back)
    after = file['model' if suffix == '.pth' else 'state_dict']
    assert set(after) == set(official)
    for name, value in official.items():
        assert after[name].dtype == value.dtype
        assert torch.equal(after[name], value), name


def with_classes(state, count):
    """The state of a detector of another number of classes, with a label more than these."""
    rows = {'class_embed': count, 'label_enc': count + 1}
    return {
        name: next((v[:n].clone() for part, n in rows.items() if part in name), v)
        for name, v in state.items()
    }


def unshared(state):
    return {k: v + 1 if 'class_embed.1.' in k else v for k, v in state.items()}


def in_half(state):
    return {k: v.half() if v.is_floating_point() else v for k, v in state.items()}


@pytest.mark.parametrize(
    ('change', 'classes'),
    [
        (lambda s: with_classes(s, 20), 20),
        (lambda s: with_classes(s, 80), 80),
        (unshared, 80),
        (in_half, 80),
        (lambda s: {f'module.{name}': value for name, value in s.items()}, 80),
        (lambda s: {**s, 'backbone.0.head.weight': torch.ones(3, 128)}, 80),
    ],
    ids=['20', '80', 'unshared', 'half', 'module', 'head'],
)
def test_round_trip_of_other_files(official, short_arch, change, classes, tmp_path):
    file, native, back = (tmp_path / f'{name}.pth' for name in ('file', 'native', 'back'))
    state = change(official)
    torch.save({'model': state}, file)
    assert convert(file, native) == 0
    cfg = short_config()
    cfg.model.bbox_head.num_classes = classes
    build_model(cfg).load_state_dict(fileio.read(native)['state_dict'])
    assert convert(native, back, '--to-official') == 0
    after = fileio.read(back)['model']
    state = {name.removeprefix('module.'): value for name, value in state.items()}
    assert set(after) == set(state)
    for name, value in state.items():
        assert after[name].dtype == value.dtype
        assert torch.equal(after[name], value), name


def test_half_precision_goes_back_in_it(official, training_file, short_arch, tmp_path):
    native, back = tmp_path / 'native.pth', tmp_path / 'back.pth'
    assert convert(training_file, native) == 0
    made = fileio.read(native)
    made['state_dict'] = in_half(made['state_dict'])
    torch.save(made, native)
    assert convert(native, back, '--to-official') == 0
    after = fileio.read(back)['model']
    assert torch.equal(after['class_embed.0.bias'], official['class_embed.0.bias'].half())


BIAS = 'transformer.enc_out_class_embed.bias'
DAMAGES = {
    'a layer gone': lambda kept, _: kept.pop('class_embed.1.weight'),
    'the bias gone': lambda kept, _: kept.pop(BIAS),
    'short': lambda kept, _: kept.update({BIAS: kept[BIAS][:85]}),
    'none': lambda kept, _: kept.update({BIAS: None}),
    'a part of another shape': lambda _, state: state.update(level_embed=torch.ones(4, 7)),
    'no tensor': lambda _, state: state.update(level_embed='abc'),
    'a norm gone': lambda _, state: [state.pop(k) for k in [*state] if 'backbone.norm1.' in k],
}


@pytest.mark.parametrize('damage', DAMAGES)
def test_a_damaged_file_does_not_go_back(training_file, short_arch, damage, tmp_path, capsys):
    native, back = tmp_path / 'native.pth', tmp_path / 'back.pth'
    assert convert(training_file, native) == 0
    made = fileio.read(native)
    DAMAGES[damage](made[UNUSED], made['state_dict'])
    torch.save(made, native)
    assert convert(native, back, '--to-official') != 0
    assert capsys.readouterr().err.count('\n') == 1
    assert not back.exists()


def test_average(official, training_file, short_arch, tmp_path):
    target = tmp_path / 'average.pth'
    assert convert(training_file, target, '--ema') == 0
    made = fileio.read(target)
    assert made['meta']['source']['weights'] == 'average'
    assert torch.equal(made['state_dict']['level_embed'], official['transformer.level_embed'] + 1)


@pytest.mark.parametrize('fault', FAULTS)
def test_a_wrong_file_is_not_converted(official, short_arch, fault, tmp_path, capsys):
    change, message = FAULTS[fault]
    path, target = tmp_path / 'wrong.pth', tmp_path / 'target.pth'
    torch.save({'model': change(official)}, path)
    assert convert(path, target) != 0
    assert re.search(message, capsys.readouterr().err)
    assert not target.exists()


def test_a_detector_is_no_classifier(training_file, short_arch, tmp_path, capsys):
    assert convert(training_file, tmp_path / 'x.pth', '--head') != 0
    assert 'leave --head out' in capsys.readouterr().err


def test_without_the_other_rows_the_backbone_alone_goes_back(
    training_file, short_arch, tmp_path, capsys
):
    native, back = tmp_path / 'native.pth', tmp_path / 'back.pth'
    assert convert(training_file, native) == 0
    made = fileio.read(native)
    del made[UNUSED]
    torch.save(made, native)
    assert convert(native, back, '--to-official') == 0
    said = capsys.readouterr().out
    assert 'left out that the published network lacks (norm1.weight, …)' in said
    assert 'outside the backbone left out' in said
    assert not any('transformer' in name for name in fileio.read(back)['state_dict'])


# --- norms of maps --------------------------------------------------------------------------------


def test_norms_of_a_file_are_loaded_where_the_backbone_has_such():
    arch = tiny(carriers=False)
    state = {
        re.sub(r'^norm\.', 'norm3.', name): value
        for name, value in hat_mm.FasterViT(arch).state_dict().items()
    }
    official, _ = hat_mm.FasterViT.name_map.to_official(
        {name: value for name, value in state.items() if not name.startswith('norm')}
    )
    dims = {f'norm{i}': 4 * 2**i for i in (1, 2, 3)}
    norms = {
        f'{norm}.{part}': fill(f'{norm}.{part}', (dim,))
        for norm, dim in dims.items()
        for part in ('weight', 'bias', 'running_mean', 'running_var')
    }
    backbone = hat_mm.FasterViT(arch, out_indices=(0, 1, 2))
    backbone.load_state_dict({**official, **norms})
    for name in ('norm1.running_mean', 'norm2.weight'):
        assert torch.equal(backbone.state_dict()[name], norms[name])
    assert torch.equal(backbone.norm0.weight, torch.ones(4))

    other = hat_mm.FasterViT(arch, out_norm_cfg=dict(type='hat_mm.LayerNorm2d'))
    other.load_state_dict({**official, **norms})
    assert torch.equal(other.norm1.weight, torch.ones(8))

    with pytest.raises(ValueError, match=r'1 missing \(norm1.bias\)'):
        backbone.load_state_dict(without({**official, **norms}, 'norm1.bias'))
