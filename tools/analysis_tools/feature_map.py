"""Shows the maps that modules of a model make of a picture, by mmengine's visualizer."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from cam import default_layers

import hat_mm
from hat_mm.engine.attention import recorded
from hat_mm.engine.cli import UserError, make_writable, run_tool
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
    return parser.parse_args(argv)


def seen_by_network(model: Any, inputs: torch.Tensor) -> np.ndarray:
    """The network's image as it was before normalization, (H, W, 3), uint8, RGB."""
    pre = model.data_preprocessor
    image = inputs[0] * pre.std.to(inputs) + pre.mean.to(inputs)
    pixels = image.clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy()
    swapped = getattr(pre, '_channel_conversion', getattr(pre, 'channel_conversion', False))
    return np.ascontiguousarray(pixels if swapped else pixels[..., ::-1])


def main(argv: list[str] | None = None) -> None:
    """Runs the model on the picture and draws the maps."""
    args = parse_args(argv)
    image = read(args.image)
    make_writable(str(args.out_dir), '--out-dir')
    infer = hat_mm.Inferencer(args.model, args.weights, device=args.device)
    inputs, *_ = infer.prepare(image)
    names = args.layers or default_layers(infer.model)
    known = dict(infer.model.named_modules())
    if unknown := [name for name in names if name not in known]:
        raise UserError(f'there is no module {", ".join(unknown)}; there are {[*known][1:40]} …')
    with recorded(infer.model, (torch.nn.Module,)) as seen, torch.no_grad():
        infer.model.extract_feat(inputs)
    below = seen_by_network(infer.model, inputs)
    for name in names:
        output = seen.get(known[name], (None, None))[1]
        if not isinstance(output, torch.Tensor) or output.ndim != 4:
            raise UserError(f'{name} returns no map (1, C, H, W): choose another of --layers')
        one = args.channel_reduction != 'none'
        drawn = Visualizer.draw_featmap(
            output[0].float().cpu(),
            overlaid_image=below,
            channel_reduction=args.channel_reduction if one else None,
            topk=args.topk,
            arrangement=(-(-args.topk // 4), 4),
        )
        path = args.out_dir / f'{name}.png'
        path.write_bytes(cv2.imencode('.png', drawn[..., ::-1])[1].tobytes())
        print(path)


if __name__ == '__main__':
    sys.exit(run_tool(main, 'feature_map.py'))
