"""Every shipped config builds what its name says, and nothing of what it replaces is left over."""

import ast
import copy
import fnmatch
import functools
import importlib
import importlib.util
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import check_configs
import make_configs
import pytest
import shapes as toy
import torch
import yaml
from mmdet.models import ResNet
from mmdet.registry import DATASETS
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DefaultScope

import hat_mm
from hat_mm.engine.build import build_model
from hat_mm.weights.official import official_file

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / 'configs'
LEAVES = sorted(p for p in CONFIGS.rglob('*.py') if '_base_' not in p.relative_to(CONFIGS).parts)
TOYS = [path for path in LEAVES if path.parent.name == 'toy']
PAPER_LEAVES = [path for path in LEAVES if path not in TOYS]

FASTERVIT_TOY = CONFIGS / 'toy/mask-rcnn_fastervit-tiny_fpn_shapes.py'
HAT_NET_TOY = CONFIGS / 'toy/mask-rcnn_hat-net-toy_fpn_shapes.py'


# --- what a leaf's name promises ------------------------------------------------------------------

IN1K = [f'fastervit-{i}' for i in range(7)]
IN21K = [f'fastervit-4-21k-{side}' for side in (224, 384, 512, 768)]
HAT_NET = [f'hat-net-{size}' for size in ('tiny', 'small', 'medium', 'large')]
PLUGINS = {'r50-hat': hat_mm.HATPlugin, 'r50-hmhsa': hat_mm.HMHSAPlugin}
SWIN_HAT = [f'swin-hat-{size}' for size in ('tiny', 'small', 'base')]
BACKBONES = {
    'fastervit': hat_mm.FasterViT,
    'hat_net': hat_mm.HATNet,
    'resnet_hat': ResNet,
    'swin_hat': hat_mm.SwinHAT,
}


class Promise(NamedTuple):
    """Settings of leaves; ``None`` means that they have no such setting."""

    toolbox: str
    metric: Any
    images: int  # of a step
    gpus: int
    optimizer: dict[str, Any]
    flat_decay: bool  # whether vectors have the weight decay of matrices
    clip: float | None
    warm_up: tuple[int, float] | None  # length, start factor
    decay: dict[str, Any]
    length: int
    drop_path: float | None = None  # None for that of the arch
    pretrained: bool = True
    undecayed: tuple[str, ...] = ()  # parts of the names of matrices without weight decay
    rounds: int = 1  # how often an epoch takes each image
    data: str = ''  # '' for the usual one of the toolbox
    by_epoch: bool = True


ADAMW = dict(type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05)
PVT = dict(type='AdamW', lr=1e-4, weight_decay=1e-4)
MASKS = ['bbox', 'segm']
STEPS_1X = dict(type='MultiStepLR', milestones=[8, 11], gamma=0.1, begin=0, end=12)
STEPS_3X = dict(type='MultiStepLR', milestones=[27, 33], gamma=0.1, begin=0, end=36)
SWIN_1X = Promise('mmdet', MASKS, 16, 8, ADAMW, False, None, (1000, 1e-3), STEPS_1X, 12)
SWIN_3X = SWIN_1X._replace(decay=STEPS_3X, length=36)
SWIN_TABLES = ('relative_position_bias_table',)
SGD = dict(type='SGD', lr=0.02, momentum=0.9, weight_decay=1e-4)
R50_1X = Promise('mmdet', MASKS, 16, 8, SGD, True, None, (500, 1e-3), STEPS_1X, 12)
R50_3X = R50_1X._replace(decay={**STEPS_1X, 'milestones': [9, 11]}, length=36, rounds=3)
PVT_1X = Promise('mmdet', MASKS, 16, 8, PVT, True, None, (500, 1e-3), STEPS_1X, 12)
DINO = Promise(
    'mmdet', 'bbox', 16, 8, PVT, True, 0.1, None,
    dict(type='MultiStepLR', milestones=[11], gamma=0.1, begin=0, end=12), 12, drop_path=0.1,
)  # fmt: skip
UPERNET = Promise(
    'mmseg', ['mIoU'], 16, 8, dict(type='AdamW', lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01),
    False, None, (1500, 1e-6),
    dict(type='PolyLR', power=1.0, eta_min=0.0, begin=1500, end=160_000), 160_000, by_epoch=False,
)  # fmt: skip
SEMANTIC_FPN = Promise(
    'mmseg', ['mIoU'], 16, 4, PVT, True, None, None,
    dict(type='PolyLR', power=0.9, eta_min=0.0, begin=0, end=80_000), 80_000, by_epoch=False,
)  # fmt: skip
MASK2FORMER = Promise(
    'mmdet', MASKS, 16, 8, {**ADAMW, 'eps': 1e-8}, True, 0.01, None,
    dict(type='MultiStepLR', milestones=[327_778, 355_092], gamma=0.1, begin=0, end=368_750),
    368_750, drop_path=0.3, by_epoch=False,
)  # fmt: skip
MASK2FORMER_ADE = MASK2FORMER._replace(
    toolbox='mmseg',
    metric=['mIoU'],
    decay=dict(type='PolyLR', power=0.9, eta_min=0, begin=0, end=160_000),
    length=160_000,
)
MASK2FORMER_CITYSCAPES = MASK2FORMER_ADE._replace(
    gpus=16,
    decay={**MASK2FORMER_ADE.decay, 'end': 90_000},
    length=90_000,
    data='Cityscapes',
)
IMAGENET = Promise(
    'mmpretrain', (1, 5), 4096, 32, {**ADAMW, 'lr': 5e-3}, False, 5.0, (20, 2e-4),
    dict(type='CosineAnnealingLR', eta_min=5e-6, begin=20, end=310), 310, pretrained=False,
)  # fmt: skip
FINE_TUNING = Promise(
    'mmpretrain', (1, 5), 1024, 8, {**ADAMW, 'lr': 4e-5, 'weight_decay': 1e-8}, True, 5.0,
    (5, 1e-2), dict(type='CosineAnnealingLR', eta_min=4e-7, begin=5, end=30), 30,
)  # fmt: skip
HAT_NET_IMAGENET = Promise(
    'mmpretrain', (1, 5), 1024, 8, {**ADAMW, 'lr': 5e-4}, False, None, (5, 2e-3),
    dict(type='CosineAnnealingLR', eta_min=1e-5, begin=5, end=300), 300, pretrained=False,
)  # fmt: skip


def lamb(weight_decay: float) -> Promise:
    optimizer = dict(type='Lamb', lr=5e-3, weight_decay=weight_decay, max_grad_norm=5.0)
    return IMAGENET._replace(optimizer=optimizer)


# Name with * for the backbone -> what each backbone's leaf promises.
NOT_768 = [name for name in (*IN1K, *IN21K, *HAT_NET) if name != 'fastervit-4-21k-768']
ALL = [*IN1K, *IN21K, *HAT_NET]
TO_LARGE = [*IN1K[:5], IN21K[1], *HAT_NET, *SWIN_HAT[:2]]
ONE_OF_EACH_SIZE = [IN1K[0], IN1K[2], IN21K[1], HAT_NET[1], HAT_NET[3], *SWIN_HAT[:2]]
PROMISES: dict[str, dict[str, Promise]] = {
    'mask-rcnn_*_fpn_1x_coco': {
        **dict.fromkeys(IN1K + IN21K, SWIN_1X),
        **dict.fromkeys(HAT_NET, PVT_1X._replace(optimizer={**PVT, 'lr': 2e-4})),
        **dict.fromkeys(PLUGINS, R50_1X),
        **dict.fromkeys(SWIN_HAT[:2], SWIN_1X._replace(drop_path=0.2, undecayed=SWIN_TABLES)),
    },
    'mask-rcnn_*_fpn_ms-crop-3x_coco': dict.fromkeys(ALL, SWIN_3X),
    'cascade-mask-rcnn_*_fpn_ms-3x_coco': dict.fromkeys(PLUGINS, R50_3X),
    'cascade-mask-rcnn_*_fpn_4conv1fc-giou_ms-crop-3x_coco': {
        **dict.fromkeys(ALL, SWIN_3X),
        **dict.fromkeys(SWIN_HAT[:2], SWIN_3X._replace(drop_path=0.2, undecayed=SWIN_TABLES)),
    },
    'retinanet_*_fpn_1x_coco': {
        **dict.fromkeys(IN1K + IN21K, SWIN_1X._replace(metric='bbox')),
        **dict.fromkeys(HAT_NET, PVT_1X._replace(metric='bbox')),
    },
    'dino-4scale_*_8xb2-12e_coco': dict.fromkeys(ALL, DINO),
    'dino-4scale_*_authors_coco': {IN21K[0]: DINO._replace(pretrained=False)},
    'dino-5scale_*_8xb2-12e_coco': dict.fromkeys(ALL, DINO),
    '*_upernet_8xb2-160k_ade20k-512x512': {
        **dict.fromkeys(NOT_768, UPERNET),
        **dict.fromkeys(SWIN_HAT, UPERNET._replace(drop_path=0.3, undecayed=SWIN_TABLES)),
    },
    '*_upernet_8xb2-160k_ade20k-640x640': dict.fromkeys(IN21K, UPERNET),
    '*_fpn_4xb4-80k_ade20k-512x512': dict.fromkeys(NOT_768, SEMANTIC_FPN),
    'mask2former_*_8xb2-lsj-50e_coco': dict.fromkeys([*TO_LARGE, *PLUGINS], MASK2FORMER),
    'mask2former_*_8xb2-lsj-50e_coco-panoptic': dict.fromkeys([*TO_LARGE, *PLUGINS], MASK2FORMER),
    '*_mask2former_8xb2-160k_ade20k-512x512': dict.fromkeys([*TO_LARGE, *PLUGINS], MASK2FORMER_ADE),
    '*_mask2former_16xb1-90k_cityscapes-1024x2048': dict.fromkeys(
        ONE_OF_EACH_SIZE, MASK2FORMER_CITYSCAPES
    ),
    '*_upernet_8xb1-160k_cityscapes-1024x2048': dict.fromkeys(
        ONE_OF_EACH_SIZE, UPERNET._replace(images=8, data='Cityscapes')
    ),
    'mask-rcnn_*_fpn_sample1e-3_ms-1x_lvis-v1': dict.fromkeys(
        ONE_OF_EACH_SIZE, SWIN_1X._replace(data='LVIS v1')
    ),
    '*_32xb128_in1k': {
        **dict.fromkeys(IN1K[:3], IMAGENET),
        'fastervit-3': IMAGENET._replace(
            optimizer={**ADAMW, 'lr': 5e-3, 'weight_decay': 0.075},
            warm_up=(35, 2e-4),
            decay={**IMAGENET.decay, 'begin': 35},
        ),
        'fastervit-4': lamb(0.12),
        'fastervit-5': lamb(0.12),
        'fastervit-6': lamb(0.15),
    },
    '*_8xb128_in1k': {
        IN21K[0]: FINE_TUNING,
        **dict.fromkeys(HAT_NET[:2], HAT_NET_IMAGENET),
        **dict.fromkeys(HAT_NET[2:], HAT_NET_IMAGENET._replace(clip=1.0)),
    },
    '*_32xb32_in1k-384px': {IN21K[1]: FINE_TUNING._replace(gpus=32)},
    '*_64xb16_in1k-512px': {IN21K[2]: FINE_TUNING._replace(gpus=64)},
    '*_128xb8_in1k-768px': {IN21K[3]: FINE_TUNING._replace(gpus=128)},
}
AUTHORS_DINO = 'dino-4scale_fastervit-4-21k-224_authors_coco'
BY_STEM = {
    pattern.replace('*', backbone): (pattern, backbone, promise)
    for pattern, promises in PROMISES.items()
    for backbone, promise in promises.items()
}
TOY_TOOLBOXES = {
    'cascade-mask-rcnn_fastervit-tiny_fpn_shapes': 'mmdet',
    'mask-rcnn_fastervit-tiny_fpn_shapes': 'mmdet',
    'mask-rcnn_hat-net-toy_fpn_shapes': 'mmdet',
    'fastervit-tiny_upernet_shapes': 'mmseg',
    'fastervit-tiny_shapes': 'mmpretrain',
    'mask2former_fastervit-tiny_shapes-panoptic': 'mmdet',
}
RELATION_TOYS = [path for path in TOYS if path.stem.endswith('_relation')]
TOY_TOOLBOXES |= dict.fromkeys(
    (
        f'faster-rcnn_{backbone}_fpn_relation'
        for backbone in (
            *('resnet-toy', 'resnet-hat-toy', 'resnet-hmhsa-toy', 'swin-toy', 'swin-hat-toy'),
            *('fastervit-no-carriers-toy', 'fastervit-toy', 'fastervit-carrier-bias-toy'),
        )
    ),
    'mmdet',
)

of_leaves = pytest.mark.parametrize('path', LEAVES, ids=lambda path: path.stem)
of_toys = pytest.mark.parametrize('path', TOYS, ids=lambda path: path.stem)
of_paper_leaves = pytest.mark.parametrize('path', PAPER_LEAVES, ids=lambda path: path.stem)


def promise_of(path: Path) -> Promise:
    return BY_STEM[path.stem][2]


def toolbox_of(path: Path) -> str:
    return TOY_TOOLBOXES[path.stem] if path in TOYS else promise_of(path).toolbox


@pytest.fixture(autouse=True)
def scope(request):
    """The toolbox of the leaf, as its runner would set it."""
    path = request.node.callspec.params.get('path') if hasattr(request.node, 'callspec') else None
    name = toolbox_of(path) if path else 'mmdet'
    importlib.import_module(f'{name}.utils').register_all_modules(init_default_scope=False)
    with DefaultScope.overwrite_default_scope(name):
        yield


@functools.cache
def load(path: Path) -> Config:
    """A config that all tests share: a test that changes it takes a deep copy."""
    return Config.fromfile(path)


@functools.cache
def on_meta(path: Path) -> torch.nn.Module:
    """The model of a leaf with few blocks, without memory for weights; not to be changed."""
    cfg = copy.deepcopy(load(path))
    if path in PAPER_LEAVES:
        check_configs.shorten(cfg)
    with torch.device('meta'):
        return build_model(cfg)


def backbone_of(path: Path) -> tuple[str, str]:
    """Family and variant of a leaf, such as ``('hat_net', 'tiny')``."""
    family = path.parent.name
    return family, BY_STEM[path.stem][1].removeprefix(f'{family.replace("_", "-")}-')


# --- names and form -------------------------------------------------------------------------------


def test_the_promised_leaves_exist():
    assert {path.stem for path in PAPER_LEAVES} == set(BY_STEM)
    assert {path.stem for path in TOYS} == set(TOY_TOOLBOXES)


def test_stems_are_unique_and_hold_no_dot():
    stems = [path.stem for path in CONFIGS.rglob('*.py')]
    assert len(set(stems)) == len(stems)
    assert not [stem for stem in stems if '.' in stem]


@of_leaves
def test_a_leaf_only_joins(path):
    targets = [ast.unparse(s.targets[0]) for s in ast.parse(path.read_text()).body]
    assert targets[:2] == ['_base_', 'model']
    extra = {
        'fastervit-3_32xb128_in1k': ['optim_wrapper', '(warm_up, decay)', 'param_scheduler'],
        **{f'fastervit-{i}_32xb128_in1k': ['optim_wrapper'] for i in (4, 5, 6)},
        **{f'hat-net-{size}_8xb128_in1k': ['optim_wrapper'] for size in ('medium', 'large')},
        AUTHORS_DINO: ['load_from'],
    }
    assert targets[2:] == extra.get(path.stem, [])


# --- the generator --------------------------------------------------------------------------------


def test_the_files_are_those_of_the_table(capsys):
    assert make_configs.main(['--check']) == 0, capsys.readouterr().err


def test_check_mends_nothing_and_writing_keeps_what_it_does_not_know(tmp_path, monkeypatch, capsys):
    copied = tmp_path / 'configs'
    shutil.copytree(CONFIGS, copied, ignore=shutil.ignore_patterns('__pycache__'))
    shutil.copy(ROOT / 'model-index.yml', tmp_path)
    (tmp_path / 'docs').mkdir()
    shutil.copy(ROOT / 'docs/models.md', tmp_path / 'docs')
    monkeypatch.setattr(make_configs, 'CONFIGS', copied)
    changed, mine = (
        copied / 'fastervit/mask-rcnn_fastervit-0_fpn_1x_coco.py',
        copied / 'hat_net/mine.py',
    )
    original = changed.read_text()
    changed.write_text(original + 'x = 1\n')
    mine.write_text('# mine\n')

    assert make_configs.main(['--check']) == 1
    assert changed.read_text() == original + 'x = 1\n'
    assert capsys.readouterr().err.splitlines() == [
        'configs/hat_net/mine.py: not in the table',
        f'configs/fastervit/{changed.name}: differs from the table',
    ]
    assert make_configs.main([]) == 1  # says that one is unknown
    assert changed.read_text() == original
    assert mine.read_text() == '# mine\n'


COLLECTIONS = {
    'fastervit': 'FasterViT',
    'hat_net': 'HAT-Net',
    'resnet_hat': 'ResNet-HAT',
    'r50-hmhsa': 'ResNet-H-MHSA',
    'swin_hat': 'SwinHAT',
}


@pytest.mark.parametrize('family', BACKBONES)
def test_metafile_describes_every_leaf(family):
    index = yaml.safe_load((CONFIGS / family / 'metafile.yml').read_text())
    leaves = {path.stem: path for path in PAPER_LEAVES if path.parent.name == family}
    # Official files follow, then what the table does not know.
    models = index['Models'][: len(leaves)]
    assert [model['Name'] for model in models] == [
        Path(leaf.path).stem for leaf in make_configs.LEAVES if leaf.path.startswith(family)
    ]
    for model in models:
        path = leaves[model['Name']]
        assert ROOT / model['Config'] == path
        assert model['In Collection'] == COLLECTIONS.get(BY_STEM[path.stem][1], COLLECTIONS[family])
        facts, promise = model['Metadata'], promise_of(path)
        if model['Name'] == AUTHORS_DINO:
            assert facts['Training Data'] == ['ImageNet-21k', 'ImageNet-1k', 'COCO']
        elif 'Weights' not in model:  # otherwise those of the training count
            assert facts['Batch Size'] == promise.images
            assert facts['Epochs' if promise.by_epoch else 'Iterations'] == promise.length
            usual = {'mmdet': 'COCO', 'mmseg': 'ADE20K', 'mmpretrain': 'ImageNet-1k'}
            assert facts['Training Data'] == (promise.data or usual[promise.toolbox])
        assert facts['Published Settings']
        assert facts['Assumed Settings']


# --- what is built --------------------------------------------------------------------------------


def channels_taken(cfg: Config) -> tuple[int, ...]:
    """Channels of the maps that the part behind the backbone expects."""
    model = cfg.model
    if cfg.default_scope == 'mmpretrain':
        return (model.head.in_channels,)
    if 'neck' in model:
        assert model.neck.get('start_level', 0) == 0
        return tuple(model.neck.in_channels)
    if 'auxiliary_head' in model:
        assert model.auxiliary_head.in_channels == model.decode_head.in_channels[2]
    return tuple(model.get('panoptic_head', model.get('decode_head')).in_channels)


def channels_given(backbone: torch.nn.Module) -> tuple[int, ...]:
    """Channels of the maps that a backbone returns."""
    if type(backbone).__name__ == 'ResNet':
        stages = [getattr(backbone, name) for name in backbone.res_layers]
        return tuple(stages[i][-1].conv3.out_channels for i in backbone.out_indices)
    return backbone.out_channels


@of_leaves
def test_builds(path):
    """With the arch of its name, of which few blocks are built."""
    cfg, backbone = load(path), on_meta(path).backbone
    # Every map has a use: another would have parameters without a gradient.
    assert channels_taken(cfg) == channels_given(backbone)
    family = path.parent.name
    if family != 'toy':
        # Each toolbox has a ResNet of its own.
        assert type(backbone).__name__ == BACKBONES[family].__name__
    if family not in ('toy', 'resnet_hat'):
        _, arch = backbone_of(path)
        arch += '-dino' * (path.stem == AUTHORS_DINO)
        assert cfg.model.backbone.arch == arch
        spec = BACKBONES[family].archs[arch]
        assert backbone.spec.drop_path_rate == (promise_of(path).drop_path or spec.drop_path_rate)
        assert backbone.spec.dims == spec.dims


@of_leaves
def test_the_model_names_its_toolbox(path):
    """So that another toolbox, such as mmpretrain's get_model, can build it."""
    assert load(path).model.get('_scope_') == toolbox_of(path)


@pytest.mark.parametrize(
    'path', [p for p in LEAVES if 'resnet' not in str(p)], ids=lambda path: path.stem
)
def test_nothing_of_the_replaced_is_left(path):
    cfg = load(path)
    assert set(cfg.model.backbone) <= {'type', 'arch', 'init_cfg', 'out_indices', 'drop_path_rate'}
    assert cfg.model.get('pretrained') is None
    text = str(cfg.to_dict()).lower()
    assert 'resnet' not in text
    assert "'swintransformer'" not in text  # which is also part of an address
    assert "'sgd'" not in text
    assert 'find_unused_parameters' not in text


@of_paper_leaves
def test_starts_from_the_weights_of_its_backbone(path):
    """Which are those of its arch, tests/test_zoo/test_metafiles.py says."""
    init = load(path).model.backbone.init_cfg
    if not promise_of(path).pretrained:
        assert init is None
    elif path.parent.name == 'resnet_hat':
        assert init == dict(type='Pretrained', checkpoint='torchvision://resnet50')
    else:
        base = load(CONFIGS / f'_base_/backbones/{BY_STEM[path.stem][1]}.py')
        assert init == base.backbone.init_cfg
        assert init.type == 'Pretrained'


# --- settings -------------------------------------------------------------------------------------


@of_paper_leaves
def test_one_optimizer(path):
    cfg, promise = load(path), promise_of(path)
    wrapper = {k: v for k, v in cfg.optim_wrapper.items() if v is not None and k != '_scope_'}
    assert wrapper.pop('type', 'OptimWrapper') == 'OptimWrapper'
    assert wrapper.pop('optimizer') == promise.optimizer
    assert wrapper.pop('clip_grad', {}).get('max_norm') == promise.clip
    paramwise = dict(wrapper.pop('paramwise_cfg', {}))
    if path.stem.startswith('dino'):
        assert paramwise == dict(custom_keys=dict(backbone=dict(lr_mult=0.1)))
    elif 'mask2former' in path.stem:  # what follows from its keys is tested below
        assert set(paramwise) == {'custom_keys', 'norm_decay_mult'}
    else:
        keys = {key: dict(decay_mult=0.0) for key in promise.undecayed}
        assert paramwise.pop('custom_keys', {}) == keys
        assert paramwise == ({} if promise.flat_decay else dict(flat_decay_mult=0.0))
    assert wrapper == {}
    # Where a toolbox's schedule names the optimizer as well, it is the same one.
    optimizer = dict(cfg.get('optimizer', promise.optimizer))
    optimizer.pop('_scope_', None)
    assert optimizer == promise.optimizer


@of_paper_leaves
def test_images_of_a_step(path):
    cfg, promise = load(path), promise_of(path)
    assert cfg.train_dataloader.batch_size * promise.gpus == promise.images
    assert cfg.auto_scale_lr == dict(enable=False, base_batch_size=promise.images)
    named = [part for part in path.stem.replace('_', '-').split('-') if 'xb' in part]
    if named:
        assert named == [f'{promise.gpus}xb{cfg.train_dataloader.batch_size}']


@of_paper_leaves
def test_one_schedule(path):
    cfg, promise = load(path), promise_of(path)
    schedule = cfg.param_scheduler
    *warm_up, decay = [schedule] if isinstance(schedule, dict) else schedule
    for key, value in promise.decay.items():
        assert decay[key] == value, key
    assert len(warm_up) == (promise.warm_up is not None)
    by_epoch = promise.by_epoch
    assert decay.get('by_epoch', True) is by_epoch
    if warm_up:
        [first] = warm_up
        assert first.type == 'LinearLR'
        assert (first.end, first.start_factor) == promise.warm_up
        assert first.begin == 0
        # Counted in epochs on ImageNet, in iterations elsewhere, and changed in each iteration.
        assert first.get('by_epoch', True) is (promise.toolbox == 'mmpretrain')
        assert promise.toolbox != 'mmpretrain' or first.convert_to_iter_based
    loop = cfg.train_cfg
    epochs = (loop.max_epochs if by_epoch else loop.max_iters) * promise.rounds
    assert epochs == promise.length
    dataset = cfg.train_dataloader.dataset
    assert (dataset.times if dataset.type == 'RepeatDataset' else 1) == promise.rounds


@of_paper_leaves
def test_one_evaluator(path):
    cfg, promise = load(path), promise_of(path)
    kind, key = {
        'mmdet': ('CocoMetric', 'metric'),
        'mmseg': ('IoUMetric', 'iou_metrics'),
        'mmpretrain': ('Accuracy', 'topk'),
    }[promise.toolbox]
    for evaluator in (cfg.val_evaluator, cfg.test_evaluator):
        if path.stem.endswith('panoptic'):
            panoptic, evaluator = evaluator
            assert panoptic.type == 'CocoPanopticMetric'
        assert evaluator.type == ('LVISMetric' if 'lvis' in path.stem else kind)
        assert evaluator[key] == promise.metric


@of_paper_leaves
def test_classes_and_sizes(path):
    cfg, model = load(path), load(path).model
    toolbox = toolbox_of(path)
    if toolbox == 'mmseg':
        height, width = map(int, path.stem.rpartition('-')[2].split('x'))
        size = (height, width)
        assert tuple(cfg.crop_size) == tuple(model.data_preprocessor.size) == size
        crops = [step for step in cfg.train_pipeline if step.type == 'RandomCrop']
        assert [tuple(step.crop_size) for step in crops] == [size]
        heads = [model.decode_head, *([model.auxiliary_head] if 'auxiliary_head' in model else [])]
        assert {head.num_classes for head in heads} == {19 if 'cityscapes' in path.stem else 150}
    elif toolbox == 'mmpretrain':
        assert model.head.num_classes == cfg.data_preprocessor.num_classes == 1000
    elif 'panoptic_head' in model:
        head = model.panoptic_head
        stuff = 53 if path.stem.endswith('panoptic') else 0
        assert (head.num_things_classes, head.num_stuff_classes) == (80, stuff)
    else:
        heads = model.roi_head.bbox_head if 'roi_head' in model else model.bbox_head
        for head in heads if isinstance(heads, list) else [heads]:
            assert head.num_classes == (1203 if 'lvis' in path.stem else 80)


# --- the toolboxes' own configs -------------------------------------------------------------------

PARTS = (
    *('model', 'train_dataloader', 'val_dataloader', 'test_dataloader', 'val_evaluator'),
    *('test_evaluator', 'train_cfg', 'val_cfg', 'test_cfg', 'default_hooks', 'custom_hooks'),
    *('data_preprocessor', 'env_cfg', 'visualizer', 'log_processor', 'load_from', 'resume'),
)
CHANNELS = ('model.backbone.', 'model.neck.in_channels', 'head.in_channels')
NO_BACKBONE_INIT = {
    'model.init_cfg': None,
    'model.init_cfg.0.type': ...,
    'model.init_cfg.0.layer': ...,
    'model.init_cfg.0.std': ...,
    'model.init_cfg.0.bias': ...,
    'model.init_cfg.1.type': ...,
    'model.init_cfg.1.layer': ...,
    'model.init_cfg.1.val': ...,
    'model.init_cfg.1.bias': ...,
    'model.head.init_cfg': ...,
    'model.head.init_cfg.type': 'TruncNormal',
    'model.head.init_cfg.layer': 'Linear',
    'model.head.init_cfg.std': 0.02,
    'default_hooks.checkpoint.max_keep_ckpts': 3,
    **{f'{split}_dataloader.batch_size': 128 for split in ('train', 'val', 'test')},
}
SEMANTIC_FPN_80K = {
    'model.pretrained': None,
    'train_cfg.max_iters': 80_000,
    'train_cfg.val_interval': 8000,
    'default_hooks.checkpoint.interval': 8000,
}
WHOLE_IMAGES = {
    'data_preprocessor.size': (1024, 2048),
    'model.data_preprocessor.size': (1024, 2048),
    'train_dataloader.batch_size': 1,
    'train_dataloader.dataset.pipeline.3.crop_size': (1024, 2048),
}
# What a task's leaves have beside the channels that is not in a config of its toolbox: value here,
# or ... where there is none.
ORIGINALS: dict[str, tuple[str, dict[str, Any]]] = {
    'mask-rcnn_*_fpn_1x_coco': ('mmdet/mask_rcnn/mask-rcnn_r50_fpn_1x_coco', {}),
    'mask-rcnn_*_fpn_ms-crop-3x_coco': (
        'mmdet/swin/mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco',
        {},
    ),
    'cascade-mask-rcnn_*_4conv1fc-giou_*': (
        'mmdet/convnext/cascade-mask-rcnn_convnext-t-p4-w7_fpn_4conv1fc-giou_amp-ms-crop-3x_coco',
        {
            f'model.roi_head.bbox_head.{stage}.{key}': value
            for stage in range(3)
            for key, value in {
                'type': 'Shared4Conv1FCBBoxHead',
                'num_shared_convs': ...,
                'num_shared_fcs': ...,
                'conv_out_channels': ...,
            }.items()
        },
    ),
    'retinanet_*': ('mmdet/retinanet/retinanet_r50_fpn_1x_coco', {'model.neck.start_level': 0}),
    'dino-4scale_*12e_coco': ('mmdet/dino/dino-4scale_r50_8xb2-12e_coco', {}),
    AUTHORS_DINO: (
        'mmdet/dino/dino-4scale_r50_8xb2-12e_coco',
        {
            'load_from': official_file('DINO_4scale_faster_vit_4_21k_224_ms_coco.pth').url,
            'model.type': 'hat_mm.FasterViTDINO',
            'model.neck.bias': True,
        },
    ),
    'dino-5scale_*': ('mmdet/dino/dino-5scale_swin-l_8xb2-12e_coco', {}),
    '*_upernet_*512x512': (
        'mmseg/swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512',
        {},
    ),
    '*_upernet_*640x640': (
        'mmseg/beit/beit-base_upernet_8xb2-160k_ade20k-640x640',
        {
            'model.pretrained': None,
            'model.decode_head.channels': 512,
            'model.test_cfg.mode': 'whole',
            'model.test_cfg.crop_size': ...,
            'model.test_cfg.stride': ...,
            'model.neck.type': ...,
            'model.neck.embed_dim': ...,
            'model.neck.rescales': ...,
        },
    ),
    'mask2former_*_coco': (
        'mmdet/mask2former/mask2former_swin-t-p4-w7-224_8xb2-lsj-50e_coco',
        {},
    ),
    'mask2former_*_coco-panoptic': (
        'mmdet/mask2former/mask2former_swin-t-p4-w7-224_8xb2-lsj-50e_coco-panoptic',
        {},
    ),
    '*_mask2former_8xb2-160k_ade20k-512x512': (
        'mmseg/mask2former/mask2former_swin-t_8xb2-160k_ade20k-512x512',
        {},
    ),
    '*_mask2former_16xb1-90k_cityscapes-1024x2048': (
        'mmseg/mask2former/mask2former_swin-t_8xb2-90k_cityscapes-512x1024',
        WHOLE_IMAGES,
    ),
    '*_upernet_8xb1-160k_cityscapes-1024x2048': (
        'mmseg/upernet/upernet_r50_4xb2-80k_cityscapes-512x1024',
        WHOLE_IMAGES
        | {
            'model.pretrained': None,
            'train_cfg.max_iters': 160_000,
            'train_cfg.val_interval': 16_000,
            'default_hooks.checkpoint.interval': 16_000,
        },
    ),
    'mask-rcnn_*_lvis-v1': ('mmdet/lvis/mask-rcnn_r50_fpn_sample1e-3_ms-1x_lvis-v1', {}),
    '*_fpn_4xb4-80k_ade20k-512x512': (
        'mmseg/sem_fpn/fpn_r50_4xb4-160k_ade20k-512x512',
        SEMANTIC_FPN_80K,
    ),
    # The full crop of the others is looked at by itself.
    'fastervit-0_32xb128_in1k': (
        'mmpretrain/swin_transformer/swin-tiny_16xb64_in1k',
        {
            **NO_BACKBONE_INIT,
            'train_cfg.max_epochs': 310,
            'custom_hooks.0.type': 'EMAHook',
            'custom_hooks.0.momentum': 2e-4,
            'custom_hooks.0.priority': 'ABOVE_NORMAL',
        },
    ),
    'hat-net-*_8xb128_in1k': (
        'mmpretrain/swin_transformer/swin-tiny_16xb64_in1k',
        {
            **NO_BACKBONE_INIT,
            'model.neck.type': 'hat_mm.DropoutPooling',
            'model.neck.drop_rate': 0.2,
        },
    ),
}


def flattened(value: Any, key: str = '') -> dict[str, Any]:
    """Settings by dotted name; lists of plain values count as one."""
    if isinstance(value, dict):
        items = [(name, entry) for name, entry in value.items() if name != '_scope_']
    elif isinstance(value, list | tuple) and any(
        isinstance(entry, dict | list | tuple) for entry in value
    ):
        items = list(enumerate(value))
    else:
        return {key: tuple(value) if isinstance(value, list) else value}
    found = {}
    for name, entry in items:
        found |= flattened(entry, f'{key}.{name}' if key else str(name))
    return found


def original(name: str) -> Config:
    """A config of a toolbox, such as ``'mmdet/mask_rcnn/mask-rcnn_r50_fpn_1x_coco'``."""
    toolbox, _, rest = name.partition('/')
    folder = Path(importlib.util.find_spec(toolbox).origin).parent / '.mim/configs'
    return load(folder / f'{rest}.py')


@pytest.mark.parametrize('pattern', ORIGINALS)
def test_all_else_is_the_toolbox_own(pattern):
    name, promised = ORIGINALS[pattern]
    toolbox_own = original(name)
    theirs = flattened({part: toolbox_own[part] for part in PARTS if part in toolbox_own})
    paths = [path for path in PAPER_LEAVES if fnmatch.fnmatch(path.stem, pattern)]
    assert paths
    for path in paths:
        cfg = load(path)
        ours = flattened({part: cfg[part] for part in PARTS if part in cfg})
        found = {
            key: value
            for key, value in differences(theirs, ours).items()
            if not any(word in key for word in CHANNELS)
        }
        assert found == promised, path.stem


def differences(theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """Our flattened settings that are not theirs; ... for those that we do not have."""
    return {
        key: ours.get(key, ...)
        for key in sorted({*theirs, *ours})
        if theirs.get(key, ...) != ours.get(key, ...)
    }


@pytest.mark.parametrize('backbone', PLUGINS)
@pytest.mark.parametrize(
    ('stem', 'name', 'measured'),
    [
        ('mask-rcnn_{}_fpn_1x_coco', 'mask_rcnn/mask-rcnn_r50_fpn_1x_coco', {}),
        (
            'cascade-mask-rcnn_{}_fpn_ms-3x_coco',
            'cascade_rcnn/cascade-mask-rcnn_r50_fpn_ms-3x_coco',
            {f'{split}_evaluator.metric': ('bbox', 'segm') for split in ('test', 'val')},
        ),
    ],
)
def test_plugins_are_the_one_difference(stem, name, measured, backbone):
    """The whole config, optimizer and schedule included, but for what is measured."""
    cfg = load(CONFIGS / f'resnet_hat/{stem.format(backbone)}.py').to_dict()
    theirs = original(f'mmdet/{name}').to_dict()
    assert theirs['model']['backbone']['type'] == 'ResNet'
    assert cfg.pop('backbone') == {'plugins': cfg['model']['backbone']['plugins']}
    found = differences(flattened(theirs), flattened(cfg))
    assert found == {
        'model.backbone.plugins.0.cfg.type': f'hat_mm.{PLUGINS[backbone].__name__}',
        'model.backbone.plugins.0.position': 'after_conv3',
        'model.backbone.plugins.0.stages': (False, False, True, False),
        **measured,
    }


@pytest.mark.parametrize('backbone', PLUGINS)
def test_a_plugin_in_each_block_of_stride_16(backbone):
    network = on_meta(CONFIGS / f'resnet_hat/mask-rcnn_{backbone}_fpn_1x_coco.py').backbone
    found = [n for n, module in network.named_modules() if type(module) is PLUGINS[backbone]]
    assert [name.rpartition('.')[0] for name in found] == [f'layer3.{i}' for i in range(6)]
    plugins = [m for n, m in network.named_modules() if n in found]
    assert {plugin.in_channels for plugin in plugins} == {1024}
    assert all(p.requires_grad for plugin in plugins for p in plugin.parameters())
    own = {name for name, _ in network.named_parameters() if not name.startswith(tuple(found))}
    with torch.device('meta'):
        assert own == {name for name, _ in ResNet(50).named_parameters()}


SWIN_1X_STEM = 'mask-rcnn_{}_fpn_1x_coco'
SWIN_3X_STEM = 'cascade-mask-rcnn_{}_fpn_4conv1fc-giou_ms-crop-3x_coco'
SWIN_UPERNET_STEM = '{}_upernet_8xb2-160k_ade20k-512x512'
MMSEG_SWIN = 'mmseg/swin/swin-{}-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512'


@pytest.mark.parametrize(
    ('size', 'stem', 'name'),
    [
        ('tiny', SWIN_1X_STEM, 'mmdet/swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco'),
        ('tiny', SWIN_3X_STEM, 'mmdet/swin/mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco'),
        ('small', SWIN_3X_STEM, 'mmdet/swin/mask-rcnn_swin-s-p4-w7_fpn_amp-ms-crop-3x_coco'),
        *((size, SWIN_UPERNET_STEM, MMSEG_SWIN.format(size)) for size in ('tiny', 'small', 'base')),
    ],
)
def test_swin_hat_is_trained_as_swin(size, stem, name):
    """The network's sizes, drop path, optimizer and schedule are those of the toolbox's Swin."""
    theirs = original(name)
    ours = load(CONFIGS / f'swin_hat/{stem.format(f"swin-hat-{size}")}.py')
    backbone, swin = ours.model.backbone, theirs.model.backbone
    arch = hat_mm.SwinHAT.archs[backbone.arch]
    assert backbone.arch == size
    assert (arch.embed_dims, *arch.num_heads) == (swin.embed_dims, *swin.num_heads)
    assert list(arch.depths) == list(swin.depths)
    assert set(arch.window_size) == {swin.window_size}
    assert backbone.drop_path_rate == swin.drop_path_rate
    if 'mmdet' in name:  # mmseg names its own files, with the names of tensors changed
        assert backbone.init_cfg == swin.init_cfg
    assert ours.optim_wrapper.optimizer == theirs.optim_wrapper.optimizer
    keys = theirs.optim_wrapper.paramwise_cfg.custom_keys.to_dict()
    # It has no absolute positions, and norms are vectors, none of which has weight decay here.
    assert set(keys) == {'absolute_pos_embed', 'norm', *SWIN_TABLES}
    found = ours.optim_wrapper.paramwise_cfg.custom_keys.to_dict()
    assert found == {key: keys[key] for key in SWIN_TABLES}
    assert flattened(ours.param_scheduler) == flattened(theirs.param_scheduler)


def test_imagenet_training_of_fastervit():
    cfg = load(CONFIGS / 'fastervit/fastervit-2_32xb128_in1k.py')
    steps = {step.type: step for step in cfg.train_pipeline}
    augment = steps['RandAugment']
    assert (augment.policies, augment.num_policies) == ('timm_increasing', 2)
    assert (augment.magnitude_level, augment.magnitude_std) == (9, 0.5)
    assert (steps['RandomErasing'].erase_prob, steps['RandomErasing'].mode) == (0.25, 'rand')
    assert cfg.model.head.loss.label_smooth_val == 0.1
    mixes = [(mix.type, mix.alpha) for mix in cfg.model.train_cfg.augments]
    assert mixes == [('Mixup', 0.8), ('CutMix', 1.0)]
    [average] = cfg.custom_hooks
    assert (average.type, average.momentum) == ('EMAHook', 2e-4)


def test_hat_nets_classifier_drops_channels_before_its_linear_layer():
    neck = on_meta(CONFIGS / 'hat_net/hat-net-tiny_8xb128_in1k.py').neck
    assert neck.dropout.p == 0.2
    neck = hat_mm.DropoutPooling(0.2).eval()
    maps = (torch.rand(2, 5, 3, 4), torch.rand(2, 7, 1, 1))
    vectors = neck(maps)
    assert [v.shape for v in vectors] == [(2, 5), (2, 7)]
    torch.testing.assert_close(vectors[0], maps[0].flatten(2).mean(2))
    torch.testing.assert_close(vectors[1], maps[1].flatten(1))
    assert (neck.train()((torch.ones(1, 1000, 2, 2),))[0] == 0).any()


def test_cascade_heads():
    cfg = load(
        CONFIGS / 'fastervit/cascade-mask-rcnn_fastervit-2_fpn_4conv1fc-giou_ms-crop-3x_coco.py'
    )
    heads = on_meta(
        CONFIGS / 'fastervit/cascade-mask-rcnn_fastervit-2_fpn_4conv1fc-giou_ms-crop-3x_coco.py'
    ).roi_head.bbox_head
    for head, settings, stds in zip(
        heads, cfg.model.roi_head.bbox_head, (0.1, 0.05, 0.033), strict=True
    ):
        assert all(type(conv.norm).__name__ == 'SyncBatchNorm' for conv in head.shared_convs)
        assert len(head.shared_convs) == 4
        assert len(head.shared_fcs) == 1
        assert type(head.loss_bbox).__name__ == 'GIoULoss'
        assert head.loss_bbox.loss_weight == 10
        assert head.reg_decoded_bbox
        assert not head.reg_class_agnostic
        assert settings.bbox_coder.target_stds[0] == stds


@pytest.mark.parametrize(('scales', 'indices'), [(4, (1, 2, 3)), (5, (0, 1, 2, 3))])
def test_dino_levels(scales, indices):
    cfg = load(CONFIGS / f'fastervit/dino-{scales}scale_fastervit-4-21k-224_8xb2-12e_coco.py')
    model = cfg.model
    assert model.backbone.out_indices == indices
    assert model.neck.num_outs == model.get('num_feature_levels', 4) == scales
    assert model.encoder.layer_cfg.self_attn_cfg.num_levels == scales
    assert model.decoder.layer_cfg.cross_attn_cfg.num_levels == scales
    assert (model.num_queries, model.dn_cfg.group_cfg.num_dn_queries) == (900, 100)
    backbone = on_meta(
        CONFIGS / f'fastervit/dino-{scales}scale_fastervit-4-21k-224_8xb2-12e_coco.py'
    ).backbone
    assert all(hasattr(getattr(backbone, f'norm{i}'), 'running_mean') for i in indices)
    assert not backbone.spec.carriers


@pytest.mark.parametrize(
    'path', [p for p in LEAVES if 'mask2former' not in p.stem], ids=lambda path: path.stem
)
def test_weight_decay_and_rate_of_each_parameter(path):
    cfg, model = load(path), on_meta(path)
    groups = build_optim_wrapper(model, cfg.optim_wrapper).optimizer.param_groups
    found = {id(p): (g['lr'], g['weight_decay']) for g in groups for p in g['params']}
    assert len(found) == len(list(model.parameters()))
    rate, full = cfg.optim_wrapper.optimizer.lr, cfg.optim_wrapper.optimizer.weight_decay
    flat = full if path in PAPER_LEAVES and promise_of(path).flat_decay else 0.0
    undecayed = promise_of(path).undecayed if path in PAPER_LEAVES else ()
    names = set()
    for name, parameter in model.named_parameters():
        exempt = [key for key in undecayed if key in name]
        names.update(exempt)
        decay = 0.0 if exempt else flat if parameter.ndim == 1 else full
        slow = path.stem.startswith('dino') and name.startswith('backbone.')
        assert found[id(parameter)] == (rate / 10 if slow else rate, decay), name
    assert names == set(undecayed)


@pytest.mark.parametrize(
    'path',
    [p for p in PAPER_LEAVES if 'mask2former' in p.stem and 'r50' not in p.stem],
    ids=lambda path: path.stem,
)
def test_mask2former_trains_the_backbone_slowly_without_decay_of_norms(path):
    cfg, model = load(path), on_meta(path)
    groups = build_optim_wrapper(model, cfg.optim_wrapper).optimizer.param_groups
    found = {id(p): (g['lr'], g['weight_decay']) for g in groups for p in g['params']}
    exempt = ('query_embed', 'query_feat', 'level_embed', 'bias_table', 'gamma1', 'gamma2')
    for prefix, module in model.named_modules():
        norm = 'norm' in type(module).__name__.lower()
        for name, parameter in module.named_parameters(prefix, recurse=False):
            rate = 1e-5 if name.startswith('backbone.') else 1e-4
            decay = 0.0 if norm or any(key in name for key in exempt) else 0.05
            assert found[id(parameter)] == (pytest.approx(rate), decay), name


# --- a step and a prediction ----------------------------------------------------------------------

# One leaf for each recipe, or config of a toolbox, with a small backbone where there is one.
SMALL = ('fastervit-0', 'hat-net-tiny', 'swin-hat-tiny', *PLUGINS)
STEPPED = {
    leaf.bases[0]: CONFIGS / leaf.path
    for leaf in sorted(make_configs.LEAVES, key=lambda leaf: leaf.backbone in SMALL)
    if leaf.backbone in (*SMALL, 'fastervit-4-21k-224')
}


def test_every_recipe_is_stepped():
    assert set(STEPPED) == {leaf.bases[0] for leaf in make_configs.LEAVES}


LOSSES = {
    'mask-rcnn': {'loss_cls', 'loss_bbox', 'loss_rpn_cls', 'loss_rpn_bbox', 'loss_mask'},
    'cascade-mask-rcnn': {'s0.loss_cls', 's2.loss_bbox', 's2.loss_mask', 'loss_rpn_cls'},
    'retinanet': {'loss_cls', 'loss_bbox'},
    'dino': {'loss_cls', 'loss_iou', 'dn_loss_cls', 'enc_loss_cls', 'd0.loss_bbox'},
    'mask2former': {'loss_cls', 'loss_mask', 'loss_dice'},
    'mmseg': {'decode.loss_ce'},
    'mmpretrain': {'loss'},
}


@pytest.mark.parametrize('path', STEPPED.values(), ids=lambda path: path.stem)
def test_a_step_and_a_prediction(path):
    losses, [prediction] = check_configs.step(copy.deepcopy(load(path)))
    kind = path.stem.partition('_')[0].partition('-4scale')[0].partition('-5scale')[0]
    if '_mask2former_' in path.stem:
        assert {f'decode.{name}' for name in LOSSES['mask2former']} <= set(losses)
    else:
        assert LOSSES[kind if kind in LOSSES else toolbox_of(path)] <= set(losses)
    height, width = check_configs.SIZES[0]
    if path.stem.endswith('panoptic'):
        assert prediction.pred_panoptic_seg.sem_seg.shape == (1, height, width)
    elif toolbox_of(path) == 'mmseg':
        assert prediction.pred_sem_seg.data.shape == (1, height, width)
    elif toolbox_of(path) == 'mmpretrain':
        assert prediction.pred_score.shape == (1000,)
    elif 'mask' in kind:
        assert prediction.pred_instances.masks.shape[1:] == (height, width)
    else:
        assert prediction.pred_instances.bboxes.shape[1] == 4


def test_an_unused_map_is_an_error():
    cfg = copy.deepcopy(load(CONFIGS / 'hat_net/retinanet_hat-net-tiny_fpn_1x_coco.py'))
    cfg.model.backbone.update(out_indices=(0, 1, 2, 3), out_norm_cfg=dict(type='BN'))
    cfg.model.neck.update(in_channels=[48, 96, 240, 384], start_level=1)
    with pytest.raises(ValueError, match=r'parameters without a gradient: .*backbone\.norm0'):
        check_configs.step(cfg)


def test_the_check_says_how_far_a_config_gets(monkeypatch, capsys):
    def step(cfg):
        if cfg.model.backbone.arch == 'large':
            raise ValueError('no step')

    monkeypatch.setattr(check_configs, 'step', step)
    assert check_configs.main(['--only', 'retinanet_hat-net-[ml]*']) == 1
    out = capsys.readouterr().out
    assert 'retinanet_hat-net-medium_fpn_1x_coco.py: parses, builds, steps (' in out
    assert 'retinanet_hat-net-large_fpn_1x_coco.py: parses, builds (' in out
    assert out.endswith('ValueError: no step\n1 of 2 configs pass\n')


# --- the toy config -------------------------------------------------------------------------------


@of_toys
def test_toy_classes_are_those_that_are_drawn(path):
    cfg = load(path)
    background = ('background',) if toolbox_of(path) == 'mmseg' else ()
    drawn = toy.RELATION if path in RELATION_TOYS else toy.EASY
    stuff = toy.STUFF if 'panoptic' in path.stem else ()
    assert tuple(cfg.metainfo.classes) == background + drawn.classes + stuff
    found = {
        module.num_classes
        for module in on_meta(path).modules()
        if hasattr(module, 'num_classes') and not type(module).__name__.startswith('RPN')
    }
    assert found == {len(cfg.metainfo.classes)}


@of_toys
def test_toy_data_and_evaluators(path):
    cfg = load(path)
    layout, metrics = {
        'mmdet': ('instances', ['CocoMetric']),
        'mmseg': ('semantic', ['IoUMetric']),
        'mmpretrain': ('classes', ['Accuracy', 'ConfusionMatrix']),
    }[toolbox_of(path)]
    if path.stem.endswith('panoptic'):
        layout, metrics = 'panoptic', ['hat_mm.PanopticQuality', 'CocoMetric']
    layout = toy.RELATION_SET if path in RELATION_TOYS else toy.LAYOUTS[layout]
    assert Path(cfg.data_root) == Path(layout.folder)
    evaluators = cfg.test_evaluator
    found = evaluators if isinstance(evaluators, list) else [evaluators]
    assert [evaluator.type for evaluator in found] == metrics
    assert cfg.optim_wrapper.optimizer.type == 'AdamW'
    assert [step.type for step in cfg.param_scheduler] == ['LinearLR', 'CosineAnnealingLR']
    assert cfg.auto_scale_lr.base_batch_size == cfg.train_dataloader.batch_size


def training_data(cfg: Config, folder: Path):
    cfg = copy.deepcopy(cfg.train_dataloader.dataset)
    cfg.update(
        data_root=f'{folder}/',
        ann_file='annotations/train.json',
        data_prefix=dict(img='train/'),
        metainfo=dict(classes=toy.EASY.classes),
    )
    return DATASETS.build(cfg)


def sizes_seen(data, rounds: int) -> list[tuple[int, int]]:
    samples = [data[i] for _ in range(rounds) for i in range(len(data))]
    for sample in samples:
        instances = sample['data_samples'].gt_instances
        assert instances.masks.masks.shape[1:] == sample['inputs'].shape[1:]
        assert len(instances.bboxes) == len(instances.masks.masks)
    return [tuple(sample['inputs'].shape[1:]) for sample in samples]


def test_toy_images_differ_in_size_and_are_not_square(shapes):
    sizes = sizes_seen(training_data(load(FASTERVIT_TOY), shapes), 4)
    assert len(set(sizes)) > 6
    assert all(height != width for height, width in sizes)


def test_toy_hat_net_has_whole_and_border_windows(shapes):
    cfg = load(HAT_NET_TOY)
    grids = cfg.model.backbone.arch.grids
    sizes = sizes_seen(training_data(cfg, shapes), 4)
    remainders = [
        {-(-side // 4 // 2**i) % grid for s in sizes for side in s} for i, grid in enumerate(grids)
    ]
    assert 0 in remainders[0]
    assert all(rest - {0} for rest in remainders[:3])


def far_pixel_reaches(arch: dict, sides: tuple[int, int]) -> bool:
    """Whether the last pixel of an image changes the first token of stage 2."""
    torch.manual_seed(0)
    backbone = hat_mm.FasterViT(arch=arch, out_norm_cfg=None).eval().double()
    image = torch.randn(1, 3, *sides, dtype=torch.float64)
    other = image.clone()
    other[..., -1, -1] += 1
    with torch.inference_mode():
        first, second = (backbone(x)[2][..., 0, 0] for x in (image, other))
    return not torch.equal(first, second)


def test_toy_windows_see_each_other_through_carriers_only(shapes):
    cfg = load(FASTERVIT_TOY)
    arch = cfg.model.backbone.arch.to_dict()
    for sides in sizes_seen(training_data(cfg, shapes), 1):
        assert far_pixel_reaches(arch, sides)
        assert not far_pixel_reaches({**arch, 'carriers': False}, sides)
