"""Writes a model as an ONNX or OpenVINO file for any image size, and compares it with PyTorch."""

import argparse
import re
import sys

from hat_mm.engine.cli import add_cfg_options, read_config, run_tool
from hat_mm.engine.export import OPSET, PRECISIONS, export


def size(text: str) -> tuple[int, int]:
    """Reads ``HEIGHTxWIDTH``."""
    match = re.fullmatch(r'(\d+)x(\d+)', text)
    if match is None:
        raise argparse.ArgumentTypeError(f'expected HEIGHTxWIDTH, got {text!r}')
    return int(match[1]), int(match[2])


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        'config', help='config file, or a backbone alone, such as hat_mm.FasterViT:arch=0'
    )
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('out', help='file to write: .onnx, or .xml for OpenVINO')
    parser.add_argument(
        '--precision',
        choices=PRECISIONS,
        default='fp32',
        help='fp16: stored so; bf16: computed so, with OpenVINO; int8: quantized',
    )
    parser.add_argument(
        '--calibration',
        default='dataset',
        metavar='FOLDER',
        help="pictures for int8 (default: 'dataset', the config's training images)",
    )
    parser.add_argument('--samples', type=int, default=64, help='number of them')
    parser.add_argument(
        '--static', type=size, metavar='HxW', help='take only one image of this size at a time'
    )
    parser.add_argument('--opset', type=int, default=OPSET, help='version of the ONNX operators')
    parser.add_argument(
        '--scores',
        action='store_true',
        help='segmentors: the scores of all classes instead of the best class',
    )
    parser.add_argument(
        '--paste-masks',
        action='store_true',
        help='detectors with masks: masks of the size of the image instead of their boxes',
    )
    parser.add_argument('--no-check', action='store_true', help='do not compare with PyTorch')
    parser.add_argument(
        '--images', nargs='+', default=[], help='pictures for the comparison (default: a portrait)'
    )
    add_cfg_options(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Exports and reports."""
    args = parse_args(argv)
    model = args.config
    if args.cfg_options:
        model = read_config(model, args.cfg_options)
    path = export(
        model,
        args.checkpoint,
        args.out,
        precision=args.precision,
        calibration=args.calibration,
        samples=args.samples,
        static=args.static,
        opset=args.opset,
        scores=args.scores,
        paste_masks=args.paste_masks,
        check=not args.no_check,
        images=args.images,
    )
    weights = (
        path.with_suffix('.bin') if path.suffix == '.xml' else path.with_name(f'{path.name}.data')
    )
    written = sum(part.stat().st_size for part in (path, weights) if part.exists())
    print(f'{path}: {written / 2**20:.1f} MiB')


if __name__ == '__main__':
    sys.exit(run_tool(main, 'export.py'))
