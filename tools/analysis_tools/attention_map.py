"""Shows what a pixel or a box of a picture looks at: tokens and carriers, block by block.

For each stage a picture: the rollout through the stage, which is how much of each place has reached
this one, and for each block the tokens of its windows and the carriers (of HAT-Net: the averages)
that it attends to, as the mean over heads.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

import hat_mm
from hat_mm.engine.cli import UserError, make_writable, run_tool
from hat_mm.engine.overlays import AttentionMaps, Panel, overlay
from hat_mm_runtime.images import read


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('image', help='picture')
    parser.add_argument('model', help='name of hat_mm.list_models() or config')
    parser.add_argument('weights', nargs='?', help='checkpoint (default: the published one)')
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument('--point', nargs=2, type=float, metavar=('X', 'Y'), help='in pixels')
    where.add_argument('--box', nargs=4, type=float, metavar=('X1', 'Y1', 'X2', 'Y2'))
    parser.add_argument('--stages', nargs='+', metavar='NAME', help='(default: all)')
    parser.add_argument('--out-dir', type=Path, default=Path('outputs/attention'))
    parser.add_argument('--device')
    return parser.parse_args(argv)


def draw(image: np.ndarray, box: list[float], name: str, rows: list[Panel], path: Path) -> None:
    """Writes the picture of a stage."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    height, width = image.shape[:2]
    figure = Figure(figsize=(2.4 * len(rows), 0.6 + 4.8 * height / width), layout='constrained')
    axes = figure.subplots(2, len(rows), squeeze=False)
    for column, (title, *maps) in enumerate(rows):
        for axis, values, kind in zip(axes[:, column], maps, ('tokens', 'carriers'), strict=True):
            axis.set_axis_off()
            if values is None:
                continue
            axis.imshow(overlay(image, values)[..., ::-1])
            axis.set_title(title if title == 'rollout' else f'{title}, {kind}', fontsize=8)
            x1, y1, x2, y2 = box
            axis.plot((x1 + x2) / 2, (y1 + y2) / 2, '+', color='cyan')
            axis.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, color='cyan'))
    figure.suptitle(name, fontsize=9)
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> None:
    """Runs the model on the picture and draws its stages."""
    args = parse_args(argv)
    box = args.box or [*args.point, *args.point]
    image = read(args.image)
    make_writable(str(args.out_dir), '--out-dir')
    infer = hat_mm.Inferencer(args.model, args.weights, device=args.device)
    maps = AttentionMaps.of(infer, image)
    if unknown := set(args.stages or ()) - {*maps.stages}:
        known = list(maps.stages)
        raise UserError(f'there is no stage {", ".join(sorted(unknown))}; there are {known}')
    for name in maps.stages:
        if args.stages and name not in args.stages:
            continue
        path = args.out_dir / f'{Path(args.image).stem}_{name}.png'
        draw(image, box, name, maps.panels(name, box), path)
        print(path)


if __name__ == '__main__':
    sys.exit(run_tool(main, 'attention_map.py'))
