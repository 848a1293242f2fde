"""Counts parameters and FLOPs (MACs) of a model by part, for one image.

Counted is the forward pass of a prediction before its post-processing, with nothing kept from an
earlier one. --published prints the tables of docs/complexity.md.
"""

from __future__ import annotations

import argparse
import datetime
import logging
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from hat_mm import compat
from hat_mm.engine.build import build_model, build_type, read_type
from hat_mm.engine.cli import UserError, run_tool
from hat_mm.engine.environment import versions

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'
# Image of a config unless --shape says otherwise: what papers count at.
SHAPES = {'mmdet': (800, 1280), 'mmseg': (512, 512), 'mmpretrain': (224, 224)}
BACKBONE_SHAPE = (224, 224)


@dataclass(frozen=True)
class Published:
    """One model of which the authors published figures.

    Attributes:
        name: Name in the table.
        model: Backbone as on the command line, which gets a head of 1000 classes, or config.
        shape: Height and width of the image in pixels.
        params: Parameters in millions, reported by the authors; None if they did not.
        flops: Multiply-adds in billions, reported by the authors.
    """

    name: str
    model: str
    shape: tuple[int, int]
    params: float | None
    flops: float


def _imagenet(name: str, arch: str, side: int, params: float, flops: float) -> Published:
    kind = name.replace('-', '')
    model = f"hat_mm.{kind}:arch='{arch}',out_indices=(3,)"
    return Published(f'{name}-{arch}', model, (side, side), params, flops)


def _hat_net(config: str, shape: tuple[int, int], flops: list[float]) -> list[Published]:
    return [
        Published(f'HAT-Net-{arch}', f'hat_net/{config.format(arch)}.py', shape, None, figure)
        for arch, figure in zip(('tiny', 'small', 'medium', 'large'), flops, strict=True)
    ]


UPERNET = 'fastervit/fastervit-{}_upernet_8xb2-160k_ade20k-512x512.py'
# The size of the detectors' images is not published; 800x1280 is the custom of the field.
PUBLISHED = {
    'FasterViT, ImageNet': [
        _imagenet('FasterViT', '0', 224, 31.4, 3.3),
        _imagenet('FasterViT', '1', 224, 53.4, 5.3),
        _imagenet('FasterViT', '2', 224, 75.9, 8.7),
        _imagenet('FasterViT', '3', 224, 159.5, 18.2),
        _imagenet('FasterViT', '4', 224, 424.6, 36.6),
        _imagenet('FasterViT', '5', 224, 957.5, 113.0),
        _imagenet('FasterViT', '6', 224, 1360.0, 142.0),
        _imagenet('FasterViT', '4-21k-224', 224, 271.9, 40.8),
        _imagenet('FasterViT', '4-21k-384', 384, 271.9, 120.1),
        _imagenet('FasterViT', '4-21k-512', 512, 271.9, 213.5),
        _imagenet('FasterViT', '4-21k-768', 768, 271.9, 480.4),
    ],
    'FasterViT, UPerNet': [
        Published('FasterViT-2', UPERNET.format('2'), (512, 2048), None, 974),
        Published('FasterViT-3', UPERNET.format('3'), (512, 2048), None, 1076),
        Published('FasterViT-4', UPERNET.format('4'), (512, 2048), None, 1290),
    ],
    'HAT-Net, ImageNet': [
        _imagenet('HAT-Net', 'tiny', 224, 12.7, 2.0),
        _imagenet('HAT-Net', 'small', 224, 25.7, 4.3),
        _imagenet('HAT-Net', 'medium', 224, 42.9, 8.3),
        _imagenet('HAT-Net', 'large', 224, 63.1, 11.5),
    ],
    'HAT-Net, RetinaNet': _hat_net(
        'retinanet_hat-net-{}_fpn_1x_coco', (800, 1280), [212, 286, 405, 519]
    ),
    'HAT-Net, Mask R-CNN': _hat_net(
        'mask-rcnn_hat-net-{}_fpn_1x_coco', (800, 1280), [231, 303, 424, 537]
    ),
    'HAT-Net, Semantic FPN': _hat_net(
        'hat-net-{}_fpn_4xb4-80k_ade20k-512x512', (512, 512), [33.2, 49.6, 74.7, 96.4]
    ),
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    mmengine = compat.require('mmengine')
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
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=mmengine.DictAction,
        default={},
        metavar='KEY=VALUE',
        help='override settings of the config',
    )
    parser.add_argument(
        '--published', action='store_true', help='measure all that the authors published instead'
    )
    args = parser.parse_args(argv)
    if (args.model is None) != args.published:
        parser.error('give a model or --published')
    if min(*(args.shape or (1, 1)), args.proposals) < 1:
        parser.error('--shape and --proposals must be at least 1')
    return args


# --- models ---------------------------------------------------------------------------------------


class Classifier(nn.Module):
    """A backbone with a head of 1000 classes, as the published ImageNet models have."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.out_channels[-1], 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps images (B, 3, H, W) to (B, 1000)."""
        return self.head(self.backbone(x)[-1].mean((2, 3)))


def is_config(model: str) -> bool:
    """Whether a model is named by a config and not as a backbone."""
    kind = model.partition(':')[0]
    return kind.endswith(('.py', '.json', '.yaml', '.yml')) or '/' in kind or '.' not in kind


def build_config(
    path: str | Path, options: dict, shape: tuple[int, int] | None
) -> tuple[nn.Module, tuple[int, int]]:
    """Builds the model of a config with random weights, and finds the shape of its image."""
    if not Path(path).is_file():
        raise UserError(
            f'{str(path)!r} is no config file, and no backbone such as hat_mm.FasterViT:arch=0'
        )
    cfg = compat.require('mmengine').Config.fromfile(path)
    cfg.merge_from_dict(options)
    scope = cfg.get('default_scope')
    if scope not in SHAPES or 'model' not in cfg:
        raise UserError(f'{path} is no config of a model of {", ".join(SHAPES)}')
    model = build_model(cfg)
    divisor = (cfg.model.get('data_preprocessor') or {}).get('pad_size_divisor') or 1
    height, width = (-(-side // divisor) * divisor for side in shape or SHAPES[scope])
    return model, (height, width)


# --- output ---------------------------------------------------------------------------------------


def row(*cells: str) -> None:
    """Prints a row of a Markdown table at once, as the next one may take a minute."""
    print('| ' + ' | '.join(cells) + ' |', flush=True)


def head(*names: str) -> None:
    """Prints the head of a Markdown table, all columns but the first right-aligned."""
    row(*names)
    row('---', *['---:'] * (len(names) - 1))


def show_versions() -> None:
    """Prints what the figures were counted with; they depend on the versions, not the hardware."""
    names = ', '.join(f'{name} {version}' for name, version in versions().items())
    print(f'\n{names}; {datetime.date.today()}')


def show(args: argparse.Namespace) -> None:
    """Prints the parts of one model."""
    from hat_mm.engine.analysis import KINDS, count

    shape = tuple(args.shape) if args.shape else None
    if is_config(args.model):
        model, shape = build_config(args.model, args.cfg_options, shape)
    else:
        if args.cfg_options:
            raise UserError('--cfg-options are for configs; write the arguments of a backbone '
                            'behind its type, as in hat_mm.FasterViT:arch=0', 2)  # fmt: skip
        model, shape = build_type(*read_type(args.model)), shape or BACKBONE_SHAPE
    found = count(model, shape, proposals=args.proposals)
    used = [kind for kind in KINDS if found.whole.flops[kind]]
    print(f'{args.model}, image of {shape[0]}×{shape[1]}\n')
    head('part', 'params M', 'FLOPs G', *(f'{kind} G' for kind in used))
    for name, part in [*found.parts.items(), ('**all**', found.whole)]:
        flops = (f'{part.flops[kind] / 1e9:.3f}' for kind in used)
        row(name, f'{part.parameters / 1e6:.3f}', f'{part.total / 1e9:.3f}', *flops)
    print(f'\nNot counted: {found.elements / 1e9:.3f} G results of elementwise operators', end='')
    calls = [f'{name} (called {n} times)' for name, n in sorted(found.unknown.items())]
    print('; operators without a rule: ' + ', '.join(calls) if calls else '', end='.\n')
    show_versions()


def show_published() -> None:
    """Prints the tables of docs/complexity.md."""
    from hat_mm.engine.analysis import count

    for title, rows in PUBLISHED.items():
        print(f'### {title}\n')
        head(
            *('model', 'image', 'params M', 'authors', 'FLOPs G', 'attention G', 'position G'),
            *('authors', 'ratio', 'without attention', 'nor position'),
        )
        for published in rows:
            shape = published.shape
            if is_config(published.model):
                model, shape = build_config(CONFIGS / published.model, {}, shape)
            else:
                model = Classifier(build_type(*read_type(published.model)))
            whole = count(model, shape).whole
            del model  # the next one may need the memory
            attention, position = whole.flops['attention'], whole.flops['position']
            rest = (whole.total, whole.total - attention, whole.total - attention - position)
            row(
                published.name,
                f'{shape[0]}×{shape[1]}',
                f'{whole.parameters / 1e6:.2f}',
                '' if published.params is None else f'{published.params}',
                *(f'{n / 1e9:.2f}' for n in (whole.total, attention, position)),
                f'{published.flops}',
                *(f'{n / 1e9 / published.flops:.3f}' for n in rest),
            )
        print()
    show_versions()


def main(argv: list[str] | None = None) -> None:
    """Counts one model, or all published ones."""
    args = parse_args(argv)
    if args.published:
        show_published()
    else:
        show(args)


if __name__ == '__main__':
    logging.disable(logging.WARNING)
    sys.exit(run_tool(main, 'get_flops.py'))
