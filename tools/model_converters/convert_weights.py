"""Converts an official checkpoint into a file of hat_mm, or back.

The result is a backbone, for init_cfg of any model, or with --head a classifier of mmpretrain. Its
metadata record its origin. Nothing in the source is executed, and DST is written whole or not at
all.
"""

import argparse
import os
import sys
from pathlib import Path

from hat_mm.engine.cli import UserError, run_tool
from hat_mm.weights import fileio
from hat_mm.weights.addresses import shown
from hat_mm.weights.convert import Source, from_official, to_official
from hat_mm.weights.download import fetch
from hat_mm.weights.official import official_file


def parse_args() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('src', help='file or address (https)')
    parser.add_argument(
        'dst', help=f'file to write; its end is the format: {", ".join(fileio.SUFFIXES)}'
    )
    parser.add_argument('--head', action='store_true', help='make a classifier of mmpretrain')
    parser.add_argument(
        '--ema', action='store_true', help='take the average of the weights that the file holds'
    )
    parser.add_argument(
        '--to-official', action='store_true', help='the way back: from a file of hat_mm'
    )
    parser.add_argument('--force', action='store_true', help='overwrite DST')
    args = parser.parse_args()
    if args.to_official and (args.head or args.ema):
        parser.error(
            '--head and --ema are for official files; --to-official converts what is there'
        )
    return args


def open_source(src: str, native: bool) -> tuple[Path, Source]:
    """Fetches the source if necessary; returns the local file and its origin.

    Args:
        src: Path or URL.
        native: Whether it is a file of hat_mm, which may have the name of an official one.
    """
    is_address = '://' in src
    path = fetch(src) if is_address else Path(os.path.expanduser(src))
    official = None if native else official_file(src if is_address else path.name)
    sha256 = fileio.sha256(path)
    if official is not None and official.sha256 not in (None, sha256):
        raise UserError(
            f'{path} is not the file that its authors publish: its sha256 is {sha256}, theirs '
            f'{official.sha256}'
        )
    return path, Source(path.name, sha256, shown(src) if is_address else None, official)


def main() -> None:
    """Converts and reports."""
    args = parse_args()
    try:
        dst = fileio.check_target(args.dst, args.force)
        path, source = open_source(args.src, args.to_official)
        if path.resolve() == dst.resolve():
            raise UserError(f'{dst} cannot be both source and target')
        checkpoint = fileio.read(path)
        if not isinstance(checkpoint, dict):
            raise UserError(f'{path} holds no weights, but {type(checkpoint).__name__}')
        if args.to_official:
            made = to_official(checkpoint, source)
        else:
            made = from_official(checkpoint, source, args.head, args.ema)
        fileio.write(dst, made, args.force)
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error
    meta = made['meta']
    print(f'{meta["family"]} {" or ".join(meta["arch"])}: {meta["report"]}')
    for key, value in meta['source'].items():
        said = '; '.join(f'{k} {v}' for k, v in value.items()) if isinstance(value, dict) else value
        print(f'source {key}: {said}')
    print(f'{dst}: sha256 {fileio.sha256(dst)}')


if __name__ == '__main__':
    sys.exit(run_tool(main, 'convert_weights.py'))
