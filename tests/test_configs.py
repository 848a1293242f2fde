"""Every shipped config builds what its name says, and nothing of what it replaces is left over."""

import ast
import copy
import dataclasses
import functools
from pathlib import Path

import pytest
import torch
from mmdet.registry import DATASETS, MODELS
from mmdet.testing import demo_mm_inputs
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper

import hat_mm
from hat_mm import toy
from hat_mm.backbones.fastervit import FASTERVIT_ARCHS

CONFIGS = Path(__file__).resolve().parents[1] / 'configs'
LEAVES = sorted(p for p in CONFIGS.rglob('*.py') if '_base_' not in p.relative_to(CONFIGS).parts)
COCO_LEAVES = [path for path in LEAVES if path.stem.endswith('_coco')]
TOY = CONFIGS / 'toy/mask-rcnn_fastervit-tiny_fpn_shapes.py'
EPOCHS = {'1x': (12, [8, 11]), 'ms-crop-3x': (36, [27, 33])}

of_leaves = pytest.mark.parametrize('path', LEAVES, ids=lambda path: path.stem)
of_coco_leaves = pytest.mark.parametrize('path', COCO_LEAVES, ids=lambda path: path.stem)


@pytest.fixture(scope='module', autouse=True)
def mmdet_modules():
    register_all_modules()


@functools.cache
def parsed(path: Path) -> Config:
    return Config.fromfile(str(path))


def load(path: Path) -> Config:
    return copy.deepcopy(parsed(path))


def arch_of(path: Path) -> str:
    """The variant in ``mask-rcnn_fastervit-0_fpn_1x_coco``."""
    [token] = [part for part in path.stem.split('_') if part.startswith('fastervit-')]
    return token.removeprefix('fastervit-')


def statements(path: Path) -> list[ast.stmt]:
    return ast.parse(path.read_text()).body


# --- names and form -------------------------------------------------------------------------------


def test_the_promised_leaves_exist():
    promised = {
        f'mask-rcnn_fastervit-{arch}_fpn_{schedule}_coco'
        for arch in range(5)
        for schedule in EPOCHS
    }
    assert {path.stem for path in COCO_LEAVES} == promised
    assert TOY in LEAVES


def test_stems_are_unique_and_hold_no_dot():
    stems = [path.stem for path in CONFIGS.rglob('*.py')]
    assert len(set(stems)) == len(stems)
    assert not [stem for stem in stems if '.' in stem]


@of_coco_leaves
def test_a_leaf_only_joins_a_recipe_and_a_backbone(path):
    assert [ast.unparse(s.targets[0]) for s in statements(path)] == ['_base_', 'model']


# --- what is built --------------------------------------------------------------------------------


@of_leaves
def test_builds_with_its_real_arch(path):
    cfg = load(path).model
    cfg.backbone.init_cfg = None
    with torch.device('meta'):
        model = MODELS.build(cfg)
    assert type(model.backbone) is hat_mm.FasterViT
    assert tuple(cfg.neck.in_channels) == model.backbone.out_channels
    if path in COCO_LEAVES:
        assert model.backbone.spec == FASTERVIT_ARCHS[arch_of(path)]


@of_leaves
def test_nothing_of_the_resnet_is_left(path):
    cfg = load(path)
    assert set(cfg.model.backbone) <= {'type', 'arch', 'init_cfg'}
    assert 'resnet' not in str(cfg.to_dict()).lower()


@of_coco_leaves
def test_starts_from_the_weights_of_its_arch(path):
    init = load(path).model.backbone.init_cfg
    assert init.type == 'Pretrained'
    assert init.checkpoint == (
        'https://huggingface.co/ahatamiz/FasterViT/resolve/main/'
        f'fastervit_{arch_of(path)}_224_1k.pth.tar'
    )


@of_coco_leaves
def test_loss_and_prediction_with_few_blocks(path):
    cfg = load(path).model
    arch = dataclasses.asdict(FASTERVIT_ARCHS[cfg.backbone.arch])
    cfg.backbone.update(arch={**arch, 'depths': (1, 1, 1, 1)}, init_cfg=None)
    cfg.test_cfg.rpn.max_per_img = 20
    cfg.test_cfg.rcnn.max_per_img = 5
    torch.manual_seed(0)
    model = MODELS.build(cfg)
    batch = demo_mm_inputs(2, [[3, 64, 96], [3, 80, 64]], num_classes=80, with_mask=True)
    batch = model.data_preprocessor(batch, training=True)
    losses = model(**batch, mode='loss')
    names = {'loss_rpn_cls', 'loss_rpn_bbox', 'loss_cls', 'loss_bbox', 'loss_mask'}
    assert names <= set(losses)
    total, _ = model.parse_losses(losses)
    assert torch.isfinite(total)
    model.eval()
    with torch.no_grad():
        predictions = model(**batch, mode='predict')
    for sample in predictions:
        assert sample.pred_instances.masks.shape[1:] == tuple(sample.ori_shape)


# --- recipes --------------------------------------------------------------------------------------


@of_coco_leaves
def test_optimiser_schedule_and_metric(path):
    cfg = load(path)
    assert set(cfg.optim_wrapper) == {'type', 'optimizer', 'paramwise_cfg'}
    assert cfg.optim_wrapper.optimizer == dict(
        type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05
    )
    epochs, milestones = EPOCHS[path.stem.split('_fpn_')[1].removesuffix('_coco')]
    warmup, decay = cfg.param_scheduler
    assert cfg.train_cfg.max_epochs == decay.end == epochs
    assert decay.milestones == milestones
    assert (warmup.type, warmup.by_epoch, warmup.begin, warmup.end) == ('LinearLR', False, 0, 1000)
    assert cfg.train_dataloader.batch_size == 2
    assert cfg.auto_scale_lr == dict(enable=False, base_batch_size=16)
    for evaluator in (cfg.val_evaluator, cfg.test_evaluator):
        assert evaluator.type == 'CocoMetric'
        assert evaluator.metric == ['bbox', 'segm']
    assert cfg.model.roi_head.bbox_head.num_classes == 80


@of_leaves
def test_no_weight_decay_on_vectors(path):
    cfg = load(path)
    cfg.model.backbone.init_cfg = None
    with torch.device('meta'):
        model = MODELS.build(cfg.model)
        groups = build_optim_wrapper(model, cfg.optim_wrapper).optimizer.param_groups
    decays = {id(p): group['weight_decay'] for group in groups for p in group['params']}
    assert len(decays) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        assert decays[id(parameter)] == (0.0 if parameter.ndim == 1 else 0.05), name


def training_data(cfg: Config, folder: Path):
    cfg = cfg.train_dataloader.dataset
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


def test_single_scale_images(shapes):
    data = training_data(load(CONFIGS / 'fastervit/mask-rcnn_fastervit-0_fpn_1x_coco.py'), shapes)
    for sides in sizes_seen(data, 1):
        assert min(sides) == 800 or max(sides) == 1333


def test_multi_scale_and_crop_images(shapes):
    path = CONFIGS / 'fastervit/mask-rcnn_fastervit-0_fpn_ms-crop-3x_coco.py'
    sizes = sizes_seen(training_data(load(path), shapes), 4)
    for sides in sizes:
        assert min(sides) in range(480, 801, 32) or max(sides) == 1333
    assert len({min(sides) for sides in sizes}) > 3
    kinds = [step.type for step in load(path).train_pipeline]
    assert kinds == [
        *('LoadImageFromFile', 'LoadAnnotations', 'RandomFlip', 'RandomChoice', 'PackDetInputs'),
    ]
    crops = [[step.type for step in steps] for steps in load(path).train_pipeline[3].transforms]
    assert crops == [
        ['RandomChoiceResize'],
        ['RandomChoiceResize', 'RandomCrop', 'RandomChoiceResize'],
    ]


# --- the toy config -------------------------------------------------------------------------------


def test_toy_classes_are_those_that_are_drawn():
    cfg = load(TOY)
    assert tuple(cfg.metainfo.classes) == toy.EASY.classes
    heads = cfg.model.roi_head
    assert heads.bbox_head.num_classes == heads.mask_head.num_classes == len(toy.EASY.classes)


def test_toy_images_differ_in_size_and_are_not_square(shapes):
    sizes = sizes_seen(training_data(load(TOY), shapes), 4)
    assert len(set(sizes)) > 6
    assert all(height != width for height, width in sizes)


def test_toy_stage_2_has_several_windows_on_each_axis(shapes):
    cfg = load(TOY)
    arch = cfg.model.backbone.arch
    windows = arch.window_size if isinstance(arch.window_size, int) else arch.window_size[2]
    assert 2 in arch.carriers
    for sides in sizes_seen(training_data(cfg, shapes), 4):
        assert min(sides) // 16 > windows


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
    cfg = load(TOY)
    arch = cfg.model.backbone.arch.to_dict()
    for sides in sizes_seen(training_data(cfg, shapes), 1):
        assert far_pixel_reaches(arch, sides)
        assert not far_pixel_reaches({**arch, 'carriers': False}, sides)
