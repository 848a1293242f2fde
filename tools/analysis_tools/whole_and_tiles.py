"""Tests a detector on whole pictures and on tiles of them: accuracy, time, memory.

Both ways run in a process of their own on the CPU, over the pictures of the config's
test_dataloader, at its scale, through SAHI, which rounds boxes to whole pixels. Writes the
detections in COCO's format, a table and precision-recall curves.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from coco_scores import score
from pr_curve import plot
from tabulate import tabulate

from hat_mm import compat
from hat_mm.configs import innermost_dataset
from hat_mm.engine.cli import UserError, add_cfg_options, read_config, run_tool

WAYS = ('whole', 'tiles')


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='config of a detector')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('--out', type=Path, required=True, metavar='FOLDER')
    parser.add_argument('--tile', type=int, default=512, help='side of a tile in pixels')
    parser.add_argument(
        '--overlap',
        type=float,
        default=0.25,
        help='shared part of neighbouring tiles; it should hold the largest object (default: 0.25)',
    )
    parser.add_argument('--only', choices=WAYS, help=argparse.SUPPRESS)
    add_cfg_options(parser)
    args = parser.parse_args(argv)
    if args.tile < 32 or not 0 <= args.overlap < 1:
        parser.error('--tile must be at least 32, --overlap from 0 to below 1')
    return args


def detect(args: argparse.Namespace, cfg: object, way: str) -> None:
    """Detects objects in all pictures and writes what was found and what it took."""
    from sahi import AutoDetectionModel
    from sahi.predict import get_prediction, get_sliced_prediction

    dataset = innermost_dataset(cfg.test_dataloader)
    root = Path(dataset.get('data_root') or '')
    coco = json.loads((root / dataset.ann_file).read_text(encoding='utf-8'))
    classes = dataset.get('metainfo', {}).get('classes', [c['name'] for c in coco['categories']])
    # As mmdet numbers them: in the order of the file.
    ids = [c['id'] for c in coco['categories'] if c['name'] in classes]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, 'config.py')
        cfg.dump(path)
        model = AutoDetectionModel.from_pretrained(
            model_type='mmdet',
            config_path=str(path),
            model_path=args.checkpoint,
            confidence_threshold=0.01,
            device='cpu',
        )
    found, seconds = [], 0.0
    for picture in coco['images']:
        file = str(root / dataset.data_prefix.img / picture['file_name'])
        start = time.perf_counter()
        if way == 'whole':
            result = get_prediction(file, model)
        else:
            result = get_sliced_prediction(
                file,
                model,
                slice_height=args.tile,
                slice_width=args.tile,
                overlap_height_ratio=args.overlap,
                overlap_width_ratio=args.overlap,
                perform_standard_pred=False,
                postprocess_type='NMS',
                postprocess_match_metric='IOU',
                verbose=0,
            )
        seconds += time.perf_counter() - start
        for one in result.to_coco_predictions(image_id=picture['id']):
            found.append({**one, 'category_id': ids[one['category_id']]})
    measured = {
        'seconds': seconds / len(coco['images']),
        'memory': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        'detections': found,
    }
    (args.out / f'{way}.json').write_text(json.dumps(measured), encoding='utf-8')


def main(argv: list[str] | None = None) -> None:
    """Runs both ways and compares them."""
    args = parse_args(argv)
    cfg = read_config(args.config, args.cfg_options)
    if cfg.get('default_scope') != 'mmdet':
        raise UserError(f'{args.config} is no config of mmdet')
    compat.require('sahi')
    if not Path(args.checkpoint).is_file():
        raise UserError(f'there is no checkpoint {args.checkpoint}')
    args.out.mkdir(parents=True, exist_ok=True)
    if args.only:
        detect(args, cfg, args.only)
        return
    dataset = innermost_dataset(cfg.test_dataloader)
    annotations = Path(dataset.get('data_root') or '', dataset.ann_file)
    rows, curves = [], {}
    for way in WAYS:
        command = [sys.executable, __file__, *(argv or sys.argv[1:]), '--only', way]
        if subprocess.run(command, check=False).returncode:
            raise UserError(f'detection on {way} failed; the cause stands above')
        measured = json.loads((args.out / f'{way}.json').read_text(encoding='utf-8'))
        scores = curves[way] = score(annotations, measured['detections'])
        rows.append(
            (
                way,
                scores.ap50,
                scores.ap75,
                scores.ap,
                measured['seconds'],
                measured['memory'] / 2**30,
            )
        )
    headers = ('', 'AP50', 'AP75', 'AP', 's / picture', 'GiB of the process')
    table = tabulate(rows, headers=headers, floatfmt=('', '.3f', '.3f', '.3f', '.1f', '.2f'))
    print(table)
    plot(curves, args.out / 'precision_recall.png')
    print(f'curves: {args.out / "precision_recall.png"}')


if __name__ == '__main__':
    sys.exit(run_tool(main, 'whole_and_tiles.py'))
