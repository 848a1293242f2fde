"""Draws the toy instance set "shapes" in COCO's layout, unless it is there already."""

from __future__ import annotations

import argparse
import sys
import time

from hat_mm.toy import make_instances


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        '--out', help='folder of the set (default: data/shapes, with --hard data/shapes-hard)'
    )
    parser.add_argument(
        '--num-train', type=int, default=256, help='training images (default: %(default)s)'
    )
    parser.add_argument(
        '--num-val', type=int, default=48, help='validation images (default: %(default)s)'
    )
    parser.add_argument(
        '--seed', type=int, default=0, help='seed; the same one gives the same bytes'
    )
    parser.add_argument(
        '--hard',
        action='store_true',
        help='six rotated classes in heavy clutter instead of three in light',
    )
    parser.add_argument(
        '--force', action='store_true', help='replace a toy set drawn with other options'
    )
    return parser.parse_args(argv)


def show_progress(split: str, done: int, total: int) -> None:
    """Prints how far a split is: in place on a terminal, else a line every 64 images."""
    if sys.stdout.isatty():
        print(f'\rdrawing {split}: {done}/{total}', end='\n' if done == total else '', flush=True)
    elif done % 64 == 0 or done == total:
        print(f'drawing {split}: {done}/{total}', flush=True)


def main(argv: list[str] | None = None) -> int:
    """Draws the set; returns the exit status."""
    args = parse_args(argv)
    out = args.out or ('data/shapes-hard' if args.hard else 'data/shapes')
    start = time.perf_counter()
    try:
        drawn = make_instances(
            out,
            num_train=args.num_train,
            num_val=args.num_val,
            seed=args.seed,
            hard=args.hard,
            force=args.force,
            progress=show_progress,
        )
    except (ValueError, OSError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print('\ninterrupted: nothing was left behind', file=sys.stderr)
        return 130
    took = f'drawn in {time.perf_counter() - start:.1f} s' if drawn else 'already there'
    print(f'{out}: {args.num_train} train and {args.num_val} val images, {took}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
