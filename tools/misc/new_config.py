"""Writes a config for data of your own, after a look at the data.

Missing pictures, boxes outside, empty classes and the like are listed first. The config inherits
from those of hat_mm and trains as it is.

  detection    --train FILE.json IMAGES --val FILE.json IMAGES, in COCO's format; for YOLO's or
               Pascal VOC's, the folder of the annotations in place of the file
  upernet      --train LABEL_MAPS IMAGES --val LABEL_MAPS IMAGES --classes NAMES.txt
  classifier   --train FOLDER --val FOLDER, with a folder of pictures for each class
"""

from __future__ import annotations

import argparse
import math
import os
import pprint
import re
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hat_mm import compat
from hat_mm.engine import own_data
from hat_mm.engine.cli import UserError, run_tool
from hat_mm.engine.own_data import Split

BASES = Path(__file__).resolve().parents[2] / 'configs/_base_'
SMALL_SIDE = 32
"""Side of the median object in pixels, from which pictures are not enlarged."""
LONG_SIDE = 1333
"""Longer side of pictures that are not shrunk."""

SMALL_CROP, SMALL_BATCH = 256, 4
"""Side of a training picture and pictures a step for the small backbones."""
STEPS = 2000
"""Fewest steps of a training."""
CROWDED = ['mAP_50', 'mAP_75', 'mAP_s', 'mAP_m', 'mAP_l']


@dataclass(frozen=True)
class Model:
    """What a model needs in a config.

    Attributes:
        recipe: Recipe for the backbones with published weights.
        settings: Lines of ``model`` that fit it to the backbone and the classes.
        maps: The maps of the backbone that this recipe uses, as an index; all of them if empty. A
            small recipe uses all.
        crop: Side of the largest training picture in pixels.
        batch_size: Pictures a step.
        epochs: Fewest epochs.
        small: Recipe for the small backbones, which learn from a random start; None if none.
        limits: Lines of ``model`` for pictures with more than 50 objects.
        masks: Whether objects need masks.
        task: Kind of data.
    """

    recipe: str
    settings: str
    maps: str = ''
    crop: int = 800
    batch_size: int = 2
    epochs: int = 12
    small: str | None = None
    limits: str = ''
    masks: bool = False
    task: str = 'detection'


NECK = 'neck=dict(in_channels=_base_.channels{maps}),\n'
BOX_HEAD = 'bbox_head=dict(num_classes=num_classes)'
MASK_HEAD = 'mask_head=dict(num_classes=num_classes)'
ONE_STAGE = 'test_cfg=dict(nms_pre={before}, max_per_img={most}),\n'
TWO_STAGES = (
    'test_cfg=dict(\n'
    '    rpn=dict(nms_pre={before}, max_per_img={before}), rcnn=dict(max_per_img={most})\n),\n'
)
MODELS = {
    'faster-rcnn': Model(
        'faster-rcnn_fpn_1x_coco',
        f'{NECK}roi_head=dict({BOX_HEAD}),\n',
        small='faster-rcnn_fpn_small',
        limits=TWO_STAGES,
    ),
    'mask-rcnn': Model(
        'mask-rcnn_fpn_1x_coco',
        f'{NECK}roi_head=dict({BOX_HEAD}, {MASK_HEAD}),\n',
        small='mask-rcnn_fpn_small',
        limits=TWO_STAGES,
        masks=True,
    ),
    'cascade-mask-rcnn': Model(
        'cascade-mask-rcnn_fpn_4conv1fc-giou_ms-crop-3x_coco',
        f'{NECK}roi_head=dict(\n    bbox_head=[\n'
        '        dict(head, num_classes=num_classes)\n'
        '        for head in _base_.model.roi_head.bbox_head\n'
        f'    ],\n    {MASK_HEAD},\n),\n',
        limits=TWO_STAGES,
        masks=True,
    ),
    'retinanet': Model(
        'retinanet_fpn_1x_coco',
        f'{NECK}{BOX_HEAD},\n',
        maps='[1:]',
        small='retinanet_fpn_small',
        limits=ONE_STAGE,
    ),
    'dino': Model('dino-4scale_8xb2-12e_coco', f'{NECK}{BOX_HEAD},\n', maps='[1:]'),
    'upernet': Model(
        'upernet_8xb2-160k_ade20k-512x512',
        'decode_head=dict(in_channels=_base_.channels, num_classes=num_classes),\n'
        'auxiliary_head=dict(in_channels=_base_.channels[2], num_classes=num_classes),\n',
        crop=512,
        small='upernet_small',
        task='segmentation',
    ),
    'classifier': Model(
        'in1k',
        'data_preprocessor=dict(num_classes=num_classes),\n'
        'head=dict(in_channels=_base_.channels[-1], num_classes=num_classes, topk=(1,)),\n',
        batch_size=32,
        epochs=30,
        task='classification',
    ),
}


def backbones() -> dict[str, bool]:
    """Names of the backbones of the configs, and whether they have published weights."""
    found = {}
    for path in sorted((BASES / 'backbones').glob('*.py')):
        text = path.read_text(encoding='utf-8')
        if 'channels = ' in text or '_base_' in text:
            found[path.stem] = 'checkpoint=' in text
    return found


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    pair = dict(nargs='+', type=Path, required=True, metavar=('ANNOTATIONS', 'IMAGES'))
    parser.add_argument('--train', **pair, help='annotations and pictures for training')
    parser.add_argument('--val', **pair, help='annotations and pictures for validation')
    parser.add_argument('--model', required=True, choices=MODELS)
    parser.add_argument(
        '--backbone',
        required=True,
        metavar='NAME',
        help='a file of configs/_base_/backbones: fastervit-0, hat-net-small, swin-hat-tiny … '
        'start from published weights; fastervit-tiny and those that end in -toy, from random '
        'ones, with a small model',
    )
    parser.add_argument('--out', required=True, type=Path, metavar='FILE', help='config to write')
    parser.add_argument(
        '--classes', type=Path, help="names of the classes: one a line, or YOLO's data.yaml"
    )
    parser.add_argument(
        '--scale',
        type=float,
        help='factor for the size of the pictures (default: by the size of the objects)',
    )
    parser.add_argument('--epochs', type=int, help='(default: by the number of pictures)')
    parser.add_argument('--batch-size', type=int, help='pictures a step (default: by the model)')
    parser.add_argument(
        '--flip',
        nargs='+',
        default=['horizontal'],
        choices=('horizontal', 'vertical', 'diagonal'),
        help='mirror images to train on; all three where pictures have no up (default: horizontal)',
    )
    parser.add_argument('--force', action='store_true', help='replace FILE if it exists')
    args = parser.parse_args(argv)
    expected = 1 if MODELS[args.model].task == 'classification' else 2
    for name in ('train', 'val'):
        if len(getattr(args, name)) != expected:
            parser.error(
                f'--{name} takes {expected} path{"s" * (expected > 1)} for {args.model} '
                f'(see above), not {len(getattr(args, name))}'
            )
    if MODELS[args.model].task == 'segmentation' and args.classes is None:
        parser.error(f'{args.model} needs --classes, a file with a name in each line')
    if args.backbone not in backbones():
        parser.error(f'argument --backbone: {args.backbone!r} is none of {", ".join(backbones())}')
    if any(number is not None and number < 1 for number in (args.epochs, args.batch_size)):
        parser.error('--epochs and --batch-size must be at least 1')
    takes_classes = MODELS[args.model].task == 'segmentation' or converts(args)
    if args.classes is not None and not takes_classes:
        parser.error('--classes is for YOLO and label maps: other data have the names in them')
    if MODELS[args.model].task == 'classification' and (args.scale or args.flip != ['horizontal']):
        parser.error('a classifier takes no --scale and no --flip: its pictures are of one size')
    if args.scale is not None and not 0 < args.scale <= 8:
        parser.error(f'--scale must be above 0 and at most 8, not {args.scale}')
    if args.out.suffix != '.py' or not re.fullmatch(r'[\w-]+', args.out.stem):
        parser.error(f'--out must be a .py file without further dots, not {args.out}')
    return args


# --- the data -------------------------------------------------------------------------------------


def read_data(args: argparse.Namespace) -> dict[str, Split]:
    """Reads and checks both splits, and prints what was found.

    Raises:
        UserError: The data would not train, or would teach something else.
    """
    model = MODELS[args.model]
    pairs = {name: getattr(args, name) for name in ('train', 'val')}
    if converts(args):
        converted = {converted_file(args.out, name): pair for name, pair in pairs.items()}
        own_data.to_coco(converted, args.classes)
        pairs = {
            name: [file, pair[1]]
            for (name, pair), file in zip(pairs.items(), converted, strict=True)
        }
    splits = {}
    for name, (source, *images) in pairs.items():
        if model.task == 'detection':
            splits[name] = own_data.read_coco(source, images[0], masks=model.masks)
        elif model.task == 'segmentation':
            classes = own_data.read_classes(args.classes)
            splits[name] = own_data.read_label_maps(source, images[0], classes)
        else:
            splits[name] = own_data.read_folders(source)
    train, val = splits.values()
    if train.classes != val.classes:
        one = sorted({*train.classes} ^ {*val.classes})
        train.find('classes of --train or --val alone', one)
        train.find('classes in another order in --val', [] if one else train.classes)
    if args.train[0].resolve() == args.val[0].resolve():
        train.find('same annotations for --train and --val', [train.source], fatal=False)
    for name, split in splits.items():
        print(f'{name}: {split.report()}')
    if any(finding.fatal for split in splits.values() for finding in split.findings):
        raise UserError('no config was written: mend the errors above first')
    return splits


def converts(args: argparse.Namespace) -> bool:
    """Whether the annotations are folders, of YOLO or Pascal VOC."""
    return MODELS[args.model].task == 'detection' and args.train[0].is_dir()


def converted_file(out: Path, split: str) -> Path:
    """Where the annotations of YOLO or Pascal VOC are written in COCO's format."""
    return out.with_name(f'{out.stem}_{split}.json')


def choose_scale(split: Split) -> float:
    """Factor for the size of all pictures, by the size of the objects.

    Pictures are shrunk so that the median of their longer sides is at most ``LONG_SIDE``, but only
    as far as the median object keeps ``SMALL_SIDE``; those with smaller objects are enlarged, at
    most twofold.
    """
    scale = min(1.0, LONG_SIDE / float(np.median([max(size) for size in split.sizes])))
    if len(split.sides):
        median = float(np.median(split.sides))
        if median * scale < SMALL_SIDE:
            scale = min(2.0, SMALL_SIDE / median)
    return round(scale, 2)


# --- the config -----------------------------------------------------------------------------------

HEAD = """\
# Written by tools/misc/new_config.py; yours to change.
# train: {train.pictures} pictures, {objects} objects; val: {val.pictures} pictures.
_base_ = [
{bases}]
classes = {classes}
num_classes = len(classes)
metainfo = dict(classes=classes)
model = dict(
    backbone=_base_.backbone,
{settings})
"""

# Shrunk and enlarged again, pictures are less sharp, as those of another camera may be.
SIZES = """\
    dict(
        type='RandomChoice',
        transforms=[
            [
                dict(type='Resize', scale_factor=scale * factor * sharpness, keep_ratio=True),
                dict(type='Resize', scale_factor=1 / sharpness, keep_ratio=True),
            ]
            for factor in (0.7, 0.85, 1.0, 1.2, 1.4)
            for sharpness in (1.0, 0.5, 0.35)
        ],
    ),
"""

DETECTION = """
# The median side of an object is {median:.0f} pixels; at this scale it is {scaled:.0f}.
scale = {scale}
crop_size = ({crop}, {crop})
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True{with_mask}),
{sizes}    dict(type='RandomCrop', crop_size=crop_size, allow_negative_crop=True),
    dict(type='RandomFlip', prob={probability:.2f}, direction={flips!r}),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale_factor=scale, keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True{with_mask}),
    dict(
        type='PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'),
    ),
]
train_dataloader = dict(
    batch_size={batch_size},
    dataset=dict(
        data_root='',
        ann_file={train_source!r},
        data_prefix=dict(img={train_images!r}),
        metainfo=metainfo,
        filter_cfg=dict(filter_empty_gt=False),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    dataset=dict(
        data_root='',
        ann_file={val_source!r},
        data_prefix=dict(img={val_images!r}),
        metainfo=metainfo,
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(
    ann_file={val_source!r},{metrics}
)
test_evaluator = val_evaluator
"""

SEGMENTATION = """
scale = {scale}
crop_size = ({crop}, {crop})
data_preprocessor = dict(size=crop_size)
model.update(data_preprocessor=data_preprocessor)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
{sizes}    dict(type='RandomCrop', crop_size=crop_size),
    dict(type='RandomFlip', prob={probability:.2f}, direction={flips!r}),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale_factor=scale, keep_ratio=True),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
train_dataloader = dict(
    batch_size={batch_size},
    dataset=dict(
        _delete_=True,
        type='BaseSegDataset',
        data_prefix=dict(img_path={train_images!r}, seg_map_path={train_source!r}),
        img_suffix={train_suffix!r},
        metainfo=metainfo,
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type='BaseSegDataset',
        data_prefix=dict(img_path={val_images!r}, seg_map_path={val_source!r}),
        img_suffix={val_suffix!r},
        metainfo=metainfo,
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
"""

CLASSIFICATION = """
train_dataloader = dict(
    batch_size={batch_size},
    dataset=dict(
        _delete_=True,
        type='CustomDataset',
        data_root={train_source!r},
        metainfo=metainfo,
        pipeline=_base_.train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size={batch_size},
    dataset=dict(
        _delete_=True,
        type='CustomDataset',
        data_root={val_source!r},
        metainfo=metainfo,
        pipeline=_base_.test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(topk=(1,))
test_evaluator = val_evaluator
"""

EPOCHS = """
# {base_lr:g} for {base_batch} pictures a step.
lr = {base_lr:g} * {batch_size} / {base_batch}
max_epochs = {epochs}
optim_wrapper = dict(optimizer=dict(lr=lr))
auto_scale_lr = dict(base_batch_size={batch_size})
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end={warm_up}),
    dict(
        type='CosineAnnealingLR',
        by_epoch=True,
        T_max=max_epochs,
        eta_min_ratio=0.01,
        convert_to_iter_based=True,
    ),
]
train_cfg = dict(max_epochs=max_epochs, val_interval={interval})
default_hooks = dict(checkpoint=dict(interval={interval}, max_keep_ckpts=2))
"""

ITERATIONS = """
# {base_lr:g} for {base_batch} pictures a step.
lr = {base_lr:g} * {batch_size} / {base_batch}
max_iters = {iterations}
optim_wrapper = dict(optimizer=dict(lr=lr))
auto_scale_lr = dict(base_batch_size={batch_size})
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end={warm_up}),
    dict(type='PolyLR', by_epoch=False, begin={warm_up}, end=max_iters, eta_min=0.0, power=1.0),
]
train_cfg = dict(max_iters=max_iters, val_interval=max(1, max_iters // 10))
default_hooks = dict(checkpoint=dict(interval=max(1, max_iters // 10), max_keep_ckpts=2))
"""


def write_config(args: argparse.Namespace, splits: dict[str, Split]) -> str:
    """Returns the text of the config.

    Raises:
        UserError: The model has no recipe for the backbone.
    """
    model = MODELS[args.model]
    train, val = splits.values()
    published = backbones()[args.backbone]
    recipe = model.recipe if published else model.small
    if recipe is None:
        raise UserError(
            f'{args.model} has no recipe for {args.backbone}, which starts from random weights; '
            f'{", ".join(name for name, model in MODELS.items() if model.small)} have one'
        )
    bases = [f'recipes/{recipe}']
    if model.task == 'classification':
        side = re.search(r'-(224|384|512|768)$', args.backbone)
        bases += [f'datasets/imagenet_{side[1]}-squash' if side else 'datasets/imagenet_224']
        bases += ['schedules/adamw_cosine-30e']
    schedule = compat.require('mmengine').Config.fromfile(BASES / f'{bases[-1]}.py')
    bases += [f'backbones/{args.backbone}']
    batch_size = args.batch_size or (model.batch_size if published else SMALL_BATCH)
    steps = math.ceil(train.pictures / batch_size)
    epochs = args.epochs or max(math.ceil(STEPS / steps), model.epochs if published else 1)
    most = max(split.most for split in splits.values())
    limits = model.limits.format(before=max(1000, 4 * most), most=2 * most) if most > 50 else ''
    median = float(np.median(train.sides)) if len(train.sides) else 0.0
    scale = args.scale or (choose_scale(train) if train.sizes else 1.0)
    largest = max((max(size) for size in train.sizes), default=0) * scale
    crop = min(model.crop if published else SMALL_CROP, math.ceil(largest / 32) * 32)
    body = {'detection': DETECTION, 'segmentation': SEGMENTATION}.get(model.task, CLASSIFICATION)
    length = ITERATIONS if model.task == 'segmentation' else EPOCHS
    settings = model.settings.format(maps=model.maps if published else '')
    folder = args.out.parent
    # mmengine resolves `..` behind a link in two ways, so there the paths are absolute.
    is_link = folder.absolute() != folder.resolve()
    paths = [BASES / f'{base}.py' for base in bases]
    paths = paths if is_link else [os.path.relpath(path, folder) for path in paths]
    lines = {
        'sizes': SIZES,
        'bases': ''.join(f'    {str(path)!r},\n' for path in paths),
        'classes': pprint.pformat(train.classes, width=80),
        'settings': textwrap.indent(settings + limits, '    '),
        'with_mask': ', with_mask=True' if model.masks else '',
        # COCO's mAP takes 100 detections a picture, its AP50 and the others take 1000.
        'metrics': f'\n    metric_items={CROWDED},' if most > 100 else '',
        'flips': args.flip[0] if len(args.flip) == 1 else args.flip,
        # Each direction as often as none.
        'probability': len(args.flip) / (len(args.flip) + 1),
        'interval': max(1, epochs // 10),
        'warm_up': min(100, max(1, epochs * steps // 10)),
    }
    return (HEAD + body + length).format(
        **lines,
        train=train,
        val=val,
        train_source=str(train.source),
        train_images=str(train.images),
        val_source=str(val.source),
        val_images=str(val.images),
        train_suffix=train.suffix,
        val_suffix=val.suffix,
        objects=train.objects.total(),
        median=median,
        scaled=median * scale,
        scale=scale,
        crop=crop,
        batch_size=batch_size,
        base_lr=schedule.optim_wrapper.optimizer.lr,
        base_batch=schedule.auto_scale_lr.get('base_batch_size', 16),
        epochs=epochs,
        iterations=epochs * steps,
    )


def main(argv: list[str] | None = None) -> None:
    """Checks the data and writes the config."""
    args = parse_args(argv)
    converted = [converted_file(args.out, split) for split in ('train', 'val')]
    written = [args.out, *(converted if converts(args) else [])]
    there = [str(path) for path in written if path.exists()]
    if there and not args.force:
        raise UserError(f'{there[0]} exists: choose another --out, or --force to replace it')
    args.out.parent.mkdir(parents=True, exist_ok=True)
    before = {path: path.read_bytes() for path in written[1:] if path.exists()}
    try:
        text = write_config(args, read_data(args))
    except BaseException:
        for path in written[1:]:
            path.unlink(missing_ok=True)
        for path, data in before.items():
            path.write_bytes(data)
        raise
    args.out.write_text(text, encoding='utf-8')
    print(f'{args.out}: written. Next: python tools/train.py {args.out}')


if __name__ == '__main__':
    sys.exit(run_tool(main, 'new_config.py'))
