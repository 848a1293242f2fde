"""Writes the config of every pairing of a backbone with a task, from one table.

A leaf joins files of ``configs/_base_``, or a toolbox's own config, with a backbone and says only
what follows from the pair. The metafiles,
the model index, the grid in ``configs/README.md``, the settings and results in each family's
README.md and the models in README.md come from the same table. What a metafile says of trainings
that were measured stays. ``--check`` writes nothing and fails if a file is missing or differs, or
is not in the table.
"""

from __future__ import annotations

import argparse
import re
import runpy
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hat_mm.weights.official import OFFICIAL_FILES, OfficialFile
from hat_mm.zoo import metafiles
from hat_mm.zoo.metafiles import AUTHORS

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'

# --- backbones ------------------------------------------------------------------------------------

IN1K = tuple(f'fastervit-{i}' for i in range(7))
IN21K = tuple(f'fastervit-4-21k-{side}' for side in (224, 384, 512, 768))
FASTERVIT = (*IN1K, *IN21K)
HAT_NET = tuple(f'hat-net-{size}' for size in ('tiny', 'small', 'medium', 'large'))
R50_HAT = ('r50-hat', 'r50-hmhsa')
SWIN_HAT = tuple(f'swin-hat-{size}' for size in ('tiny', 'small', 'base'))


@dataclass(frozen=True)
class Collection:
    """Backbones of one paper.

    Attributes:
        name: Its name.
        backbones: Names of the backbones, files of ``_base_/backbones``.
        paper: Title and address of the paper.
        architecture: What the networks are made of, in the words of model indexes.
    """

    name: str
    backbones: tuple[str, ...]
    paper: tuple[str, str]
    architecture: tuple[str, ...]


@dataclass(frozen=True)
class Family:
    """Backbones of one folder.

    Attributes:
        folder: Folder of the leaves.
        collections: The collections of its metafile.
    """

    folder: str
    collections: tuple[Collection, ...]

    @property
    def backbones(self) -> tuple[str, ...]:
        """Names of the backbones of all collections."""
        return tuple(name for collection in self.collections for name in collection.backbones)


_FASTERVIT_PAPER = (
    'FasterViT: Fast Vision Transformers with Hierarchical Attention',
    'https://arxiv.org/abs/2306.06189',
)
_HAT_NET_PAPER = (
    'Vision Transformers with Hierarchical Attention',
    'https://arxiv.org/abs/2106.03180',
)
_HAT = ('Hierarchical Attention', 'Window Attention', 'Carrier Tokens')
_HMHSA = ('Hierarchical Multi-Head Self-Attention',)

FAMILIES = (
    Family('fastervit', (Collection('FasterViT', FASTERVIT, _FASTERVIT_PAPER, _HAT),)),
    Family(
        'hat_net',
        (Collection('HAT-Net', HAT_NET, _HAT_NET_PAPER, (*_HMHSA, 'Inverted Residual')),),
    ),
    Family(
        'resnet_hat',
        (
            Collection('ResNet-HAT', R50_HAT[:1], _FASTERVIT_PAPER, ('ResNet', *_HAT)),
            Collection('ResNet-H-MHSA', R50_HAT[1:], _HAT_NET_PAPER, ('ResNet', *_HMHSA)),
        ),
    ),
    Family(
        'swin_hat',
        (Collection('SwinHAT', SWIN_HAT, _FASTERVIT_PAPER, ('Swin Transformer', *_HAT)),),
    ),
)

# --- what a leaf tells the model ------------------------------------------------------------------

PLUGINS = """\
model = dict(backbone=_base_.backbone)
"""
FPN = """\
model = dict(backbone=_base_.backbone, neck=dict(in_channels=_base_.channels))
"""
LAST_THREE = """\
model = dict(backbone=_base_.backbone, neck=dict(in_channels=_base_.channels[1:]))
"""
UPERNET = """\
model = dict(
    backbone=_base_.backbone,
    decode_head=dict(in_channels=_base_.channels),
    auxiliary_head=dict(in_channels=_base_.channels[2]),
)
"""
FROM_SCRATCH = """\
model = dict(
    backbone=dict(_base_.backbone, init_cfg=None),
    head=dict(in_channels=_base_.channels[-1]),
)
"""
FINE_TUNED = """\
model = dict(backbone=_base_.backbone, head=dict(in_channels=_base_.channels[-1]))
"""
LONG_WARM_UP = """\
optim_wrapper = dict(optimizer=dict(weight_decay=0.075))
warm_up, decay = _base_.param_scheduler
param_scheduler = [dict(warm_up, end=35), dict(decay, begin=35)]
"""
# Without max_grad_norm, mmpretrain's LAMB would clip at 1.0 by itself.
LAMB = """\
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='Lamb', lr=5e-3, weight_decay={}, max_grad_norm=5.0)
)
"""
CLIPPED = """\
optim_wrapper = dict(clip_grad=dict(max_norm=1.0))
"""

# --- tasks ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """A column of the grid.

    Attributes:
        title: Its head.
        dataset: What is trained on.
        length: Epochs or iterations.
        batch: Images a step.
        metrics: What is measured.
    """

    title: str
    dataset: str
    length: tuple[str, int]
    batch: int
    metrics: tuple[str, ...]


BOX = ('box AP',)
BOX_AND_MASK = ('box AP', 'mask AP')
MIOU = ('mIoU',)
TOP_1 = ('Top 1 Accuracy',)
# First word of a metric -> task in the words of model indexes.
TASK_OF_METRIC = {
    'box': 'Object Detection',
    'mask': 'Instance Segmentation',
    'mIoU': 'Semantic Segmentation',
    'mIoU(ms+flip)': 'Semantic Segmentation',
    'Top': 'Image Classification',
}

MASK_1X = Task('Mask R-CNN 1x', 'COCO', ('Epochs', 12), 16, BOX_AND_MASK)
MASK_3X = Task('Mask R-CNN 3x', 'COCO', ('Epochs', 36), 16, BOX_AND_MASK)
CASCADE = Task('Cascade Mask R-CNN 3x', 'COCO', ('Epochs', 36), 16, BOX_AND_MASK)
RETINANET = Task('RetinaNet 1x', 'COCO', ('Epochs', 12), 16, BOX)
DINO_4 = Task('DINO-4scale 12e', 'COCO', ('Epochs', 12), 16, BOX)
DINO_5 = Task('DINO-5scale 12e', 'COCO', ('Epochs', 12), 16, BOX)
UPERNET_512 = Task('UPerNet 512', 'ADE20K', ('Iterations', 160_000), 16, MIOU)
UPERNET_640 = Task('UPerNet 640', 'ADE20K', ('Iterations', 160_000), 16, MIOU)
SEMANTIC_FPN = Task('Semantic FPN', 'ADE20K', ('Iterations', 80_000), 16, MIOU)
IMAGENET = Task('ImageNet-1K', 'ImageNet-1k', ('Epochs', 310), 4096, TOP_1)
TASKS = (
    MASK_1X, MASK_3X, CASCADE, RETINANET, DINO_4, DINO_5, UPERNET_512, UPERNET_640, SEMANTIC_FPN,
    IMAGENET,
)  # fmt: skip

# --- pairings -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pairing:
    """Leaves that differ in the backbone alone.

    Attributes:
        task: Their column of the grid.
        leaf: Their name, ``{}`` being the backbone.
        bases: Files of ``_base_``, or configs of a toolbox, that they join with the backbone's.
        backbones: The backbones.
        model: What follows ``_base_`` in the leaf.
        published: Settings that the authors publish for this task.
        assumed: Settings that they do not, with the source.
        length: Epochs or iterations, where they are not the task's.
        batch: Images a step, where it is not the task's.
    """

    task: Task
    leaf: str
    bases: tuple[str, ...]
    backbones: tuple[str, ...]
    model: str
    published: str
    assumed: str
    length: tuple[str, int] | None = None
    batch: int | None = None


def _but(names: tuple[str, ...], *left_out: str) -> tuple[str, ...]:
    return tuple(name for name in names if name not in left_out)


CASCADE_OPTIMIZER = 'AdamW, learning rate 1e-4, weight decay 0.05, 16 images a step, 36 epochs'
LIKE_SWIN = (
    'images, warm-up of 1000 iterations, drops of the learning rate: mmdet for Swin; no weight '
    'decay on vectors: our choice; drop path: the classification model'
)
LIKE_CASCADE = f'optimizer: FasterViT in Cascade Mask R-CNN; {LIKE_SWIN}'
NOTHING = 'nothing'
PVT_DETECTION = (
    'that PVT is followed: AdamW, weight decay 1e-4, 16 images a step, 500 iterations of warm-up, '
    '12 epochs with drops after 8 and 11, 1333×800'
)
PVT_DROP_PATH = 'drop path: the classification model'
SAME_AS_21K = 'all: published for FasterViT-4-21K-224 in DINO-4scale'
LIKE_R50 = (
    'all: mmdet for ResNet-50. That plugins are trained like the rest, without clipped gradients: '
    "mmdet for other attention in ResNets (GCNet's, empirical attention)"
)
SWIN_BUT_DECAY = (
    'no weight decay on vectors: our choice; all else, drop path {} included: {} with Swin'
)

_MASK_1X = Pairing(
    MASK_1X, 'mask-rcnn_{}_fpn_1x_coco', ('recipes/mask-rcnn_fpn_1x_coco',),
    FASTERVIT, FPN, NOTHING, LIKE_CASCADE,
)  # fmt: skip
_MASK_3X = Pairing(
    MASK_3X, 'mask-rcnn_{}_fpn_ms-crop-3x_coco', ('recipes/mask-rcnn_fpn_ms-crop-3x_coco',),
    FASTERVIT, FPN, NOTHING, LIKE_CASCADE,
)  # fmt: skip
_CASCADE = Pairing(
    CASCADE, 'cascade-mask-rcnn_{}_fpn_4conv1fc-giou_ms-crop-3x_coco',
    ('recipes/cascade-mask-rcnn_fpn_4conv1fc-giou_ms-crop-3x_coco',),
    FASTERVIT, FPN, CASCADE_OPTIMIZER, f'heads and box loss: mmdet for ConvNeXt; {LIKE_SWIN}',
)  # fmt: skip
_RETINANET = Pairing(
    RETINANET, 'retinanet_{}_fpn_1x_coco', ('recipes/retinanet_fpn_1x_coco',),
    FASTERVIT, LAST_THREE, NOTHING, LIKE_CASCADE,
)  # fmt: skip
_DINO_4 = Pairing(
    DINO_4, 'dino-4scale_{}_8xb2-12e_coco', ('recipes/dino-4scale_8xb2-12e_coco',),
    ('fastervit-4-21k-224',), LAST_THREE,
    'AdamW, learning rate 1e-4 (backbone 1e-5), weight decay 1e-4, gradients clipped at 0.1, '
    'drop after 11 of 12 epochs, 900 queries, 100 denoising queries, short side 480–800 with '
    'crops, drop path 0.1, batch norm on each map',
    NOTHING,
)  # fmt: skip
_DINO_5 = Pairing(
    DINO_5, 'dino-5scale_{}_8xb2-12e_coco', ('recipes/dino-5scale_8xb2-12e_coco',),
    FASTERVIT, FPN, NOTHING, SAME_AS_21K,
)  # fmt: skip
_UPERNET = Pairing(
    UPERNET_512, '{}_upernet_8xb2-160k_ade20k-512x512',
    ('recipes/upernet_8xb2-160k_ade20k-512x512',),
    _but(FASTERVIT, 'fastervit-4-21k-768'), UPERNET,
    'AdamW, learning rate 6e-5, weight decay 0.01, 16 images a step',
    '160,000 iterations, polynomial decay of power 1, 1500 iterations of warm-up: mmseg for Swin; '
    'no weight decay on vectors: our choice; drop path: the classification model',
)  # fmt: skip
_SEMANTIC_FPN = Pairing(
    SEMANTIC_FPN, '{}_fpn_4xb4-80k_ade20k-512x512', ('recipes/fpn_4xb4-80k_ade20k-512x512',),
    _but(FASTERVIT, 'fastervit-4-21k-768'), FPN, NOTHING,
    'all: PVT, with 80,000 iterations of 16 images at 1e-4 for 40,000 of 32 at 2e-4; drop path: '
    'the classification model',
)  # fmt: skip
_IN1K = Pairing(
    IMAGENET, '{}_32xb128_in1k', ('recipes/fastervit_32xb128_in1k', 'datasets/imagenet_224-full'),
    ('fastervit-1', 'fastervit-2'), FROM_SCRATCH,
    '4096 images a step, 310 epochs, cosine from 5e-3 to 5e-6, 20 epochs of warm-up from 1e-6 (35 '
    'for FasterViT-3), AdamW (LAMB from FasterViT-4 on), weight decay 0.05 (3: 0.075, 4 and 5: '
    '0.12, 6: 0.15), RandAugment m9-mstd0.5-inc1, mixup 0.8, cutmix 1.0, erasing 0.25, label '
    'smoothing 0.1, gradients clipped at 5.0, average of the weights 0.9998, test crops',
    'no weight decay on vectors: timm, which the authors use. Their colour jitter of 0.4 is left '
    'out: timm does not apply it beside RandAugment',
)  # fmt: skip
_IN21K = Pairing(
    IMAGENET, '', ('recipes/fastervit-21k_in1k',), (), FINE_TUNED, 'test crops',
    'all of the training, which is our choice: the published backbone with a new head, AdamW, '
    'learning rate 4e-5, weight decay 1e-8, 30 epochs, 5 of them warm-up, 1024 images a step, '
    'random crops and flips, mixup and cutmix, gradients clipped at 5.0',
    ('Epochs', 30), 1024,
)  # fmt: skip
# Images of a GPU fall with the memory that one image takes; the GPUs make up for it.
_IN21K_GPUS = {'224': '8xb128', '384': '32xb32', '512': '64xb16', '768': '128xb8'}
_HAT_NET_IN1K = Pairing(
    IMAGENET, '{}_8xb128_in1k', ('recipes/hat-net_8xb128_in1k', 'datasets/imagenet_224'),
    HAT_NET[:2], FROM_SCRATCH,
    'AdamW, learning rate 5e-4 for 1024 images, weight decay 0.05, 300 epochs, 5 of them warm-up, '
    'drop path 0.1 (tiny, small) and 0.3, dropout 0.2 before the linear layer, gradients clipped '
    'at 1.0 (medium, large)',
    'augmentation, mixup, cutmix, label smoothing: mmpretrain for Swin; cosine to 1e-5, warm-up '
    'from 1e-6, no weight decay on vectors: our choice',
    ('Epochs', 300), 1024,
)  # fmt: skip

_R50_MASK_1X = Pairing(
    MASK_1X, 'mask-rcnn_{}_fpn_1x_coco', ('mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco',),
    R50_HAT, PLUGINS, NOTHING, LIKE_R50,
)  # fmt: skip

PAIRINGS = (
    _MASK_1X,
    replace(
        _MASK_1X, bases=('recipes/mask-rcnn_fpn_pvt-1x_coco',), backbones=HAT_NET,
        published=PVT_DETECTION,
        assumed=f'learning rate 2e-4: PVT, but a sibling paper has 1e-4; {PVT_DROP_PATH}',
    ),
    _R50_MASK_1X,
    replace(
        _MASK_1X, bases=('recipes/mask-rcnn_fpn_swin-1x_coco',), backbones=SWIN_HAT[:2],
        assumed=SWIN_BUT_DECAY.format(0.2, "mmdet's Mask R-CNN"),
    ),
    _MASK_3X,
    replace(_MASK_3X, backbones=HAT_NET, assumed=LIKE_CASCADE),
    _CASCADE,
    replace(_CASCADE, backbones=HAT_NET, published=NOTHING, assumed=LIKE_CASCADE),
    replace(
        _R50_MASK_1X, task=CASCADE, leaf='cascade-mask-rcnn_{}_fpn_ms-3x_coco',
        bases=('recipes/cascade-mask-rcnn_r50_fpn_ms-3x_coco',),
    ),
    replace(
        _CASCADE, bases=('recipes/cascade-mask-rcnn_fpn_4conv1fc-giou_swin-ms-crop-3x_coco',),
        backbones=SWIN_HAT[:2], published=NOTHING,
        assumed='heads and box loss: mmdet for ConvNeXt; '
        + SWIN_BUT_DECAY.format(0.2, "mmdet's Mask R-CNN"),
    ),
    _RETINANET,
    replace(
        _RETINANET, bases=('recipes/retinanet_fpn_pvt-1x_coco',), backbones=HAT_NET,
        published=PVT_DETECTION + ', learning rate 1e-4', assumed=PVT_DROP_PATH,
    ),
    _DINO_4,
    replace(
        _DINO_4, backbones=_but(FASTERVIT, 'fastervit-4-21k-224'), published=NOTHING,
        assumed=SAME_AS_21K,
    ),
    replace(_DINO_4, backbones=HAT_NET, published=NOTHING, assumed=SAME_AS_21K),
    _DINO_5,
    replace(_DINO_5, backbones=HAT_NET),
    _UPERNET,
    replace(_UPERNET, backbones=HAT_NET, published=NOTHING, assumed='all: FasterViT in UPerNet'),
    replace(
        _UPERNET, bases=('recipes/upernet_swin-8xb2-160k_ade20k-512x512',), backbones=SWIN_HAT,
        published=NOTHING, assumed=SWIN_BUT_DECAY.format(0.3, "mmseg's UPerNet"),
    ),
    replace(
        _UPERNET, task=UPERNET_640, leaf='{}_upernet_8xb2-160k_ade20k-640x640',
        bases=('recipes/upernet_8xb2-160k_ade20k-640x640',), backbones=IN21K, published=NOTHING,
        assumed='all: the recipe for crops of 512',
    ),
    _SEMANTIC_FPN,
    replace(
        _SEMANTIC_FPN, backbones=HAT_NET,
        published='that PVT is followed: AdamW, weight decay 1e-4, polynomial decay of power 0.9',
        assumed='80,000 iterations of 16 images at 1e-4 for 40,000 of 32 at 2e-4; '
        + PVT_DROP_PATH,
    ),
    replace(_IN1K, backbones=('fastervit-0',), bases=(_IN1K.bases[0], 'datasets/imagenet_224')),
    _IN1K,
    replace(_IN1K, backbones=('fastervit-3',), model=FROM_SCRATCH + LONG_WARM_UP),
    replace(
        _IN1K, backbones=('fastervit-4', 'fastervit-5'), model=FROM_SCRATCH + LAMB.format(0.12)
    ),
    replace(_IN1K, backbones=('fastervit-6',), model=FROM_SCRATCH + LAMB.format(0.15)),
    *(
        replace(
            _IN21K, backbones=(f'fastervit-4-21k-{side}',),
            leaf=f'{{}}_{gpus}_in1k' + ('' if side == '224' else f'-{side}px'),
            bases=(*_IN21K.bases, f'datasets/imagenet_{side}-squash'),
        )
        for side, gpus in _IN21K_GPUS.items()
    ),
    _HAT_NET_IN1K,
    replace(_HAT_NET_IN1K, backbones=HAT_NET[2:], model=FROM_SCRATCH + CLIPPED),
)  # fmt: skip

LEFT_OUT = (
    'FasterViT-4-21K-768 on crops of 512 pixels: its windows have 48×48 tokens, of which 32×32 '
    'would be image and the rest padding. At 640 pixels it is 40×40.',
    'UPerNet on crops of 640 pixels with weights that were trained at 224 on ImageNet-1K alone: '
    'nobody reports it; the recipe of 512 takes another size by an option.',
)

# --- the files ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Leaf:
    """A config of the grid: its pairing, backbone and path below ``configs``."""

    pairing: Pairing
    backbone: str
    path: str

    @property
    def text(self) -> str:
        """What the file holds."""
        bases = (*self.pairing.bases, f'backbones/{self.backbone}')
        paths = (base if '::' in base else f'../_base_/{base}' for base in bases)
        lines = ''.join(f"    '{path}.py',\n" for path in paths)
        return f'_base_ = [\n{lines}]\n{self.pairing.model}'


def family_of(backbone: str) -> Family:
    """The family that a backbone belongs to."""
    [family] = [family for family in FAMILIES if backbone in family.backbones]
    return family


def collection_of(backbone: str) -> Collection:
    """The collection that a backbone belongs to."""
    collections = family_of(backbone).collections
    [collection] = [each for each in collections if backbone in each.backbones]
    return collection


LEAVES = tuple(
    Leaf(pairing, name, f'{family_of(name).folder}/{pairing.leaf.format(name)}.py')
    for pairing in PAIRINGS
    for name in pairing.backbones
)


# --- results --------------------------------------------------------------------------------------

_AP = ('box AP', 'box AP50', 'box AP75')
_MASK_AP = ('mask AP', 'mask AP50', 'mask AP75')
_MIOU = ('mIoU', 'mIoU(ms+flip)')
_TOP_1_AND_5 = ('Top 1 Accuracy', 'Top 5 Accuracy')


def _reported(metrics: tuple[str, ...], rows: dict[str, tuple]) -> dict[str, dict[str, float]]:
    return {
        backbone: {
            metric: figure
            for metric, figure in zip(metrics, figures, strict=True)
            if figure is not None
        }
        for backbone, figures in rows.items()
    }


# What the authors report, in percent; what is not known is left out. Those of ImageNet are of the
# weights that they publish.
REPORTED = {
    IMAGENET: _reported(_TOP_1_AND_5, {
        'fastervit-0': (82.1, 95.9),
        'fastervit-1': (83.2, 96.5),
        'fastervit-2': (84.2, 96.8),
        'fastervit-3': (84.9, 97.2),
        'fastervit-4': (85.4, 97.3),
        'fastervit-5': (85.6, 97.4),
        'fastervit-6': (85.8, 97.4),
        'fastervit-4-21k-224': (86.6, 97.8),
        'fastervit-4-21k-384': (87.6, 98.3),
        'fastervit-4-21k-512': (87.8, 98.4),
        'fastervit-4-21k-768': (87.9, 98.5),
        'hat-net-tiny': (79.8, None),
        'hat-net-small': (82.6, None),
        'hat-net-medium': (84.0, None),
        'hat-net-large': (84.2, None),
    }),
    CASCADE: _reported(_AP + _MASK_AP, {
        'fastervit-2': (52.1, None, 56.6, 45.4, 68.4, 49.0),
        'fastervit-3': (52.4, 71.1, 56.7, 45.4, 68.7, 49.3),
        'fastervit-4': (52.9, 71.6, 57.7, 45.8, 69.1, 49.8),
    }),
    UPERNET_512: _reported(_MIOU, {
        'fastervit-2': (47.2, 48.4),
        'fastervit-3': (48.7, 49.7),
        'fastervit-4': (49.1, 50.3),
    }),
    DINO_4: _reported(BOX, {'fastervit-4-21k-224': (55.16,)}),
    RETINANET: _reported(_AP, {
        'hat-net-tiny': (42.5, 63.3, 45.8),
        'hat-net-small': (44.8, 65.8, 48.1),
        'hat-net-medium': (45.9, 66.9, 49.2),
        'hat-net-large': (46.3, 67.2, 49.6),
    }),
    MASK_1X: _reported(_AP + _MASK_AP, {
        'hat-net-tiny': (43.1, 65.4, 47.4, 39.7, 62.5, 42.4),
        'hat-net-small': (45.2, 67.6, 49.9, 41.6, 64.6, 44.7),
        'hat-net-medium': (47.0, 69.0, 51.5, 42.7, 66.0, 46.0),
        'hat-net-large': (47.4, 69.3, 52.1, 43.1, 66.5, 46.6),
    }),
    SEMANTIC_FPN: _reported(MIOU, {
        'hat-net-tiny': (43.6,),
        'hat-net-small': (46.6,),
        'hat-net-medium': (49.3,),
        'hat-net-large': (49.5,),
    }),
}  # fmt: skip
# Parameters of the networks with their head of 1000 classes, and billions of MACs for an
# image of the size of the weights: measured, docs/complexity.md.
COUNTS = {
    'fastervit-0': (31_404_840, 3.50),
    'fastervit-1': (53_366_696, 5.51),
    'fastervit-2': (75_923_816, 8.99),
    'fastervit-3': (159_547_944, 18.73),
    'fastervit-4': (365_555_712, 43.27),
    'fastervit-5': (957_520_552, 114.04),
    'fastervit-6': (1_360_328_872, 144.08),
    'fastervit-4-21k-224': (271_944_224, 41.62),
    'fastervit-4-21k-384': (271_944_224, 126.65),
    'fastervit-4-21k-512': (271_944_224, 234.24),
    'fastervit-4-21k-768': (271_944_224, 585.43),
    'hat-net-tiny': (12_650_152, 2.15),
    'hat-net-small': (25_738_568, 4.58),
    'hat-net-medium': (42_925_960, 8.83),
    'hat-net-large': (63_108_936, 12.14),
}
# Parameters of the backbones that are used without a head of classes, counted.
BACKBONE_PARAMETERS = {
    'r50-hat': 37_812_800,
    'r50-hmhsa': 29_433_920,
    'swin-hat-tiny': 34_183_194,
    'swin-hat-small': 67_382_826,
    'swin-hat-base': 118_783_032,
}

# --- metafiles ------------------------------------------------------------------------------------

HEADER = 'Written by tools/dev/make_configs.py, which keeps what it does not know.'
# Facts of one training: the table's until there are weights, that training's from then on.
_OF_A_TRAINING = ('Training Data', 'Epochs', 'Iterations', 'Batch Size')
# Facts that are always the table's.
_SETTINGS = ('Published Settings', 'Assumed Settings')


def _results_of(model: dict[str, Any]) -> list[dict[str, Any]]:
    """The results of an entry, of which a single one needs no list."""
    results = model.get('Results') or []
    return [results] if isinstance(results, dict) else results


def _results(
    task: Task, figures: dict[str, float], old: dict[str, Any] | None
) -> list[dict[str, Any]]:
    """Results with the authors' figures in place of those that were there.

    There is one for each thing that the task measures, even where no figure is known: it says what
    the model is for.
    """
    results: dict[tuple, dict[str, Any]] = {}
    for metric in (*task.metrics, *figures):
        key = (TASK_OF_METRIC[metric.split()[0]], task.dataset)
        results.setdefault(key, {'Task': key[0], 'Dataset': key[1], 'Metrics': {}})
    for result in _results_of(old or {}):
        metrics = result.get('Metrics') or {}
        measured = {k: v for k, v in metrics.items() if not k.endswith(AUTHORS)}
        key = (result.get('Task'), result.get('Dataset'))
        if measured or key in results:
            results.setdefault(key, {**result, 'Metrics': {}})['Metrics'] |= measured
    for metric, figure in figures.items():
        key = (TASK_OF_METRIC[metric.split()[0]], task.dataset)
        results[key]['Metrics'][metric + AUTHORS] = figure
    return list(results.values())


def leaf_entry(leaf: Leaf, old: dict[str, Any] | None) -> dict[str, Any]:
    """The entry of a leaf, with what is known of a training with it."""
    pairing, task = leaf.pairing, leaf.pairing.task
    unit, length = pairing.length or task.length
    training = {
        'Training Data': task.dataset,
        unit: length,
        'Batch Size': pairing.batch or task.batch,
    }
    settings = dict(zip(_SETTINGS, (pairing.published, pairing.assumed), strict=True))
    old = old or {}
    known = {k: v for k, v in (old.get('Metadata') or {}).items() if k not in _SETTINGS}
    if not old.get('Weights'):
        known = training | {k: v for k, v in known.items() if k not in _OF_A_TRAINING}
    # The published weights gave the figures on ImageNet, they are not of a training with the leaf.
    figures = {} if task is IMAGENET else REPORTED.get(task, {}).get(leaf.backbone, {})
    entry = {
        'Name': Path(leaf.path).stem,
        'In Collection': collection_of(leaf.backbone).name,
        'Config': f'configs/{leaf.path}',
        'Metadata': known | settings,
        'Results': _results(task, figures, old),
    }
    return entry | {k: v for k, v in old.items() if k not in entry}


def official_name(file: OfficialFile) -> str:
    """The name of the entry of an official file."""
    side = '' if file.input_size == 224 else f'-{file.input_size}px'
    return f'{file.backbone}_3rdparty_in1k{side}'


def official_entry(file: OfficialFile, old: dict[str, Any] | None) -> dict[str, Any]:
    """The entry of an official file, with what was measured with it."""
    parameters, giga = COUNTS[file.backbone]
    metadata: dict[str, Any] = {
        'Parameters': parameters,
        'FLOPs': round(giga * 1e9),
        'Training Data': file.trained_on[0] if len(file.trained_on) == 1 else [*file.trained_on],
        'Licence': file.licence,
    }
    if file.sha256:
        metadata['SHA256'] = file.sha256
    [config] = [
        leaf.path
        for leaf in LEAVES
        if leaf.backbone == file.backbone and leaf.pairing.task is IMAGENET
    ]
    old = old or {}
    owned = {*metadata, 'SHA256'}
    known = {k: v for k, v in (old.get('Metadata') or {}).items() if k not in owned}
    entry = {
        'Name': official_name(file),
        'In Collection': collection_of(file.backbone).name,
        'Config': f'configs/{config}',
        'Metadata': metadata | known,
        'Results': _results(IMAGENET, REPORTED[IMAGENET][file.backbone], old),
        'Weights': file.url,
        'Converted From': {'Weights': file.url},
    }
    return entry | {k: v for k, v in old.items() if k not in entry}


def metafile(family: Family) -> dict[str, Any]:
    """The metafile of a family, in OpenMMLab's format.

    Args:
        family: Its file is read for what was measured, and for what the table does not know.
    """
    path = CONFIGS / family.folder / 'metafile.yml'
    there = metafiles.load(path) if path.is_file() else {'Collections': [], 'Models': []}
    old = {model.get('Name'): model for model in there['Models']}
    if len(old) < len(there['Models']):
        raise SystemExit(f'{path} has several models of one name')
    entries = [
        leaf_entry(leaf, old.pop(Path(leaf.path).stem, None))
        for leaf in LEAVES
        if family_of(leaf.backbone) is family
    ]
    entries += [
        official_entry(file, old.pop(official_name(file), None))
        for file in OFFICIAL_FILES
        if family_of(file.backbone) is family
    ]
    others = {c.get('Name'): c for c in there['Collections']}
    collections = []
    for collection in family.collections:
        title, url = collection.paper
        facts = {
            'Name': collection.name,
            'Metadata': {'Architecture': [*collection.architecture]},
            'Paper': {'URL': url, 'Title': title},
            'README': 'README.md',  # beside the metafile, where model-index looks for it
        }
        known = others.pop(collection.name, {})
        collections.append(facts | {k: v for k, v in known.items() if k not in facts})
    return there | {
        'Collections': [*collections, *others.values()],
        'Models': [*entries, *old.values()],
    }


def model_index() -> str:
    """The root of the model index, which names the metafiles."""
    return metafiles.text(
        {'Import': [f'configs/{family.folder}/metafile.yml' for family in FAMILIES]}
    )


# --- pages ----------------------------------------------------------------------------------------


def grid() -> str:
    """The grid of backbones and tasks, each cell a link to its config."""
    cells = {(leaf.backbone, leaf.pairing.task): leaf.path for leaf in LEAVES}
    rows = [['backbone', *(task.title for task in TASKS)], ['---'] * (len(TASKS) + 1)]
    for family in FAMILIES:
        for name in family.backbones:
            paths = [cells.get((name, task)) for task in TASKS]
            rows.append([name, *(f'[config]({path})' if path else '' for path in paths)])
    return f'{_table(rows)}\nLeft out:\n\n' + ''.join(f'- {reason}\n' for reason in LEFT_OUT)


def settings(family: Family) -> str:
    """Which settings of a family's configs are published and which are assumed."""
    lines = [
        '| task | backbones | published by the authors | assumed, and where from |',
        '|---|---|---|---|',
    ]
    seen: dict[tuple, list[str]] = {}
    for pairing in PAIRINGS:
        if family_of(pairing.backbones[0]) is family:
            key = (pairing.task.title, pairing.published, pairing.assumed)
            seen.setdefault(key, []).extend(pairing.backbones)
    for (title, published, assumed), names in seen.items():
        short = [name.removeprefix(f'{family.folder.replace("_", "-")}-') for name in names]
        lines.append(f'| {title} | {", ".join(short)} | {published} | {assumed} |')
    return '\n'.join(lines) + '\n'


def _figures(model: dict[str, Any]) -> dict[str, float]:
    """All metrics of an entry."""
    return {
        metric: figure
        for result in _results_of(model)
        for metric, figure in (result.get('Metrics') or {}).items()
    }


def _groups(models: list[dict[str, Any]]) -> Iterator[tuple[str, tuple[str, ...], list[dict]]]:
    """Entries with figures by the title of their task, with what it measures."""
    task_of = {f'configs/{leaf.path}': leaf.pairing.task for leaf in LEAVES}
    for task in (*sorted(TASKS, key=lambda task: task is not IMAGENET), None):
        group = [m for m in models if task_of.get(m.get('Config')) is task and _figures(m)]
        if group:
            title = task.title if task else 'Others'
            if task and task.dataset.lower() not in title.lower():
                title += f', {task.dataset}'
            yield title, task.metrics if task else (), group


def _table(rows: list[list[str]]) -> str:
    return ''.join(f'| {" | ".join(row)} |\n' for row in rows)


# Facts in the tables of results: head, unit, decimals.
_COUNTED = {'Parameters': ('parameters, M', 1e6, 1), 'FLOPs': ('FLOPs, G', 1e9, 2)}


def results(family: Family, models: list[dict[str, Any]]) -> str:
    """A table of each task with figures: the authors', then those measured, with the weights."""
    parts = []
    for title, measured, group in _groups(models):
        known = [metric + AUTHORS for metric in (*_TOP_1_AND_5, *_AP, *_MASK_AP, *_MIOU)]
        found = dict.fromkeys(name for model in group for name in _figures(model))
        names = sorted(found, key=lambda name: known.index(name) if name in known else -1)
        authors = [name for name in names if name.endswith(AUTHORS)]
        ours = [*measured, *(n for n in names if n not in authors and n not in measured)]
        counted = [key for key in _COUNTED if any(key in m.get('Metadata', ()) for m in group)]
        rows = [[title, *(_COUNTED[key][0] for key in counted), *authors, *ours, 'weights']]
        rows.append(['---'] * len(rows[0]))
        for model in group:
            figures, facts = _figures(model), model.get('Metadata', {})
            row = [_link(model['Name'], _beside(family, model.get('Config')))]
            for key in counted:
                _, unit, decimals = _COUNTED[key]
                row.append(f'{facts[key] / unit:.{decimals}f}' if key in facts else '')
            row += [str(figures.get(name, '')) for name in (*authors, *ours)]
            rows.append([*row, _link('file', model['Weights']) if model.get('Weights') else ''])
        parts.append(_table(rows))
    return '\n'.join(parts) or 'No model has been trained with these configs yet.\n'


def _beside(family: Family, config: str | None) -> str | None:
    """A config as its family's page links to it."""
    return config and f'../../{config}'.replace(f'../../configs/{family.folder}/', '')


def _link(text: str, target: str | None) -> str:
    return f'[{text}]({target})' if target else text


def _cells(model: dict[str, Any], metrics: tuple[str, ...]) -> Iterator[str]:
    """What README.md says of an entry: the authors' figures, ours in bold with the weights."""
    figures = _figures(model)
    authors, ours = ([figures.get(metric + end) for metric in metrics] for end in (AUTHORS, ''))
    if None not in authors:
        yield _link(' / '.join(map(str, authors)), model['Config'])
    if None not in ours and model.get('Weights'):
        yield f'**{_link(" / ".join(map(str, ours)), model["Weights"])}**'


def _head(title: str, metrics: tuple[str, ...]) -> str:
    """Head of a task's column."""
    return f'{title}, {" / ".join(metrics).replace("AP / mask", "/ mask")}'


def configs_table(family: Family, models: list[dict[str, Any]]) -> str:
    """The backbones of a family without weights of its own: their configs, and our figures."""
    leaves = {
        (leaf.backbone, leaf.pairing.task): leaf
        for leaf in LEAVES
        if family_of(leaf.backbone) is family
    }
    tasks = [task for task in TASKS if task in {task for _, task in leaves}]
    entry_of = {model['Name']: model for model in models}
    heads = [_head(task.title, task.metrics) for task in tasks]
    rows = [['backbone', 'its parameters, M', *heads]]
    rows.append(['---'] * len(rows[0]))
    for name in family.backbones:
        row = [f'`{name}`', f'{BACKBONE_PARAMETERS[name] / 1e6:.1f}']
        for task in tasks:
            leaf = leaves.get((name, task))
            model = leaf and entry_of[Path(leaf.path).stem]
            parts = [f'[config]({model["Config"]})', *_cells(model, task.metrics)] if model else []
            row.append(', '.join(parts))
        rows.append(row)
    return _table(rows)


def models_table(family: Family, models: list[dict[str, Any]]) -> str:
    """The backbones of a family and the figures of all tasks that have some."""
    if not any(file.backbone in family.backbones for file in OFFICIAL_FILES):
        return configs_table(family, models)
    columns = [
        (title.partition(',')[0], metrics, group)
        for title, metrics, group in _groups(models)
        if metrics
    ]
    heads = [_head(title, metrics) for title, metrics, _ in columns]
    rows = [['arch', 'channels', 'parameters, M', *heads]]
    rows.append(['---'] * len(rows[0]))
    backbone_of = {f'configs/{leaf.path}': leaf.backbone for leaf in LEAVES}
    for file in OFFICIAL_FILES:
        if family_of(file.backbone) is not family:
            continue
        base = runpy.run_path(str(CONFIGS / f'_base_/backbones/{file.backbone}.py'))
        row = [f'`{file.arch}`', ', '.join(map(str, base['channels']))]
        row.append(f'{COUNTS[file.backbone][0] / 1e6:.1f}')
        for _, metrics, group in columns:
            mine = [model for model in group if backbone_of[model['Config']] == file.backbone]
            row.append(', '.join(cell for model in mine for cell in _cells(model, metrics)))
        rows.append(row)
    return _table(rows)


def with_part(text: str, name: str, part: str) -> str:
    """Puts a generated part between its two marks in a page."""
    mark = f'<!-- {name}: tools/dev/make_configs.py -->\n'
    pattern = re.compile(f'{re.escape(mark)}.*?<!-- end of {name} -->\n', re.DOTALL)
    if not pattern.search(text):
        raise SystemExit(f'a page has no marks for its {name}: {mark.strip()}')
    return pattern.sub(lambda _: f'{mark}\n{part}\n<!-- end of {name} -->\n', text)


def files() -> dict[Path, str]:
    """All that is written, by path."""
    wanted = {CONFIGS / leaf.path: leaf.text for leaf in LEAVES}
    wanted[CONFIGS.parent / 'model-index.yml'] = model_index()
    page, front = CONFIGS / 'README.md', CONFIGS.parent / 'README.md'
    wanted[page] = with_part(page.read_text(encoding='utf-8'), 'grid', grid())
    wanted[front] = front.read_text(encoding='utf-8')
    for family in FAMILIES:
        index = metafile(family)
        wanted[CONFIGS / family.folder / 'metafile.yml'] = metafiles.text(index, HEADER)
        page = CONFIGS / family.folder / 'README.md'
        text = with_part(page.read_text(encoding='utf-8'), 'settings', settings(family))
        wanted[page] = with_part(text, 'results', results(family, index['Models']))
        table = models_table(family, index['Models'])
        wanted[front] = with_part(wanted[front], f'models of {family.folder}', table)
    return wanted


def left_over(wanted: dict[Path, str]) -> list[Path]:
    """Configs in the families' folders that the table does not know."""
    found = (path for family in FAMILIES for path in (CONFIGS / family.folder).rglob('*.py'))
    return sorted(set(found) - set(wanted))


def main(argv: list[str] | None = None) -> int:
    """Writes or checks the files; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--check', action='store_true', help='write nothing; fail if files differ')
    args = parser.parse_args(argv)
    status = 0
    wanted = files()
    stale = [
        path
        for path, text in wanted.items()
        if not path.is_file() or path.read_text(encoding='utf-8') != text
    ]
    for path in left_over(wanted):
        print(f'{path.relative_to(CONFIGS.parent)}: not in the table', file=sys.stderr)
        status = 1
    for path in stale:
        if args.check:
            print(f'{path.relative_to(CONFIGS.parent)}: differs from the table', file=sys.stderr)
            status = 1
        else:
            path.write_text(wanted[path], encoding='utf-8')
    print(f'{len(LEAVES)} configs, {len(stale)} files {"differ" if args.check else "written"}')
    return status


if __name__ == '__main__':
    sys.exit(main())
