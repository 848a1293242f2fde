"""Draws the toy set "shapes" in one of three layouts, unless it is there already."""

from __future__ import annotations

import argparse
import sys
import time

from shapes import LAYOUTS, RELATION_SET, make_dataset


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        '--layout',
        choices=LAYOUTS,
        default='instances',
        help="instances in COCO's files (the default), semantic label maps in ADE20K's, or one "
        'object an image in a folder for each of the classes',
    )
    folders = ', '.join(layout.folder for layout in LAYOUTS.values())
    parser.add_argument(
        '--out',
        help=f'folder of the set (default, by layout: {folders}; -hard is added with --hard; '
        f'{RELATION_SET.folder} with --relation)',
    )
    for option, name, what in (
        ('--num-train', 'num_train', 'training'),
        ('--num-val', 'num_val', 'validation'),
    ):
        counts = ', '.join(str(getattr(layout, name)) for layout in LAYOUTS.values())
        parser.add_argument(
            option,
            type=int,
            help=f'{what} images (default, by layout: {counts}; '
            f'{getattr(RELATION_SET, name)} with --relation)',
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
        '--relation',
        action='store_true',
        help='small shapes whose class depends on a marker far away in the image, too; instances '
        'only, and not with --hard',
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
    layout = RELATION_SET if args.relation else LAYOUTS[args.layout]
    out = args.out or layout.folder + ('-hard' if args.hard else '')
    num_train = layout.num_train if args.num_train is None else args.num_train
    num_val = layout.num_val if args.num_val is None else args.num_val
    start = time.perf_counter()
    try:
        drawn = make_dataset(
            out,
            layout=args.layout,
            num_train=num_train,
            num_val=num_val,
            seed=args.seed,
            hard=args.hard,
            relation=args.relation,
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
    print(f'{out}: {num_train} train and {num_val} val images, {took}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
