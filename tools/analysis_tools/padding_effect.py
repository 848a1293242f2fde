"""Measures how much the padding of a batch changes the backbone features of a detector.

Each image of the test set goes through the backbone twice: padded only to the detector's divisor,
and with more zeros at the bottom and right, as a detector adds them to give the images of a batch
the same size. The tool prints the relative change of each feature map inside the image, averaged
over the images.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor

from hat_mm import compat
from hat_mm.engine.cli import UserError, add_cfg_options, read_config, run_tool


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add('config', help='config of a detector')
    add('checkpoint', help='its checkpoint')
    add('--images', type=int, default=24, help='images to average over')
    add('--pad', nargs='+', type=float, default=[0.1, 0.25, 0.5, 1.0],
        help='what is added to both sides, as a part of the side')  # fmt: skip
    add_cfg_options(parser)
    args = parser.parse_args(argv)
    if args.images < 1 or not all(0 < pad < math.inf for pad in args.pad):
        parser.error('--images and --pad must be positive and finite')
    return args


def changes(backbone: torch.nn.Module, image: Tensor, pad: float) -> Tensor:
    """Relative change of each map if ``pad`` times the side is added at the bottom and right."""
    height, width = image.shape[-2:]
    alone = backbone(image)
    padded = backbone(F.pad(image, (0, round(pad * width), 0, round(pad * height))))
    return torch.stack(
        [
            (there[..., : here.shape[-2], : here.shape[-1]] - here).norm() / here.norm()
            for here, there in zip(alone, padded, strict=True)
        ]
    )


def main(argv: list[str] | None = None) -> None:
    """Prints a Markdown table."""
    args = parse_args(argv)
    cfg = read_config(args.config, args.cfg_options)
    if cfg.default_scope != 'mmdet' or 'backbone' not in cfg.model:
        raise UserError(f'{args.config} is no config of a detector with a backbone')
    if '://' not in args.checkpoint and not Path(args.checkpoint).is_file():
        raise UserError(f'there is no checkpoint {args.checkpoint}')
    apis, registry = compat.require('mmdet.apis'), compat.require('mmdet.registry')
    model = apis.init_detector(cfg, args.checkpoint, palette='random', device='cpu')
    data = registry.DATASETS.build(cfg.test_dataloader.dataset)
    rows = []
    with torch.inference_mode():
        images = [
            model.data_preprocessor({'inputs': [data[i]['inputs']], 'data_samples': None})['inputs']
            for i in range(min(args.images, len(data)))
        ]
        strides = [round(images[0].shape[-1] / x.shape[-1]) for x in model.backbone(images[0])]
        for pad in args.pad:
            mean = torch.stack([changes(model.backbone, x, pad) for x in images]).mean(0)
            rows.append([f'{pad:.0%}', *(f'{value:.1%}' for value in mean.tolist())])
    head = ['added to both sides', *(f'stride {stride}' for stride in strides)]
    print(tabulate(rows, head, tablefmt='github', disable_numparse=True))


if __name__ == '__main__':
    logging.disable(logging.WARNING)
    sys.exit(run_tool(main, 'padding_effect.py'))
