"""Draws precision against recall at IoU 0.5, from detections in COCO's format.

``tools/test.py … --cfg-options test_evaluator.outfile_prefix=work_dirs/found`` writes such files:
``work_dirs/found.bbox.json`` and ``work_dirs/found.segm.json``.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from coco_scores import Scores, score

from hat_mm.engine.cli import UserError, run_tool


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('annotations', type=Path, help="JSON file in COCO's format")
    parser.add_argument('detections', type=Path, nargs='+', help='JSON files, a curve for each')
    parser.add_argument('--kind', choices=['bbox', 'segm'], default='bbox', help='what is scored')
    parser.add_argument('--out', type=Path, default=Path('pr_curve.png'))
    return parser.parse_args(argv)


def plot(curves: dict[str, Scores], path: Path) -> None:
    """Draws precision against recall, a curve for each name."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 4), layout='constrained')
    axis = figure.subplots()
    for name, scores in curves.items():
        recall = [i / 100 for i in range(101)]
        axis.plot(recall, scores.precision, label=f'{name}, AP50 {scores.ap50:.3f}')
    axis.set(xlabel='recall', ylabel='precision at IoU 0.5', xlim=(0, 1), ylim=(0, 1.02))
    axis.legend()
    figure.savefig(path, dpi=100)


def main(argv: list[str] | None = None) -> None:
    """Scores the files, prints their AP and draws the curves."""
    args = parse_args(argv)
    curves = {}
    for path in (args.annotations, *args.detections):
        if not path.is_file():
            raise UserError(f'there is no file {path}')
    for path in args.detections:
        try:
            found = json.loads(path.read_text(encoding='utf-8'))
        except ValueError as error:
            raise UserError(f'{path} is no JSON: {error}') from error
        if not isinstance(found, list):
            raise UserError(f"{path} is no list of detections in COCO's format")
        curves[str(path)] = scores = score(args.annotations, found, args.kind)
        print(f'{path}: AP {scores.ap:.3f}, AP50 {scores.ap50:.3f}, AP75 {scores.ap75:.3f}')
    args.out.parent.mkdir(parents=True, exist_ok=True)
    plot(curves, args.out)
    print(args.out)


if __name__ == '__main__':
    sys.exit(run_tool(main, 'pr_curve.py'))
