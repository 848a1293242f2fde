"""Shows what a pixel or a box of a picture looks at: tokens and carriers, block by block.

For each stage a picture: the rollout through the stage, which is how much of each place has reached
this one, and for each block the tokens of its windows and the carriers (of HAT-Net: the averages)
that it attends to, as the mean over heads.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

import hat_mm
from hat_mm.engine.attention import StageAttention, trace_attention
from hat_mm.engine.cli import UserError, make_writable, run_tool
from hat_mm.engine.overlays import overlay, stride_of, to_cells, to_picture
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


def choose(stage: StageAttention, box: list[float], *, matrix: np.ndarray, stride: int) -> Any:
    """The tokens (H, W) of a stage whose centres lie in a box of the picture, at least one.

    Raises:
        UserError: The box is outside of what the network sees.
    """
    height, width = stage.map_size
    (x1, y1), (x2, y2) = to_cells(np.reshape(box, (2, 2)), matrix=matrix, stride=stride)
    if x2 < 0 or y2 < 0 or x1 >= width or y1 >= height or x2 < x1 or y2 < y1:
        raise UserError(f'{box} is no place in the picture that the network sees')
    cols, rows = np.arange(width) + 0.5, np.arange(height) + 0.5
    tokens = ((rows >= y1) & (rows <= y2))[:, None] & ((cols >= x1) & (cols <= x2))
    middle = [
        int(np.clip((a + b) / 2, 0, n - 1)) for a, b, n in ((y1, y2, height), (x1, x2, width))
    ]
    tokens[middle[0], middle[1]] = True
    return torch.from_numpy(tokens)


def panels(
    stage: StageAttention, tokens: torch.Tensor, spread: Any, spread_grid: Any
) -> list[tuple[str, np.ndarray, np.ndarray | None]]:
    """Name, tokens and carriers of the rollout and of each block; None where there are none."""
    found = [('rollout', spread(stage.rollout(tokens)), None)]
    for i, block in enumerate(stage.blocks):
        near, far = stage.look(block, tokens)
        found.append((f'block {i}', spread(near), None if far is None else spread_grid(far)))
    return found


def draw(image: np.ndarray, box: list[float], name: str, rows: list, path: Path) -> None:
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
    inputs, _, matrix = infer.prepare(image)
    stages = trace_attention(infer.model, lambda: infer.model.extract_feat(inputs))
    names = [stage.name for stage in stages]
    if unknown := set(args.stages or ()) - set(names):
        raise UserError(f'there is no stage {", ".join(sorted(unknown))}; there are {names}')
    for stage in stages:
        if args.stages and stage.name not in args.stages:
            continue
        stride = stride_of(inputs.shape[-1], stage.map_size[1])
        tokens = choose(stage, box, matrix=matrix, stride=stride).to(inputs.device)

        def spread(values: torch.Tensor, stride: float = stride) -> np.ndarray:
            size = image.shape[:2]
            return to_picture(values.cpu().numpy(), matrix=matrix, stride=stride, size=size)

        def spread_grid(values: torch.Tensor, stride: float = stride * stage.cell_size) -> Any:
            return spread(values, stride)

        path = args.out_dir / f'{stage.name}.png'
        draw(image, box, stage.name, panels(stage, tokens, spread, spread_grid), path)
        print(path)


if __name__ == '__main__':
    sys.exit(run_tool(main, 'attention_map.py'))
