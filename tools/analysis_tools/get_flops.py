"""Counts parameters and FLOPs (MACs) of a model by part, for one image.

It counts the forward pass of a prediction before its post-processing. --published prints the
tables of docs/complexity/published.md.
"""

import argparse
import datetime
import logging
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

from torch import nn

from hat_mm import compat
from hat_mm.engine.analysis import Complexity, count
from hat_mm.engine.build import build_model, build_type, read_type
from hat_mm.engine.cli import UserError, add_cfg_options, run_tool
from hat_mm.engine.environment import versions

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'
# Default image size of a config: the size at which papers count.
SHAPES = {'mmdet': (800, 1280), 'mmseg': (512, 512), 'mmpretrain': (224, 224)}

FASTERVIT_IN1K = 'fastervit/fastervit-{}_32xb128_in1k.py'
FASTERVIT_UPERNET = 'fastervit/fastervit-{}_upernet_8xb2-160k_ade20k-512x512.py'
# Title -> config, height and width of the image, and the authors' figures: millions of parameters
# (None if not reported) and billions of FLOPs. The image size for detectors is not published;
# 800x1280 is usual.
PUBLISHED = {
    'FasterViT, ImageNet': [
        (FASTERVIT_IN1K.format(0), (224, 224), 31.4, 3.3),
        (FASTERVIT_IN1K.format(1), (224, 224), 53.4, 5.3),
        (FASTERVIT_IN1K.format(2), (224, 224), 75.9, 8.7),
        (FASTERVIT_IN1K.format(3), (224, 224), 159.5, 18.2),
        (FASTERVIT_IN1K.format(4), (224, 224), 424.6, 36.6),
        (FASTERVIT_IN1K.format(5), (224, 224), 957.5, 113.0),
        (FASTERVIT_IN1K.format(6), (224, 224), 1360.0, 142.0),
        ('fastervit/fastervit-4-21k-224_8xb128_in1k.py', (224, 224), 271.9, 40.8),
        ('fastervit/fastervit-4-21k-384_32xb32_in1k-384px.py', (384, 384), 271.9, 120.1),
        ('fastervit/fastervit-4-21k-512_64xb16_in1k-512px.py', (512, 512), 271.9, 213.5),
        ('fastervit/fastervit-4-21k-768_128xb8_in1k-768px.py', (768, 768), 271.9, 480.4),
    ],
    'FasterViT, UPerNet': [
        (FASTERVIT_UPERNET.format(2), (512, 2048), None, 974),
        (FASTERVIT_UPERNET.format(3), (512, 2048), None, 1076),
        (FASTERVIT_UPERNET.format(4), (512, 2048), None, 1290),
    ],
    'HAT-Net, ImageNet': [
        ('hat_net/hat-net-tiny_8xb128_in1k.py', (224, 224), 12.7, 2.0),
        ('hat_net/hat-net-small_8xb128_in1k.py', (224, 224), 25.7, 4.3),
        ('hat_net/hat-net-medium_8xb128_in1k.py', (224, 224), 42.9, 8.3),
        ('hat_net/hat-net-large_8xb128_in1k.py', (224, 224), 63.1, 11.5),
    ],
    'HAT-Net, RetinaNet': [
        ('hat_net/retinanet_hat-net-tiny_fpn_1x_coco.py', (800, 1280), None, 212),
        ('hat_net/retinanet_hat-net-small_fpn_1x_coco.py', (800, 1280), None, 286),
        ('hat_net/retinanet_hat-net-medium_fpn_1x_coco.py', (800, 1280), None, 405),
        ('hat_net/retinanet_hat-net-large_fpn_1x_coco.py', (800, 1280), None, 519),
    ],
    'HAT-Net, Mask R-CNN': [
        ('hat_net/mask-rcnn_hat-net-tiny_fpn_1x_coco.py', (800, 1280), None, 231),
        ('hat_net/mask-rcnn_hat-net-small_fpn_1x_coco.py', (800, 1280), None, 303),
        ('hat_net/mask-rcnn_hat-net-medium_fpn_1x_coco.py', (800, 1280), None, 424),
        ('hat_net/mask-rcnn_hat-net-large_fpn_1x_coco.py', (800, 1280), None, 537),
    ],
    'HAT-Net, Semantic FPN': [
        ('hat_net/hat-net-tiny_fpn_4xb4-80k_ade20k-512x512.py', (512, 512), None, 33.2),
        ('hat_net/hat-net-small_fpn_4xb4-80k_ade20k-512x512.py', (512, 512), None, 49.6),
        ('hat_net/hat-net-medium_fpn_4xb4-80k_ade20k-512x512.py', (512, 512), None, 74.7),
        ('hat_net/hat-net-large_fpn_4xb4-80k_ade20k-512x512.py', (512, 512), None, 96.4),
    ],
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        'model',
        nargs='?',
        help='config of mmdet, mmseg or mmpretrain, or a backbone as TYPE[:KEY=VALUE,...], such as '
        'hat_mm.HATNet:arch=small',
    )
    parser.add_argument(
        '--shape',
        nargs=2,
        type=int,
        metavar=('HEIGHT', 'WIDTH'),
        help='pixels of the image (default: 800 1280 for detectors, 512 512 for segmentors, '
        '224 224 for classifiers and backbones); sides of a config with a pad_size_divisor are '
        'rounded up to it',
    )
    parser.add_argument(
        '--proposals', type=int, default=1000, help='boxes for the second stage of a detector'
    )
    add_cfg_options(parser)
    parser.add_argument(
        '--published', action='store_true', help='measure all that the authors published instead'
    )
    args = parser.parse_args(argv)
    if (args.model is None) != args.published:
        parser.error('give a model or --published')
    if min(*(args.shape or (1, 1)), args.proposals) < 1:
        parser.error('--shape and --proposals must be at least 1')
    return args


def measure(
    model: str, options: dict, shape: tuple[int, int] | None, proposals: int = 1000
) -> tuple[Complexity, tuple[int, int]]:
    """Counts a backbone or a config's model; also returns the shape of the image."""
    kind = model.partition(':')[0]
    if '.' in kind and '/' not in kind and not kind.endswith(('.py', '.json', '.yaml', '.yml')):
        if options:
            raise UserError('--cfg-options are for configs; write the arguments of a backbone '
                            'behind its type, as in hat_mm.FasterViT:arch=0', 2)  # fmt: skip
        shape = shape or SHAPES['mmpretrain']
        return _count(lambda: build_type(*read_type(model)), shape, proposals), shape
    if not Path(model).is_file():
        raise UserError(f'{model!r} is no config file, and no backbone such as '
                        'hat_mm.FasterViT:arch=0')  # fmt: skip
    cfg = compat.require('mmengine').Config.fromfile(model)
    cfg.merge_from_dict(options)
    scope = cfg.get('default_scope')
    if scope not in SHAPES or 'model' not in cfg:
        raise UserError(f'{model} is no config of a model of {", ".join(SHAPES)}')
    divisor = (cfg.model.get('data_preprocessor') or {}).get('pad_size_divisor') or 1
    height, width = (-(-side // divisor) * divisor for side in shape or SHAPES[scope])
    return _count(lambda: build_model(cfg), (height, width), proposals), (height, width)


def _count(build: Callable[[], nn.Module], shape: tuple[int, int], proposals: int) -> Complexity:
    """Counts without computing, unless the model needs values."""
    model = build()
    try:
        return count(model.to('meta'), shape, proposals=proposals)
    except RuntimeError:  # meta has no values, which NMS or the levels of RoIAlign need
        del model
        return count(build(), shape, proposals=proposals)


def row(*cells: str) -> None:
    """Prints a row of a Markdown table immediately, as the next one may take a minute."""
    print('| ' + ' | '.join(cells) + ' |', flush=True)


def head(*names: str) -> None:
    """Prints the head of a Markdown table, with all columns but the first right-aligned."""
    row(*names)
    row('---', *['---:'] * (len(names) - 1))


def show(args: argparse.Namespace) -> None:
    """Prints the parts of one model."""
    shape = tuple(args.shape) if args.shape else None
    found, shape = measure(args.model, args.cfg_options, shape, args.proposals)
    print(f'{args.model}, image of {shape[0]}×{shape[1]}\n')
    head('part', 'params M', 'FLOPs G', 'attention G', 'position G')
    for name, part in [*found.parts.items(), ('**all**', found.whole)]:
        flops = (f'{n / 1e9:.3f}' for n in (part.flops, part.attention, part.position))
        row(name, f'{part.parameters / 1e6:.3f}', *flops)


def show_published() -> None:
    """Prints the tables of docs/complexity/published.md."""
    for title, rows in PUBLISHED.items():
        print(f'## {title}\n')
        head(
            *('model', 'image', 'params M', 'authors', 'FLOPs G', 'attention G', 'position G'),
            *('authors', 'ratio', 'without attention', 'nor position'),
        )
        for config, shape, params, flops in rows:
            whole = measure(str(CONFIGS / config), {}, shape)[0].whole
            rest = whole.flops - whole.attention
            row(
                re.search('(fastervit|hat-net)-[^_]+', config)[0],
                f'{shape[0]}×{shape[1]}',
                f'{whole.parameters / 1e6:.2f}',
                '' if params is None else f'{params}',
                *(f'{n / 1e9:.2f}' for n in (whole.flops, whole.attention, whole.position)),
                f'{flops}',
                *(f'{n / 1e9 / flops:.3f}' for n in (whole.flops, rest, rest - whole.position)),
            )
        print()


def main(argv: list[str] | None = None) -> None:
    """Counts one model, or all published ones, and prints the versions."""
    args = parse_args(argv)
    if args.published:
        show_published()
    else:
        show(args)
    names = ', '.join(f'{name} {version}' for name, version in versions().items())
    print(f'\n{names}; {datetime.date.today()}')


if __name__ == '__main__':
    logging.disable(logging.WARNING)
    warnings.simplefilter('ignore')  # of the toolboxes
    sys.exit(run_tool(main, 'get_flops.py'))
