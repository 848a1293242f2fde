"""Makes a dataset of tree crowns seen from the air, in COCO's format.

The pictures are in the wheel of DeepForest 2.1.0 (MIT licence, DATA.md). A large one is for
training, cut into overlapping tiles; another one of the same region is for validation, whole; one
of another region is for the test.
"""

import argparse
import shutil
import sys
import zipfile
from pathlib import Path

from packaged import Wheel, add_arguments, check_arguments, fetch, is_made, new_folder, print_counts

from hat_mm import compat
from hat_mm.engine.cli import run_tool

WHEEL = Wheel(
    name='deepforest-2.1.0-py3-none-any.whl',
    requirement='deepforest==2.1.0',
    sha256='8c2798d8e9be7f0004b194fe207b76c1d9fff6e711b3db67b9508dcd5d00ae54',
)
PICTURES = {
    'whole': '2019_YELL_2_528000_4978000_image_crop2',
    'val': '2019_YELL_2_541000_4977000_image_crop',
    'test': 'OSBS_029',
}
"""A picture for each split; that of training is kept whole beside its tiles."""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, out='data/trees', tile=512)
    args = parser.parse_args(argv)
    check_arguments(parser, args)
    return args


def convert(wheel: Path, folder: Path, tile: int, overlap: float) -> None:
    """Writes pictures and annotations of all splits to a folder."""
    datasets = compat.require('supervision').DetectionDataset
    with zipfile.ZipFile(wheel) as archive:
        for split, name in PICTURES.items():
            source = folder / 'source' / split
            source.mkdir(parents=True)
            for suffix in ('png', 'xml'):
                data = archive.read(f'deepforest/data/{name}.{suffix}')
                (source / f'{name}.{suffix}').write_bytes(data)
            # The annotations are in Pascal VOC's format.
            dataset = datasets.from_pascal_voc(str(source), str(source))
            dataset.as_coco(str(folder / split), str(folder / f'annotations/{split}.json'))
    shutil.rmtree(folder / 'source')
    # A box of which less than half lies in a tile is left out there.
    compat.require('sahi.slicing').slice_coco(
        str(folder / 'annotations/whole.json'),
        str(folder / 'whole'),
        'train',
        str(folder / 'train'),
        slice_height=tile,
        slice_width=tile,
        overlap_height_ratio=overlap,
        overlap_width_ratio=overlap,
        min_area_ratio=0.5,
    )
    (folder / 'train/train_coco.json').rename(folder / 'annotations/train.json')


def main(argv: list[str] | None = None) -> None:
    """Makes the dataset unless it is there, and prints what is in it."""
    args = parse_args(argv)
    parameters = {'dataset': 'trees', 'tile': args.tile, 'overlap': args.overlap}
    if not is_made(args.out, parameters):
        wheel = fetch(WHEEL, args.wheels)
        with new_folder(args.out, parameters) as folder:
            convert(wheel, folder, args.tile, args.overlap)
    print_counts(args.out)


if __name__ == '__main__':
    sys.exit(run_tool(main, 'trees.py'))
