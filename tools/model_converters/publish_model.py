"""Publishes a training checkpoint: a file with only its weights and plain metadata.

Optimizer, schedules and message hub are left out; averaged weights (EMAHook) are preferred. The
name ends with the first eight digits of the sha256, as in OpenMMLab.
"""

import argparse
import sys

from hat_mm.engine.cli import UserError, run_tool
from hat_mm.weights.fileio import SUFFIXES
from hat_mm.zoo.publish import publish


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('in_file', help='checkpoint of a training; it is not changed')
    parser.add_argument(
        'out_file',
        help='name without the hash: model.pth becomes model-1a2b3c4d.pth; its end is the format: '
        + ', '.join(SUFFIXES),
    )
    parser.add_argument(
        '--no-ema',
        action='store_true',
        help='publish the weights that are not averaged, of a training with EMAHook',
    )
    parser.add_argument('--force', action='store_true', help='overwrite another file of that name')
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Publishes and reports."""
    args = parse_args(argv)
    try:
        done = publish(args.in_file, args.out_file, averaged=not args.no_ema, force=args.force)
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error
    print(f'file: {done.path}')
    print(f'size: {done.path.stat().st_size / 2**20:.1f} MiB, {done.tensors} tensors')
    print(f'weights: {done.weights}')
    print(f'left out: {", ".join(done.dropped) or "nothing"}')
    print(f'sha256: {done.sha256}')


if __name__ == '__main__':
    sys.exit(run_tool(main, 'publish_model.py'))
