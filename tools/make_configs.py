"""Writes the config of every pairing of a backbone with a task, from one table.

A leaf joins files of ``configs/_base_`` and says only what follows from the pair. The metafiles,
the grid in ``configs/README.md`` and the settings in each family's README.md come from the same
table. ``--check`` writes nothing and fails if a file is missing or differs, or is not in the table.
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path

CONFIGS = Path(__file__).resolve().parents[1] / 'configs'

# --- backbones ------------------------------------------------------------------------------------

IN1K = tuple(f'fastervit-{i}' for i in range(7))
IN21K = tuple(f'fastervit-4-21k-{side}' for side in (224, 384, 512, 768))
FASTERVIT = (*IN1K, *IN21K)
HAT_NET = tuple(f'hat-net-{size}' for size in ('tiny', 'small', 'medium', 'large'))


@dataclass(frozen=True)
class Family:
    """Backbones of one paper.

    Attributes:
        folder: Folder of the leaves.
        name: Name of the collection.
        backbones: Names of the backbones, files of ``_base_/backbones``.
        paper: Title and address of the paper.
        architecture: What the networks are made of, in the words of model indexes.
    """

    folder: str
    name: str
    backbones: tuple[str, ...]
    paper: tuple[str, str]
    architecture: tuple[str, ...]


FAMILIES = (
    Family(
        'fastervit', 'FasterViT', FASTERVIT,
        (
            'FasterViT: Fast Vision Transformers with Hierarchical Attention',
            'https://arxiv.org/abs/2306.06189',
        ),
        ('Hierarchical Attention', 'Window Attention', 'Carrier Tokens'),
    ),
    Family(
        'hat_net', 'HAT-Net', HAT_NET,
        ('Vision Transformers with Hierarchical Attention', 'https://arxiv.org/abs/2106.03180'),
        ('Hierarchical Multi-Head Self-Attention', 'Inverted Residual'),
    ),
)  # fmt: skip

# --- what a leaf tells the model ------------------------------------------------------------------

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
    """

    title: str
    dataset: str
    length: tuple[str, int]
    batch: int


MASK_1X = Task('Mask R-CNN 1x', 'COCO', ('Epochs', 12), 16)
MASK_3X = Task('Mask R-CNN 3x', 'COCO', ('Epochs', 36), 16)
CASCADE = Task('Cascade Mask R-CNN 3x', 'COCO', ('Epochs', 36), 16)
RETINANET = Task('RetinaNet 1x', 'COCO', ('Epochs', 12), 16)
DINO_4 = Task('DINO-4scale 12e', 'COCO', ('Epochs', 12), 16)
DINO_5 = Task('DINO-5scale 12e', 'COCO', ('Epochs', 12), 16)
UPERNET_512 = Task('UPerNet 512', 'ADE20K', ('Iterations', 160_000), 16)
UPERNET_640 = Task('UPerNet 640', 'ADE20K', ('Iterations', 160_000), 16)
SEMANTIC_FPN = Task('Semantic FPN', 'ADE20K', ('Iterations', 80_000), 16)
IMAGENET = Task('ImageNet-1K', 'ImageNet-1K', ('Epochs', 310), 4096)
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
        bases: Files of ``_base_`` that they join with the backbone's.
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

PAIRINGS = (
    _MASK_1X,
    replace(
        _MASK_1X, bases=('recipes/mask-rcnn_fpn_pvt-1x_coco',), backbones=HAT_NET,
        published=PVT_DETECTION,
        assumed=f'learning rate 2e-4: PVT, but a sibling paper has 1e-4; {PVT_DROP_PATH}',
    ),
    _MASK_3X,
    replace(_MASK_3X, backbones=HAT_NET, assumed=LIKE_CASCADE),
    _CASCADE,
    replace(_CASCADE, backbones=HAT_NET, published=NOTHING, assumed=LIKE_CASCADE),
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
        lines = ''.join(f"    '../_base_/{base}.py',\n" for base in bases)
        return f'_base_ = [\n{lines}]\n{self.pairing.model}'


def family_of(backbone: str) -> Family:
    """The family that a backbone belongs to."""
    [family] = [family for family in FAMILIES if backbone in family.backbones]
    return family


LEAVES = tuple(
    Leaf(pairing, name, f'{family_of(name).folder}/{pairing.leaf.format(name)}.py')
    for pairing in PAIRINGS
    for name in pairing.backbones
)


def metafile(family: Family) -> str:
    """The model index of a family, in OpenMMLab's format."""
    title, url = family.paper
    lines = [
        '# Written by tools/make_configs.py.',
        'Collections:',
        f'  - Name: {family.name}',
        '    Metadata:',
        '      Architecture:',
        *(f'        - {part}' for part in family.architecture),
        '    Paper:',
        f'      URL: {url}',
        f"      Title: '{title}'",
        f'    README: configs/{family.folder}/README.md',
        'Models:',
    ]
    for leaf in LEAVES:
        if family_of(leaf.backbone) is not family:
            continue
        pairing, task = leaf.pairing, leaf.pairing.task
        unit, length = pairing.length or task.length
        lines += [
            f'  - Name: {Path(leaf.path).stem}',
            f'    In Collection: {family.name}',
            f'    Config: configs/{leaf.path}',
            '    Metadata:',
            f'      Training Data: {task.dataset}',
            f'      {unit}: {length}',
            f'      Batch Size: {pairing.batch or task.batch}',
            f"      Published Settings: '{pairing.published}'",
            f"      Assumed Settings: '{pairing.assumed}'",
        ]
    return '\n'.join(lines) + '\n'


def grid() -> str:
    """The grid of backbones and tasks, each cell a link to its config."""
    cells = {(leaf.backbone, leaf.pairing.task): leaf.path for leaf in LEAVES}
    rows = [['backbone', *(task.title for task in TASKS)], ['---'] * (len(TASKS) + 1)]
    for family in FAMILIES:
        for name in family.backbones:
            paths = [cells.get((name, task)) for task in TASKS]
            rows.append([name, *(f'[config]({path})' if path else '' for path in paths)])
    lines = [f'| {" | ".join(row)} |' for row in rows]
    return '\n'.join([*lines, '', 'Left out:', '', *(f'- {reason}' for reason in LEFT_OUT)]) + '\n'


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


def with_part(text: str, name: str, part: str) -> str:
    """Puts a generated part between its two marks in a page."""
    mark = f'<!-- {name}: tools/make_configs.py -->\n'
    pattern = re.compile(f'{re.escape(mark)}.*?<!-- end of {name} -->\n', re.DOTALL)
    if not pattern.search(text):
        raise SystemExit(f'a page has no marks for its {name}: {mark.strip()}')
    return pattern.sub(lambda _: f'{mark}\n{part}\n<!-- end of {name} -->\n', text)


def files() -> dict[Path, str]:
    """All that is written, by path."""
    wanted = {CONFIGS / leaf.path: leaf.text for leaf in LEAVES}
    page = CONFIGS / 'README.md'
    wanted[page] = with_part(page.read_text(encoding='utf-8'), 'grid', grid())
    for family in FAMILIES:
        page = CONFIGS / family.folder / 'README.md'
        text = with_part(page.read_text(encoding='utf-8'), 'settings', settings(family))
        wanted |= {page: text, page.with_name('metafile.yml'): metafile(family)}
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
