"""Measures how much the padding of a batch changes what a detector's backbone sees in an image.

Each image of the test set goes through the backbone alone, filled to the detector's divisor, and
again with zeros at the bottom and right, as a detector adds them to make the images of a batch
equal in size. Printed is the relative change of each feature map where the image is, averaged over
the images.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys

import torch
import torch.nn.functional as F
from torch import Tensor

from hat_mm import compat
from hat_mm.engine.cli import UserError, run_tool


def parse_args() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    mmengine = compat.require('mmengine')
    parser.add_argument('config', help='config of a detector')
    parser.add_argument('checkpoint', help='its checkpoint')
    parser.add_argument('--images', type=int, default=24, help='images to average over')
    parser.add_argument(
        '--pad',
        nargs='+',
        type=float,
        default=[0.1, 0.25, 0.5, 1.0],
        help='what is added to both sides, as a part of the side',
    )
    parser.add_argument('--cfg-options', nargs='+', action=mmengine.DictAction, default={})
    args = parser.parse_args()
    if args.images < 1 or not all(0 < pad < math.inf for pad in args.pad):
        parser.error('--images and --pad must be positive and finite')
    return args


def load(args: argparse.Namespace) -> tuple[torch.nn.Module, object]:
    """The detector with its weights, and its test set."""
    mmengine = compat.require('mmengine')
    registry = compat.require('mmdet.registry')
    compat.require('mmdet.utils').register_all_modules()
    cfg = mmengine.Config.fromfile(args.config)
    cfg.merge_from_dict(args.cfg_options)
    if 'backbone' not in cfg.get('model', {}):
        raise UserError(f'{args.config} has no model.backbone: it is no config of a detector')
    cfg.model.backbone.init_cfg = None
    model = registry.MODELS.build(cfg.model)
    load_checkpoint = compat.require('mmengine.runner').load_checkpoint
    load_checkpoint(model, args.checkpoint, map_location='cpu')
    return model.eval(), registry.DATASETS.build(cfg.test_dataloader.dataset)


def changes(backbone: torch.nn.Module, image: Tensor, pad: float) -> Tensor:
    """Relative change of each map by padding of the bottom and right by ``pad`` times the side."""
    height, width = image.shape[-2:]
    alone = backbone(image)
    padded = backbone(F.pad(image, (0, round(pad * width), 0, round(pad * height))))
    return torch.stack(
        [
            (there[..., : here.shape[-2], : here.shape[-1]] - here).norm() / here.norm()
            for here, there in zip(alone, padded, strict=True)
        ]
    )


def main() -> None:
    """Prints a Markdown table."""
    args = parse_args()
    logging.disable(logging.WARNING)
    model, data = load(args)
    images = [
        model.data_preprocessor({'inputs': [data[i]['inputs']], 'data_samples': None})['inputs']
        for i in range(min(args.images, len(data)))
    ]
    with torch.inference_mode():
        maps = model.backbone(images[0])
        names = [f'stride {round(images[0].shape[-1] / m.shape[-1])}' for m in maps]
        print('| added to both sides | ' + ' | '.join(names) + ' |')
        print('|' + '---|' * (len(names) + 1))
        for pad in args.pad:
            mean = torch.stack([changes(model.backbone, x, pad) for x in images]).mean(0)
            print(f'| {pad:.0%} | ' + ' | '.join(f'{value:.1%}' for value in mean.tolist()) + ' |')


if __name__ == '__main__':
    sys.exit(run_tool(main, 'padding_effect.py'))
