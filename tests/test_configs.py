"""Every shipped config builds what its name says, and nothing of what it replaces is left over."""

import ast
import copy
import dataclasses
import functools
import importlib
from pathlib import Path
from typing import Any, NamedTuple

import mmdet.registry
import mmseg.registry
import pytest
import torch
from mmdet.registry import DATASETS
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DefaultScope, Registry
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample

import hat_mm
from hat_mm import toy

CONFIGS = Path(__file__).resolve().parents[1] / 'configs'
LEAVES = sorted(p for p in CONFIGS.rglob('*.py') if '_base_' not in p.relative_to(CONFIGS).parts)
TOYS = [path for path in LEAVES if path.parent.name == 'toy']
PAPER_LEAVES = [path for path in LEAVES if path not in TOYS]


FASTERVIT_TOY = CONFIGS / 'toy/mask-rcnn_fastervit-tiny_fpn_shapes.py'
HAT_NET_TOY = CONFIGS / 'toy/mask-rcnn_hat-net-toy_fpn_shapes.py'
EPOCHS = {'1x': (12, [8, 11]), 'ms-crop-3x': (36, [27, 33])}


class Recipe(NamedTuple):
    """What a leaf's name promises beside its backbone."""

    toolbox: str
    archs: tuple[str, ...]
    optimizer: dict[str, Any]
    flat_decay: bool  # whether vectors have the weight decay of matrices
    metrics: list[str]


ADAMW = dict(type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05)
FASTERVIT = ('fastervit-0', 'fastervit-1', 'fastervit-2', 'fastervit-3', 'fastervit-4')
HAT_NET = ('hat-net-tiny', 'hat-net-small', 'hat-net-medium', 'hat-net-large')
PVT = dict(type='AdamW', lr=1e-4, weight_decay=1e-4)

# Name of the leaves with * for the backbone.
RECIPES = {
    'mask-rcnn_*_fpn_1x_coco': [
        Recipe('mmdet', FASTERVIT, ADAMW, False, ['bbox', 'segm']),
        Recipe('mmdet', HAT_NET, {**PVT, 'lr': 2e-4}, True, ['bbox', 'segm']),
    ],
    'mask-rcnn_*_fpn_ms-crop-3x_coco': [Recipe('mmdet', FASTERVIT, ADAMW, False, ['bbox', 'segm'])],
    'retinanet_*_fpn_1x_coco': [Recipe('mmdet', HAT_NET, PVT, True, 'bbox')],
    '*_fpn_4xb4-80k_ade20k-512x512': [Recipe('mmseg', HAT_NET, PVT, True, ['mIoU'])],
}
BY_STEM = {
    name.replace('*', arch): (arch, recipe)
    for name, recipes in RECIPES.items()
    for recipe in recipes
    for arch in recipe.archs
}
WEIGHTS = {
    'fastervit': 'https://huggingface.co/ahatamiz/FasterViT/resolve/main/fastervit_{}_224_1k.pth.tar',
    'hat-net': 'https://github.com/yun-liu/HAT-Net/releases/download/v2.0/HAT-Net_{}.pth',
}
BACKBONES = {'fastervit': hat_mm.FasterViT, 'hat-net': hat_mm.HATNet}
REGISTRIES: dict[str, Registry] = {
    'mmdet': mmdet.registry.MODELS,
    'mmseg': mmseg.registry.MODELS,
}

of_leaves = pytest.mark.parametrize('path', LEAVES, ids=lambda path: path.stem)
of_toys = pytest.mark.parametrize('path', TOYS, ids=lambda path: path.stem)
of_paper_leaves = pytest.mark.parametrize('path', PAPER_LEAVES, ids=lambda path: path.stem)


def toolbox_of(path: Path) -> str:
    return 'mmdet' if path in TOYS else BY_STEM[path.stem][1].toolbox


@pytest.fixture(autouse=True)
def scope(request):
    """The toolbox of the leaf, as its runner would set it."""
    path = request.node.callspec.params.get('path') if hasattr(request.node, 'callspec') else None
    name = toolbox_of(path) if path else 'mmdet'
    importlib.import_module(f'{name}.utils').register_all_modules(init_default_scope=False)
    with DefaultScope.overwrite_default_scope(name):
        yield


@functools.cache
def parsed(path: Path) -> Config:
    return Config.fromfile(str(path))


def load(path: Path) -> Config:
    return copy.deepcopy(parsed(path))


def backbone_of(path: Path) -> tuple[str, str]:
    """Family and variant of a leaf, such as ``('hat-net', 'tiny')``."""
    token = BY_STEM[path.stem][0]
    [family] = [family for family in BACKBONES if token.startswith(f'{family}-')]
    return family, token.removeprefix(f'{family}-')


def build(path: Path, cfg: Config):
    return REGISTRIES[toolbox_of(path)].build(cfg.model)


def statements(path: Path) -> list[ast.stmt]:
    return ast.parse(path.read_text()).body


# --- names and form -------------------------------------------------------------------------------


def test_the_promised_leaves_exist():
    assert {path.stem for path in PAPER_LEAVES} == set(BY_STEM)
    assert {path.stem for path in TOYS} == {
        'mask-rcnn_fastervit-tiny_fpn_shapes',
        'mask-rcnn_hat-net-toy_fpn_shapes',
    }


def test_stems_are_unique_and_hold_no_dot():
    stems = [path.stem for path in CONFIGS.rglob('*.py')]
    assert len(set(stems)) == len(stems)
    assert not [stem for stem in stems if '.' in stem]


@of_paper_leaves
def test_a_leaf_only_joins_a_recipe_and_a_backbone(path):
    assert [ast.unparse(s.targets[0]) for s in statements(path)] == ['_base_', 'model']


# --- what is built --------------------------------------------------------------------------------


@of_leaves
def test_builds_with_its_real_arch(path):
    cfg = load(path)
    cfg.model.backbone.init_cfg = None
    with torch.device('meta'):
        model = build(path, cfg)
    neck = cfg.model.neck
    assert tuple(neck.in_channels) == model.backbone.out_channels
    # Every map has a use: another would have parameters without a gradient.
    assert neck.get('start_level', 0) == 0
    if path in PAPER_LEAVES:
        family, arch = backbone_of(path)
        assert type(model.backbone) is BACKBONES[family]
        assert model.backbone.spec == BACKBONES[family].archs[arch]


@of_leaves
def test_nothing_of_the_resnet_is_left(path):
    cfg = load(path)
    assert set(cfg.model.backbone) <= {'type', 'arch', 'init_cfg', 'out_indices'}
    assert cfg.model.get('pretrained') is None
    assert 'resnet' not in str(cfg.to_dict()).lower()
    assert 'SGD' not in str(cfg.to_dict())


@of_paper_leaves
def test_starts_from_the_weights_of_its_arch(path):
    init = load(path).model.backbone.init_cfg
    assert init.type == 'Pretrained'
    family, arch = backbone_of(path)
    # The one family writes its variants with a capital.
    assert init.checkpoint == WEIGHTS[family].format(arch.title())


def detection_batch(masks: bool) -> dict:
    return demo_mm_inputs(2, [[3, 64, 96], [3, 80, 64]], num_classes=80, with_mask=masks)


def segmentation_batch() -> dict:
    samples = []
    for height, width in ((75, 101), (80, 64)):
        sample = SegDataSample(metainfo=dict(img_shape=(height, width), ori_shape=(height, width)))
        sample.gt_sem_seg = PixelData(data=torch.randint(0, 150, (1, height, width)))
        samples.append(sample)
    inputs = [torch.randint(0, 256, (3, *sample.img_shape)) for sample in samples]
    return dict(inputs=inputs, data_samples=samples)


@of_paper_leaves
def test_loss_and_prediction_with_few_blocks(path):
    cfg = load(path)
    family, arch = backbone_of(path)
    fields = dataclasses.asdict(BACKBONES[family].archs[arch])
    cfg.model.backbone.update(arch={**fields, 'depths': (1, 1, 1, 1)}, init_cfg=None)
    torch.manual_seed(0)
    recipe = BY_STEM[path.stem][1]
    if recipe.toolbox == 'mmseg':
        cfg.model.data_preprocessor.size = (96, 128)  # in place of crops of 512 pixels
        model = revert_sync_batchnorm(build(path, cfg))
        batch, wanted = segmentation_batch(), {'decode.loss_ce'}
    else:
        if 'rpn' in cfg.model.test_cfg:
            cfg.model.test_cfg.rpn.max_per_img = 20
            cfg.model.test_cfg.rcnn.max_per_img = 5
        masks = 'segm' in recipe.metrics
        model, batch = build(path, cfg), detection_batch(masks)
        wanted = {'loss_cls', 'loss_bbox'}
        if masks:
            wanted |= {'loss_rpn_cls', 'loss_rpn_bbox', 'loss_mask'}
    train_batch = model.data_preprocessor(batch, training=True)
    losses = model(**train_batch, mode='loss')
    assert wanted <= set(losses)
    total, _ = model.parse_losses(losses)
    assert torch.isfinite(total)
    total.backward()
    unused = [name for name, p in model.backbone.named_parameters() if p.grad is None]
    assert not unused
    model.eval()
    if recipe.toolbox == 'mmseg':  # one image at a time, of any size
        batch = {key: value[:1] for key, value in segmentation_batch().items()}
    test_batch = model.data_preprocessor(batch, training=False)
    with torch.no_grad():
        predictions = model(**test_batch, mode='predict')
    for sample in predictions:
        if recipe.toolbox == 'mmseg':
            assert sample.pred_sem_seg.data.shape[1:] == tuple(sample.ori_shape)
        elif 'segm' in recipe.metrics:
            assert sample.pred_instances.masks.shape[1:] == tuple(sample.ori_shape)
        else:
            assert sample.pred_instances.bboxes.shape[1] == 4


# --- recipes --------------------------------------------------------------------------------------


@of_paper_leaves
def test_optimizer_and_metric(path):
    cfg, recipe = load(path), BY_STEM[path.stem][1]
    wrapper = {key for key, value in cfg.optim_wrapper.items() if value is not None} - {'_scope_'}
    assert wrapper == {'type', 'optimizer'} | (set() if recipe.flat_decay else {'paramwise_cfg'})
    assert cfg.optim_wrapper.optimizer == recipe.optimizer
    assert cfg.train_dataloader.batch_size * (4 if recipe.toolbox == 'mmseg' else 8) == 16
    assert cfg.auto_scale_lr == dict(enable=False, base_batch_size=16)
    metric = {'mmdet': ('CocoMetric', 'metric'), 'mmseg': ('IoUMetric', 'iou_metrics')}
    kind, key = metric[recipe.toolbox]
    for evaluator in (cfg.val_evaluator, cfg.test_evaluator):
        assert evaluator.type == kind
        assert evaluator[key] == recipe.metrics


@of_paper_leaves
def test_schedule(path):
    cfg, recipe = load(path), BY_STEM[path.stem][1]
    if recipe.toolbox == 'mmseg':
        [decay] = cfg.param_scheduler
        assert (decay.type, decay.power, decay.eta_min, decay.by_epoch) == ('PolyLR', 0.9, 0, False)
        assert cfg.train_cfg.max_iters == decay.end == 80_000
        assert tuple(cfg.crop_size) == tuple(cfg.model.data_preprocessor.size) == (512, 512)
        assert cfg.model.decode_head.num_classes == 150
        return
    epochs, milestones = EPOCHS[path.stem.split('_fpn_')[1].removesuffix('_coco')]
    warmup, decay = cfg.param_scheduler
    assert cfg.train_cfg.max_epochs == decay.end == epochs
    assert decay.milestones == milestones
    assert (warmup.type, warmup.by_epoch, warmup.begin) == ('LinearLR', False, 0)
    assert warmup.end == (500 if recipe.flat_decay else 1000)
    head = cfg.model.get('bbox_head') or cfg.model.roi_head.bbox_head
    assert head.num_classes == 80


@of_leaves
def test_weight_decay(path):
    cfg = load(path)
    cfg.model.backbone.init_cfg = None
    with torch.device('meta'):
        model = build(path, cfg)
        groups = build_optim_wrapper(model, cfg.optim_wrapper).optimizer.param_groups
    decays = {id(p): group['weight_decay'] for group in groups for p in group['params']}
    assert len(decays) == len(list(model.parameters()))
    full = cfg.optim_wrapper.optimizer.weight_decay
    flat = full if path in PAPER_LEAVES and BY_STEM[path.stem][1].flat_decay else 0.0
    for name, parameter in model.named_parameters():
        assert decays[id(parameter)] == (flat if parameter.ndim == 1 else full), name


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


@of_toys
def test_toy_classes_are_those_that_are_drawn(path):
    cfg = load(path)
    assert tuple(cfg.metainfo.classes) == toy.EASY.classes
    heads = cfg.model.roi_head
    assert heads.bbox_head.num_classes == heads.mask_head.num_classes == len(toy.EASY.classes)


def test_toy_images_differ_in_size_and_are_not_square(shapes):
    sizes = sizes_seen(training_data(load(FASTERVIT_TOY), shapes), 4)
    assert len(set(sizes)) > 6
    assert all(height != width for height, width in sizes)


def test_toy_stage_2_has_several_windows_on_each_axis(shapes):
    cfg = load(FASTERVIT_TOY)
    arch = cfg.model.backbone.arch
    windows = arch.window_size if isinstance(arch.window_size, int) else arch.window_size[2]
    assert 2 in arch.carriers
    for sides in sizes_seen(training_data(cfg, shapes), 4):
        assert min(sides) // 16 > windows


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
