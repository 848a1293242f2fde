"""A backbone of hat_mm in the place of another, in configs of every kind of consumer."""

import copy
import functools
import math
from pathlib import Path

import pytest
import swap_backbone
import torch
from mmengine.config import Config

import hat_mm
from hat_mm.engine import cli
from hat_mm.engine.build import build_model
from hat_mm.engine.cli import UserError
from hat_mm.engine.edits import base_of, find, write
from hat_mm.engine.maps import check_maps, check_model
from hat_mm.engine.swap import plan_swap

ROOT = Path(__file__).resolve().parents[2]
ALL = [64, 128, 256, 512]  # channels of FasterViT-0
POOL = dict(type='GlobalAveragePooling')
IMAGENET = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375])


def caffe(path):
    """The edits that a config needs whose pictures were normalized for Caffe's weights."""
    return {f'{path}.{k}': v for k, v in IMAGENET.items()} | {f'{path}.bgr_to_rgb': True}


# Config of a toolbox -> stages that are read, other edits of the model.
EDITS = {
    'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py': ((0, 1, 2, 3), {'neck.in_channels': ALL}),
    'mmdet::retinanet/retinanet_r50-caffe_fpn_1x_coco.py': (
        (1, 2, 3),
        {'neck.in_channels': ALL[1:], 'neck.start_level': 0} | caffe('data_preprocessor'),
    ),
    'mmdet::yolo/yolov3_mobilenetv2_8xb24-320-300e_coco.py': (
        (1, 2, 3),
        {'neck.in_channels': ALL[:0:-1]},
    ),
    'mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py': (
        (1, 2, 3),
        {'neck.in_channels': ALL[1:]} | caffe('data_preprocessor'),
    ),
    'mmdet::yolox/yolox_tiny_8xb8-300e_coco.py': (  # on pictures that are not normalized
        (1, 2, 3),
        {'neck.in_channels': ALL[1:]} | caffe('data_preprocessor'),
    ),
    'mmdet::yolof/yolof_r50-c5_8xb8-1x_coco.py': (
        (3,),
        {'neck.in_channels': 512} | caffe('data_preprocessor'),
    ),
    'mmdet::libra_rcnn/libra-faster-rcnn_r50_fpn_1x_coco.py': (
        (0, 1, 2, 3),
        {'neck.0.in_channels': ALL},
    ),
    'mmdet::nas_fcos/nas-fcos_r50-caffe_fpn_fcoshead-gn-head_4xb4-1x_coco.py': (
        (0, 1, 2, 3),
        {'neck.in_channels': ALL} | caffe('data_preprocessor'),
    ),
    'mmdet::rpn/rpn_r50-caffe-c4_1x_coco.py': (
        (2,),
        {
            'neck': dict(
                _delete_=True,
                type='ChannelMapper',
                in_channels=[256],
                out_channels=1024,
                kernel_size=1,
                num_outs=1,
            )
        }
        | caffe('data_preprocessor'),
    ),
    'mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco.py': (
        (0, 1, 2, 3),
        {'panoptic_head.in_channels': ALL},
    ),
    'mmseg::deeplabv3plus/deeplabv3plus_r50-d8_4xb4-80k_ade20k-512x512.py': (
        (0, 2, 3),
        {
            'pretrained': None,
            'decode_head.in_channels': 512,
            'decode_head.in_index': 2,
            'decode_head.c1_in_channels': 64,
            'auxiliary_head.in_channels': 256,
            'auxiliary_head.in_index': 1,
        },
    ),
    'mmseg::segnext/segnext_mscan-t_1xb16-adamw-160k_ade20k-512x512.py': (
        (1, 2, 3),
        {'decode_head.in_channels': ALL[1:], 'decode_head.in_index': [0, 1, 2]},
    ),
    'mmseg::ocrnet/ocrnet_r101-d8_4xb2-40k_cityscapes-512x1024.py': (
        (3,),
        {
            'pretrained': None,
            'decode_head.0.in_channels': 512,
            'decode_head.0.in_index': 0,
            'decode_head.1.in_channels': 512,
            'decode_head.1.in_index': 0,
        },
    ),
    'mmseg::knet/knet-s3_r50-d8_upernet_8xb2-adamw-80k_ade20k-512x512.py': (
        (0, 1, 2, 3),
        {
            'pretrained': None,
            'decode_head.kernel_generate_head.in_channels': ALL,
            'auxiliary_head.in_channels': 256,
        },
    ),
    'mmseg::encnet/encnet_r50-d8_4xb4-80k_ade20k-512x512.py': (
        (2, 3),
        {
            'pretrained': None,
            'decode_head.in_channels': [512],
            'decode_head.in_index': (1,),
            'auxiliary_head.in_channels': 256,
            'auxiliary_head.in_index': 0,
        },
    ),
    'mmseg::bisenetv1/bisenetv1_r18-d32_4xb4-160k_cityscapes-1024x1024.py': (
        (1, 2, 3),  # its first map is the last one that it makes
        {
            'decode_head.in_channels': 512,
            'decode_head.in_index': 2,
            'auxiliary_head.0.in_index': 0,
            'auxiliary_head.1.in_channels': 256,
            'auxiliary_head.1.in_index': 1,
        },
    ),
    'mmseg::fastfcn/fastfcn_r50-d32_jpu_psp_4xb4-80k_ade20k-512x512.py': (
        (1, 2, 3),
        {'pretrained': None, 'neck.in_channels': tuple(ALL[1:]), 'auxiliary_head.in_channels': 256},
    ),
    'mmseg::vit/vit_vit-b16_mln_upernet_8xb2-80k_ade20k-512x512.py': (
        (0, 1, 2, 3),
        {
            'pretrained': None,
            'neck': None,
            'decode_head.in_channels': ALL,
            'auxiliary_head.in_channels': 512,
        },
    ),
    'mmpretrain::resnet/resnet50_8xb32_in1k.py': ((3,), {'head.in_channels': 512}),
    'mmpretrain::convnext/convnext-tiny_32xb128_in1k.py': (
        (3,),
        {'head.in_channels': 512, 'neck': POOL},
    ),
    'mmpretrain::mlp_mixer/mlp-mixer-base-p16_64xb64_in1k.py': (
        (3,),
        {
            'head.in_channels': 512,
            'neck': dict(_delete_=True, **POOL),
        },
    ),
    'mmpretrain::vgg/vgg11_8xb32_in1k.py': (
        (3,),
        {
            'head': dict(
                _delete_=True,
                type='LinearClsHead',
                num_classes=1000,
                in_channels=512,
                loss=dict(type='CrossEntropyLoss', loss_weight=1.0),
                topk=(1, 5),
            ),
            'neck': dict(_delete_=True, **POOL),
        },
    ),
    'mmpretrain::hrnet/hrnet-w18_4xb32_in1k.py': ((0, 1, 2, 3), {'neck.0.in_channels': tuple(ALL)}),
}


@functools.cache
def read(source: str) -> Config:
    return Config.fromfile(find(source))


@pytest.mark.parametrize('source', EDITS)
def test_the_edits_are_those_that_a_person_would_make(source, tmp_path):
    cfg = read(source)
    before = cfg.to_dict()
    swap = plan_swap(cfg, 'fastervit-0', check=False)
    assert cfg.to_dict() == before
    stages, expected = EDITS[source]
    backbone = swap.edits['model.backbone'].value
    assert backbone['out_indices'] == stages
    assert backbone['init_cfg']['checkpoint'].endswith('fastervit_0_224_1k.pth.tar')
    found = {k.removeprefix('model.'): e.value for k, e in swap.edits.items() if 'model.' in k}
    del found['backbone']
    assert found == expected
    # The file says the same.
    out = tmp_path / 'swapped.py'
    write(out, swap.edits.text(source, swap.notes), swap.cfg)


NESTED = {
    'mmdet::qdtrack/qdtrack_faster-rcnn_r50_fpn_8xb2-4e_mot17halftrain_test-mot17halfval.py': (
        'model.data_preprocessor'
    ),
    'mmdet::soft_teacher/soft-teacher_faster-rcnn_r50-caffe_fpn_180k_semi-0.1-coco.py': (
        'model.data_preprocessor.data_preprocessor'
    ),
}


@pytest.mark.parametrize('source', NESTED)
def test_nested_detectors(source):
    swap = plan_swap(read(source), 'fastervit-0', check=False)
    assert swap.edits['model.detector.neck.in_channels'].value == ALL
    assert swap.cfg.model.detector.backbone.type == 'hat_mm.FasterViT'
    part = swap.cfg
    for key in NESTED[source].split('.'):
        part = part[key]
    assert part.mean == IMAGENET['mean']
    assert part.bgr_to_rgb


# A model of each toolbox and each special way is also built and run.
@pytest.mark.parametrize(
    'source',
    [
        'mmdet::yolox/yolox_tiny_8xb8-300e_coco.py',
        'mmdet::htc/htc_r50_fpn_1x_coco.py',
        'mmdet::ld/ld_r18-gflv1-r101_fpn_1x_coco.py',
        'mmseg::maskformer/maskformer_r50-d32_8xb2-160k_ade20k-512x512.py',
        'mmseg::fastfcn/fastfcn_r50-d32_jpu_psp_4xb4-80k_ade20k-512x512.py',
        'mmpretrain::simclr/simclr_resnet50_16xb256-coslr-200e_in1k.py',
    ],
)
def test_the_new_model_runs(source):
    swap = plan_swap(read(source), 'hat-net-toy')
    assert swap.cfg.model.backbone.type == 'hat_mm.HATNet'
    assert not [note for note in swap.notes if 'strides' in note]
    teacher = [note for note in swap.notes if 'teacher' in note]
    assert bool(teacher) == ('::ld/' in source)


# --- refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('source', 'why'),
    [
        ('mmdet::ssd/ssd300_coco.py', "SSD's extra layers"),
        ('mmdet::cornernet/cornernet_hourglass104_8xb6-210e-mstest_coco.py', 'hourglass'),
        ('mmdet::glip/glip_atss_swin-t_a_fpn_dyhead_pretrain_obj365.py', 'a text model'),
        ('mmseg::pidnet/pidnet-s_2xb6-120k_1024x1024-cityscapes.py', 'three branches of PIDNet'),
        ('mmpretrain::mae/mae_vit-base-p16_8xb512-amp-coslr-300e_in1k.py', 'hides a part'),
        ('mmpretrain::blip/blip-base_8xb32_caption.py', 'BlipCaption has no backbone'),
    ],
)
def test_what_cannot_work_is_refused(source, why):
    with pytest.raises(UserError, match=why):
        plan_swap(read(source), 'fastervit-toy')


def test_a_map_of_stride_64():
    cfg = copy.deepcopy(read('mmdet::yolox/yolox_tiny_8xb8-300e_coco.py'))
    cfg.model.backbone.update(arch='P6', out_indices=(2, 3, 4, 5))
    cfg.model.neck.in_channels = [96, 192, 288, 384]
    with pytest.raises(UserError, match=r'strides 8, 16, 32, 64; those of hat_mm\.FasterViT are 4'):
        plan_swap(cfg, 'fastervit-toy')


def test_a_wrong_in_channels_is_found():
    cfg = plan_swap(read('mmdet::atss/atss_r50_fpn_1x_coco.py'), 'fastervit-toy', check=False).cfg
    cfg.model.neck.in_channels = [1, 2, 3]
    with pytest.raises(UserError, match='the new model fails: RuntimeError'):
        check_model(cfg)


# --- the command ----------------------------------------------------------------------------------

RETINANET = 'mmdet::retinanet/retinanet_r50-caffe_fpn_1x_coco.py'


def swapped(out: Path, *words: str) -> Config:
    swap_backbone.main([RETINANET, 'fastervit-0', '--no-check', '--out', str(out), *words])
    return Config.fromfile(out)


def test_flags(tmp_path):
    plan = functools.partial(plan_swap, read(RETINANET), 'fastervit-0', check=False)
    cfg = plan(keep_preprocessing=True).cfg
    assert not cfg.model.data_preprocessor.bgr_to_rgb
    assert cfg.model.data_preprocessor.mean == [103.530, 116.280, 123.675]
    cfg = plan(pretrained=False).cfg
    assert 'init_cfg' not in cfg.model.backbone
    assert not cfg.model.data_preprocessor.bgr_to_rgb  # nothing asks for other pictures
    rate, name = 'model.backbone.drop_path_rate=0.3', 'work_dir=elsewhere'
    words = ['--transformer-recipe', '--cfg-options', rate, name, 'model.neck.num_outs=4']
    cfg = swapped(tmp_path / 'a.py', *words)
    assert cfg.optim_wrapper.optimizer.type == 'AdamW'
    assert cfg.optim_wrapper.clip_grad.max_norm == 1.0
    assert cfg.optim_wrapper.paramwise_cfg.flat_decay_mult == 0.0
    assert 'momentum' not in cfg.optim_wrapper.optimizer
    assert cfg.model.backbone.drop_path_rate == 0.3
    assert cfg.model.backbone.arch == '0'
    assert cfg.work_dir == 'elsewhere'
    assert cfg.model.neck.num_outs == 4


def test_the_recipe_where_settings_are_none_or_missing():
    source = 'mmseg::deeplabv3plus/deeplabv3plus_r50-d8_4xb4-80k_ade20k-512x512.py'
    plan = functools.partial(plan_swap, transformer_recipe=True, check=False)
    wrapper = plan(read(source), 'fastervit-0').cfg.optim_wrapper
    assert wrapper.clip_grad == dict(max_norm=1.0, norm_type=2)
    assert wrapper.paramwise_cfg == dict(flat_decay_mult=0.0)
    cfg = copy.deepcopy(read(source))
    cfg.optim_wrapper = dict(type='OptimWrapper', paramwise_cfg=None)
    wrapper = plan(cfg, 'fastervit-0').cfg.optim_wrapper
    assert wrapper.optimizer == dict(type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05)
    assert wrapper.paramwise_cfg == dict(flat_decay_mult=0.0)


@pytest.mark.parametrize(
    ('name', 'given', 'value'),
    [
        ('train_pipeline.3.transforms.0.0.scales', '[(96,128)]', [(96, 128)]),
        ('model.train_cfg.foo-bar', '1', 1),
        ('model.train_cfg.class.lambda', '2', 2),
        ('model.train_cfg.items', '3', 3),
        ('model.train_cfg.largest', 'inf', math.inf),
    ],
)
def test_any_option_can_be_written(name, given, value, tmp_path):
    source = 'mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py'
    words = [source, 'fastervit-0', '--no-check', '--out', str(tmp_path / 'a.py')]
    swap_backbone.main([*words, '--cfg-options', f'{name}={given}'])
    found = Config.fromfile(tmp_path / 'a.py')
    for key in name.split('.'):
        found = found[int(key)] if isinstance(found, list) else found[key]
    assert found == value


@pytest.mark.parametrize(
    'option',
    [
        'model.num_queries.first=4',
        'model.backbone.arch.depths=[1,1]',
        'train_pipeline.3.transforms.0.0.scales.0=(96,128)',
    ],
)
def test_options_that_do_not_fit(option, tmp_path):
    out = tmp_path / 'a.py'
    words = ['mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py', 'fastervit-0', '--no-check']
    with pytest.raises(UserError, match='--cfg-options'):
        swap_backbone.main([*words, '--out', str(out), '--cfg-options', option])
    assert not out.exists()


def test_what_is_not_decided_is_said(tmp_path, capsys):
    swapped(tmp_path / 'a.py')
    said = capsys.readouterr().out
    assert 'still SGD with lr=0.01' in said
    assert 'frozen' in said
    assert '# Not decided here: ' in (tmp_path / 'a.py').read_text()


def test_nothing_is_overwritten(tmp_path):
    out = tmp_path / 'a.py'
    out.write_text('mine')
    with pytest.raises(UserError, match='exists'):
        swapped(out)
    assert out.read_text() == 'mine'
    swapped(out, '--force')
    own = tmp_path / 'own.py'
    own.write_text(f'_base_ = [{RETINANET!r}]')
    with pytest.raises(UserError, match='would replace what it inherits from'):
        swap_backbone.main([str(own), 'fastervit-0', '--out', str(own), '--force'])
    assert own.read_text() == f'_base_ = [{RETINANET!r}]'


def test_a_file_that_fails_the_check_is_not_written(tmp_path):
    out = tmp_path / 'a.py'
    words = [RETINANET, 'fastervit-toy', '--out', str(out), '--cfg-options']
    shifted = 'model.bbox_head.anchor_generator.strides=[4,8,16,32,64]'
    with pytest.raises(UserError, match='all are shifted'):
        swap_backbone.main([*words, shifted])
    assert not out.exists()


@pytest.mark.parametrize(
    ('words', 'why'),
    [
        (['mmdet::no/such.py', 'fastervit-0'], 'does not exist'),
        (['mmfoo::no/such.py', 'fastervit-0'], "'mmfoo' in 'mmfoo::no/such.py' is no toolbox"),
        (['mmdet::retinanet', 'fastervit-0'], 'is a folder'),
        ([RETINANET, 'fastervit-7'], "'fastervit-7' is no backbone"),
        ([RETINANET, 'r50-hat'], 'sets no backbone'),
    ],
)
def test_wrong_words(words, why):
    with pytest.raises(UserError, match=why):
        swap_backbone.main(words)


def test_names_of_bases(tmp_path):
    wheel = find(RETINANET)
    assert base_of(str(wheel), tmp_path) == RETINANET
    assert base_of(RETINANET, tmp_path) == RETINANET
    (tmp_path / 'mine.py').write_text(
        f'_base_ = [{RETINANET!r}]\nmodel = dict(neck=dict(num_outs=5))\n'
    )
    out = tmp_path / 'folder/swapped.py'
    swap_backbone.main([str(tmp_path / 'mine.py'), 'fastervit-0', '--no-check', '--out', str(out)])
    assert "_base_ = ['../mine.py']" in out.read_text()
    assert Config.fromfile(out).model.neck.in_channels == ALL[1:]


def test_a_backbone_of_ones_own(tmp_path):
    mine = tmp_path / 'mine.py'
    mine.write_text("backbone = dict(type='hat_mm.FasterViT', arch='1', drop_path_rate=0.1)\n")
    cfg = hat_mm.swap_backbone(read(RETINANET), str(mine), check=False)
    assert cfg.model.backbone.drop_path_rate == 0.1
    assert cfg.model.neck.in_channels == [160, 320, 640]
    mine.write_text("backbone = dict(type='ResNet', depth=50)\n")
    with pytest.raises(UserError, match='sets no backbone'):
        hat_mm.swap_backbone(read(RETINANET), str(mine))
    mine.write_text("backbone = dict(type='hat_mm.FasterViT', arch='9')\n")
    with pytest.raises(UserError, match=r"cannot be built: .*'9'"):
        hat_mm.swap_backbone(read(RETINANET), str(mine))


def test_new_style_configs(tmp_path):
    path = tmp_path / 'new.py'
    path.write_text('from torch.nn import Conv2d\nmodel = dict(backbone=dict(type=Conv2d))\n')
    with pytest.raises(UserError, match='written in the new style'):
        swap_backbone.main([str(path), 'fastervit-0'])


def test_without_a_scope(tmp_path):
    cfg = copy.deepcopy(read(RETINANET))
    cfg.pop('default_scope')
    swap = plan_swap(cfg, 'fastervit-0', check=False)
    assert swap.cfg.default_scope == 'mmdet'
    assert swap.edits['default_scope'].value == 'mmdet'


def test_layer_decay_that_knows_its_own_backbones_only():
    source = 'mmdet::convnext/mask-rcnn_convnext-t-p4-w7_fpn_amp-ms-crop-3x_coco.py'
    wrapper = plan_swap(read(source), 'fastervit-0', check=False).cfg.optim_wrapper
    assert wrapper.constructor == 'hat_mm.LayerDecayOptimWrapperConstructor'
    assert wrapper.paramwise_cfg == dict(layer_decay_rate=0.95, flat_decay_mult=0.0)


def test_necks_of_classifiers():
    cfg = copy.deepcopy(read('mmpretrain::resnet/resnet50_8xb32_in1k.py'))
    cfg.model.neck = [POOL, dict(type='LinearNeck', in_channels=2048, out_channels=99)]
    cfg.model.head.in_channels = 99
    new = plan_swap(cfg, 'fastervit-toy').cfg.model
    assert new.neck[1].in_channels == 256
    assert new.head.in_channels == 99
    linear = cfg.model.neck[1]
    for neck in (dict(linear), [dict(linear)], [dict(POOL, dim=1), dict(linear)]):
        cfg.model.neck = neck
        new = plan_swap(cfg, 'fastervit-toy').cfg.model
        assert [part.type for part in new.neck] == ['GlobalAveragePooling', 'LinearNeck']
        assert 'dim' not in new.neck[0]
        assert new.neck[1].in_channels == 256
        assert new.head.in_channels == 99
    cfg.model.neck = [dict(type='ClsBatchNormNeck', input_features=2048)]
    new = plan_swap(cfg, 'fastervit-toy').cfg.model
    assert [part.type for part in new.neck] == ['GlobalAveragePooling', 'ClsBatchNormNeck']
    assert new.neck[1].input_features == 256
    assert new.head.in_channels == 256


def test_pictures_that_a_pipeline_normalizes():
    cfg = copy.deepcopy(read('mmpretrain::resnet/resnet50_8xb32_in1k.py'))
    cfg.data_preprocessor = dict(num_classes=1000)
    cfg.train_dataloader.dataset.pipeline.append(dict(type='torchvision/Normalize'))
    swap = plan_swap(cfg, 'fastervit-0', check=False)
    assert 'mean' not in swap.cfg.data_preprocessor
    assert any('set outside of data_preprocessor' in note for note in swap.notes)


def test_the_source_stays_as_it_is():
    cfg, mine = read('mmpretrain::vgg/vgg11_8xb32_in1k.py'), dict(type='hat_mm.FasterViT', arch='0')
    before = copy.deepcopy(cfg.to_dict())
    options = {'model.head.loss.loss_weight': 7.0, 'model.backbone.arch': '1'}
    swap = plan_swap(cfg, mine, options=options, check=False)
    assert swap.cfg.model.head.loss.loss_weight == 7.0
    assert cfg.to_dict() == before
    assert mine == dict(type='hat_mm.FasterViT', arch='0')


def test_pictures_of_one_channel():
    swap = plan_swap(read('mmpretrain::lenet/lenet5_mnist.py'), 'fastervit-0', check=False)
    assert swap.cfg.model.backbone.in_channels == 1
    assert 'init_cfg' not in swap.cfg.model.backbone
    assert any('no weights' in note for note in swap.notes)
    cfg = copy.deepcopy(read(RETINANET))
    cfg.model.backbone.in_channels = 4
    swap = plan_swap(cfg, 'fastervit-0', check=False)
    assert swap.cfg.model.backbone.in_channels == 4
    assert any('the pictures have 4' in note for note in swap.notes)


# --- the strides of the maps ----------------------------------------------------------------------


def detector(**changes):
    """RetinaNet with a tiny backbone."""
    cfg = plan_swap(read(RETINANET), 'fastervit-toy', check=False).cfg
    cfg.merge_from_dict(changes)
    return cfg


def test_levels_that_miss_their_anchors():
    assert check_model(detector()) == []
    strides = {'model.bbox_head.anchor_generator.strides': [8, 16, 32, 64, 64]}
    [warning] = check_model(detector(**strides))
    assert 'RetinaNet.bbox_head is made for strides 8, 16, 32, 64, 64, but gets' in warning
    # The README's trap: four maps, of which the first has stride 4.
    four = {
        'model.backbone.out_indices': (0, 1, 2, 3),
        'model.neck.in_channels': [32, 64, 128, 256],
        'model.neck.num_outs': 6,
    }
    with pytest.raises(UserError, match='the last would be dropped'):
        check_model(detector(**four))


def test_a_head_that_reads_some_levels():
    cfg = plan_swap(read('mmseg::sem_fpn/fpn_r50_4xb4-160k_ade20k-512x512.py'), 'fastervit-toy').cfg
    head = cfg.model.decode_head
    head.update(in_index=[1, 2, 3], in_channels=[256] * 3, feature_strides=[8, 16, 32])
    assert check_model(cfg) == []
    head.update(feature_strides=[4, 8, 16])
    with pytest.raises(UserError, match=r'EncoderDecoder\.decode_head.*all are shifted'):
        check_model(cfg)
    cfg.check_maps = False
    assert check_model(cfg) == []


def test_what_cannot_be_checked_is_a_warning():
    class Neck(torch.nn.Module):
        def forward(self, maps):
            return {'map': maps[0]}

    model = build_model(detector())
    model.neck = Neck()
    [warning] = cli.maps_warnings(Config(), model)
    assert 'not checked' in warning
    assert cli.maps_warnings(Config(dict(check_maps=False)), model) == []


def test_the_check_leaves_the_model_as_it_was():
    model = build_model(detector()).train()
    model.backbone.eval()
    state = torch.get_rng_state()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert check_maps(model) == []
    assert torch.equal(torch.get_rng_state(), state)
    assert model.neck.training
    assert not model.backbone.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_the_tools_check(tmp_path, toy_options):
    config = str(ROOT / 'configs/toy/mask-rcnn_hat-net-toy_fpn_shapes.py')
    shifted = 'model.roi_head.bbox_roi_extractor.featmap_strides=[8,16,32,64]'
    words = [config, '--work-dir', str(tmp_path), '--cfg-options', *toy_options, shifted]
    with pytest.raises(UserError, match=r'all are shifted.*check_maps=False turns this check off'):
        cli.train(words)
    cli.train([*words, 'check_maps=False', 'experiment_name=unchecked'])
    with pytest.raises(UserError, match='all are shifted'):
        cli.test([config, str(tmp_path / 'epoch_1.pth'), *words[1:], 'experiment_name=tested'])
