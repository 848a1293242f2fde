"""Shows the maps that modules of a model make of a picture, by mmengine's visualizer."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from cam import check_maps_of, default_layers, find_layers

import hat_mm
from hat_mm.engine.attention import recorded
from hat_mm.engine.build import evaluation, swaps_channels
from hat_mm.engine.cli import make_writable, run_tool
from hat_mm_runtime.images import read

# isort: split
from mmengine.visualization import Visualizer


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('image', help='picture')
    parser.add_argument('model', help='name of hat_mm.list_models() or config')
    parser.add_argument('weights', nargs='?', help='checkpoint (default: the published one)')
    parser.add_argument(
        '--layers', nargs='+', metavar='NAME', help='modules (default: the stages that are read)'
    )
    parser.add_argument(
        '--channel-reduction',
        choices=['squeeze_mean', 'select_max', 'none'],
        default='squeeze_mean',
        help='mean over the channels, the strongest channel, or the strongest --topk side by side',
    )
    parser.add_argument('--topk', type=int, default=16)
    parser.add_argument('--out-dir', type=Path, default=Path('outputs/features'))
    parser.add_argument('--device')
    args = parser.parse_args(argv)
    if args.topk < 1:
        parser.error('--topk must be at least 1')
    return args


def seen_by_network(model: Any, inputs: torch.Tensor) -> np.ndarray:
    """The network's image as it was before normalization, (H, W, 3), uint8, RGB."""
    pre = model.data_preprocessor
    image = inputs[0]
    if getattr(pre, '_enable_normalize', False):
        image = image * pre.std.to(inputs) + pre.mean.to(inputs)
    pixels = image.clamp(0, 255).round().byte().permute(1, 2, 0).cpu().numpy()
    return np.ascontiguousarray(pixels if swaps_channels(pre) else pixels[..., ::-1])


def main(argv: list[str] | None = None) -> None:
    """Runs the model on the picture and draws the maps."""
    args = parse_args(argv)
    image = read(args.image)
    make_writable(str(args.out_dir), '--out-dir')
    infer = hat_mm.Inferencer(args.model, args.weights, device=args.device)
    inputs, *_ = infer.prepare(image)
    names = args.layers or default_layers(infer.model)
    modules = find_layers(infer.model, names)
    with evaluation(infer.model), recorded(modules) as seen, torch.no_grad():
        infer.model.extract_feat(inputs)
    check_maps_of(names, modules, seen)
    below = seen_by_network(infer.model, inputs)
    for name, module in zip(names, modules, strict=True):
        output = seen[module][1]
        one = args.channel_reduction != 'none'
        drawn = Visualizer.draw_featmap(
            output[0].float().cpu(),
            overlaid_image=below,
            channel_reduction=args.channel_reduction if one else None,
            topk=args.topk,
            arrangement=(-(-args.topk // 4), 4),
        )
        path = args.out_dir / f'{Path(args.image).stem}_{name}.png'
        path.write_bytes(cv2.imencode('.png', drawn[..., ::-1])[1].tobytes())
        print(path)


if __name__ == '__main__':
    sys.exit(run_tool(main, 'feature_map.py'))
